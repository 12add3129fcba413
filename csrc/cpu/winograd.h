// Winograd's minimal filtering (Lavin and Gray, 2016): m x m outputs of an r x r filter by n x n products, n = m + r - 1.
//
//     Y = A' [ (G w G') * (B' d B) ] A          points 0, +-5/8, +-3/2, infinity for r = 3
//                                               points +-7/16, +-11/8, infinity  for r = 2
//
// Of symmetric points without rounding these have the least error, near that of a direct sum; +-1, +-2 lose three times as
// much. Here are the transforms of inputs,
// of outputs, of weights, of the gradients of outputs (A applied to them), and of sums in the transformed domain to gradients
// of weights (G').
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

struct ThreeTaps {
  static constexpr int m = 4, n = 6, r = 3;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;

  INLINE void input(const V* d, V* o) {
    o[0] = d[4] - (a2 + b2) * d[2] + (a2 * b2) * d[0];
    V even = d[4] - b2 * d[2], odd = d[3] - b2 * d[1];
    o[1] = even + a * odd;
    o[2] = even - a * odd;
    even = d[4] - a2 * d[2];
    odd = d[3] - a2 * d[1];
    o[3] = even + b * odd;
    o[4] = even - b * odd;
    o[5] = d[5] - (a2 + b2) * d[3] + (a2 * b2) * d[1];
  }
  INLINE void output(const V* x, V* y) {
    V p = x[1] + x[2], q = x[1] - x[2], r = x[3] + x[4], s = x[3] - x[4];
    y[0] = x[0] + p + r;
    y[1] = a * (q + (b / a) * s);
    y[2] = a2 * (p + (b2 / a2) * r);
    y[3] = (a * a2) * (q + (b * b2 / (a * a2)) * s) + x[5];
  }
  INLINE void gradient(const V* y, V* o) {
    o[0] = y[0];
    V even = y[0] + a2 * y[2], odd = a * y[1] + (a * a2) * y[3];
    o[1] = even + odd;
    o[2] = even - odd;
    even = y[0] + b2 * y[2];
    odd = b * y[1] + (b * b2) * y[3];
    o[3] = even + odd;
    o[4] = even - odd;
    o[5] = y[3];
  }
  INLINE void weights(const V* w, V* x) {
    constexpr float u = -1 / (2 * a2 * (b2 - a2)), v = 1 / (2 * b2 * (b2 - a2));
    const V low = w[0] + a2 * w[2], high = w[0] + b2 * w[2];
    x[0] = (1 / (a2 * b2)) * w[0];
    x[1] = u * (low + a * w[1]);
    x[2] = u * (low - a * w[1]);
    x[3] = v * (high + b * w[1]);
    x[4] = v * (high - b * w[1]);
    x[5] = w[2];
  }
  INLINE void filter(const V* x, V* w) {
    constexpr float u = -1 / (2 * a2 * (b2 - a2)), v = 1 / (2 * b2 * (b2 - a2));
    w[0] = (1 / (a2 * b2)) * x[0] + u * (x[1] + x[2]) + v * (x[3] + x[4]);
    w[1] = (u * a) * (x[1] - x[2]) + (v * b) * (x[3] - x[4]);
    w[2] = (u * a2) * (x[1] + x[2]) + (v * b2) * (x[3] + x[4]) + x[5];
  }
};

struct TwoTaps {
  static constexpr int m = 4, n = 5, r = 2;
  static constexpr float a = 0.4375f, b = 1.375f, a2 = a * a, b2 = b * b;

  INLINE void input(const V* d, V* o) {
    V even = d[3] - b2 * d[1], odd = d[2] - b2 * d[0];
    o[0] = even + a * odd;
    o[1] = even - a * odd;
    even = d[3] - a2 * d[1];
    odd = d[2] - a2 * d[0];
    o[2] = even + b * odd;
    o[3] = even - b * odd;
    o[4] = d[4] - (a2 + b2) * d[2] + (a2 * b2) * d[0];
  }
  INLINE void output(const V* x, V* y) {
    V p = x[0] + x[1], q = x[0] - x[1], r = x[2] + x[3], s = x[2] - x[3];
    y[0] = p + r;
    y[1] = a * (q + (b / a) * s);
    y[2] = a2 * (p + (b2 / a2) * r);
    y[3] = (a * a2) * (q + (b * b2 / (a * a2)) * s) + x[4];
  }
  INLINE void gradient(const V* y, V* o) {
    V even = y[0] + a2 * y[2], odd = a * y[1] + (a * a2) * y[3];
    o[0] = even + odd;
    o[1] = even - odd;
    even = y[0] + b2 * y[2];
    odd = b * y[1] + (b * b2) * y[3];
    o[2] = even + odd;
    o[3] = even - odd;
    o[4] = y[3];
  }
  INLINE void weights(const V* w, V* x) {
    constexpr float u = -1 / (2 * a * (b2 - a2)), v = 1 / (2 * b * (b2 - a2));
    x[0] = u * (a * w[1] + w[0]);
    x[1] = u * (a * w[1] - w[0]);
    x[2] = v * (b * w[1] + w[0]);
    x[3] = v * (b * w[1] - w[0]);
    x[4] = w[1];
  }
  INLINE void filter(const V* x, V* w) {
    constexpr float u = -1 / (2 * a * (b2 - a2)), v = 1 / (2 * b * (b2 - a2));
    w[0] = u * (x[0] - x[1]) + v * (x[2] - x[3]);
    w[1] = (u * a) * (x[0] + x[1]) + (v * b) * (x[2] + x[3]) + x[4];
  }
};

// A plane of one image on a lattice of its pixels, every one or every second.
template <class E>
struct Plane {
  const E* data;
  int64_t row, column;  // from lattice point to lattice point
  int height, width;    // in lattice points
  int channels;
  const float* scale;
  const float* shift;
  float slope;
  int plain;  // leading channels that are read as they are
};

// What a reader of a plane with `scale` sees of channels c to c + LANES.
template <class E>
INLINE V read(const Plane<E>& plane, V x, V scale, V shift, int c) {
  const V read = activate(x * scale + shift, plane.slope);
  return c < plane.plain ? first_lanes(plane.plain - c, x, read) : read;
}

template <class E>
INLINE Plane<E> plane_of(const Map& map, int64_t image, int z, float slope, int step = 1, int py = 0, int px = 0) {
  Plane<E> plane;
  plane.data = at<E>(map, image, (static_cast<int64_t>(z) * map.height + py - map.origin) * map.width + px);
  plane.row = static_cast<int64_t>(step) * map.width * map.pixel;
  plane.column = step * map.pixel;
  plane.height = (map.height - py + step - 1) / step;
  plane.width = (map.width - px + step - 1) / step;
  plane.channels = map.channels;
  plane.scale = map.scale ? map.scale + image * map.affine_image : nullptr;
  plane.shift = map.shift ? map.shift + image * map.affine_image : nullptr;
  plane.slope = slope;
  plane.plain = map.plain;
  return plane;
}

// The transform of the n x n points from (y0, x0) on, those outside zero, to result[t * stride + channel].
// GRADIENT: A of the m x m points instead of B'.
template <class T, bool GRADIENT, class E>
static void transform(const Plane<E>& plane, int y0, int x0, float* result, int64_t stride) {
  constexpr int n = T::n, size = GRADIENT ? T::m : T::n;
  const bool inside = y0 >= 0 && x0 >= 0 && y0 + size <= plane.height && x0 + size <= plane.width;
  for (int c = 0; c < plane.channels; c += LANES) {
    const int count = plane.channels - c;
    V scale = {}, shift = {};
    if (plane.scale) {
      scale = load_some(plane.scale + c, count);
      shift = load_some(plane.shift + c, count);
    }
    V columns[n][size];
    for (int x = 0; x < size; x++) {
      V d[size], r[n];
#pragma GCC unroll 6
      for (int y = 0; y < size; y++) {
        d[y] = V{};
        const unsigned row = y0 + y, column = x0 + x;
        if (inside || (row < static_cast<unsigned>(plane.height) && column < static_cast<unsigned>(plane.width))) {
          d[y] = load_some(plane.data + row * plane.row + column * plane.column + c, count);
          if (plane.scale) d[y] = read(plane, d[y], scale, shift, c);
        }
      }
      if (GRADIENT)
        T::gradient(d, r);
      else
        T::input(d, r);
#pragma GCC unroll 6
      for (int y = 0; y < n; y++) columns[y][x] = r[y];
    }
    for (int y = 0; y < n; y++) {
      V r[n];
      if (GRADIENT)
        T::gradient(columns[y], r);
      else
        T::input(columns[y], r);
#pragma GCC unroll 6
      for (int x = 0; x < n; x++) store(result + (y * n + x) * stride + c, r[x]);
    }
  }
}

// The m x m outputs of one tile from products[t * stride + channel], for LANES channels, into y.
template <class T>
INLINE void inverse(const float* products, int64_t stride, V y[T::m][T::m]) {
  constexpr int n = T::n, m = T::m;
  V rows[m][n];
  for (int x = 0; x < n; x++) {
    V d[n], r[m];
#pragma GCC unroll 6
    for (int t = 0; t < n; t++) d[t] = load(products + (t * n + x) * stride);
    T::output(d, r);
#pragma GCC unroll 4
    for (int t = 0; t < m; t++) rows[t][x] = r[t];
  }
#pragma GCC unroll 4
  for (int t = 0; t < m; t++) T::output(rows[t], y[t]);
}

}  // namespace ISA
}  // namespace unetpp
