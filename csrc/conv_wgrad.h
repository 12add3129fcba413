// The gradient of a convolution's weights from shared-memory halo tiles: `conv_wgrad` of kernels/naive.py.
//
//   dW[t, k, c] = sum over pixels o of act(a[o + t - 1, k]) dy[o, c]          and, for the low source of half the size,
//   dW[p, t, k, c] = sum over u of act(b[u + p + t - 1, k]) dy[2u + p, c]
//
// A block takes 64 bytes of channels on both sides (32 x 32, in TF32 16 x 16) and a range of 8 x 32 tiles of dy. The product
// sums over pixels, so both factors are read transposed. A warp holds all taps of 16 x 16 channels (72 accumulators per
// thread, 64 for phases) and sums over one column parity: one product sums over 16 pixels of a row. Rows of dy stay in
// registers while the rows of `a` that use them are read: 3 ldmatrix of pixels and one of dy for 18 mma.
//
// Bytes per stage: tile 10 x 34 x 64 = 21,760 (phases: 6 x 18 x 64 = 6,912) and dy 8 x 34 x 64 = 17,408; two stages.
//
// Every block and parity writes its own sums, and a second kernel adds them in a fixed order: no atomics, the same bits
// every time.
//
// In 3D a block takes one plane of taps, of one phase.
#pragma once

#include "halo_tile.h"

// ---- Traits: row `r` of the tile and slot `s` of taps use row(r, s) of dy, which slot s - 1 used at row r - 1 unless s is
// a multiple of PERIOD. In 3D, slab d of PLANES pairs plane(z, d) with gradient_plane(z, d) of dy for the taps from
// plane_tap(d) on, each next group of four GROUP later. ----

template <typename T>
struct SameWgrad {
  using TILE = Tile<T, 10, 34, true>;
  static constexpr int TAPS = 9, COLUMNS = 3, SLOTS = 3, PERIOD = 3, UNIT = 1;  // UNIT: rows of dy for each row of the tile
  static constexpr int PLANES = 3, GROUP = 4, ALL_TAPS = 27;
  HW_FUNCTION static constexpr int plane(int z, int d) { return z + d - 1; }
  HW_FUNCTION static constexpr int gradient_plane(int z, int) { return z; }
  HW_FUNCTION static constexpr int plane_tap(int d) { return d * 9; }
  HW_FUNCTION static constexpr int row(int r, int slot) { return r - slot; }
  HW_FUNCTION static constexpr int tap(int x, int slot) { return slot * 3 + x; }
  HW_FUNCTION static constexpr int origin(int place) { return place - 1; }
};

template <typename T>
struct PhasedWgrad {  // slot 2 py + t
  using TILE = Tile<T, 6, 18, false>;
  static constexpr int TAPS = 16, COLUMNS = 2, SLOTS = 4, PERIOD = 2, UNIT = 2;
  static constexpr int PLANES = 4, GROUP = 8, ALL_TAPS = 64;  // slab 2 pz + t
  HW_FUNCTION static constexpr int plane(int z, int d) { return z + d / 2 - 1 + d % 2; }
  HW_FUNCTION static constexpr int gradient_plane(int z, int d) { return 2 * z + d / 2; }
  HW_FUNCTION static constexpr int plane_tap(int d) { return d / 2 * 32 + d % 2 * 4; }
  HW_FUNCTION static constexpr int row(int r, int slot) { return 2 * (r - slot / 2 - slot % 2) + slot / 2; }
  HW_FUNCTION static constexpr int tap(int x, int slot) { return slot / 2 * 8 + slot % 2 * 2 + x; }
  HW_FUNCTION static constexpr int origin(int place) { return place / 2 - 1; }
};

template <typename T_, bool PHASED_>
struct WgradTraits {
  using T = T_;
  using KIND = std::conditional_t<PHASED_, PhasedWgrad<T>, SameWgrad<T>>;
  using GRADIENT = Tile<T, 8, 32, true>;
  static constexpr bool PHASED = PHASED_;
  static constexpr int WARPS = 8, THREADS = WARPS * 32;
  static constexpr int SIDE = Format<T>::CHUNK / 16;          // warps along K, and along CO
  static constexpr int BANDS = WARPS / (SIDE * SIDE * 2);     // of rows, if the channels leave warps over
  static constexpr int ROWS = GRADIENT::ROWS / BANDS;         // of dy per warp
  static constexpr int FRAMES = ROWS / KIND::UNIT + 2;
  static constexpr int STEPS = Format<T>::TF32 ? 2 : 1;       // products for 16 pixels
  static constexpr int PARTS = PHASED ? BANDS : 2 * BANDS;    // sums per block
  static constexpr int BLOCKS = Format<T>::TF32 ? 1 : 2;      // 128 registers per thread suffice for 16 bits
  static constexpr int STAGE = KIND::TILE::BYTES + GRADIENT::BYTES, SHARED = 2 * STAGE;
  static_assert(SIDE * SIDE * 2 * BANDS == WARPS && ROWS % KIND::UNIT == 0);
  static_assert(SHARED <= 99 * 1024, "no GPU since sm_80 has less");
};

// ---- Kernels ----

// The channels of a block, and the channels and pixels of a warp.
template <typename TRAITS>
struct WgradPlace {
  int slab = 0, k, co, k_part, co_part, parity, band, lane;

  HW_FUNCTION explicit WgradPlace(const WgradArguments& p) {
    constexpr int CHUNK = Format<typename TRAITS::T>::CHUNK, SIDE = TRAITS::SIDE;
    k = hw::block_y() * CHUNK;
    co = hw::block_z();
    if (p.deep) slab = co % TRAITS::KIND::PLANES, co /= TRAITS::KIND::PLANES;
    co *= CHUNK;
    const uint32_t thread = hw::again(hw::thread()), warp = thread / 32;
    k_part = warp % SIDE;
    co_part = warp / SIDE % SIDE;
    parity = warp / (SIDE * SIDE) % 2;
    band = warp / (SIDE * SIDE * 2);
    lane = thread % 32;
  }
};

// A tile of dy, in the order in which a block takes them.
template <typename TRAITS>
struct WgradTile {
  int image, plane, y, x;

  HW_FUNCTION WgradTile(const WgradArguments& p, int number) {
    x = number % p.tiles_x * TRAITS::GRADIENT::COLUMNS;
    y = number % p.tiles / p.tiles_x * TRAITS::GRADIENT::ROWS;
    plane = number / p.tiles % p.planes;
    image = number / p.tiles / p.planes;
  }
  HW_FUNCTION void advance(const WgradArguments& p) {
    if ((x += TRAITS::GRADIENT::COLUMNS) < p.dy.width) return;
    x = 0;
    if ((y += TRAITS::GRADIENT::ROWS) < p.dy.height) return;
    y = 0;
    if (++plane < p.planes) return;
    plane = 0;
    ++image;
  }
};

// 16 adjacent pixels of a row from place `first` on by 16 channels from piece `piece` on, transposed, as the first factor.
template <typename TILE, int STEPS>
HW_FUNCTION void load_rows(hw::Word (&a)[STEPS][4], uint32_t row, int first, int piece, int lane) {
  using PIXELS = typename TILE::PIXELS;
  if constexpr (STEPS == 2) {
    HW_UNROLL
    for (int k = 0; k < STEPS * 4; ++k) {
      const int pixel = first + k / 4 * 8 + k / 2 % 2 * 4 + lane % 4;
      const uint32_t at = PIXELS::at(pixel, piece + k % 2 * 2 + lane / 16) + lane / 4 % 4 * 4;
      a[k / 4][k % 4] = hw::load_shared<uint32_t>(row + at);
    }
  } else {
    const uint32_t at = PIXELS::at(first + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2);
    hw::load_matrices_transposed(a[0], row + at);
  }
}

// The same as the second factor, two times eight columns.
template <typename TILE, int STEPS>
HW_FUNCTION void load_gradient(hw::Word (&b)[STEPS][2][2], uint32_t row, int first, int piece, int lane) {
  using PIXELS = typename TILE::PIXELS;
  if constexpr (STEPS == 2) {
    HW_UNROLL
    for (int k = 0; k < STEPS * 4; ++k) {
      const int pixel = first + k / 4 * 8 + k % 2 * 4 + lane % 4;
      const uint32_t at = PIXELS::at(pixel, piece + k / 2 % 2 * 2 + lane / 16) + lane / 4 % 4 * 4;
      b[k / 4][k / 2 % 2][k % 2] = hw::load_shared<uint32_t>(row + at);
    }
  } else {
    hw::Word r[4];
    hw::load_matrices_transposed(r, row + PIXELS::at(first + lane % 16, piece + lane / 16));
    HW_UNROLL
    for (int k = 0; k < 4; ++k) b[0][k / 2][k % 2] = r[k];
  }
}

template <typename TRAITS>
HW_FUNCTION void add_gradients(float (&acc)[TRAITS::KIND::SLOTS][TRAITS::KIND::COLUMNS][2][4], uint32_t stage,
                               const WgradPlace<TRAITS>& place) {
  using T = typename TRAITS::T;
  using KIND = typename TRAITS::KIND;
  using TILE = typename KIND::TILE;
  using GRADIENT = typename TRAITS::GRADIENT;
  constexpr int PIECES = 16 / Format<T>::VECTOR;  // of a warp's channels
  const uint32_t pixels = stage + place.band * TRAITS::ROWS / KIND::UNIT * TILE::PITCH;
  const uint32_t gradient = stage + TILE::BYTES + place.band * TRAITS::ROWS * GRADIENT::PITCH;
  hw::Word b[KIND::SLOTS][TRAITS::STEPS][2][2] = {};  // ptxas drops copies of registers that nobody wrote
  HW_NO_UNROLL
  for (int r = 0; r < TRAITS::FRAMES; ++r) {
    HW_UNROLL
    for (int slot = KIND::SLOTS - 1; slot >= 0; --slot) {
      const int y = KIND::row(r, slot);
      if (slot % KIND::PERIOD) {
        HW_UNROLL
        for (int k = 0; k < TRAITS::STEPS * 4; ++k) b[slot][k / 4][k / 2 % 2][k % 2] = b[slot - 1][k / 4][k / 2 % 2][k % 2];
      } else if (y >= 0 && y < TRAITS::ROWS) {
        load_gradient<GRADIENT, TRAITS::STEPS>(b[slot], gradient + y * GRADIENT::PITCH, GRADIENT::place(place.parity),
                                               place.co_part * PIECES, place.lane);
      }
    }
    hw::Word a[KIND::COLUMNS][TRAITS::STEPS][4];
    HW_UNROLL
    for (int x = 0; x < KIND::COLUMNS; ++x)
      load_rows<TILE, TRAITS::STEPS>(a[x], pixels + r * TILE::PITCH, TILE::place(place.parity + x), place.k_part * PIECES,
                                        place.lane);
    HW_UNROLL
    for (int slot = 0; slot < KIND::SLOTS; ++slot) {
      const int y = KIND::row(r, slot);
      if (y < 0 || y >= TRAITS::ROWS) continue;
      HW_UNROLL
      for (int x = 0; x < KIND::COLUMNS; ++x)
        HW_UNROLL
        for (int k = 0; k < TRAITS::STEPS * 2; ++k) hw::multiply<T>(acc[slot][x][k % 2], a[x][k / 2], b[slot][k / 2][k % 2]);
    }
  }
}

template <typename TRAITS>
HW_FUNCTION void store_gradients(const float (&acc)[TRAITS::KIND::SLOTS][TRAITS::KIND::COLUMNS][2][4],
                                 const WgradArguments& p, const WgradPlace<TRAITS>& place) {
  using KIND = typename TRAITS::KIND;
  const int part = hw::block_x() * TRAITS::PARTS + (TRAITS::PHASED ? 0 : place.parity * TRAITS::BANDS) + place.band;
  const int phase = TRAITS::PHASED && !hw::fault(hw::Fault::phase) ? place.parity * 4 : 0;
  const int64_t taps = static_cast<int64_t>(part) * (p.deep ? KIND::ALL_TAPS : KIND::TAPS);
  const int first_tap = p.deep ? KIND::plane_tap(place.slab) : 0, group = p.deep ? KIND::GROUP : 4;
  const int first_k = place.k + place.k_part * 16 + place.lane / 4;
  const int first_co = place.co + place.co_part * 16 + place.lane % 4 * 2;
  HW_UNROLL
  for (int slot = 0; slot < KIND::SLOTS; ++slot)
    HW_UNROLL
    for (int x = 0; x < KIND::COLUMNS; ++x) {
      const int tap = phase + KIND::tap(x, slot);
      float* to = p.partial + (taps + first_tap + tap / 4 * group + tap % 4) * p.a.channels * p.dy.channels;
      HW_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int row = first_k + e / 2 % 2 * 8, column = first_co + e / 4 * 8 + e % 2;
        if (row < p.a.channels && column < p.dy.channels)
          to[static_cast<int64_t>(row) * p.dy.channels + column] = acc[slot][x][e / 4][e % 4];
      }
    }
}

template <typename TRAITS>
HW_KERNEL void HW_BOUNDS(TRAITS::THREADS, TRAITS::BLOCKS) conv_wgrad_kernel(HW_CONSTANT WgradArguments p) {
  using KIND = typename TRAITS::KIND;
  using TILE = typename KIND::TILE;
  using GRADIENT = typename TRAITS::GRADIENT;
  const auto of_a = [&](const WgradTile<TRAITS>& tile, const WgradPlace<TRAITS>& place) -> Window {
    const int plane = p.deep ? KIND::plane(tile.plane, place.slab) + hw::fault(hw::Fault::plane) : 0;
    return {p.a, tile.image, plane, KIND::origin(tile.y), KIND::origin(tile.x), place.k};
  };
  const auto of_dy = [&](const WgradTile<TRAITS>& tile, const WgradPlace<TRAITS>& place) -> Window {
    return {p.dy, tile.image, p.deep ? KIND::gradient_plane(tile.plane, place.slab) : 0, tile.y, tile.x, place.co};
  };
  const auto load = [&](const WgradTile<TRAITS>& tile, uint32_t stage) {
    const WgradPlace<TRAITS> place(p);
    load_tile<TILE, TRAITS::THREADS>(stage, of_a(tile, place));
    load_tile<GRADIENT, TRAITS::THREADS>(stage + TILE::BYTES, of_dy(tile, place));
  };
  const auto transform = [&](const WgradTile<TRAITS>& tile, uint32_t stage) {
    const WgradPlace<TRAITS> place(p);
    transform_tile<TILE, TRAITS::THREADS>(stage, of_a(tile, place), p.slope, p.relu);
    if constexpr (Format<typename TRAITS::T>::TF32)
      transform_tile<GRADIENT, TRAITS::THREADS>(stage + TILE::BYTES, of_dy(tile, place), p.slope, p.relu);
  };
  float acc[KIND::SLOTS][KIND::COLUMNS][2][4] = {};
  const int first = hw::block_x() * p.tiles_each;
  int left = clamp(p.images * p.planes * p.tiles - first, 0, p.tiles_each);
  WgradTile<TRAITS> tile(p, first);
  uint32_t stage = 0;
  if (left) load(tile, stage);
  HW_NO_UNROLL
  for (; left; --left, stage = TRAITS::STAGE - stage) {
    hw::wait_copies();
    transform(tile, stage);
    if (!hw::fault(hw::Fault::barrier)) hw::barrier();  // every thread has written this stage and read the previous one
    tile.advance(p);
    if (left > 1) load(tile, TRAITS::STAGE - stage);
    add_gradients<TRAITS>(acc, stage, WgradPlace<TRAITS>(p));
  }
  store_gradients<TRAITS>(acc, p, WgradPlace<TRAITS>(p));
}

template <int THREADS>
HW_KERNEL void HW_BOUNDS(THREADS, 1) add_parts_kernel(HW_CONSTANT WgradArguments p) {
  const int64_t size = int64_t{1} * p.taps * p.a.channels * p.dy.channels;
  const int64_t place = int64_t{1} * hw::block_x() * THREADS + hw::thread();
  if (place >= size) return;
  float sum = 0;
  for (int part = 0; part < p.parts - hw::fault(hw::Fault::reduction); ++part) sum += p.partial[part * size + place];
  p.result[place] = sum;
}

// ---- Launch ----

template <typename TRAITS>
const char* launch_wgrad(WgradArguments p, Stream stream) {
  using T = typename TRAITS::T;
  constexpr int CHUNK = Format<T>::CHUNK;
  if (const char* error = p.prepare(sizeof(T))) return error;
  if (p.parts % TRAITS::PARTS) return "the partial sums are not a whole number of blocks";
  const int splits = p.parts / TRAITS::PARTS;
  p.tiles_x = (p.dy.width + TRAITS::GRADIENT::COLUMNS - 1) / TRAITS::GRADIENT::COLUMNS;
  p.tiles = (p.dy.height + TRAITS::GRADIENT::ROWS - 1) / TRAITS::GRADIENT::ROWS * p.tiles_x;
  p.planes = p.a.depth;
  const int64_t tiles = int64_t{1} * p.images * p.planes * p.tiles;
  if (tiles >= int64_t{1} << 31) return "more than 2^31 tiles";
  p.tiles_each = static_cast<int>((tiles + splits - 1) / splits);
  p.taps = p.deep ? TRAITS::KIND::ALL_TAPS : TRAITS::KIND::TAPS;
  const auto chunks = [](const Map& map) { return (map.channels + CHUNK - 1) / CHUNK; };
  const hw::Grid blocks{splits, chunks(p.a), chunks(p.dy) * (p.deep ? TRAITS::KIND::PLANES : 1)};
  if (const char* error = hw::launch<conv_wgrad_kernel<TRAITS>>(blocks, TRAITS::THREADS, TRAITS::SHARED, stream, p))
    return error;
  constexpr int THREADS = 256;
  const int64_t size = int64_t{1} * p.taps * p.a.channels * p.dy.channels;
  const hw::Grid grid{static_cast<int>((size + THREADS - 1) / THREADS)};
  return hw::launch<add_parts_kernel<THREADS>>(grid, THREADS, 0, stream, p);
}

// ---- Dispatch ----

template <typename T>
const char* dispatch_wgrad(const WgradArguments& p, Stream stream) {
  return p.phased ? launch_wgrad<WgradTraits<T, true>>(p, stream) : launch_wgrad<WgradTraits<T, false>>(p, stream);
}
