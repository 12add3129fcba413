// Tiles of channels-last maps in shared memory: 64 bytes of channels (32 of 16 bits, 16 of 32) for each pixel and its halo.
//
// Banks: the four 16-byte pieces of a pixel are permuted by its place in its row, so that the same piece of eight adjacent
// pixels, which ldmatrix reads at once, lies in all banks, and so do two pixels that eight lanes copy. Rows begin at
// multiples of 128 bytes: a row is a constant added to the address. If a warp's pixels are two columns apart (one phase of
// an up-sampled map, or a stride of two), the tile stores the even columns first and the odd ones after them (SPLIT), which
// makes the pixels adjacent again; they begin at an odd place, so that neighbours still lie in different banks. Weights are
// rows (tap, channel) of CO values, permuted alike.
//
// A thread copies the same pieces of every tile: one column's every few rows, so that its next piece is a constant further
// in shared memory and a product away in the map. Padding is written by the copy (zero fill) and stays zero: norm and
// activation touch only pixels inside the map.
#pragma once

#include "hardware.h"
#include "kernels.h"

constexpr int PIXEL_BYTES = 64;

template <typename T>
struct Format {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  static constexpr int VECTOR = 16 / sizeof(T);          // values in 16 bytes
  static constexpr int CHUNK = PIXEL_BYTES / sizeof(T);  // channels of a tile
  static constexpr int STEP = 32 / sizeof(T);            // channels of one matrix product
  static constexpr bool TF32 = sizeof(T) == 4;
};

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// Rows of WIDTH values in shared memory. Their 16-byte pieces are permuted by the number of the row: the same piece of eight
// rows lies in all banks, and so do the single words that lanes read of 32-bit weights.
template <typename T, int WIDTH>
struct Rows {
  static constexpr int BYTES = WIDTH * sizeof(T), PIECES = BYTES / 16;
  static_assert(PIECES == 4 || PIECES == 8 || PIECES == 16);

  HW_FUNCTION static constexpr int permuted(int row, int piece) {
    return piece ^ (PIECES == 4 ? row / 2 % 4 : sizeof(T) == 4 ? row % 4 * 2 : row % 8);
  }
  HW_FUNCTION static constexpr uint32_t at(int row, int piece) { return row * BYTES + permuted(row, piece) * 16; }
  // Of four pieces, the address of the third from that of the first, of the fourth from that of the second, and back.
  HW_FUNCTION static constexpr uint32_t other(uint32_t address) { return address ^ 32; }
};

template <typename T, int ROWS_, int COLUMNS_, bool SPLIT>
struct Tile {
  using Type = T;
  using PIXELS = Rows<T, Format<T>::CHUNK>;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, ODD = COLUMNS / 2 | 1;  // ODD: where the odd columns begin
  static constexpr int PITCH = (SPLIT ? 2 * ODD : COLUMNS) * PIXEL_BYTES, BYTES = ROWS * PITCH;
  static_assert(PITCH % 128 == 0 && COLUMNS % 2 == 0);

  HW_FUNCTION static constexpr int place(int column) { return SPLIT ? column % 2 * ODD + column / 2 : column; }
};

HW_FUNCTION int clamp(int value, int low, int high) { return value < low ? low : value > high ? high : value; }
HW_FUNCTION bool within(int place, int size) { return static_cast<unsigned>(place) < static_cast<unsigned>(size); }

// ReLU for a slope of 0, of minus infinity too: its product with 0 would be NaN.
HW_FUNCTION float activate(float x, float slope) { return x < 0 ? (slope == 0 ? 0.0f : x * slope) : x; }

// Up to VECTOR values from memory, with zeros after them: all or none at once (`vector`), or one by one.
template <typename T>
HW_FUNCTION hw::Vec load_piece(const char* from, int count, bool vector) {
  hw::Vec vec{};
  if (vector) return count ? *reinterpret_cast<const hw::Vec*>(from) : vec;
  HW_UNROLL
  for (int k = 0; k < Format<T>::VECTOR; ++k) {
    if (k >= count) continue;
    if constexpr (Format<T>::TF32)
      vec.word[k] = reinterpret_cast<const uint32_t*>(from)[k];
    else
      vec.word[k / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[k]} << 16 * (k % 2);
  }
  return vec;
}

// `left` values, at most a piece, into shared memory, zeros if not `given`; with VECTOR a piece, by hw::wait_copies.
template <typename T, bool VECTOR>
HW_FUNCTION void copy_piece(uint32_t to, const char* from, bool given, int left) {
  if constexpr (VECTOR) {
    hw::copy_async(to, from, given);
  } else {
    hw::store_shared(to, hw::Vec{});
    HW_NO_UNROLL
    for (int k = 0; k < (given ? clamp(left, 0, Format<T>::VECTOR) : 0); ++k)
      hw::store_shared(to + k * sizeof(T), reinterpret_cast<const Bits<T>*>(from)[k]);
  }
}

// COUNT values from `first` on of a row that ends at `end`, with zeros after it.
template <int COUNT>
HW_FUNCTION void load_floats(float (&to)[COUNT], const float* row, int first, int end, bool vector) {
  if (vector && first + COUNT <= end) {
    HW_UNROLL
    for (int k = 0; k < COUNT; k += 4) {
      const hw::Vec vec = *reinterpret_cast<const hw::Vec*>(row + first + k);
      HW_UNROLL
      for (int w = 0; w < 4; ++w) to[k + w] = hw::as_float(vec.word[w]);
    }
    return;
  }
  HW_UNROLL
  for (int k = 0; k < COUNT; ++k) to[k] = first + k < end ? row[first + k] : 0.0f;
}

// What a tile shows of a map: 64 bytes of channels, from k on, of the pixels of a plane from (row, column) on; of what lies
// above the map the tile's first row alone.
struct Window {
  const Map& map;
  int image, plane, row, column, k;

  HW_FUNCTION bool exists() const { return within(plane, map.depth); }
};

// The thread's pieces of a tile: every STEP-th row of a column, and of the columns that are left because all of them do not
// divide the threads, single ones. Calls of_column(column, row) for the first piece in each column, and what that returns,
// with the offset and the rows from there, for this piece and each next one.
template <typename TILE, int THREADS, typename OfColumn>
HW_FUNCTION void for_pieces(uint32_t thread, OfColumn of_column) {
  constexpr int COLUMNS = TILE::COLUMNS / 16 * 16, LEFT = TILE::COLUMNS - COLUMNS, STEP = THREADS / 4 / COLUMNS;
  static_assert(THREADS % (4 * COLUMNS) == 0 && STEP <= TILE::ROWS);
  using PIXELS = typename TILE::PIXELS;
  const int piece = thread % 4, pixel = thread / 4, x = pixel % COLUMNS, y = pixel / COLUMNS;
  const uint32_t first = PIXELS::at(TILE::place(x), piece) + y * TILE::PITCH;
  const auto each = of_column(x, y);
  HW_UNROLL
  for (int row = 0; row < TILE::ROWS; row += STEP)
    if (row + STEP <= TILE::ROWS || y < TILE::ROWS - row) each(first + row * TILE::PITCH, row);
  if constexpr (LEFT) {
    HW_UNROLL
    for (int start = 0; start < TILE::ROWS * LEFT; start += THREADS / 4) {
      const int row = (start + pixel) / LEFT, column = COLUMNS + (start + pixel) % LEFT;
      if (row < TILE::ROWS) of_column(column, row)(PIXELS::at(TILE::place(column), piece) + row * TILE::PITCH, 0);
    }
  }
}

// Starts to copy a window to `offset`.
template <typename TILE, int THREADS>
HW_FUNCTION void load_tile(uint32_t offset, const Window& window) {
  using T = typename TILE::Type;
  const Map& map = window.map;
  const uint32_t thread = hw::again(hw::thread());
  const int first = window.k + thread % 4 * Format<T>::VECTOR, left = map.channels - first + hw::fault(hw::Fault::tail);
  const int pixel_bytes = map.pixel_bytes, row_bytes = map.row_bytes;
  const char* plane = map.data + static_cast<uint32_t>(window.image) * static_cast<uint64_t>(map.image_bytes);
  int height = left > 0 ? map.height + hw::fault(hw::Fault::bounds) : 0;
  if (window.plane) {  // never in 2D
    if (window.exists())
      plane += static_cast<uint32_t>(window.plane) * static_cast<uint64_t>(map.plane_bytes);
    else
      height = 0;
  }
  const int width = map.width;
  const auto copy = [&](auto vector) {
    for_pieces<TILE, THREADS>(thread, [&](int x, int y) {
      x += window.column + hw::fault(hw::Fault::halo), y += window.row;
      const int rows = within(x, width) ? height - y : 0;  // from here to the map's end
      const bool above = y < 0;
      const char* from = hw::kept(hw::advance(hw::advance(plane + first * sizeof(T), x, pixel_bytes), y, row_bytes));
      return [=](uint32_t at, int row) {
        copy_piece<T, vector>(offset + at, hw::advance(from, row, row_bytes), row < rows && (row || !above), left);
      };
    });
  };
  if (map.vector)
    copy(std::true_type{});
  else
    copy(std::false_type{});
}

// The values of a piece after norm and activation, which is ReLU if RELU; floats are rounded to TF32.
template <typename T, bool RELU>
HW_FUNCTION hw::Vec transformed(hw::Vec vec, const float* scale, const float* shift, float slope) {
  HW_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (Format<T>::TF32) {
      vec.word[w] = hw::tf32(activate(hw::as_float(vec.word[w]) * scale[w] + shift[w], slope));
    } else {
      const hw::Pair pair = hw::unpack<T>(vec.word[w]);
      const float first = pair.first * scale[2 * w] + shift[2 * w];
      const float second = pair.second * scale[2 * w + 1] + shift[2 * w + 1];
      vec.word[w] = RELU ? hw::pack_relu<T>(first, second) : hw::pack<T>(activate(first, slope), activate(second, slope));
    }
  }
  return vec;
}

// Norm and activation of what this thread copied, after its copies have arrived. `relu`: the slope is 0.
template <typename TILE, int THREADS>
HW_FUNCTION void transform_tile(uint32_t offset, const Window& window, float slope, bool relu) {
  using T = typename TILE::Type;
  constexpr int VECTOR = Format<T>::VECTOR;
  const Map& map = window.map;
  const uint32_t thread = hw::again(hw::thread());
  const int height = map.height, width = map.width;
  const auto change = [&](auto changed) {
    for_pieces<TILE, THREADS>(thread, [&](int x, int y) {
      y += window.row;
      const int rows = within(window.column + x, width) ? height - y : 0;
      const bool above = y < 0;
      return [=](uint32_t at, int row) {
        const hw::Vec vec = changed(hw::load_shared<hw::Vec>(offset + at));
        if ((row < rows && (row || !above)) || hw::fault(hw::Fault::mask)) hw::store_shared(offset + at, vec);
      };
    });
  };
  if (!window.exists()) return;
  if (map.scale) {
    const int64_t row = int64_t{window.image} * map.affine_stride;
    const int first = window.k + thread % 4 * VECTOR;
    float scale[VECTOR], shift[VECTOR];
    load_floats(scale, map.scale + row, first, map.channels, map.vector_affine);
    load_floats(shift, map.shift + row, first, map.channels, map.vector_affine);
    if (relu && !Format<T>::TF32)
      change([&](hw::Vec vec) { return transformed<T, !Format<T>::TF32>(vec, scale, shift, slope); });
    else
      change([&](hw::Vec vec) { return transformed<T, false>(vec, scale, shift, slope); });
  } else if (Format<T>::TF32) {
    change([](hw::Vec vec) {
      HW_UNROLL
      for (int w = 0; w < 4; ++w) vec.word[w] = hw::tf32(hw::as_float(vec.word[w]));
      return vec;
    });
  }
}

// Starts to copy channels k.. and columns co.. of TAPS taps from first_tap on, each next four `group` later (4 if they are
// contiguous), as rows tap * CHUNK + channel; zeros past K and CO. `vector`: rows start at multiples of 16 bytes.
template <typename T, int CO_TILE, int TAPS, int THREADS>
HW_FUNCTION void load_weights(uint32_t offset, const char* weights, int channels, int columns, int k, int co, int first_tap,
                              int group, bool vector) {
  using W = Rows<T, CO_TILE>;
  constexpr int CHUNK = Format<T>::CHUNK, AT_ONCE = THREADS / W::PIECES;  // rows
  static_assert(THREADS % W::PIECES == 0 && (AT_ONCE % CHUNK == 0 || CHUNK % AT_ONCE == 0));
  const uint32_t thread = hw::again(hw::thread());
  const int piece = thread % W::PIECES, row = thread / W::PIECES, tap = row / CHUNK;
  const int channel = k + row % CHUNK, column = co + piece * Format<T>::VECTOR;
  const int left = columns - column, row_bytes = columns * static_cast<int>(sizeof(T));
  const int tap_bytes = channels * row_bytes;
  const int row_of_map = (first_tap + tap) * channels + channel;
  const char* first = hw::kept(hw::advance(weights + column * sizeof(T), row_of_map, row_bytes));
  const uint32_t to = offset + W::at(row, piece);
  const auto copy = [&](auto vectors) {
    HW_UNROLL
    for (int start = 0; start < TAPS * CHUNK; start += AT_ONCE) {
      const int t = start / CHUNK, c = start % CHUNK;
      if (start + AT_ONCE > TAPS * CHUNK && t + tap >= TAPS) continue;
      const char* from = hw::advance(hw::advance(first, t / 4 * group + t % 4, tap_bytes), c, row_bytes);
      copy_piece<T, vectors>(to + start * W::BYTES, from, left > 0 && channel + c < channels, left);
    }
  };
  if (vector)
    copy(std::true_type{});
  else
    copy(std::false_type{});
}

// Second factors: a step of channels by 32 columns, from piece 4 (of 32 bits 8) times `part` on. Where a lane reads them in
// its rows is computed once.
template <typename T, int CO_TILE>
struct Columns {
  using W = Rows<T, CO_TILE>;
  static constexpr int COUNT = Format<T>::TF32 ? 8 : 2;
  uint32_t at[COUNT];

  HW_FUNCTION Columns(int part, int lane) {
    HW_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      if constexpr (Format<T>::TF32)
        at[k] = W::at(lane % 4 + 4 * (k % 2), part * 8 + k / 2 * 2 + lane / 16) + lane / 4 % 4 * 4;
      else
        at[k] = hw::again(W::at(lane % 16, part * 4 + k * 2 + lane / 16));
    }
  }
  // From the rows at `offset` on.
  HW_FUNCTION void load(hw::Word (&b)[4][2], uint32_t offset) const {
    HW_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      if constexpr (Format<T>::TF32) {
        b[k / 2][k % 2] = hw::tf32(hw::load_shared<float>(offset + at[k]));
      } else {
        hw::Word r[4];
        hw::load_matrices_transposed(r, offset + at[k]);
        b[2 * k][0] = r[0], b[2 * k][1] = r[1];
        b[2 * k + 1][0] = r[2], b[2 * k + 1][1] = r[3];
      }
    }
  }
};
