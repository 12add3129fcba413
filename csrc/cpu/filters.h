// Weights as a convolution reads them: from the caller's tensor, of any strides, transformed (U = G w G') or as they are,
// into panels [points, channels, WIDTH] for one block of output channels.
#pragma once

#include "winograd.h"

namespace unetpp {
namespace ISA {

// No transform: the taps themselves.
struct Taps {
  static constexpr int r = 0;
};

template <class T>
INLINE int points_of(const Filters& filters) {
  if constexpr (std::is_same<T, Taps>::value)
    return filters.taps;
  else
    return T::n * T::n;
}

constexpr int GATHERED_CHANNELS = 8;  // input channels that are read at a time

// to[tap, k, c] of `rows` input channels and `columns` output channels; nothing else is written.
template <int TAPS>
static void gather(const Filters& filters, const float* from, int rows, int columns, float* to) {
  constexpr int64_t tap = static_cast<int64_t>(GATHERED_CHANNELS) * WIDTH;
  const int taps = TAPS ? TAPS : filters.taps;
  int64_t offsets[64];
  for (int t = 0; t < taps; t++) offsets[t] = filters.offset(t);
  if (filters.co == 1) {
    for (int t = 0; t < taps; t++)
      for (int r = 0; r < rows; r++)
        std::memcpy(to + t * tap + r * WIDTH, from + offsets[t] + r * filters.k, sizeof(float) * columns);
    return;
  }
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++) {
      const float* place = from + c * filters.co + r * filters.k;
#pragma GCC unroll 9
      for (int t = 0; t < taps; t++) to[t * tap + r * WIDTH + c] = place[offsets[t]];
    }
}

// The transform of one input channel, from taps at distance `tap`, to points at distance `point`.
template <class T>
INLINE void weigh(const Filters& filters, const float* taps, int64_t tap, float* to, int64_t point) {
  if constexpr (std::is_same<T, Taps>::value) {
    for (int t = 0; t < filters.taps; t++) std::memcpy(to + t * point, taps + t * tap, sizeof(float) * WIDTH);
  } else {
    for (int v = 0; v < WIDTH; v += LANES) {
      V columns[T::n][T::r];
      for (int x = 0; x < T::r; x++) {
        V w[T::r], u[T::n];
        for (int y = 0; y < T::r; y++) w[y] = load(taps + (y * T::r + x) * tap + v);
        T::weights(w, u);
        for (int y = 0; y < T::n; y++) columns[y][x] = u[y];
      }
      for (int y = 0; y < T::n; y++) {
        V u[T::n];
        T::weights(columns[y], u);
        for (int x = 0; x < T::n; x++) store(to + (y * T::n + x) * point + v, u[x]);
      }
    }
  }
}

// Filter `filter` for block `block` of outputs and input channels k0 to k0 + rows, to[p * point + (k - k0) * WIDTH]; what
// lies beyond the channels is zero.
template <class T>
ONCE static void panel(const Filters& filters, int filter, int block, int k0, int rows, float* to, int64_t point) {
  float taps[64 * GATHERED_CHANNELS * WIDTH];
  const float* from = filters.at(filter) + k0 * filters.k + static_cast<int64_t>(block) * WIDTH * filters.co;
  const int columns = std::min(WIDTH, filters.outputs - block * WIDTH);
  if (columns < WIDTH) std::memset(taps, 0, sizeof(float) * filters.taps * GATHERED_CHANNELS * WIDTH);
  for (int k = 0; k < rows; k += GATHERED_CHANNELS) {
    const int here = std::min(GATHERED_CHANNELS, rows - k), given = std::min(here, filters.channels - k0 - k);
    gather<T::r * T::r>(filters, from + k * filters.k, given, columns, taps);
    for (int r = 0; r < given; r++)
      weigh<T>(filters, taps + r * WIDTH, GATHERED_CHANNELS * WIDTH, to + static_cast<int64_t>(k + r) * WIDTH, point);
    for (int r = given; r < here; r++)
      for (int p = 0; p < points_of<T>(filters); p++)
        std::memset(to + p * point + static_cast<int64_t>(k + r) * WIDTH, 0, sizeof(float) * WIDTH);
  }
}

// All filters, [filters, points, blocks of outputs, channels rounded up to 4, WIDTH].
template <class T>
static void pack_all(const Filters& filters, float* to) {
  const int blocks = (filters.outputs + WIDTH - 1) / WIDTH, k = round_up(filters.channels, 4);
  constexpr int rows = 32;
  const int pieces = (k + rows - 1) / rows;
  const int64_t point = static_cast<int64_t>(blocks) * k * WIDTH;
  parallel_for(static_cast<int64_t>(filters.count()) * blocks * pieces, [&](int64_t index) {
    const int filter = index / pieces / blocks, block = index / pieces % blocks, k0 = index % pieces * rows;
    panel<T>(filters, filter, block, k0, std::min(rows, k - k0),
             to + filter * points_of<T>(filters) * point + (static_cast<int64_t>(block) * k + k0) * WIDTH, point);
  });
}

static void pack(const Filters& filters, bool winograd, float* to) {
  if (!winograd)
    pack_all<Taps>(filters, to);
  else if (filters.taps == 9)
    pack_all<ThreeTaps>(filters, to);
  else
    pack_all<TwoTaps>(filters, to);
}

}  // namespace ISA
}  // namespace unetpp
