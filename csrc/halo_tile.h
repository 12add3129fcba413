// Tiles of channels-last maps in shared memory: 64 bytes of channels (32 of 16 bits, 16 of 32) for each pixel and its halo.
//
// Bytes and banks: a pixel takes 80 bytes, 16 of them unused, so that the 16-byte rows of eight adjacent pixels, which
// ldmatrix reads at once, lie in eight different groups of banks, and a tap is a constant added to the address. If a
// warp's pixels are two columns apart (one phase of an up-sampled map, or a stride of two), the tile stores the even
// columns first and the odd ones after them (SPLIT), which makes the pixels adjacent again.
// Weights are rows (tap, channel) of CO values without padding; their 16-byte pieces are permuted by the row instead,
// which costs nothing, as every lane reads rows of the same residue.
//
// Padding is written by the copy (zero fill) and stays zero: norm and activation touch only pixels inside the map.
#pragma once

#include "hardware.h"
#include "kernels.h"

constexpr int PIXEL_BYTES = 64, PITCH = 80;

template <typename T>
struct Format {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  static constexpr int VECTOR = 16 / sizeof(T);          // values in 16 bytes
  static constexpr int CHUNK = PIXEL_BYTES / sizeof(T);  // channels of a tile
  static constexpr int STEP = 32 / sizeof(T);            // channels of one matrix product
  static constexpr bool TF32 = sizeof(T) == 4;
};

// Rows of WIDTH values in shared memory. Their 16-byte pieces are permuted by the number of the row: eight rows at a piece,
// which ldmatrix reads at once, lie in all banks, and so do the single words that lanes read of 32-bit weights.
template <typename T, int WIDTH>
struct Rows {
  static constexpr int BYTES = WIDTH * sizeof(T), PIECES = BYTES / 16;
  static_assert(PIECES == 4 || PIECES == 8 || PIECES == 16);

  HW_FUNCTION static constexpr int permuted(int row, int piece) {
    return piece ^ (PIECES == 4 ? row / 2 % 4 : sizeof(T) == 4 ? row % 4 * 2 : row % 8);
  }
  HW_FUNCTION static constexpr uint32_t at(int row, int piece) { return row * BYTES + permuted(row, piece) * 16; }
};

template <typename T, int ROWS_, int COLUMNS_, bool SPLIT>
struct Tile {
  using Type = T;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, BYTES = ROWS * COLUMNS * PITCH;
  static_assert(!SPLIT || COLUMNS % 2 == 0);

  HW_FUNCTION static constexpr int column(int x) { return SPLIT ? x % 2 * (COLUMNS / 2) + x / 2 : x; }
  HW_FUNCTION static constexpr uint32_t at(int row, int x) { return (row * COLUMNS + column(x)) * PITCH; }
};

// Up to VECTOR values from memory that is aligned to one value only; zeros after them.
template <typename T>
HW_FUNCTION hw::Vec load_values(const char* from, int count) {
  hw::Vec vec{};
  HW_UNROLL
  for (int k = 0; k < Format<T>::VECTOR; ++k) {
    if (k >= count) continue;
    if constexpr (sizeof(T) == 2)
      vec.word[k / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[k]} << 16 * (k % 2);
    else
      vec.word[k] = reinterpret_cast<const uint32_t*>(from)[k];
  }
  return vec;
}

// As many values at 16 bytes' alignment (`vector`), or at that of one value.
template <typename T>
HW_FUNCTION hw::Vec load_piece(const char* from, int count, bool vector) {
  if (!vector) return load_values<T>(from, count);
  return count ? *reinterpret_cast<const hw::Vec*>(from) : hw::Vec{};
}

HW_FUNCTION int clamp(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// ReLU for a slope of 0, of minus infinity too: its product with 0 would be NaN.
HW_FUNCTION float activate(float x, float slope) { return x < 0 ? (slope == 0 ? 0.0f : x * slope) : x; }

// Starts to copy 64 bytes of channels from k on, of the pixels of a plane from (row, column) on, to `offset`.
template <typename TILE, int THREADS>
HW_FUNCTION void load_tile(uint32_t offset, const Map& map, int image, int plane, int row, int column, int k) {
  using T = typename TILE::Type;
  static_assert(THREADS % 4 == 0, "a thread keeps its channels");
  const int first = k + hw::thread() % 4 * Format<T>::VECTOR;
  const bool exists = plane >= 0 && plane < map.depth;
  const int count = exists ? clamp(map.channels - first + hw::fault(hw::Fault::tail), 0, Format<T>::VECTOR) : 0;
  const int64_t start = static_cast<int64_t>(plane) * map.height * map.width * map.pixel_stride + first;
  const char* from = map.data + (image * map.image_stride + start) * static_cast<int64_t>(sizeof(T));
  HW_NO_UNROLL
  for (int item = hw::thread() / 4; item < TILE::ROWS * TILE::COLUMNS; item += THREADS / 4) {
    const int tile_y = item / TILE::COLUMNS, tile_x = item % TILE::COLUMNS;
    const int y = row + tile_y, x = column + tile_x + hw::fault(hw::Fault::halo);
    const int height = map.height + hw::fault(hw::Fault::bounds);
    const bool inside = y >= 0 && y < height && x >= 0 && x < map.width && count > 0;
    const uint32_t to = offset + TILE::at(tile_y, tile_x) + hw::thread() % 4 * 16;
    const int64_t pixel = (static_cast<int64_t>(y) * map.width + x) * map.pixel_stride * static_cast<int64_t>(sizeof(T));
    if (map.vector)
      hw::copy_async(to, inside ? from + pixel : map.data, inside ? count * sizeof(T) : 0);
    else
      hw::store_shared(to, inside ? load_values<T>(from + pixel, count) : hw::Vec{});
  }
}

// Norm and activation of what this thread copied, after its copies have arrived; rounds float32 to TF32.
template <typename TILE, int THREADS>
HW_FUNCTION void transform_tile(uint32_t offset, const Map& map, int image, int plane, int row, int column, int k,
                                float slope) {
  using T = typename TILE::Type;
  constexpr int VECTOR = Format<T>::VECTOR;
  if ((!map.scale && !Format<T>::TF32) || plane < 0 || plane >= map.depth) return;
  const int first = k + hw::thread() % 4 * VECTOR;
  float scale[VECTOR], shift[VECTOR];
  HW_UNROLL
  for (int v = 0; v < VECTOR; ++v) {
    const bool used = map.scale && first + v < map.channels;
    scale[v] = used ? map.scale[image * map.affine_stride + first + v] : 0.0f;
    shift[v] = used ? map.shift[image * map.affine_stride + first + v] : 0.0f;
  }
  HW_NO_UNROLL
  for (int item = hw::thread() / 4; item < TILE::ROWS * TILE::COLUMNS; item += THREADS / 4) {
    const int tile_y = item / TILE::COLUMNS, tile_x = item % TILE::COLUMNS;
    const int y = row + tile_y, x = column + tile_x;
    const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
    if (!inside && !hw::fault(hw::Fault::mask)) continue;
    const uint32_t at = offset + TILE::at(tile_y, tile_x) + hw::thread() % 4 * 16;
    hw::Vec vec = hw::load_shared<hw::Vec>(at);
    HW_UNROLL
    for (int w = 0; w < 4; ++w) {
      if constexpr (Format<T>::TF32) {
        const float value = hw::as_float(vec.word[w]);
        vec.word[w] = hw::tf32(map.scale ? activate(value * scale[w] + shift[w], slope) : value);
      } else {
        const hw::Pair pair = hw::unpack<T>(vec.word[w]);
        vec.word[w] = hw::pack<T>(activate(pair.first * scale[2 * w] + shift[2 * w], slope),
                                  activate(pair.second * scale[2 * w + 1] + shift[2 * w + 1], slope));
      }
    }
    hw::store_shared(at, vec);
  }
}

// Starts to copy channels k.. and columns co.. of TAPS taps from first_tap on, each next four `group` later (4 if they are
// contiguous); zeros past K and CO. `vector`: rows start at multiples of 16 bytes.
template <typename T, int CO_TILE, int TAPS, int THREADS>
HW_FUNCTION void load_weights(uint32_t offset, const char* weights, int channels, int columns, int k, int co, int first_tap,
                              int group, bool vector) {
  using W = Rows<T, CO_TILE>;
  constexpr int CHUNK = Format<T>::CHUNK, VECTOR = Format<T>::VECTOR;
  static_assert(THREADS % W::PIECES == 0);
  const int piece = hw::thread() % W::PIECES, first = co + piece * VECTOR;
  HW_NO_UNROLL
  for (int row = hw::thread() / W::PIECES; row < TAPS * CHUNK; row += THREADS / W::PIECES) {
    const int tap = first_tap + row / CHUNK / 4 * group + row / CHUNK % 4, channel = k + row % CHUNK;
    const int count = channel < channels ? clamp(columns - first, 0, VECTOR) : 0;
    const int64_t place = (static_cast<int64_t>(tap) * channels + channel) * columns + first;
    const char* from = count ? weights + place * static_cast<int64_t>(sizeof(T)) : weights;
    const uint32_t to = offset + W::at(row, piece);
    if (vector)
      hw::copy_async(to, from, count * sizeof(T));
    else
      hw::store_shared(to, load_values<T>(from, count));
  }
}

HW_FUNCTION int lane() { return hw::thread() % 32; }

// 16 adjacent pixels and one step of channels, as the first factor of a product.
template <typename T>
HW_FUNCTION void load_pixels(hw::Word (&a)[4], uint32_t offset) {
  hw::load_matrices(a, offset + lane() % 16 * PITCH + lane() / 16 * 16);
}

// One step of channels (rows from `row` on) and 32 columns (from piece 4, of 32 bits 8, times `part` on) as second factors.
template <typename T, int CO_TILE>
HW_FUNCTION void load_columns(hw::Word (&b)[4][2], uint32_t offset, int row, int part) {
  using W = Rows<T, CO_TILE>;
  if constexpr (Format<T>::TF32) {
    const int group = lane() / 4, quad = lane() % 4;
    HW_UNROLL
    for (int n = 0; n < 4; ++n)
      HW_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = quad + 4 * half;
        const uint32_t at = row * W::BYTES + W::at(r, part * 8 + n * 2 + group / 4) + group % 4 * 4;
        b[n][half] = hw::tf32(hw::load_shared<float>(offset + at));
      }
  } else {
    HW_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      hw::Word r[4];
      const int piece = part * 4 + pair * 2 + lane() / 16;
      hw::load_matrices_transposed(r, offset + row * W::BYTES + W::at(lane() % 16, piece));
      b[2 * pair][0] = r[0], b[2 * pair][1] = r[1];
      b[2 * pair + 1][0] = r[2], b[2 * pair + 1][1] = r[3];
    }
  }
}
