// Convolutions of one tap: products of pixels and weights, some pixels at a time, finished while they are in the cache.
//
// Each image is one row of pixels. Float maps that are read as they are are multiplied where they lie; others are copied first,
// widened and activated.
#pragma once

#include "conv.h"

namespace unetpp {
namespace ISA {

constexpr int POINT_VALUES = 1 << 16;  // of a that are multiplied at a time: they stay in the L2 cache, beside some weights
constexpr int LEAST_POINTS = 24, MOST_POINTS = 192;

// Pixels of about the same number, each piece but the last in whole products.
static Blocks points_of(const Conv& conv) {
  const int most = std::min(std::max(POINT_VALUES / conv.a.channels, LEAST_POINTS), MOST_POINTS);
  const int pieces = (conv.out.width + most - 1) / most;
  const int columns = round_up((conv.out.width + pieces - 1) / pieces, MOST_ROWS);
  return {1, 1, columns, 1, (conv.out.width + columns - 1) / columns};
}

// What readers of pixels x0 to x0 + count see, [count, row].
template <class E>
static void copy_points(const Conv& conv, int64_t image, int x0, int count, float* to, int64_t row) {
  const Plane<E> plane = plane_of<E>(conv.a, image, 0, conv.slope);
  for (int x = 0; x < count; x++, to += row)
    for (int c = 0; c < plane.channels; c += LANES) {
      const int some = plane.channels - c;
      V value = load_some(plane.data + (x0 + x) * plane.column + c, some);
      if (plane.scale) value = read(plane, value, load_some(plane.scale + c, some), load_some(plane.shift + c, some), c);
      store_some(to + c, rounded<E>(value), some);
    }
}

template <class E>
static void conv_point(const Conv& conv) {
  const Blocks blocks = points_of(conv);
  const int channels = conv.a.channels, out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH;
  const int64_t count = static_cast<int64_t>(conv.images) * blocks.across, panel = round_up(channels, 4) * WIDTH;
  const int shares = shares_of(count, out_blocks);
  const bool copied = !std::is_same<E, float>::value || conv.a.scale;
  parallel_for(count * shares, [&](int64_t index) {
    const Place here(conv, blocks, index / shares);
    float* acc = scratch.get(static_cast<int64_t>(blocks.columns) * (WIDTH + (copied ? channels : 0)));
    Segment segment = {acc + static_cast<int64_t>(blocks.columns) * WIDTH, channels, nullptr, channels};
    if (copied)
      copy_points<E>(conv, here.image, here.x0, here.columns, acc + static_cast<int64_t>(blocks.columns) * WIDTH, channels);
    else
      segment.rows = at<float>(conv.a, here.image, here.x0), segment.row = conv.a.pixel;
    const int share = index % shares;
    for (int o = out_blocks * share / shares; o < out_blocks * (share + 1) / shares; o++) {
      segment.weights = conv.ua + o * panel;
      multiply_all(&segment, 1, here.columns, acc, WIDTH);
      finish<E>(conv, here, o, acc, nullptr);
    }
  });
}

}  // namespace ISA
}  // namespace unetpp
