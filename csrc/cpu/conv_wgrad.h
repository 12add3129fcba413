// The gradient of a convolution's weights in the transformed domain, the adjoint of the forward pass:
//
//     dW = G' [ sum over tiles (B' d B) * (A dY A') ] G
//
// Tiles are transformed in batches that fit the scratch memory. Then every sum over the tiles of a batch is one thread's, in
// their order, for as many input channels at a time as stay in the cache until the last transform adds them to the result:
// the same bits for any number of threads.
#pragma once

#include "winograd.h"

namespace unetpp {
namespace ISA {

constexpr int TILES_SUMMED = 32;  // tiles whose products are summed before they are added to the sum of all, as in a `STRETCH`

// sums[k, c] = sum over tiles, stretch by stretch, of a[tile, k] dy[tile, c], for R rows k and COLUMNS vectors of columns c.
template <int R, int COLUMNS>
static void outer(const float* a, int64_t a_tile, const float* dy, int64_t dy_tile, int64_t tiles, float* sums,
                  int64_t row) {
  for (int64_t first = 0; first == 0 || first < tiles; first += TILES_SUMMED) {
    V acc[R][COLUMNS] = {};
    for (int64_t j = std::min<int64_t>(TILES_SUMMED, tiles - first); j > 0; j--, a += a_tile, dy += dy_tile) {
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
        store(place, first ? load(place) + acc[r][c] : acc[r][c]);
      }
  }
}

constexpr int OUTER_ROWS = 4;  // divides every padded channel count
constexpr int SUMS = 1 << 19;  // values that stay in the cache

// One pair of planes per image and depth: of the operand, shifted, and of dy on its lattice.
struct Pairing {
  int dz, y, x;                     // shift of the operand's plane, and of its first tap
  int step, pz, py, px, z_step;     // lattice of dy
};

// The tiles of all pairs of planes, in the order of images and planes.
struct Tiles {
  int across, per_plane, first_z;
  int64_t planes, total;

  Tiles(const Wgrad& call, const Pairing& pair, int m) {
    const int height = call.dy.height / pair.step, width = call.dy.width / pair.step, depth = call.dy.depth / pair.z_step;
    across = (width + m - 1) / m;
    per_plane = (height + m - 1) / m * across;
    // Planes whose partner lies outside the map add nothing.
    first_z = std::max(0, -pair.dz);
    planes = std::max(0, std::min(depth, call.a.depth - pair.dz) - first_z);
    total = call.images * planes * per_plane;
  }
};

// Tiles `start` to `start + count`, transformed: inputs [n * n, count, k] and gradients [n * n, count, co].
template <class T, class E>
static void transform_tiles(const Wgrad& call, const Pairing& pair, const Tiles& tiles, int64_t start, int64_t count, int k,
                            int co, float* inputs, float* gradients) {
  parallel_for((count + 7) / 8, [&](int64_t group) {
    for (int64_t j = group * 8; j < std::min(count, group * 8 + 8); j++) {
      const int64_t plane = (start + j) / tiles.per_plane, place = (start + j) % tiles.per_plane;
      const int64_t image = plane / tiles.planes;
      const int z = tiles.first_z + static_cast<int>(plane % tiles.planes);
      const int y = place / tiles.across * T::m, x = place % tiles.across * T::m;
      const Plane<E> a = plane_of<E>(call.a, image, z + pair.dz, call.slope);
      const Plane<E> dy = plane_of<E>(call.dy, image, z * pair.z_step + pair.pz, 0, pair.step, pair.py, pair.px);
      transform<T, false>(a, y + pair.y, x + pair.x, inputs + j * k, count * k);
      transform<T, true>(dy, y, x, gradients + j * co, count * co);
    }
  });
}

constexpr int FILTER_ROWS = 16;  // input channels that one thread transforms at a time

// result[t, first + row, c] (+)= G' S G, r x r, of the n x n sums S [n * n, rows, co] of each pair of channels.
template <class T>
static void filters(const Wgrad& call, const float* sums, int first, int rows, int co, bool add, float* result) {
  const int outputs = call.dy.channels, given = std::min(rows, call.a.channels - first);
  const int vectors = (outputs + LANES - 1) / LANES, pieces = (given + FILTER_ROWS - 1) / FILTER_ROWS;
  parallel_for(static_cast<int64_t>(vectors) * pieces, [&](int64_t index) {
    const int c = index % vectors * LANES, count = std::min(LANES, outputs - c), from = index / vectors * FILTER_ROWS;
    for (int row = from; row < std::min(given, from + FILTER_ROWS); row++) {
      V columns[T::r][T::n], w[T::r][T::r];
      for (int x = 0; x < T::n; x++) {
        V d[T::n], y[T::r];
        for (int t = 0; t < T::n; t++) d[t] = load(sums + (static_cast<int64_t>(t * T::n + x) * rows + row) * co + c);
        T::filter(d, y);
        for (int t = 0; t < T::r; t++) columns[t][x] = y[t];
      }
      for (int y = 0; y < T::r; y++) T::filter(columns[y], w[y]);
      float* place = result + (first + row) * call.k + c * call.co;
      for (int t = 0; t < T::r * T::r; t++, place += call.tap) {
        const V value = w[t / T::r][t % T::r];
        if (call.co == 1)
          store_some(place, add ? load_some(place, count) + value : value, count);
        else
          for (int lane = 0; lane < count; lane++)
            place[lane * call.co] = add ? place[lane * call.co] + value[lane] : value[lane];
      }
    }
  });
}

// One filter, r x r taps, into result.
template <class T, class E>
static void wgrad_filter(const Wgrad& call, const Pairing& pair, float* result) {
  constexpr int n2 = T::n * T::n;
  const int k = round_up(call.a.channels, LANES), co = round_up(call.dy.channels, LANES);
  const Tiles tiles(call, pair, T::m);
  if (tiles.total == 0)
    for (int t = 0; t < T::r * T::r; t++)
      for (int k = 0; k < call.a.channels; k++)
        for (int c = 0; c < call.dy.channels; c++) result[t * call.tap + k * call.k + c * call.co] = 0;
  const int at_once = std::min(k, std::max(1, SUMS / (n2 * co * OUTER_ROWS)) * OUTER_ROWS);
  float* sums = scratch.get(static_cast<int64_t>(n2) * at_once * co);
  const int64_t batch = std::max<int64_t>(1, call.scratch_size / (static_cast<int64_t>(n2) * (k + co)));
  for (int64_t start = 0; start < tiles.total; start += batch) {
    const int64_t count = std::min(batch, tiles.total - start);
    float *inputs = call.scratch, *gradients = inputs + n2 * count * k;
    transform_tiles<T, E>(call, pair, tiles, start, count, k, co, inputs, gradients);
    for (int first = 0; first < call.a.channels; first += at_once) {
      const int rows = std::min(at_once, k - first), groups = rows / OUTER_ROWS;
      parallel_for(static_cast<int64_t>(n2) * groups, [&](int64_t index) {
        const int t = index / groups, r = index % groups * OUTER_ROWS;
        const float *a = inputs + t * count * k + first + r, *dy = gradients + t * count * co;
        float* place = sums + (static_cast<int64_t>(t) * rows + r) * co;
        int c = 0;
        for (; c + WIDTH <= co; c += WIDTH) outer<OUTER_ROWS, 2>(a, k, dy + c, co, count, place + c, co);
        if (c < co) outer<OUTER_ROWS, 1>(a, k, dy + c, co, count, place + c, co);
      });
      filters<T>(call, sums, first, rows, co, start > 0, result);
    }
  }
}

// body(planes, result) for every filter of taps in a plane.
template <class F>
static void each_filter(const Wgrad& call, const F& body) {
  const bool deep = call.axes == 3;
  const int taps = call.phased ? 2 : 3, depth_taps = deep ? taps : 1, phases = call.phased ? (deep ? 8 : 4) : 1;
  for (int phase = 0; phase < phases; phase++) {
    float* result = call.result + phase * call.phase;
    const int pz = phase / 4, py = phase / 2 % 2, px = phase % 2;
    for (int t = 0; t < depth_taps; t++, result += taps * taps * call.tap)
      if (call.phased)
        body(Pairing{deep ? pz - 1 + t : 0, py - 1, px - 1, 2, pz, py, px, deep ? 2 : 1}, result);
      else
        body(Pairing{deep ? t - 1 : 0, -1, -1, 1, 0, 0, 0, 1}, result);
  }
}

template <class E>
static void conv_wgrad(const Wgrad& call) {
  each_filter(call, [&](const Pairing& pair, float* result) {
    if (call.phased)
      wgrad_filter<TwoTaps, E>(call, pair, result);
    else
      wgrad_filter<ThreeTaps, E>(call, pair, result);
  });
}

}  // namespace ISA
}  // namespace unetpp
