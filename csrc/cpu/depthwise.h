// Depthwise convolutions in 2D: each channel of the result is a sum over taps of the same channel, at any stride and border.
//
// What bounds them is memory: a map is read once, row by row from the cache, and the result is activated as it is stored.
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

constexpr int TOGETHER = 8;  // pixels that share the weights in registers
constexpr int STRIP = 8;     // rows of the result that one thread takes, which read some rows of the map again

// LANES channels from c on of R pixels of row y from x on, of taps in rows first to last; `inside`: of all taps in such a row.
template <int R, class E>
INLINE void depthwise_pixels(const Depthwise& call, int64_t image, int y, int x, int c, int first, int last, bool inside) {
  const int channels = call.out.channels, some = channels - c, taps = call.taps, left = x * call.stride - call.left;
  const int64_t step = call.stride * call.x.pixel;
  V sums[R];
  for (int r = 0; r < R; r++) sums[r] = call.bias ? load_some(call.bias + c, some) : V{};
  for (int ty = first; ty < last; ty++) {
    const int64_t row = static_cast<int64_t>(y * call.stride - call.top + ty) * call.x.width;
    const float* weights = call.weight + static_cast<int64_t>(ty) * taps * channels + c;
    for (int tx = 0; tx < taps; tx++, weights += channels) {
      if (!inside && (left + tx < 0 || left + tx >= call.x.width)) continue;
      const E* from = at<E>(call.x, image, row + left + tx) + c;
      const V w = load_some(weights, some);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r] += load_some(from + r * step, some) * w;
    }
  }
  E* to = at<E>(call.out, image, static_cast<int64_t>(y) * call.out.width + x) + c;
  for (int r = 0; r < R; r++, to += call.out.pixel)
    store_some(to, call.act == Activation::kNone ? sums[r] : activate(sums[r], call.act, 0), some);
}

template <class E>
static void depthwise_row(const Depthwise& call, int64_t image, int y) {
  const int width = call.out.width, top = y * call.stride - call.top;
  const int first = std::max(0, -top), last = std::min(call.taps, call.x.height - top);
  const int room = call.x.width - call.taps + call.left;  // the last place of the first tap, from the border on
  const int begin = std::min(width, (call.left + call.stride - 1) / call.stride);
  const int end = std::min(width, std::max(begin, room < 0 ? 0 : room / call.stride + 1));
  for (int c = 0; c < call.out.channels; c += LANES) {
    for (int x = 0; x < begin; x++) depthwise_pixels<1, E>(call, image, y, x, c, first, last, false);
    for_pieces<TOGETHER>(end - begin, [&](int x, auto pixels) {
      depthwise_pixels<pixels, E>(call, image, y, begin + x, c, first, last, true);
    });
    for (int x = end; x < width; x++) depthwise_pixels<1, E>(call, image, y, x, c, first, last, false);
  }
}

template <class E>
static void depthwise(const Depthwise& call) {
  const int height = call.out.height, strips = (height + STRIP - 1) / STRIP;
  parallel_for(static_cast<int64_t>(call.images) * strips, [&](int64_t index) {
    const int strip = index % strips;
    for (int y = strip * STRIP; y < std::min(height, strip * STRIP + STRIP); y++) depthwise_row<E>(call, index / strips, y);
  });
}

}  // namespace ISA
}  // namespace unetpp
