// The passes over whole maps: pooling, heads, and the gradients of norm and activation. Each reads its maps once, channels
// in vectors, pixels in chunks of a fixed size; sums are one row per chunk, added in their order by the caller.
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

// What a reader of the map sees of LANES channels of an image, before it is rounded.
template <class E>
INLINE V read(const E* from, const Map& map, int64_t image, int c, int count, float slope) {
  const V value = load_some(from + c, count);
  if (!map.scale) return value;
  const V scale = load_some(map.scale + image * map.affine_image + c, count);
  const V shift = load_some(map.shift + image * map.affine_image + c, count);
  return activate(value * scale + shift, slope);
}

INLINE int64_t pixels_of(const Map& map) { return static_cast<int64_t>(map.depth) * map.height * map.width; }
INLINE int64_t chunks_of(const Map& map, int64_t chunk) { return (pixels_of(map) + chunk - 1) / chunk; }

// body(image, chunk, first pixel, last pixel) for every chunk of every image.
template <class F>
static void over_chunks(const Pass& pass, const F& body) {
  const int64_t pixels = pixels_of(pass.x), chunks = chunks_of(pass.x, pass.chunk);
  parallel_for(pass.images * chunks, [&](int64_t index) {
    const int64_t image = index / chunks, chunk = index % chunks, first = chunk * pass.chunk;
    body(image, chunk, first, std::min(first + pass.chunk, pixels));
  });
}

// body(first, last) for stretches of the pixels, first to last: each is summed before it is added to the sum of a chunk,
// which keeps rounding errors small.
template <class F>
INLINE void over_stretches(int64_t first, int64_t last, const F& body) {
  for (; first < last; first += 64) body(first, std::min(first + 64, last));
}

// body(image, pixel, window) for every pixel of the pooled map; window: its `corners` pixels in x, 4 or 8.
template <class F>
static void over_windows(const Pass& pass, const Map& pooled, int corners, const F& body) {
  const int64_t rows = static_cast<int64_t>(pooled.depth) * pooled.height;
  parallel_for(pass.images * rows, [&](int64_t index) {
    const int64_t row = index % rows, z = row / pooled.height, y = row % pooled.height;
    for (int x = 0; x < pooled.width; x++) {
      int64_t window[8];
      for (int q = 0; q < corners; q++) {
        const int64_t plane = corners == 8 ? 2 * z + q / 4 : z;
        window[q] = (plane * pass.x.height + 2 * y + q / 2 % 2) * pass.x.width + 2 * x + q % 2;
      }
      body(index / rows, row * pooled.width + x, window);
    }
  });
}

// y = maximum of each 2 x 2 (x 2) window of what readers of x see; NaN stays.
template <class E>
static void pool(const Pass& pass) {
  const int corners = pass.axes == 3 ? 8 : 4;
  over_windows(pass, pass.y, corners, [&](int64_t image, int64_t pixel, const int64_t* window) {
    E* to = at<E>(pass.y, image, pixel);
    const E* from[8];
    for (int q = 0; q < corners; q++) from[q] = at<E>(pass.x, image, window[q]);
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int some = pass.x.channels - c;
      V best = read(from[0], pass.x, image, c, some, pass.slope);
      for (int q = 1; q < corners; q++) {
        const V value = read(from[q], pass.x, image, c, some, pass.slope);
        best = ((value > best) | (value != value)) ? value : best;
      }
      store_some(to + c, best, some);
    }
  });
}

// y (+)= g at the first pixel of each window that holds the maximum, zero at the others. g: of the pooled map.
template <class E>
static void pool_backward(const Pass& pass) {
  const int corners = pass.axes == 3 ? 8 : 4;
  over_windows(pass, pass.g, corners, [&](int64_t image, int64_t pixel, const int64_t* window) {
    const E *g = at<E>(pass.g, image, pixel), *from[8];
    for (int q = 0; q < corners; q++) from[q] = at<E>(pass.x, image, window[q]);
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int some = pass.x.channels - c;
      V best = {}, chosen = {};
      for (int q = 0; q < corners; q++) {
        // Values that are equal once rounded are equal: the first is taken.
        const V value = rounded<E>(read(from[q], pass.x, image, c, some, pass.slope));
        if (q == 0) {
          best = value;
          continue;
        }
        const auto above = (value > best) | ((value != value) & (best == best));
        best = above ? value : best;
        chosen = above ? splat(static_cast<float>(q)) : chosen;
      }
      const V gradient = load_some(g + c, some);
      for (int q = 0; q < corners; q++) {
        E* to = at<E>(pass.y, image, window[q]) + c;
        V part = chosen == splat(static_cast<float>(q)) ? gradient : V{};
        if (pass.add) part += load_some(to, some);
        store_some(to, part, some);
      }
    }
  });
}

// y[n, class, pixel] = bias + sum over channels of what readers of x see times weight; y is channels-first and dense.
template <class E>
static void head(const Pass& pass) {
  const int64_t pixels = pixels_of(pass.x);
  over_chunks(pass, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, last - p));
      for (int m = 0; m < pass.classes; m++) {
        const float* weight = pass.weight + static_cast<int64_t>(m) * pass.x.channels;
        float scores[LANES] = {};
        for (int i = 0; i < count; i++) {
          const E* from = at<E>(pass.x, image, p + i);
          V total = {};
          for (int c = 0; c < pass.x.channels; c += LANES) {
            const int some = pass.x.channels - c;
            total += read(from, pass.x, image, c, some, pass.slope) * load_some(weight + c, some);
          }
          scores[i] = pass.bias[m] + sum(total);
        }
        store_some(static_cast<E*>(pass.y.data) + (image * pass.classes + m) * pixels + p, load(scores), count);
      }
    }
  });
}

// y (+)= sum over classes of g weight; sums[n, chunk, class, channels + 1]: of g times what readers of x see, and of g.
template <class E>
static void head_backward(const Pass& pass) {
  const int64_t pixels = pixels_of(pass.x), chunks = chunks_of(pass.x, pass.chunk);
  const int channels = pass.x.channels;
  over_chunks(pass, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * pass.classes * (channels + 1);
    std::memset(sums, 0, sizeof(float) * pass.classes * (channels + 1));
    const E* scores = static_cast<const E*>(pass.g.data) + image * pass.classes * pixels;
    over_stretches(first, last, [&](int64_t start, int64_t end) {
      for (int c = 0; c < channels; c += LANES) {
        const int some = channels - c;
        for (int64_t p = start; p < end; p++) {
          E* to = at<E>(pass.y, image, p) + c;
          V value = pass.add ? load_some(to, some) : V{};
          for (int m = 0; m < pass.classes; m++)
            value += scalar(scores[m * pixels + p]) * load_some(pass.weight + static_cast<int64_t>(m) * channels + c, some);
          store_some(to, value, some);
        }
        for (int m = 0; m < pass.classes; m++) {
          const E* g = scores + m * pixels;
          V part = {};
          for (int64_t p = start; p < end; p++)
            part += scalar(g[p]) * read(at<E>(pass.x, image, p), pass.x, image, c, some, pass.slope);
          float* row = sums + m * (channels + 1) + c;
          store_some(row, load_some(row, some) + part, some);
        }
      }
    });
    for (int m = 0; m < pass.classes; m++) {
      const E* g = scores + m * pixels;
      V total = {};
      for (int64_t p = first; p < last; p += LANES) total += load_some(g + p, static_cast<int>(last - p));
      sums[m * (channels + 1) + channels] = sum(total);
    }
  });
}

struct Through {
  V h, z, scale;
};

// h = g act'(scale x + shift) and z = (x - mean) inverse, as kernels/naive.py:norm_backward.
template <class E>
INLINE Through through_norm(const Pass& pass, const E* g, const E* x, int64_t image, int c, int some) {
  const int64_t row = image * pass.x.affine_image + c;
  const V value = load_some(x + c, some), gradient = load_some(g + c, some);
  Through t;
  t.scale = load_some(pass.x.scale + row, some);
  t.h = value * t.scale + load_some(pass.x.shift + row, some) > 0 ? gradient : gradient * pass.slope;
  t.z = (value - load_some(pass.mean + row, some)) * load_some(pass.inverse + row, some);
  return t;
}

// sums[n, chunk, 2, C] = sum of h and of h z; where frozen g <- scale h.
template <class E>
static void norm_sums(const Pass& pass) {
  const int64_t chunks = chunks_of(pass.x, pass.chunk);
  over_chunks(pass, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * 2 * pass.x.channels;
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int some = pass.x.channels - c;
      V h = {}, hz = {};
      over_stretches(first, last, [&](int64_t start, int64_t end) {
        V part_h = {}, part_hz = {};
        for (int64_t p = start; p < end; p++) {
          E* g = at<E>(pass.g, image, p);
          const Through t = through_norm<E>(pass, g, at<E>(pass.x, image, p), image, c, some);
          part_h += t.h;
          part_hz += t.h * t.z;
          if (pass.frozen) store_some(g + c, t.scale * t.h, some);
        }
        h += part_h;
        hz += part_hz;
      });
      store_some(sums + c, h, some);
      store_some(sums + pass.x.channels + c, hz, some);
    }
  });
}

// g <- scale (h - mean(h) - z mean(h z)); averages [1 or N, 2, C].
template <class E>
static void norm_apply(const Pass& pass) {
  over_chunks(pass, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    const float* averages = pass.averages + image * pass.averages_image;
    for (int64_t p = first; p < last; p++) {
      E* g = at<E>(pass.g, image, p);
      for (int c = 0; c < pass.x.channels; c += LANES) {
        const int some = pass.x.channels - c;
        const Through t = through_norm<E>(pass, g, at<E>(pass.x, image, p), image, c, some);
        const V mean_h = load_some(averages + c, some), mean_hz = load_some(averages + pass.x.channels + c, some);
        store_some(g + c, t.scale * (t.h - mean_h - t.z * mean_hz), some);
      }
    }
  });
}

// g <- g where x > 0, slope g elsewhere; sums[n, chunk, C] of what was stored. x: the activation's output.
template <class E>
static void act_backward(const Pass& pass) {
  const int64_t chunks = chunks_of(pass.x, pass.chunk);
  over_chunks(pass, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * pass.x.channels;
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int some = pass.x.channels - c;
      V total = {};
      over_stretches(first, last, [&](int64_t start, int64_t end) {
        V part = {};
        for (int64_t p = start; p < end; p++) {
          E* g = at<E>(pass.g, image, p) + c;
          const V value = load_some(at<E>(pass.x, image, p) + c, some), gradient = load_some(g, some);
          part += store_some(g, value > 0 ? gradient : gradient * pass.slope, some);
        }
        total += part;
      });
      store_some(sums + c, total, some);
    }
  });
}

}  // namespace ISA
}  // namespace unetpp
