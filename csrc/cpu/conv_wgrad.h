// The gradient of a convolution's weights in the transformed domain, the adjoint of the forward pass:
//
//     dW = G' [ sum over tiles (B' d B) * (A dY A') ] G
//
// Tiles are transformed in batches that fit the scratch memory; then every sum is one thread's, over the tiles in their
// order: the same bits for any number of threads.
#pragma once

#include "winograd.h"

namespace unetpp {
namespace ISA {

// sums[k, c] += sum over tiles of a[tile, k] dy[tile, c], for R rows k and COLUMNS vectors of columns c.
template <int R, int COLUMNS>
static void outer(const float* a, int64_t a_tile, const float* dy, int64_t dy_tile, int64_t tiles, float* sums,
                  int64_t row) {
  V acc[R][COLUMNS] = {};
  for (int64_t j = 0; j < tiles; j++, a += a_tile, dy += dy_tile) {
    V y[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      y[c] = load(dy + c * LANES);
      KEEP(y[c]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      V x = splat(a[r]);
#pragma GCC unroll 2
      for (int c = 0; c < COLUMNS; c++) acc[r][c] += x * y[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < COLUMNS; c++) {
      float* place = sums + r * row + c * LANES;
      store(place, load(place) + acc[r][c]);
    }
}

constexpr int OUTER_ROWS = 4;  // divides every padded channel count

// One pair of planes per image and depth: of the operand, shifted, and of dy on its lattice.
struct Pairing {
  int dz, y, x;                     // shift of the operand's plane, and of its first tap
  int step, pz, py, px, z_step;     // lattice of dy
};

template <class T, class E>
static void accumulate(const Wgrad& call, const Pairing& pair, float* sums) {
  constexpr int n2 = T::n * T::n;
  const int k = round_up(call.a.channels, LANES), co = round_up(call.dy.channels, LANES);
  const int height = call.dy.height / pair.step, width = call.dy.width / pair.step, depth = call.dy.depth / pair.z_step;
  const int down = (height + T::m - 1) / T::m, across = (width + T::m - 1) / T::m;
  const int per_plane = down * across;
  // Planes whose partner lies outside the map add nothing.
  const int first_z = std::max(0, -pair.dz), last_z = std::min(depth, call.a.depth - pair.dz);
  const int64_t planes = std::max(0, last_z - first_z), total = call.images * planes * per_plane;
  const int64_t batch = std::max<int64_t>(1, call.scratch_size / (static_cast<int64_t>(n2) * (k + co)));
  for (int64_t start = 0; start < total; start += batch) {
    const int64_t count = std::min(batch, total - start);
    float *inputs = call.scratch, *gradients = inputs + n2 * count * k;
    parallel_for((count + 7) / 8, [&](int64_t group) {
      for (int64_t j = group * 8; j < std::min(count, group * 8 + 8); j++) {
        const int64_t tile = start + j, image = tile / per_plane / planes;
        const int z = first_z + static_cast<int>(tile / per_plane % planes);
        const int y = tile % per_plane / across * T::m, x = tile % across * T::m;
        const Plane<E> a = plane_of<E>(call.a, image, z + pair.dz, call.slope);
        const Plane<E> dy = plane_of<E>(call.dy, image, z * pair.z_step + pair.pz, 0, pair.step, pair.py, pair.px);
        transform<T, false>(a, y + pair.y, x + pair.x, inputs + j * k, count * k);
        transform<T, true>(dy, y, x, gradients + j * co, count * co);
      }
    });
    const int rows = k / OUTER_ROWS;
    parallel_for(static_cast<int64_t>(n2) * rows, [&](int64_t index) {
      const int t = index / rows, r = index % rows * OUTER_ROWS;
      const float *a = inputs + t * count * k + r, *dy = gradients + t * count * co;
      float* place = sums + (static_cast<int64_t>(t) * k + r) * co;
      int c = 0;
      for (; c + WIDTH <= co; c += WIDTH) outer<OUTER_ROWS, 2>(a, k, dy + c, co, count, place + c, co);
      if (c < co) outer<OUTER_ROWS, 1>(a, k, dy + c, co, count, place + c, co);
    });
  }
}

// result[t, k, c] = G' S G, r x r, of the n x n sums S of each pair of channels.
template <class T>
static void filters(const Wgrad& call, const float* sums, float* result) {
  const int channels = call.a.channels, outputs = call.dy.channels;
  const int64_t k = round_up(channels, LANES), co = round_up(outputs, LANES);
  parallel_for(channels, [&](int64_t row) {
    for (int c = 0; c < outputs; c += LANES) {
      V rows[T::r][T::n];
      for (int x = 0; x < T::n; x++) {
        V d[T::n], w[T::r];
        for (int y = 0; y < T::n; y++) d[y] = load(sums + ((y * T::n + x) * k + row) * co + c);
        T::filter(d, w);
        for (int y = 0; y < T::r; y++) rows[y][x] = w[y];
      }
      for (int y = 0; y < T::r; y++) {
        V w[T::r];
        T::filter(rows[y], w);
        for (int x = 0; x < T::r; x++)
          store_some(result + (static_cast<int64_t>(y * T::r + x) * channels + row) * outputs + c, w[x], outputs - c);
      }
    }
  });
}

template <class E>
static void conv_wgrad(const Wgrad& call) {
  const bool deep = call.axes == 3;
  const int n2 = call.phased ? TwoTaps::n * TwoTaps::n : ThreeTaps::n * ThreeTaps::n;
  const int64_t size = static_cast<int64_t>(n2) * round_up(call.a.channels, LANES) * round_up(call.dy.channels, LANES);
  const int taps = call.phased ? 2 : 3, depth_taps = deep ? taps : 1;
  const int phases = call.phased ? (deep ? 8 : 4) : 1;
  for (int phase = 0; phase < phases; phase++) {
    const int pz = phase / 4, py = phase / 2 % 2, px = phase % 2;
    for (int t = 0; t < depth_taps; t++) {
      const int64_t filter = phase * depth_taps + t;
      float* sums = call.sums + filter * size;
      float* result = call.result + filter * taps * taps * call.a.channels * call.dy.channels;
      if (call.phased) {
        accumulate<TwoTaps, E>(call, {deep ? pz - 1 + t : 0, py - 1, px - 1, 2, pz, py, px, deep ? 2 : 1}, sums);
        filters<TwoTaps>(call, sums, result);
      } else {
        accumulate<ThreeTaps, E>(call, {deep ? t - 1 : 0, -1, -1, 1, 0, 0, 0, 1}, sums);
        filters<ThreeTaps>(call, sums, result);
      }
    }
  }
}

}  // namespace ISA
}  // namespace unetpp
