// The passes over whole maps: pooling, heads, and the gradients of norm and activation. Each reads its maps once, channels
// in vectors, pixels in chunks of a fixed size; sums are one row per chunk, added in their order by the caller.
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

INLINE const float* row_of(const float* values, int64_t image, int64_t stride) { return values ? values + image * stride : nullptr; }

// What a reader of the map sees of LANES channels.
INLINE V read(const float* from, const Map& map, int64_t image, int c, int count, float slope) {
  V value = load_some(from + c, count);
  if (!map.scale) return value;
  const V scale = load_some(map.scale + image * map.affine_image + c, count);
  const V shift = load_some(map.shift + image * map.affine_image + c, count);
  return activate(value * scale + shift, slope);
}

INLINE int64_t pixels_of(const Map& map) { return static_cast<int64_t>(map.depth) * map.height * map.width; }
INLINE int64_t chunks_of(const Map& map, int64_t chunk) { return (pixels_of(map) + chunk - 1) / chunk; }

// body(image, chunk, first pixel, last pixel) for every chunk of every image.
template <class F>
static void over_chunks(const Pass& pass, const Map& map, const F& body) {
  const int64_t pixels = pixels_of(map), chunks = chunks_of(map, pass.chunk);
  parallel_for(pass.images * chunks, [&](int64_t index) {
    const int64_t image = index / chunks, chunk = index % chunks, first = chunk * pass.chunk;
    body(image, chunk, first, std::min(first + pass.chunk, pixels));
  });
}

// body(image, pooled pixel row number, z, y) for every row of the pooled map y.
template <class F>
static void over_rows(const Pass& pass, const Map& map, const F& body) {
  const int64_t rows = static_cast<int64_t>(map.depth) * map.height;
  parallel_for(pass.images * rows, [&](int64_t index) {
    body(index / rows, static_cast<int>(index % rows / map.height), static_cast<int>(index % map.height));
  });
}

// y = maximum of each 2 x 2 (x 2) window of what readers of x see; NaN stays.
static void pool(const Pass& pass) {
  const int corners = pass.axes == 3 ? 8 : 4;
  over_rows(pass, pass.y, [&](int64_t image, int z, int y) {
    for (int x = 0; x < pass.y.width; x++) {
      const float* from[8];
      for (int q = 0; q < corners; q++) {
        const int64_t pixel = (static_cast<int64_t>(z * (pass.axes == 3 ? 2 : 1) + q / 4) * pass.x.height + 2 * y + q / 2 % 2) * pass.x.width + 2 * x + q % 2;
        from[q] = pass.x.data + image * pass.x.image + pixel * pass.x.pixel;
      }
      float* to = pass.y.data + image * pass.y.image + ((static_cast<int64_t>(z) * pass.y.height + y) * pass.y.width + x) * pass.y.pixel;
      for (int c = 0; c < pass.x.channels; c += LANES) {
        const int count = pass.x.channels - c;
        V best = read(from[0], pass.x, image, c, count, pass.slope);
        for (int q = 1; q < corners; q++) {
          const V value = read(from[q], pass.x, image, c, count, pass.slope);
          best = (value > best) | (value != value) ? value : best;
        }
        store_some(to + c, best, count);
      }
    }
  });
}

// y (+)= g at the first pixel of each window that holds the maximum, zero at the others. g: of the pooled map.
static void pool_backward(const Pass& pass) {
  const int corners = pass.axes == 3 ? 8 : 4;
  over_rows(pass, pass.g, [&](int64_t image, int z, int y) {
    for (int x = 0; x < pass.g.width; x++) {
      int64_t pixels[8];
      for (int q = 0; q < corners; q++)
        pixels[q] = (static_cast<int64_t>(z * (pass.axes == 3 ? 2 : 1) + q / 4) * pass.x.height + 2 * y + q / 2 % 2) * pass.x.width + 2 * x + q % 2;
      const float* g = pass.g.data + image * pass.g.image + ((static_cast<int64_t>(z) * pass.g.height + y) * pass.g.width + x) * pass.g.pixel;
      for (int c = 0; c < pass.x.channels; c += LANES) {
        const int count = pass.x.channels - c;
        V best = {}, chosen = {};
        for (int q = 0; q < corners; q++) {
          const V value = read(pass.x.data + image * pass.x.image + pixels[q] * pass.x.pixel, pass.x, image, c, count, pass.slope);
          if (q == 0) {
            best = value;
            continue;
          }
          auto above = (value > best) | ((value != value) & (best == best));
          best = above ? value : best;
          chosen = above ? splat(static_cast<float>(q)) : chosen;
        }
        const V gradient = load_some(g + c, count);
        for (int q = 0; q < corners; q++) {
          float* to = pass.y.data + image * pass.y.image + pixels[q] * pass.y.pixel + c;
          V part = chosen == splat(static_cast<float>(q)) ? gradient : V{};
          if (pass.add) part += load_some(to, count);
          store_some(to, part, count);
        }
      }
    }
  });
}

// y[n, class, pixel] = bias + sum over channels of what readers of x see times weight; y is channels-first and dense.
static void head(const Pass& pass) {
  const int64_t pixels = pixels_of(pass.x);
  over_chunks(pass, pass.x, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) {
      const float* from = pass.x.data + image * pass.x.image + p * pass.x.pixel;
      for (int m = 0; m < pass.classes; m++) {
        V total = {};
        for (int c = 0; c < pass.x.channels; c += LANES) {
          const int count = pass.x.channels - c;
          total += read(from, pass.x, image, c, count, pass.slope) * load_some(pass.weight + static_cast<int64_t>(m) * pass.x.channels + c, count);
        }
        pass.y.data[(image * pass.classes + m) * pixels + p] = pass.bias[m] + sum(total);
      }
    }
  });
}

// y (+)= sum over classes of g weight; sums[n, chunk, class, channels + 1]: of g times what readers of x see, and of g.
static void head_backward(const Pass& pass) {
  const int64_t pixels = pixels_of(pass.x), chunks = chunks_of(pass.x, pass.chunk);
  const int channels = pass.x.channels;
  over_chunks(pass, pass.x, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * pass.classes * (channels + 1);
    std::memset(sums, 0, sizeof(float) * pass.classes * (channels + 1));
    const float* g = pass.g.data + image * pass.classes * pixels;
    for (int c = 0; c < channels; c += LANES) {
      const int count = channels - c;
      for (int64_t p = first; p < last; p++) {
        const V value = read(pass.x.data + image * pass.x.image + p * pass.x.pixel, pass.x, image, c, count, pass.slope);
        float* to = pass.y.data + image * pass.y.image + p * pass.y.pixel + c;
        V part = pass.add ? load_some(to, count) : V{};
        for (int m = 0; m < pass.classes; m++) {
          const float gradient = g[m * pixels + p];
          float* row = sums + m * (channels + 1) + c;
          part += gradient * load_some(pass.weight + static_cast<int64_t>(m) * channels + c, count);
          store_some(row, load_some(row, count) + gradient * value, count);
        }
        store_some(to, part, count);
      }
    }
    for (int m = 0; m < pass.classes; m++)
      for (int64_t p = first; p < last; p++) sums[m * (channels + 1) + channels] += g[m * pixels + p];
  });
}

struct Through {
  V h, z, scale;
};

// h = g act'(scale x + shift) and z = (x - mean) inverse, as kernels/naive.py:norm_backward.
INLINE Through through_norm(const Pass& pass, const float* g, const float* x, int64_t image, int c, int count) {
  const int64_t row = image * pass.x.affine_image + c;
  const V value = load_some(x + c, count), gradient = load_some(g + c, count);
  Through t;
  t.scale = load_some(pass.x.scale + row, count);
  t.h = value * t.scale + load_some(pass.x.shift + row, count) > 0 ? gradient : gradient * pass.slope;
  t.z = (value - load_some(pass.mean + row, count)) * load_some(pass.inverse + row, count);
  return t;
}

// sums[n, chunk, 2, C] = sum of h and of h z; where frozen g <- scale h.
static void norm_sums(const Pass& pass) {
  const int64_t chunks = chunks_of(pass.x, pass.chunk);
  over_chunks(pass, pass.x, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * 2 * pass.x.channels;
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int count = pass.x.channels - c;
      V h = {}, hz = {};
      for (int64_t p = first; p < last; p++) {
        float* g = pass.g.data + image * pass.g.image + p * pass.g.pixel;
        const Through t = through_norm(pass, g, pass.x.data + image * pass.x.image + p * pass.x.pixel, image, c, count);
        h += t.h;
        hz += t.h * t.z;
        if (pass.frozen) store_some(g + c, t.scale * t.h, count);
      }
      store_some(sums + c, h, count);
      store_some(sums + pass.x.channels + c, hz, count);
    }
  });
}

// g <- scale (h - mean(h) - z mean(h z)); averages [1 or N, 2, C].
static void norm_apply(const Pass& pass) {
  over_chunks(pass, pass.x, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    const float* averages = pass.averages + image * pass.averages_image;
    for (int64_t p = first; p < last; p++) {
      float* g = pass.g.data + image * pass.g.image + p * pass.g.pixel;
      for (int c = 0; c < pass.x.channels; c += LANES) {
        const int count = pass.x.channels - c;
        const Through t = through_norm(pass, g, pass.x.data + image * pass.x.image + p * pass.x.pixel, image, c, count);
        const V mean_h = load_some(averages + c, count), mean_hz = load_some(averages + pass.x.channels + c, count);
        store_some(g + c, t.scale * (t.h - mean_h - t.z * mean_hz), count);
      }
    }
  });
}

// g <- g where x > 0, slope g elsewhere; sums[n, chunk, C] of what was stored. x: the activation's output.
static void act_backward(const Pass& pass) {
  const int64_t chunks = chunks_of(pass.x, pass.chunk);
  over_chunks(pass, pass.x, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    float* sums = pass.sums + (image * chunks + chunk) * pass.x.channels;
    for (int c = 0; c < pass.x.channels; c += LANES) {
      const int count = pass.x.channels - c;
      V total = {};
      for (int64_t p = first; p < last; p++) {
        float* g = pass.g.data + image * pass.g.image + p * pass.g.pixel + c;
        const V value = load_some(pass.x.data + image * pass.x.image + p * pass.x.pixel + c, count);
        const V gradient = load_some(g, count);
        const V result = value > 0 ? gradient : gradient * pass.slope;
        store_some(g, result, count);
        total += result;
      }
      store_some(sums + c, total, count);
    }
  });
}

}  // namespace ISA
}  // namespace unetpp
