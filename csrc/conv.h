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
// Bytes per stage, 16-bit: ROWS = 16, CO_TILE = 32: tile 18 x 34 x 80 = 48,960 and weights 9 x 32 x 64 = 18,432; ROWS = 8:
// 27,200; CO_TILE = 64: 36,864. The low source: 10 x 18 x 80 (6 x 18 x 80) and 16 x 32 x 64 (128). 32 bits: the same.
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
  int image, tile, z, y, x, co;       // of the block
  int warp_row, parity, part, group;  // of the warp: row of pixels, column parity, 32 channels; and lane / 4

  HW_FUNCTION Place(const ConvArguments& p, int block, int thread) {
    co = block % p.co_blocks * TRAITS::CO_TILE;
    tile = block / p.co_blocks;
    const int tiles = p.tiles_y * p.tiles_x;
    image = tile / tiles / p.depth;
    z = tile / tiles % p.depth;
    y = tile % tiles / p.tiles_x * TRAITS::OUT_ROWS;
    x = tile % p.tiles_x * TRAITS::OUT_COLUMNS;
    const int warp = thread / 32, pixels = warp % TRAITS::PIXEL_WARPS;
    part = warp / TRAITS::PIXEL_WARPS;
    parity = pixels % TRAITS::WARP_COLUMNS;
    warp_row = pixels / TRAITS::WARP_COLUMNS;
    group = thread % 32 / 4;
  }
  HW_FUNCTION int row(int m) const { return y + warp_row * TRAITS::M + m; }
  HW_FUNCTION int column(int half) const { return x + (group + 8 * half) * TRAITS::WARP_COLUMNS + parity; }
  HW_FUNCTION bool inside(const ConvArguments& p, int m, int half) const {
    return row(m) < p.height && column(half) < p.width;
  }
};

// Adds the products of one stage: `steps` times 32 bytes of channels.
template <typename TRAITS, typename KIND>
HW_FUNCTION void add_products(float (&acc)[TRAITS::M][4][4], uint32_t stage, int steps, const Place<TRAITS>& place) {
  using T = typename TRAITS::T;
  using TILE = typename KIND::TILE;
  constexpr int CHUNK = Format<T>::CHUNK, ROW = TRAITS::WEIGHT_ROW;
  const uint32_t pixels = stage + TILE::at(place.warp_row * KIND::WARP_ROWS, 0);
  const int parity = hw::fault(hw::Fault::phase) ? 0 : place.parity;
  const uint32_t weights = stage + TILE::BYTES + parity * KIND::PHASE_TAPS * CHUNK * ROW;
  HW_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    const uint32_t step_weights = weights + step * Format<T>::STEP * ROW;
    HW_NO_UNROLL
    for (int x = 0; x < KIND::COLUMNS; ++x) {
      hw::Word b[KIND::SLOTS][4][2];
      const uint32_t column = pixels + TILE::column(place.parity + x) * PITCH + step * 32;
      HW_UNROLL
      for (int r = 0; r < KIND::FRAMES; ++r) {
        HW_UNROLL
        for (int slot = 0; slot < KIND::SLOTS; ++slot)
          if (KIND::begin(slot) == r && (slot || !hw::fault(hw::Fault::unwritten)))
            load_columns<T, TRAITS::CO_TILE>(b[slot], step_weights, KIND::tap(x, slot) * CHUNK, place.part);
        hw::Word a[4];
        load_pixels<T>(a, column + TILE::at(r, 0));
        HW_UNROLL
        for (int m = 0; m < TRAITS::M; ++m) {
          const int slot = KIND::use(m, r);
          if (slot < 0 || slot >= KIND::SLOTS) continue;
          HW_UNROLL
          for (int n = 0; n < 4; ++n) hw::multiply<T>(acc[m][n], a, b[slot][n]);
        }
      }
    }
  }
}

// Contents of stage `index` of an operand: channels of a plane from k on, and the taps from `tap` on.
struct Part {
  int k, plane, tap;

  template <typename KIND>
  HW_FUNCTION static Part of(int index, const ConvArguments& p, int z, int chunk) {
    if (!p.deep) return {index * chunk, 0, 0};
    const int t = index % KIND::PLANES;
    return {index / KIND::PLANES * chunk, KIND::plane(z, t) + hw::fault(hw::Fault::plane), KIND::plane_tap(z, t)};
  }
};

template <typename TRAITS, typename KIND>
HW_FUNCTION void load_stage(uint32_t stage, const Map& map, const char* weights, int index, const ConvArguments& p,
                            const Place<TRAITS>& place) {
  using TILE = typename KIND::TILE;
  const Part part = Part::of<KIND>(index, p, place.z, Format<typename TRAITS::T>::CHUNK);
  load_tile<TILE, TRAITS::THREADS>(stage, map, place.image, part.plane, KIND::origin(place.y), KIND::origin(place.x),
                                   part.k);
  load_weights<typename TRAITS::T, TRAITS::CO_TILE, KIND::TAPS, TRAITS::THREADS>(
      stage + TILE::BYTES, weights, map.channels, p.channels, part.k, place.co, part.tap, p.deep ? KIND::GROUP : 4,
      p.vector_weights);
}

template <typename TRAITS, typename KIND>
HW_FUNCTION void transform_stage(uint32_t stage, const Map& map, int index, const ConvArguments& p,
                                 const Place<TRAITS>& place) {
  const Part part = Part::of<KIND>(index, p, place.z, Format<typename TRAITS::T>::CHUNK);
  transform_tile<typename KIND::TILE, TRAITS::THREADS>(stage, map, place.image, part.plane, KIND::origin(place.y),
                                                       KIND::origin(place.x), part.k, p.slope);
}

// The stages in order: those of `a`, then those of `b`.
template <typename TRAITS>
struct Stages {
  static constexpr int CHUNK = Format<typename TRAITS::T>::CHUNK;
  const ConvArguments& p;

  // Computed again for each use, to leave the registers to the accumulators.
  HW_FUNCTION Place<TRAITS> place() const { return {p, hw::forgotten(hw::block()), hw::forgotten(hw::thread())}; }
  HW_FUNCTION static uint32_t memory(int index) { return index % TRAITS::STAGES * TRAITS::STAGE; }
  HW_FUNCTION bool of_low(int index) const { return !TRAITS::GATHERED && index >= p.stages_a && p.phased; }

  HW_FUNCTION void load(int index) const {
    using First = typename TRAITS::First;
    if (index < p.stages_a)
      load_stage<TRAITS, First>(memory(index), p.a, p.weights_a, index, p, place());
    else if (of_low(index))
      load_stage<TRAITS, typename TRAITS::Low>(memory(index), p.b, p.weights_b, index - p.stages_a, p, place());
    else
      load_stage<TRAITS, First>(memory(index), p.b, p.weights_b, index - p.stages_a, p, place());
  }
  HW_FUNCTION void transform(int index) const {
    using First = typename TRAITS::First;
    const int mine = index < p.stages_a ? index : index - p.stages_a;
    if (of_low(index))
      transform_stage<TRAITS, typename TRAITS::Low>(memory(index), p.b, mine, p, place());
    else
      transform_stage<TRAITS, First>(memory(index), index < p.stages_a ? p.a : p.b, mine, p, place());
  }
  HW_FUNCTION void multiply(int index, float (&acc)[TRAITS::M][4][4]) const {
    constexpr int STEP = Format<typename TRAITS::T>::STEP;
    const int k = (index < p.stages_a ? index / p.planes_a : (index - p.stages_a) / p.planes_b) * CHUNK;
    const int left = (index < p.stages_a ? p.a.channels : p.b.channels) - k;
    const int steps = left > STEP ? 2 : 1;
    if constexpr (!TRAITS::GATHERED)
      if (of_low(index)) return add_products<TRAITS, typename TRAITS::Low>(acc, memory(index), steps, place());
    add_products<TRAITS, typename TRAITS::First>(acc, memory(index), steps, place());
  }
};

#include "conv_epilogue.h"

template <typename TRAITS>
HW_KERNEL void HW_BOUNDS(TRAITS::THREADS, TRAITS::BLOCKS) conv_kernel(HW_CONSTANT ConvArguments p) {
  const Stages<TRAITS> stages{p};
  float acc[TRAITS::M][4][4];
  if (TRAITS::STAGES == 2) stages.load(0);
  begin(acc, p, stages.place());
  HW_NO_UNROLL
  for (int index = 0; index < p.stages; ++index) {
    if (TRAITS::STAGES == 1) {
      if (index && !hw::fault(hw::Fault::reuse)) hw::barrier();  // every thread has read the previous stage
      stages.load(index);
    }
    hw::wait_copies();
    stages.transform(index);
    if (!hw::fault(hw::Fault::barrier)) hw::barrier();  // every thread has written this stage and read the previous one
    if (TRAITS::STAGES == 2 && index + 1 < p.stages) stages.load(index + 1);
    stages.multiply(index, acc);
  }
  finish(acc, p, stages.place());
}

// ---- Launch ----

template <typename TRAITS>
const char* launch_conv(ConvArguments p, Stream stream) {
  using T = typename TRAITS::T;
  const auto aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  };
  for (Map* map : {&p.a, &p.b}) map->set_vector(sizeof(T));
  p.vector_weights = aligned(p.weights_a, p.channels) && aligned(p.weights_b, p.channels);
  p.vector_out = aligned(p.out, p.out_pixel_stride) && aligned(p.out, p.out_image_stride) && aligned(nullptr, p.channels);
  p.relu = p.slope == 0;
  p.tiles_y = (p.height + TRAITS::OUT_ROWS - 1) / TRAITS::OUT_ROWS;
  p.tiles_x = (p.width + TRAITS::OUT_COLUMNS - 1) / TRAITS::OUT_COLUMNS;
  p.co_blocks = (p.channels + TRAITS::CO_TILE - 1) / TRAITS::CO_TILE;
  if (p.deep) p.planes_a = TRAITS::First::PLANES, p.planes_b = p.phased ? TRAITS::Low::PLANES : TRAITS::First::PLANES;
  const auto stages = [](const Map& map, int planes) {
    return (map.channels + Format<T>::CHUNK - 1) / Format<T>::CHUNK * planes;
  };
  p.stages_a = stages(p.a, p.planes_a);
  p.stages = p.stages_a + (p.b.data ? stages(p.b, p.planes_b) : 0);
  const int64_t blocks = int64_t{1} * p.images * p.depth * p.tiles_y * p.tiles_x * p.co_blocks;
  if (blocks >= int64_t{1} << 31) return "more than 2^31 tiles";
  return hw::launch<conv_kernel<TRAITS>>(static_cast<int>(blocks), 1, TRAITS::THREADS, TRAITS::SHARED, stream, p);
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
      return launch_conv<ConvTraits<T, 32, 16, 1, true>>(p, stream);
    case 5:
      return launch_conv<ConvTraits<T, 64, 8, 1, true>>(p, stream);
  }
  return "no such configuration of conv";
}
