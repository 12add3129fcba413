// The gradient of a convolution's weights in matrix tiles, of bfloat16 maps: sums over pixels of dY' X.
//
// dY is copied to tiles [16 outputs, 32 pixels], X to pairs of pixels [pairs, LANES, 2], once with pairs that begin at even
// pixels and once at odd ones, so that any tap of 32 pixels is one tile. Rows of pixels follow one another with the border
// between them, where dY is zero. Every sum is one thread's, in the order of the pixels: the same bits for any number of
// threads.
#pragma once

#include "conv_wgrad.h"
#include "tiles.h"

namespace unetpp {
namespace ISA {

constexpr int STRIP = 4096, STRIPS = 8192;  // pixels of a strip of rows, and of the strips that are summed at once
constexpr int TILE_ROWS = 16;

// How the planes of one filter are cut into strips of rows, and what a strip takes in memory.
struct Strips {
  int height, width, pitch, rows, per_plane, first_z;
  int64_t planes, total;  // total: strips
  int64_t steps, pairs;   // of a strip: tiles of 32 pixels, and pairs of the operand's pixels
  int a_blocks, dy_blocks;

  Strips(const Wgrad& call, int dz, int step, int z_step, int taps) {
    height = call.dy.height / step;
    width = call.dy.width / step;
    pitch = round_up(width + taps - 1, 2);
    rows = std::max(1, std::min(height, STRIP / pitch));
    per_plane = (height + rows - 1) / rows;
    first_z = std::max(0, -dz);
    planes = std::max(0, std::min(call.dy.depth / z_step, call.a.depth - dz) - first_z);
    total = call.images * planes * per_plane;
    steps = (static_cast<int64_t>(rows) * pitch + 31) / 32;
    pairs = steps * 16 + (static_cast<int64_t>(taps - 1) * pitch + taps) / 2 + 1;
    a_blocks = round_up(call.a.channels, WIDTH) / LANES;
    dy_blocks = round_up(call.dy.channels, 2 * TILE_ROWS) / TILE_ROWS;
  }
  int64_t at_once() const { return std::max<int64_t>(1, std::min(total, STRIPS / (steps * 32))); }
  // Values of one block of channels of a strip.
  int64_t dy_block() const { return steps * TILE_ROWS * 32; }
  int64_t a_block() const { return pairs * 2 * LANES; }
  int64_t size() const { return dy_blocks * dy_block() + a_blocks * 2 * a_block(); }
  int64_t sums(int taps) const { return static_cast<int64_t>(taps) * a_blocks * LANES * dy_blocks * TILE_ROWS; }
};

// LANES channels from c on of the pixel at (y, x), as its readers see it; zero outside. Bits of bfloat16 in the upper half.
INLINE Words pixel_bits(const Plane<BFloat16>& plane, int y, int x, int c, V scale, V shift) {
  const int count = plane.channels - c;
  if (count <= 0 || y < 0 || x < 0 || y >= plane.height || x >= plane.width) return Words{};
  V value = load_some(plane.data + y * plane.row + x * plane.column + c, count);
  if (plane.scale) value = rounded<BFloat16>(read(plane, value, scale, shift, c));
  return reinterpret_cast<Words>(value);
}

// LANES channels of an operand's rows from (y0, x0) on, in pairs that begin at even pixels, then in those at odd ones.
static void fill_pairs(const Plane<BFloat16>& plane, int y0, int x0, int rows, const Strips& strips, int c, BFloat16* to) {
  V scale = {}, shift = {};
  if (plane.scale && c < plane.channels) {
    scale = load_some(plane.scale + c, plane.channels - c);
    shift = load_some(plane.shift + c, plane.channels - c);
  }
  BFloat16 *even = to, *odd = to + strips.a_block();
  for (int y = 0; y < rows; y++) {
    Words first = pixel_bits(plane, y0 + y, x0, c, scale, shift);
    for (int x = 0; x < strips.pitch; x += 2, even += 2 * LANES, odd += 2 * LANES) {
      const Words second = pixel_bits(plane, y0 + y, x0 + x + 1, c, scale, shift);
      const Words pair = first >> 16 | second;
      first = x + 2 < strips.pitch ? pixel_bits(plane, y0 + y, x0 + x + 2, c, scale, shift) : Words{};
      const Words next = second >> 16 | first;
      std::memcpy(even, &pair, sizeof pair);
      std::memcpy(odd, &next, sizeof next);
    }
  }
  const int64_t rest = to + strips.a_block() - even;  // read by the last tile, whose dY is zero there
  std::memset(even, 0, sizeof(BFloat16) * rest);
  std::memset(odd, 0, sizeof(BFloat16) * rest);
}

// to[c, j] = from[j, c] of 16 pairs j and 16 channels c.
INLINE void turn(const uint32_t* from, uint32_t* to) {
#if LANES == 16
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {  // a[4 r + c] has rows 4 r to 4 r + 3 of channels c, c + 4, c + 8 and c + 12
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(to + 16 * c, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + 16 * (c + 8), _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + 16 * (c + 4), _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(to + 16 * (c + 12), _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
#else
  for (int j = 0; j < 16; j++)
    for (int c = 0; c < 16; c++) to[16 * c + j] = from[16 * j + c];
#endif
}

// 16 outputs of dY's rows from y0 on, in tiles.
static void fill_gradients(const Plane<BFloat16>& plane, int y0, int rows, const Strips& strips, int c, BFloat16* to) {
  uint32_t pairs[16 * 16];
  const int64_t half = strips.pitch / 2, last = rows * half;
  for (int64_t step = 0; step < strips.steps; step++, to += TILE_ROWS * 32) {
    for (int j = 0; j < 16; j++) {
      const int64_t pair = step * 16 + j;
      const int y = pair < last ? y0 + static_cast<int>(pair / half) : -1, x = static_cast<int>(pair % half) * 2;
      for (int v = 0; v < TILE_ROWS; v += LANES) {
        const Words words = pixel_bits(plane, y, x, c + v, V{}, V{}) >> 16 | pixel_bits(plane, y, x + 1, c + v, V{}, V{});
        std::memcpy(pairs + j * 16 + v, &words, sizeof words);
      }
    }
    turn(pairs, reinterpret_cast<uint32_t*>(to));
  }
}

// acc[32 outputs, WIDTH inputs] (+)= the sums of a number of strips for one tap, `offset` pixels after an output's place.
ONCE static void strip_products(const Strips& strips, const BFloat16* memory, int64_t count, int dy_block, int a_block,
                                int64_t offset, bool add, float* acc) {
  TileSums<2, 2> sums;
  if (add)
    sums.read(acc, WIDTH);
  else
    sums.clear();
  for (int64_t s = 0; s < count; s++, memory += strips.size()) {
    const BFloat16* dy = memory + dy_block * strips.dy_block();
    const BFloat16* a = memory + strips.dy_blocks * strips.dy_block() + a_block * 2 * strips.a_block() +
                        offset % 2 * strips.a_block() + offset / 2 * 2 * LANES;
    for (int64_t step = 0; step < strips.steps; step++, dy += TILE_ROWS * 32, a += TILE_WEIGHTS)
      sums.add(dy, 32, strips.dy_block(), a, 2 * strips.a_block());
  }
  sums.write(acc, WIDTH);
}

// Strips `start` to `start + count` into memory.
static void fill_strips(const Wgrad& call, const Pairing& pair, const Strips& strips, int taps, int64_t start, int64_t count,
                        BFloat16* memory) {
  const int blocks = strips.dy_blocks + strips.a_blocks;
  parallel_for(count * blocks, [&](int64_t index) {
    const int64_t strip = start + index / blocks, plane = strip / strips.per_plane;
    const int block = static_cast<int>(index % blocks), z = strips.first_z + static_cast<int>(plane % strips.planes);
    const int y0 = static_cast<int>(strip % strips.per_plane) * strips.rows, rows = std::min(strips.rows, strips.height - y0);
    BFloat16* to = memory + index / blocks * strips.size();
    if (block < strips.dy_blocks) {
      const Plane<BFloat16> dy = plane_of<BFloat16>(call.dy, plane / strips.planes, z * pair.z_step + pair.pz, 0, pair.step,
                                                    pair.py, pair.px);
      fill_gradients(dy, y0, rows, strips, block * TILE_ROWS, to + block * strips.dy_block());
      return;
    }
    const int place = block - strips.dy_blocks;
    to += strips.dy_blocks * strips.dy_block() + place * 2 * strips.a_block();
    const Plane<BFloat16> a = plane_of<BFloat16>(call.a, plane / strips.planes, z + pair.dz, call.slope);
    fill_pairs(a, y0 + pair.y, pair.x, rows + taps - 1, strips, place * LANES, to);
  });
}

// One filter of taps x taps into result.
static void wgrad_tiles_filter(const Wgrad& call, const Pairing& pair, int taps, float* result) {
  const Strips strips(call, pair.dz, pair.step, pair.z_step, taps);
  const int outputs = strips.dy_blocks / 2, inputs = strips.a_blocks / 2, all = taps * taps;
  float* sums = call.scratch;  // [outputs, inputs, taps, 32, WIDTH]
  BFloat16* memory = reinterpret_cast<BFloat16*>(sums + strips.sums(all));
  constexpr int64_t block = 2 * TILE_ROWS * WIDTH;
  if (strips.total == 0) std::memset(sums, 0, sizeof(float) * strips.sums(all));
  for (int64_t start = 0; start < strips.total; start += strips.at_once()) {
    const int64_t count = std::min(strips.at_once(), strips.total - start);
    fill_strips(call, pair, strips, taps, start, count, memory);
    parallel_for(static_cast<int64_t>(outputs) * inputs * all, [&](int64_t index) {
      const TileUse use;
      const int t = index % all, input = index / all % inputs, output = static_cast<int>(index / all / inputs);
      const int64_t offset = static_cast<int64_t>(t / taps) * strips.pitch + t % taps;
      strip_products(strips, memory, count, 2 * output, 2 * input, offset, start > 0, sums + index * block);
    });
  }
  parallel_for(call.dy.channels, [&](int64_t c) {
    for (int k = 0; k < call.a.channels; k++)
      for (int t = 0; t < all; t++)
        result[t * call.tap + k * call.k + c * call.co] =
            sums[((c / 32 * inputs + k / WIDTH) * all + t) * block + c % 32 * WIDTH + k % WIDTH];
  });
}

static void conv_wgrad_tiles(const Wgrad& call) {
  each_filter(call, [&](const Pairing& pair, float* result) { wgrad_tiles_filter(call, pair, call.phased ? 2 : 3, result); });
}

// Values of scratch memory that it takes.
static int64_t wgrad_tiles_scratch(const Wgrad& call) {
  const int taps = call.phased ? 2 : 3, step = call.phased ? 2 : 1;
  const Strips strips(call, 0, step, call.axes == 3 ? step : 1, taps);
  return strips.sums(taps * taps) + (strips.at_once() * strips.size() + 1) / 2;
}

}  // namespace ISA
}  // namespace unetpp
