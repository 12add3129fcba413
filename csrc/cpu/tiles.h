// Products of bfloat16 pairs, summed in float32, in matrix tiles: 2 x 2 tiles of sums from 2 tiles of pixels and 2 of weights.
// AMX multiplies them where the CPU has it; elsewhere the same is done value by value, for tests.
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

constexpr int TILE_CHANNELS = 32, TILE_PIXELS = 16;        // of a tile of pixels: [TILE_PIXELS, TILE_CHANNELS]
constexpr int64_t TILE_WEIGHTS = TILE_CHANNELS * LANES;    // of a tile of weights: [pairs of channels, LANES, 2]

#if LANES == 16 && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define HAS_TILES 1

// All tiles of 16 rows of 64 bytes while this lives; then the tiles that were there, empty.
struct TileUse {
  alignas(64) unsigned char before[64];
  TileUse() {
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    asm volatile("" : : "r"(config) : "memory");  // some compilers believe that only its first bytes are read
    _tile_storeconfig(before);
    _tile_loadconfig(config);
  }
  ~TileUse() {
    asm volatile("" : : "r"(before) : "memory");
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};

// Sums of R x C tiles; all loads are of memory that was written in another function.
template <int R, int C>
struct TileSums {
  INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  INLINE void read(const float* from, int64_t row) {
    _tile_loadd(0, from, 4 * row);
    if (C == 2) _tile_loadd(1, from + 16, 4 * row);
    if (R == 2) _tile_loadd(2, from + 16 * row, 4 * row);
    if (R == 2 && C == 2) _tile_loadd(3, from + 16 * row + 16, 4 * row);
  }
  INLINE void write(float* to, int64_t row) {
    _tile_stored(0, to, 4 * row);
    if (C == 2) _tile_stored(1, to + 16, 4 * row);
    if (R == 2) _tile_stored(2, to + 16 * row, 4 * row);
    if (R == 2 && C == 2) _tile_stored(3, to + 16 * row + 16, 4 * row);
  }
  // Adds the products of pixels, whose rows have `row` values, and weights. The second tiles lie `next` and `beside` values
  // after the first.
  INLINE void add(const BFloat16* pixels, int64_t row, int64_t next, const BFloat16* weights,
                  int64_t beside = TILE_WEIGHTS) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, pixels, 2 * row);
    _tile_dpbf16ps(0, 4, 6);
    if (C == 2) {
      _tile_loadd(7, weights + beside, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, pixels + next, 2 * row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
  }
};

#else
#define HAS_TILES 0

struct TileUse {};

template <int R, int C>
struct TileSums {
  V sums[R * TILE_PIXELS][C];

  void clear() { std::memset(sums, 0, sizeof sums); }
  void read(const float* from, int64_t row) {
    for (int p = 0; p < R * TILE_PIXELS; p++)
      for (int c = 0; c < C; c++) sums[p][c] = load(from + p * row + c * LANES);
  }
  void write(float* to, int64_t row) const {
    for (int p = 0; p < R * TILE_PIXELS; p++)
      for (int c = 0; c < C; c++) store(to + p * row + c * LANES, sums[p][c]);
  }
  void add(const BFloat16* pixels, int64_t row, int64_t next, const BFloat16* weights, int64_t beside = TILE_WEIGHTS) {
    for (int p = 0; p < R * TILE_PIXELS; p++)
      for (int k = 0; k < TILE_CHANNELS; k++) {
        const float x = scalar(pixels[p / TILE_PIXELS * next + p % TILE_PIXELS * row + k]);
        for (int c = 0; c < C; c++)
          for (int lane = 0; lane < LANES; lane++)
            sums[p][c][lane] += x * scalar(weights[c * beside + k / 2 * 2 * LANES + 2 * lane + k % 2]);
      }
  }
};

#endif

}  // namespace ISA
}  // namespace unetpp
