// Convolutions and their weights as operators: from tensors to the structures of kernels.h.
#pragma once

#include <cstring>

#include "arguments.h"
#include "blocks.h"

namespace unetpp {

constexpr int64_t kLarge = 16 << 20;  // bytes of a result that would push everything else out of the caches

const Kernels& kernels(Element element = Element::kFloat);

inline int64_t padded(int64_t channels, int64_t to) { return (channels + to - 1) / to * to; }

// Values of packed weights: `count` filters of `points` values for each pair of channels.
inline int64_t packed(int64_t count, int64_t points, int64_t inputs, int64_t outputs) {
  return count * points * padded(inputs, 4) * padded(outputs, 2 * kernels().lanes);
}

// Everything of a convolution into `o` but its results' statistics; `images` of them, by element type.
inline Conv conv_call(const Map& o, int64_t images, const Tensor& a, const Tensor& ua, const Optional& scale_a,
                      const Optional& shift_a, const Optional& b, const Optional& ub, const Optional& scale_b,
                      const Optional& shift_b, const Optional& bias, const Optional& border, int64_t axes, int64_t taps,
                      int64_t stride, bool phased, bool winograd) {
  Conv call;
  call.axes = static_cast<int>(axes);
  const bool deep = axes == 3, gathered = taps == 4 && stride == 2;
  call.geometry = phased ? Geometry::kPhased : gathered ? Geometry::kGathered : Geometry::kPlain;
  call.out = o;
  call.end = o.height;
  call.images = static_cast<int>(images);
  call.a = map_of(a, o.element, "a", scale_a, shift_a);
  check_axes(axes, o.depth);
  STD_TORCH_CHECK((taps == 3 || taps == 4) && (stride == 1 || stride == 2), "taps are 3 or 4, and stride is 1 or 2");
  if (phased) check_even(axes, o);
  check_images(a, images, "a");
  const int step = phased ? 2 : 1, scaled = static_cast<int>(stride);
  const int depth = deep ? o.depth / step : 1, height = o.height / step, width = o.width / step;
  check_size(call.a, deep ? depth * scaled : 1, height * scaled, width * scaled, "a");
  const int64_t depth_taps = deep ? taps : 1;
  const bool few = ua.dim() == 7;  // weights as they are
  STD_TORCH_CHECK(!winograd || gathered || (taps == 3 && stride == step), "no transform for these taps");
  STD_TORCH_CHECK(!few || (winograd && !deep), "weights are packed in 3D and for direct sums");
  if (few) {
    call.wa = filters_of(ua, "ua");
    check_filters(call.wa, gathered ? 4 : 1, gathered ? 2 : 3, call.a.channels, o.channels, "ua");
  } else {
    call.ua = values(ua, !winograd  ? packed(1, depth_taps * taps * taps, call.a.channels, o.channels)
                         : gathered ? packed(depth_taps * 4, 25, call.a.channels, o.channels)
                                    : packed(depth_taps, 36, call.a.channels, o.channels), "ua");
  }
  if (b) {
    STD_TORCH_CHECK(ub.has_value() && !gathered, "b comes with its weights, beside 3 taps of a");
    call.b = map_of(*b, o.element, "b", scale_b, shift_b);
    check_images(*b, images, "b");
    check_size(call.b, depth, height, width, "b");
    const int64_t phases = phased ? (deep ? 8 : 4) : 1, b_taps = phased ? 2 : 3, b_depth = deep ? b_taps : 1;
    if (few) {
      call.wb = filters_of(*ub, "ub");
      check_filters(call.wb, phases, phased ? 2 : 3, call.b.channels, o.channels, "ub");
    } else {
      call.ub = values(ub, winograd ? packed(phases * b_depth, phased ? 25 : 36, call.b.channels, o.channels)
                                    : packed(phases, b_depth * b_taps * b_taps, call.b.channels, o.channels), "ub");
    }
  }
  STD_TORCH_CHECK(call.a.channels || b, "a has no channels");
  call.bias = values(bias, o.channels, "bias");
  call.border = values(border, (deep ? 27 : 9) * static_cast<int64_t>(o.channels), "border");
  return call;
}

inline void run_winograd(const Conv& call) {
  const Kernels& table = kernels(call.out.element);
  (call.wa.data || call.wb.data ? table.conv_few : table.conv_winograd)(call);
}

inline void conv(Tensor out, Tensor a, Tensor ua, Optional scale_a, Optional shift_a, Optional b, Optional ub,
                 Optional scale_b, Optional shift_b, Optional bias, Optional border, Optional stats, int64_t axes,
                 int64_t taps, int64_t stride, bool phased, bool winograd, double slope, int64_t plain, bool act, bool add) {
  const Map o = map_of(out, element_of(out, "out"), "out");
  Conv call = conv_call(o, out.size(0), a, ua, scale_a, shift_a, b, ub, scale_b, shift_b, bias, border, axes, taps, stride,
                        phased, winograd);
  set_plain(call.a, plain, "a");
  const int64_t parts = winograd ? winograd_parts(call) : o.depth;
  call.stats = const_cast<float*>(values(stats, call.images * parts * 3 * o.channels, "stats"));
  call.slope = static_cast<float>(slope);
  call.act = act;
  call.add = add;
  call.past = !add && out.numel() * static_cast<int64_t>(out.element_size()) >= kLarge;
  if (out.numel() == 0) return;
  if (winograd)
    run_winograd(call);
  else
    kernels(o.element).conv_direct(call, static_cast<int>(taps), static_cast<int>(stride));
}

inline Map of_image(Map map, int64_t image) {
  const int64_t size = map.element == Element::kFloat ? sizeof(float) : sizeof(BFloat16);
  if (map.data) map.data = static_cast<char*>(map.data) + image * map.image * size;
  return map;
}

// Rows from..to of a map that starts at row `before` in memory become its first ones.
inline void move_up(const Map& mid, int before, int from, int to) {
  const int64_t size = mid.element == Element::kFloat ? sizeof(float) : sizeof(BFloat16);
  const int64_t row = mid.width * mid.pixel * size;
  char* data = static_cast<char*>(mid.data);
  std::memmove(data, data + (from - before) * row, (to - from) * row);
}

// The two convolutions of a node in 2D, activated, strip by strip of rows: of what lies between them, only a few rows
// exist at a time, in mid [1, 1, rows, W, C]. The second one's strips of rows are followed by 8 rows of the first's.
inline void conv_pair(Tensor out, Tensor mid, Tensor a, Tensor ua, Optional b, Optional ub, Optional bias, Optional border,
                      Tensor second, Optional second_bias, bool phased, double slope) {
  const Map o = map_of(out, element_of(out, "out"), "out");
  Map between = map_of(mid, o.element, "mid");
  const int held = between.height, strip = (held - 9) / 8 * 8;
  STD_TORCH_CHECK(mid.is_contiguous() && mid.size(0) == 1 && between.depth == 1 && between.width == o.width && strip > 0,
                  "mid must be [1, 1, at least 17 rows, ", o.width, ", C], contiguous");
  between.height = o.height;
  Conv first = conv_call(between, out.size(0), a, ua, {}, {}, b, ub, {}, {}, bias, border, 2, 3, phased ? 2 : 1, phased, true);
  Conv last;
  last.out = o;
  last.a = between;
  last.images = first.images = 1;
  if (second.dim() == 7) {
    last.wa = filters_of(second, "second");
    check_filters(last.wa, 1, 3, between.channels, o.channels, "second");
  } else {
    last.ua = values(second, packed(1, 36, between.channels, o.channels), "second");
  }
  last.bias = values(second_bias, o.channels, "second_bias");
  first.slope = last.slope = static_cast<float>(slope);
  first.act = last.act = true;
  last.past = out.numel() * static_cast<int64_t>(out.element_size()) >= kLarge;
  const Map a_all = first.a, b_all = first.b;
  if (out.numel() == 0) return;
  for (int64_t image = 0; image < out.size(0); image++) {
    first.a = of_image(a_all, image);
    first.b = of_image(b_all, image);
    last.out = of_image(o, image);
    int done = 0, origin = 0;  // rows of mid that are there, and the first that is in memory
    for (int row = 0; row < o.height; row += strip) {
      const int before = origin, end = std::min(o.height, row + strip);
      origin = std::max(0, row - 1);
      if (origin > before) move_up(between, before, origin, done);
      first.out.origin = last.a.origin = origin;
      first.begin = done;
      first.end = done = std::min(o.height, end + 8);
      if (first.end > first.begin) run_winograd(first);
      last.begin = row;
      last.end = end;
      run_winograd(last);
    }
  }
}

// Weights, as `filters_of` takes them, packed for one of the kernels.
inline void pack(Tensor out, Tensor weight, bool winograd) {
  const Filters filters = filters_of(weight, "weight");
  STD_TORCH_CHECK(!winograd || filters.taps == 9 || filters.taps == 4, "no transform for ", filters.taps, " taps");
  const int64_t points = !winograd ? filters.taps : filters.taps == 9 ? 36 : 25;
  const int64_t count = packed(filters.count(), points, filters.channels, filters.outputs);
  if (count) kernels().pack(filters, winograd, const_cast<float*>(values(out, count, "out")));
}

// Parts of the statistics of one image.
inline int64_t conv_parts(Tensor out, int64_t inputs, bool phased, bool winograd) {
  Conv call;
  call.geometry = phased ? Geometry::kPhased : Geometry::kPlain;
  call.out = map_of(out, element_of(out, "out"), "out");
  call.end = call.out.height;
  call.a.channels = static_cast<int>(inputs);
  return winograd ? winograd_parts(call) : call.out.depth;
}

inline void conv_wgrad(Tensor result, Tensor scratch, Tensor a, Optional scale, Optional shift, Tensor dy, int64_t axes,
                bool phased, double slope, int64_t plain) {
  Wgrad call;
  call.axes = static_cast<int>(axes);
  call.phased = phased;
  const Element element = element_of(a, "a");
  call.a = map_of(a, element, "a", scale, shift);
  set_plain(call.a, plain, "a");
  call.dy = map_of(dy, element, "dy");
  const bool deep = axes == 3;
  const int step = phased ? 2 : 1;
  check_axes(axes, call.dy.depth);
  if (phased) check_even(axes, call.dy);
  check_images(a, dy.size(0), "a");
  check_size(call.a, deep ? call.dy.depth / step : 1, call.dy.height / step, call.dy.width / step, "a");
  const int64_t k = padded(call.a.channels, kernels().lanes), co = padded(call.dy.channels, kernels().lanes);
  const int64_t taps = phased ? 2 : 3, points = phased ? 25 : 36;
  call.images = static_cast<int>(dy.size(0));
  check_floats(result, "result");
  STD_TORCH_CHECK(result.dim() == 4 && result.size(0) == (phased ? (deep ? 8 : 4) : 1) &&
                      result.size(1) == taps * taps * (deep ? taps : 1) && result.size(2) == call.a.channels &&
                      result.size(3) == call.dy.channels, "result must be [phases, taps, K, CO]");
  call.result = static_cast<float*>(result.data_ptr());
  call.phase = result.stride(0);
  call.tap = result.stride(1);
  call.k = result.stride(2);
  call.co = result.stride(3);
  call.scratch = const_cast<float*>(values(scratch, scratch.numel(), "scratch"));
  call.scratch_size = scratch.numel();
  STD_TORCH_CHECK(call.scratch_size >= points * (k + co), "scratch is too small for one tile");
  call.slope = static_cast<float>(slope);
  kernels(element).conv_wgrad(call);
}

}  // namespace unetpp
