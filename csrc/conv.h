// Convolution over a prefix and a low source from shared-memory halo tiles: the op `conv` of kernels/naive.py.
//
//   out[o] = epilogue( sum_t act(a[o + t - 1]) Wa[t]  +  sum_t act(b[u + p + t - 1]) Wb[p, t]  +  bias )      o = 2u + p
//
// A block computes ROWS x 32 output pixels of CO_TILE channels. For each 64 bytes of input channels it copies the tile with
// its halo once, normalises it in place once, and reads it for every tap. A warp computes 4 rows of 16 pixels, every second
// one of the row, by 32 channels: 64 accumulators per thread. It holds the weights of one column of taps and reads each row
// of pixels once for all the rows that use it, so 9 taps cost 18 ldmatrix of pixels and 18 of weights for 144 mma: 1 KiB
// from shared memory for 16 Ki multiplications. Pixels of one phase are two apart in a row, so a warp of one column parity
// can read both sources.
//
// Bytes per stage, 16-bit: ROWS = 16, CO_TILE = 32: tile 18 x 34 x 64 = 39,168 and weights 9 x 32 x 64 = 18,432; ROWS = 8:
// 21,760; CO_TILE = 64: 36,864. The low source: 10 x 18 x 64 (6 x 18 x 64) and 16 x 32 x 64 (128). 32 bits: the same.
//
// The data gradient of the prefix is the same kernel on dy with flipped weights. That of the low source gathers 4 x 4 taps
// at a stride of two (GATHERED): low pixel u reads dy at 2u - 1 + q; a warp computes 2 rows of 16 low pixels.
//
// In 3D a block computes a tile of one plane. Each plane that contributes to it is a separate stage with its own 9 taps.
#pragma once

#include "halo_tile.h"

// ---- Traits: how an operand is sampled. A warp's accumulator row `m` uses frame row `r` with the weights of slot
// use(m, r), if that is one of SLOTS; slot `s` is loaded at row begin(s), and tap(x, s) is its tap in column x. In 3D output
// plane z uses plane(z, t), t < PLANES, with the taps from plane_tap(z, t) on, each next group of four GROUP later. ----

template <typename T, int ROWS>
struct Same {  // 3 x 3 taps, of the size of `out`
  using TILE = Tile<T, ROWS + 2, 34, true>;
  static constexpr int TAPS = 9, COLUMNS = 3, SLOTS = 3, PHASE_TAPS = 0, FRAMES = 6, WARP_ROWS = 4;
  static constexpr int PLANES = 3, GROUP = 4;
  HW_FUNCTION static constexpr int plane(int z, int t) { return z - 1 + t; }
  HW_FUNCTION static constexpr int plane_tap(int, int t) { return t * TAPS; }
  HW_FUNCTION static constexpr int use(int m, int r) { return r - m; }
  HW_FUNCTION static constexpr int begin(int slot) { return slot; }
  HW_FUNCTION static constexpr int tap(int x, int slot) { return slot * 3 + x; }
  HW_FUNCTION static constexpr int origin(int place) { return place - 1; }
};

template <typename T, int ROWS>
struct Phased {  // 2 x 2 taps for each phase, of half the size: rows m = 2 unit + py
  using TILE = Tile<T, ROWS / 2 + 2, 18, false>;
  static constexpr int TAPS = 16, COLUMNS = 2, SLOTS = 4, PHASE_TAPS = 4, FRAMES = 4, WARP_ROWS = 2;
  static constexpr int PLANES = 2, GROUP = 8;
  HW_FUNCTION static constexpr int plane(int z, int t) { return z / 2 + z % 2 - 1 + t; }
  HW_FUNCTION static constexpr int plane_tap(int z, int t) { return z % 2 * 32 + t * 4; }
  HW_FUNCTION static constexpr int use(int m, int r) {
    const int t = r - m / 2 - m % 2;
    return t < 0 || t > 1 ? -1 : m % 2 * 2 + t;
  }
  HW_FUNCTION static constexpr int begin(int slot) { return slot / 2 + slot % 2; }
  HW_FUNCTION static constexpr int tap(int x, int slot) { return slot / 2 * 8 + slot % 2 * 2 + x; }
  HW_FUNCTION static constexpr int origin(int place) { return place / 2 - 1; }
};

template <typename T, int ROWS>
struct Gathered {  // 4 x 4 taps at a stride of two, of twice the size
  using TILE = Tile<T, ROWS + 2, 34, true>;
  static constexpr int TAPS = 16, COLUMNS = 4, SLOTS = 4, PHASE_TAPS = 0, FRAMES = 6, WARP_ROWS = 4;
  static constexpr int PLANES = 4, GROUP = 4;
  HW_FUNCTION static constexpr int plane(int z, int t) { return 2 * z - 1 + t; }
  HW_FUNCTION static constexpr int plane_tap(int, int t) { return t * TAPS; }
  HW_FUNCTION static constexpr int use(int m, int r) { return r - 2 * m; }
  HW_FUNCTION static constexpr int begin(int slot) { return slot; }
  HW_FUNCTION static constexpr int tap(int x, int slot) { return slot * 4 + x; }
  HW_FUNCTION static constexpr int origin(int place) { return 2 * place - 1; }
};

template <typename T_, int CO_TILE_, int ROWS_, int STAGES_, bool GATHERED_>
struct ConvTraits {
  using T = T_;
  using First = std::conditional_t<GATHERED_, Gathered<T, ROWS_>, Same<T, ROWS_>>;
  using Low = Phased<T, ROWS_>;
  static constexpr int CO_TILE = CO_TILE_, STAGES = STAGES_;
  static constexpr bool GATHERED = GATHERED_;
  static constexpr int M = GATHERED ? 2 : 4;               // rows of 16 pixels per warp
  static constexpr int WARP_COLUMNS = GATHERED ? 1 : 2;    // warps side by side
  static constexpr int OUT_ROWS = GATHERED ? ROWS_ / 2 : ROWS_, OUT_COLUMNS = 16 * WARP_COLUMNS;
  static constexpr int PIXEL_WARPS = OUT_ROWS / M * WARP_COLUMNS, WARPS = PIXEL_WARPS * (CO_TILE / 32);
  static constexpr int THREADS = WARPS * 32;
  static constexpr int WEIGHT_ROW = Rows<T, CO_TILE>::BYTES;

  template <typename KIND>
  static constexpr int bytes() {
    return KIND::TILE::BYTES + KIND::TAPS * Format<T>::CHUNK * WEIGHT_ROW;
  }
  static constexpr int STAGE = !GATHERED && bytes<Low>() > bytes<First>() ? bytes<Low>() : bytes<First>();
  static constexpr int SHARED = STAGE * STAGES;
  // Blocks at once on a multiprocessor of 227 KiB and 65,536 registers; 128 registers per thread suffice for 16 bits.
  static constexpr int FITTING = 227 * 1024 / (SHARED + 1024);
  static constexpr int BLOCKS = Format<T>::TF32 ? 1 : THREADS * FITTING > 512 ? 512 / THREADS : FITTING;

  static_assert(CO_TILE % 32 == 0 && OUT_ROWS % M == 0 && (STAGES == 1 || STAGES == 2));
  static_assert(STAGE % 16 == 0 && SHARED <= 163 * 1024, "sm_80 has no more");
};

// ---- Kernel ----

// The position of a block and its warps. Rows and columns are of output pixels.
template <typename TRAITS>
struct Place {
  int image, z = 0, y, x, co;  // of the block
  int warp_row, parity, part;  // of the warp: row of pixels, column parity, 32 channels
  int warp, lane;

  HW_FUNCTION explicit Place(const ConvArguments& p) {
    int column = hw::block_x();
    co = 0;
    if (p.co_blocks > 1) co = column % p.co_blocks * TRAITS::CO_TILE, column /= p.co_blocks;
    x = column * TRAITS::OUT_COLUMNS;
    y = hw::block_y() * TRAITS::OUT_ROWS;
    image = hw::block_z();
    if (p.deep) z = image % p.depth, image /= p.depth;
    const uint32_t thread = hw::again(hw::thread()), pixels = thread / 32 % TRAITS::PIXEL_WARPS;
    warp = thread / 32, lane = thread % 32;
    part = thread / 32 / TRAITS::PIXEL_WARPS;
    parity = pixels % TRAITS::WARP_COLUMNS;
    warp_row = pixels / TRAITS::WARP_COLUMNS;
  }
  HW_FUNCTION int row(int m) const { return y + warp_row * TRAITS::M + m; }
  HW_FUNCTION int column(int half) const { return x + (lane / 4 + 8 * half) * TRAITS::WARP_COLUMNS + parity; }
};

// Adds the products of one stage: `steps` times 32 bytes of channels.
template <typename TRAITS, typename KIND>
HW_FUNCTION void add_products(float (&acc)[TRAITS::M][4][4], uint32_t stage, int steps, const Place<TRAITS>& place) {
  using T = typename TRAITS::T;
  using TILE = typename KIND::TILE;
  constexpr int CHUNK = Format<T>::CHUNK, ROW = TRAITS::WEIGHT_ROW, STEP_BYTES = Format<T>::STEP * ROW;
  const uint32_t pixels = stage + place.warp_row * KIND::WARP_ROWS * TILE::PITCH;
  const int parity = hw::fault(hw::Fault::phase) ? 0 : place.parity;
  const uint32_t weights = stage + TILE::BYTES + parity * KIND::PHASE_TAPS * CHUNK * ROW;
  const Columns<T, TRAITS::CO_TILE> columns(place.part, place.lane);
  HW_UNROLL
  for (int x = 0; x < KIND::COLUMNS; ++x) {
    const int first = TILE::place(place.parity + x) + place.lane % 16;
    uint32_t column = pixels + TILE::PIXELS::at(first, place.lane / 16);
    const uint32_t taps = weights + KIND::tap(x, 0) * CHUNK * ROW, end = steps * STEP_BYTES;
    HW_NO_UNROLL  // unrolled, sm_80 spills
    for (uint32_t step = 0; step < end; step += STEP_BYTES) {
      hw::Word b[KIND::SLOTS][4][2];
      HW_UNROLL
      for (int r = 0; r < KIND::FRAMES; ++r) {
        HW_UNROLL
        for (int slot = 0; slot < KIND::SLOTS; ++slot)
          if (KIND::begin(slot) == r && (slot || !hw::fault(hw::Fault::unwritten)))
            columns.load(b[slot], taps + step + KIND::tap(0, slot) * CHUNK * ROW);
        hw::Word a[4];
        hw::load_matrices(a, column + r * TILE::PITCH);
        HW_UNROLL
        for (int m = 0; m < TRAITS::M; ++m) {
          const int slot = KIND::use(m, r);
          if (slot < 0 || slot >= KIND::SLOTS) continue;
          HW_UNROLL
          for (int n = 0; n < 4; ++n) hw::multiply<T>(acc[m][n], a, b[slot][n]);
        }
      }
      column = TILE::PIXELS::other(column);
    }
  }
}

// A stage: those of `a` come first, then those of `b`; of each, channels k.. of its planes one after another.
struct Stage {
  int index = 0, k = 0, plane = 0;
};

template <typename TRAITS>
struct Stages {
  using T = typename TRAITS::T;
  static constexpr int CHUNK = Format<T>::CHUNK;
  const ConvArguments& p;

  HW_FUNCTION static uint32_t memory(const Stage& at) { return at.index % TRAITS::STAGES * TRAITS::STAGE; }
  HW_FUNCTION void next(Stage& at) const {
    const int planes = p.stages_a > at.index ? p.planes_a : p.planes_b;
    if (++at.plane >= planes) at.plane = 0, at.k += CHUNK;
    if (++at.index == p.stages_a) at.k = 0;
  }

  // Runs `with` by how the stage is sampled: its KIND, its map and its weights.
  template <typename With>
  HW_FUNCTION void visit(const Stage& at, With with) const {
    const bool first = p.stages_a > at.index;
    const Map& map = first ? p.a : p.b;
    const char* weights = first ? p.weights_a : p.weights_b;
    if constexpr (!TRAITS::GATHERED)
      if (!first && p.phased) return with(typename TRAITS::Low{}, map, weights);
    with(typename TRAITS::First{}, map, weights);
  }
  template <typename KIND>
  HW_FUNCTION Window window(KIND, const Map& map, const Stage& at, const Place<TRAITS>& place) const {
    const int plane = p.deep ? KIND::plane(place.z, at.plane) + hw::fault(hw::Fault::plane) : 0;
    return {map, place.image, plane, KIND::origin(place.y), KIND::origin(place.x), at.k};
  }

  HW_FUNCTION void load(const Stage& at) const {
    visit(at, [&](auto kind, const Map& map, const char* weights) {
      using KIND = decltype(kind);
      using TILE = typename KIND::TILE;
      const Place<TRAITS> place(p);
      load_tile<TILE, TRAITS::THREADS>(memory(at), window(kind, map, at, place));
      load_weights<T, TRAITS::CO_TILE, KIND::TAPS, TRAITS::THREADS>(
          memory(at) + TILE::BYTES, weights, map.channels, p.channels, at.k, place.co, KIND::plane_tap(place.z, at.plane),
          hw::again(p.deep) ? KIND::GROUP : 4, p.vector_weights);
    });
  }
  HW_FUNCTION void transform(const Stage& at) const {
    visit(at, [&](auto kind, const Map& map, const char*) {
      using TILE = typename decltype(kind)::TILE;
      if (!map.scale && !Format<T>::TF32) return;  // before a window is computed
      transform_tile<TILE, TRAITS::THREADS>(memory(at), window(kind, map, at, Place<TRAITS>(p)), p.slope, p.relu);
    });
  }
  HW_FUNCTION void multiply(const Stage& at, float (&acc)[TRAITS::M][4][4]) const {
    visit(at, [&](auto kind, const Map& map, const char*) {
      const int steps = map.channels - at.k > Format<T>::STEP ? 2 : 1;
      add_products<TRAITS, decltype(kind)>(acc, memory(at), steps, Place<TRAITS>(p));
    });
  }
};

#include "conv_epilogue.h"

template <typename TRAITS>
HW_KERNEL void HW_BOUNDS(TRAITS::THREADS, TRAITS::BLOCKS) conv_kernel(HW_CONSTANT ConvArguments p) {
  const Stages<TRAITS> stages{p};
  float acc[TRAITS::M][4][4];
  Stage loaded;
  if (TRAITS::STAGES == 2) stages.load(loaded);
  begin(acc, p, Place<TRAITS>(p));
  HW_NO_UNROLL
  for (Stage at; p.stages > at.index; stages.next(at)) {
    if (TRAITS::STAGES == 1) {
      if (at.index && !hw::fault(hw::Fault::reuse)) hw::barrier();  // every thread has read the previous stage
      stages.load(at);
    }
    hw::wait_copies();
    stages.transform(at);
    if (!hw::fault(hw::Fault::barrier)) hw::barrier();  // every thread has written this stage and read the previous one
    if (TRAITS::STAGES == 2) {
      stages.next(loaded);
      if (p.stages > loaded.index) stages.load(loaded);
    }
    stages.multiply(at, acc);
  }
  finish(acc, p, Place<TRAITS>(p));
}

// ---- Launch ----

template <typename TRAITS>
const char* launch_conv(ConvArguments p, Stream stream) {
  using T = typename TRAITS::T;
  if (const char* error = p.prepare(sizeof(T))) return error;
  p.tiles_y = (p.height + TRAITS::OUT_ROWS - 1) / TRAITS::OUT_ROWS;
  p.tiles_x = (p.width + TRAITS::OUT_COLUMNS - 1) / TRAITS::OUT_COLUMNS;
  p.co_blocks = (p.channels + TRAITS::CO_TILE - 1) / TRAITS::CO_TILE;
  const auto stages = [&](const Map& map, int planes) {
    return (map.channels + Format<T>::CHUNK - 1) / Format<T>::CHUNK * planes;
  };
  p.planes_a = p.deep ? TRAITS::First::PLANES : 1;
  p.planes_b = p.deep && p.phased ? TRAITS::Low::PLANES : p.planes_a;
  p.stages_a = stages(p.a, p.planes_a);
  p.stages = p.stages_a + (p.b.data ? stages(p.b, p.planes_b) : 0);
  const int64_t columns = int64_t{1} * p.tiles_x * p.co_blocks, planes = int64_t{1} * p.images * p.depth;
  if (columns >= int64_t{1} << 31 || p.tiles_y > hw::MOST_BLOCKS || planes > hw::MOST_BLOCKS) return "too many tiles";
  const hw::Grid grid{static_cast<int>(columns), p.tiles_y, static_cast<int>(planes)};
  return hw::launch<conv_kernel<TRAITS>>(grid, TRAITS::THREADS, TRAITS::SHARED, stream, p);
}

// ---- Dispatch: the configurations of kernels/cuda_ops.py by number ----

template <typename T>
const char* dispatch_conv(int config, const ConvArguments& p, Stream stream) {
  switch (config) {
    case 0:
      return launch_conv<ConvTraits<T, 32, 16, 1, false>>(p, stream);
    case 1:
      return launch_conv<ConvTraits<T, 32, 8, 2, false>>(p, stream);
    case 2:
      return launch_conv<ConvTraits<T, 64, 8, 1, false>>(p, stream);
    case 3:
      return launch_conv<ConvTraits<T, 64, 8, 2, false>>(p, stream);
    case 4:
      return launch_conv<ConvTraits<T, 32, 32, 1, true>>(p, stream);
    case 5:
      return launch_conv<ConvTraits<T, 32, 16, 1, true>>(p, stream);
    case 6:
      return launch_conv<ConvTraits<T, 64, 16, 1, true>>(p, stream);
    case 7:
      return launch_conv<ConvTraits<T, 64, 8, 1, true>>(p, stream);
  }
  return "no such configuration of conv";
}
