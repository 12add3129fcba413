// A low source that is up-sampled linearly, piece by piece, where a convolution is about to read it: the whole map never exists.
#pragma once

#include "winograd.h"

namespace unetpp {
namespace ISA {

// A pixel of the up-sampled axis lies between pixels `low` and `high` of the source, `part` of the way.
struct Between {
  int low, high;
  float part;

  Between(int place, int size, bool align_corners) {
    const double at = align_corners ? place * (size - 1.0) / (2.0 * size - 1) : std::max(0.0, (place + 0.5) / 2 - 0.5);
    low = std::min(static_cast<int>(at), size - 1);
    high = std::min(low + 1, size - 1);
    part = static_cast<float>(at - low);
  }
};

// Two rows of one plane of the source or of two, averaged as `weights` [planes, 2 rows] say: from column `first` on, to
// [columns, channels rounded up to LANES].
template <class E>
static void average_rows(const Plane<E>* planes, int count, const int* rows, const float* weights, int first, int columns,
                         float* to) {
  const int padded = round_up(planes[0].channels, LANES);
  for (int c = 0; c < planes[0].channels; c += LANES) {
    const int some = planes[0].channels - c;
    V scale = {}, shift = {};
    if (planes[0].scale) {
      scale = load_some(planes[0].scale + c, some);
      shift = load_some(planes[0].shift + c, some);
    }
    for (int x = 0; x < columns; x++) {
      V total = {};
      for (int i = 0; i < 2 * count; i++) {
        const Plane<E>& plane = planes[i / 2];
        V value = load_some(plane.data + rows[i % 2] * plane.row + (first + x) * plane.column + c, some);
        if (plane.scale) value = read(plane, value, scale, shift, c);
        total += weights[i] * value;
      }
      store(to + static_cast<int64_t>(x) * padded + c, total);
    }
  }
}

// Values of memory that `up_sample` works in, for pieces of this many columns.
INLINE int64_t work_of(const Map& low, int columns) {
  return static_cast<int64_t>(columns / 2 + 3) * round_up(low.channels, LANES);
}

// Pixels (y0, x0) to (y0 + rows, x0 + columns) of plane z of the up-sampled map, to [rows, columns, pixel] values; zero
// outside the map.
template <class E, class To>
static void up_sample(const Map& low, int axes, bool align_corners, float slope, int64_t image, int z, int y0, int x0,
                      int rows, int columns, To* to, int64_t pixel, float* work) {
  const int padded = round_up(low.channels, LANES), height = 2 * low.height, width = 2 * low.width;
  const int left = std::min(columns, std::max(0, -x0)), right = std::max(left, std::min(columns, width - x0));
  const Between deep = axes == 3 ? Between(z, low.depth, align_corners) : Between(0, 1, false);
  const Plane<E> planes[2] = {plane_of<E>(low, image, deep.low, slope), plane_of<E>(low, image, deep.high, slope)};
  for (int y = 0; y < rows; y++, to += columns * pixel) {
    const bool inside = y0 + y >= 0 && y0 + y < height && right > left;
    const int from = inside ? left : columns, end = inside ? right : columns;
    std::memset(to, 0, sizeof(To) * from * pixel);
    std::memset(to + end * pixel, 0, sizeof(To) * (columns - end) * pixel);
    if (!inside) continue;
    const Between down(y0 + y, low.height, align_corners);
    const int pair[2] = {down.low, down.high}, first = Between(x0 + left, low.width, align_corners).low;
    const int last = Between(x0 + right - 1, low.width, align_corners).high;
    const float weights[4] = {(1 - deep.part) * (1 - down.part), (1 - deep.part) * down.part, deep.part * (1 - down.part),
                              deep.part * down.part};
    average_rows(planes, axes - 1, pair, weights, first, last - first + 1, work);
    for (int x = left; x < right; x++) {
      const Between across(x0 + x, low.width, align_corners);
      const float *a = work + (across.low - first) * padded, *b = work + (across.high - first) * padded;
      for (int c = 0; c < low.channels; c += LANES) {
        const V value = (1 - across.part) * load(a + c) + across.part * load(b + c);
        store_some(to + x * pixel + c, value, static_cast<int>(std::min<int64_t>(LANES, pixel - c)));
      }
    }
  }
}

// Such a piece as a plane of its own, in `memory`, of `piece_of` values.
template <class E>
static Plane<E> up_sampled(const Conv& conv, int64_t image, int z, int y0, int x0, int rows, int columns, float* memory) {
  const int64_t pixel = round_up(conv.b.channels, LANES);
  E* data = reinterpret_cast<E*>(memory + work_of(conv.b, columns));
  up_sample<E>(conv.b, conv.axes, conv.align_corners, conv.slope, image, z, y0, x0, rows, columns, data, pixel, memory);
  return {data, columns * pixel, pixel, rows, columns, conv.b.channels, nullptr, nullptr, 0, 0};
}

INLINE int64_t piece_of(const Conv& conv, int rows, int columns) {
  return work_of(conv.b, columns) + static_cast<int64_t>(rows) * columns * round_up(conv.b.channels, LANES);
}

}  // namespace ISA
}  // namespace unetpp
