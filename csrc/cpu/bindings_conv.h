// Convolutions and their weights as operators: from tensors to the structures of kernels.h.
#pragma once

#include <cstring>

#include "arguments.h"
#include "blocks.h"

namespace unetpp {

constexpr int64_t kLarge = 16 << 20;  // bytes of a result that would push everything else out of the caches

const Kernels& kernels(Element element = Element::kFloat);

// Whether there are matrix tiles: none, as plain sums for tests, or of the CPU.
enum class Tiles { kNone, kPlain, kCpu };
Tiles tiles();

inline int64_t padded(int64_t channels, int64_t to) { return (channels + to - 1) / to * to; }

// Values of packed weights: `count` filters of `points` values for each pair of channels.
inline int64_t packed(int64_t count, int64_t points, int64_t inputs, int64_t outputs) {
  return count * points * padded(inputs, 4) * padded(outputs, 2 * kernels().lanes);
}

// Values of weights that are packed for matrix tiles: `count` filters of `taps`.
inline int64_t packed_pairs(int64_t count, int64_t taps, int64_t inputs, int64_t outputs) {
  return count * taps * padded(inputs, 32) * padded(outputs, 2 * kernels().lanes);
}

inline Way way_of(int64_t way) {
  STD_TORCH_CHECK(way >= 0 && way <= 2, "way is 0 (direct sums), 1 (Winograd) or 2 (matrix tiles)");
  STD_TORCH_CHECK(way != 2 || tiles() != Tiles::kNone, "this CPU has no matrix tiles");
  return static_cast<Way>(way);
}

// The weights of one operand, [filters] of `width` x `width` taps, `points` of them transformed, into the place for its kind.
inline void take_weights(const Conv& call, Way way, const Tensor& u, int64_t filters, int width, int channels,
                         const float*& packed_floats, Filters& as_they_are, const BFloat16*& packed_tiles, const char* name) {
  const int outputs = call.out.channels, taps = width * width, points = (width + 3) * (width + 3);
  if (way == Way::kTiles) {
    packed_tiles = pairs(u, packed_pairs(filters, taps, channels, outputs), name);
  } else if (u.dim() == 7) {
    STD_TORCH_CHECK(way == Way::kWinograd && call.axes == 2, "weights are packed in 3D and for direct sums");
    as_they_are = filters_of(u, name);
    check_filters(as_they_are, filters, width, channels, outputs, name);
  } else {
    packed_floats = values(u, packed(filters, way == Way::kDirect ? taps : points, channels, outputs), name);
  }
}

// Whether b is up-sampled linearly, and whether the corners of both maps then meet.
enum class Linear { kNo, kEdges, kCorners };

inline Linear linear_of(int64_t linear) {
  STD_TORCH_CHECK(linear >= 0 && linear <= 2, "linear is 0 (no), 1 (edges meet) or 2 (corners meet)");
  return static_cast<Linear>(linear);
}

// Everything of a convolution into `o` but its results' statistics; `images` of them, by element type.
inline Conv conv_call(const Map& o, int64_t images, const Tensor& a, const Tensor& ua, const Optional& scale_a,
                      const Optional& shift_a, const Optional& b, const Optional& ub, const Optional& scale_b,
                      const Optional& shift_b, const Optional& bias, const Optional& border, int64_t axes, int64_t taps,
                      int64_t stride, bool phased, Linear linear, Way way) {
  Conv call;
  call.linear = linear != Linear::kNo;
  call.align_corners = linear == Linear::kCorners;
  call.axes = static_cast<int>(axes);
  const bool deep = axes == 3, gathered = taps == 4 && stride == 2;
  call.geometry = phased ? Geometry::kPhased : gathered ? Geometry::kGathered : Geometry::kPlain;
  call.out = o;
  call.end = o.height;
  call.images = static_cast<int>(images);
  call.a = map_of(a, o.element, "a", scale_a, shift_a);
  check_axes(axes, o.depth);
  STD_TORCH_CHECK((taps == 3 || taps == 4) ? stride == 1 || stride == 2 : taps == 1 && stride == 1,
                  "taps are 1, 3 or 4, and stride is 1 or, of 3 and 4 taps, 2");
  STD_TORCH_CHECK(taps > 1 || (way == Way::kDirect && !b && !border), "taps: one comes without b and border, by direct sums");
  STD_TORCH_CHECK(way != Way::kTiles || o.element == Element::kBFloat16, "matrix tiles take bfloat16 maps");
  if (phased) check_even(axes, o);
  check_images(a, images, "a");
  const int step = phased ? 2 : 1, scaled = static_cast<int>(stride);
  const int depth = deep ? o.depth / step : 1, height = o.height / step, width = o.width / step;
  check_size(call.a, deep ? depth * scaled : 1, height * scaled, width * scaled, "a");
  STD_TORCH_CHECK(way == Way::kDirect || gathered || (taps == 3 && stride == step), "only direct sums know these taps");
  const int64_t depth_taps = deep ? taps : 1;
  if (way == Way::kDirect)
    call.ua = values(ua, packed(1, depth_taps * taps * taps, call.a.channels, o.channels), "ua");
  else
    take_weights(call, way, ua, depth_taps * (gathered ? 4 : 1), gathered ? 2 : 3, call.a.channels, call.ua, call.wa, call.ta,
                 "ua");
  if (b) {
    STD_TORCH_CHECK(ub.has_value() && !gathered, "b comes with its weights, beside 3 taps of a");
    call.b = map_of(*b, o.element, "b", scale_b, shift_b);
    check_images(*b, images, "b");
    if (call.linear) {
      STD_TORCH_CHECK(!phased, "a low source is read by phases or up-sampled linearly");
      check_even(axes, o);
      check_size(call.b, deep ? depth / 2 : 1, height / 2, width / 2, "b");
    } else {
      check_size(call.b, depth, height, width, "b");
    }
    const int64_t phases = phased ? (deep ? 8 : 4) : 1, b_taps = phased ? 2 : 3, b_depth = deep ? b_taps : 1;
    if (way == Way::kDirect)
      call.ub = values(ub, packed(phases, b_depth * b_taps * b_taps, call.b.channels, o.channels), "ub");
    else
      take_weights(call, way, *ub, phases * b_depth, static_cast<int>(b_taps), call.b.channels, call.ub, call.wb, call.tb, "ub");
  }
  STD_TORCH_CHECK(call.a.channels || b, "a has no channels");
  call.bias = values(bias, o.channels, "bias");
  call.border = values(border, (deep ? 27 : 9) * static_cast<int64_t>(o.channels), "border");
  return call;
}

// The way of weights that are not for direct sums.
inline Way way_for(const Tensor& u) { return way_of(u.scalar_type() == ScalarType::BFloat16 ? 2 : 1); }

// By Winograd's filtering or in tiles, as the weights say.
inline void run_conv(const Conv& call) {
  const Kernels& table = kernels(call.out.element);
  const auto run = call.ta || call.tb ? table.conv_tiles : call.wa.data || call.wb.data ? table.conv_few : table.conv_winograd;
  run(call);
}

inline Activation activation_of(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= 4, "act is 0 (none), 1 (leaky ReLU), 2 (ReLU6), 3 (SiLU) or 4 (Hardswish)");
  return static_cast<Activation>(act);
}

// Of one tap: every image is a row of pixels.
inline void run_point(Conv call) {
  STD_TORCH_CHECK(!call.stats, "stats: a convolution of one tap gives none");
  for (Map* map : {&call.out, &call.a}) {
    map->width *= map->height * map->depth;
    map->height = map->depth = 1;
  }
  call.axes = 2;
  call.end = 1;
  kernels(call.out.element).conv_point(call);
}

inline void conv(Tensor out, Tensor a, Tensor ua, Optional scale_a, Optional shift_a, Optional b, Optional ub,
                 Optional scale_b, Optional shift_b, Optional bias, Optional border, Optional stats, int64_t axes,
                 int64_t taps, int64_t stride, bool phased, int64_t linear, int64_t way, double slope, int64_t plain, int64_t act,
                 bool add) {
  const Map o = map_of(out, element_of(out, "out"), "out");
  Conv call = conv_call(o, out.size(0), a, ua, scale_a, shift_a, b, ub, scale_b, shift_b, bias, border, axes, taps, stride,
                        phased, linear_of(linear), way_of(way));
  set_plain(call.a, plain, "a");
  const int64_t parts = parts_of(call, way_of(way));
  call.stats = const_cast<float*>(values(stats, call.images * parts * 3 * o.channels, "stats"));
  call.slope = static_cast<float>(slope);
  call.act = activation_of(act);
  call.add = add;
  call.past = !add && out.numel() * static_cast<int64_t>(out.element_size()) >= kLarge;
  if (out.numel() == 0) return;
  if (taps == 1)
    run_point(call);
  else if (way_of(way) == Way::kDirect)
    kernels(o.element).conv_direct(call, static_cast<int>(taps), static_cast<int>(stride));
  else
    run_conv(call);
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
                      Tensor second, Optional second_bias, bool phased, int64_t linear, double slope) {
  const Map o = map_of(out, element_of(out, "out"), "out");
  Map between = map_of(mid, o.element, "mid");
  const int held = between.height, strip = (held - 9) / 8 * 8;
  STD_TORCH_CHECK(mid.is_contiguous() && mid.size(0) == 1 && between.depth == 1 && between.width == o.width && strip > 0,
                  "mid must be [1, 1, at least 17 rows, ", o.width, ", C], contiguous");
  between.height = o.height;
  Conv first = conv_call(between, out.size(0), a, ua, {}, {}, b, ub, {}, {}, bias, border, 2, 3, phased ? 2 : 1, phased,
                         linear_of(linear), way_for(ua));
  Conv last;
  last.out = o;
  last.a = between;
  last.images = first.images = 1;
  take_weights(last, way_for(second), second, 1, 3, between.channels, last.ua, last.wa, last.ta, "second");
  STD_TORCH_CHECK(!last.ta || o.element == Element::kBFloat16, "second: matrix tiles take bfloat16 maps");
  last.bias = values(second_bias, o.channels, "second_bias");
  first.slope = last.slope = static_cast<float>(slope);
  first.act = last.act = Activation::kLeaky;
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
      if (first.end > first.begin) run_conv(first);
      last.begin = row;
      last.end = end;
      run_conv(last);
    }
  }
}

// Weights, as `filters_of` takes them, packed for one of the kernels: in bfloat16 for tiles.
inline void pack(Tensor out, Tensor weight, int64_t way) {
  const Filters filters = filters_of(weight, "weight");
  const int64_t k = filters.channels, co = filters.outputs;
  const bool square = filters.taps == filters.width * filters.width && (filters.width == 2 || filters.width == 3);
  STD_TORCH_CHECK(way_of(way) == Way::kDirect || square, "weight has ", filters.taps, " taps, which only direct sums know");
  if (way_of(way) == Way::kTiles) {
    const BFloat16* to = pairs(out, packed_pairs(filters.count(), filters.taps, k, co), "out");
    if (out.numel()) kernels().pack_tiles(filters, const_cast<BFloat16*>(to));
    return;
  }
  const int64_t points = way_of(way) == Way::kDirect ? filters.taps : filters.taps == 9 ? 36 : 25;
  const int64_t count = packed(filters.count(), points, k, co);
  if (count) kernels().pack(filters, way_of(way) == Way::kWinograd, const_cast<float*>(values(out, count, "out")));
}

// Parts of the statistics of one image.
inline int64_t conv_parts(Tensor out, int64_t inputs, int64_t low_inputs, bool phased, int64_t way) {
  Conv call;
  call.geometry = phased ? Geometry::kPhased : Geometry::kPlain;
  call.out = map_of(out, element_of(out, "out"), "out");
  call.end = call.out.height;
  call.a.channels = static_cast<int>(inputs);
  call.b.channels = static_cast<int>(low_inputs);
  return parts_of(call, way_of(way));
}

// Everything of a weight gradient but where it goes.
inline Wgrad wgrad_call(const Tensor& a, const Optional& scale, const Optional& shift, const Tensor& dy, int64_t axes,
                        bool phased) {
  Wgrad call;
  call.axes = static_cast<int>(axes);
  call.phased = phased;
  const Element element = element_of(a, "a");
  call.a = map_of(a, element, "a", scale, shift);
  call.dy = map_of(dy, element, "dy");
  const bool deep = axes == 3;
  const int step = phased ? 2 : 1;
  check_axes(axes, call.dy.depth);
  if (phased) check_even(axes, call.dy);
  check_images(a, dy.size(0), "a");
  check_size(call.a, deep ? call.dy.depth / step : 1, call.dy.height / step, call.dy.width / step, "a");
  call.images = static_cast<int>(dy.size(0));
  return call;
}

// Values of scratch memory for a weight gradient in matrix tiles.
inline int64_t wgrad_scratch(Tensor a, Tensor dy, int64_t axes, bool phased) {
  return kernels().wgrad_tiles_scratch(wgrad_call(a, {}, {}, dy, axes, phased));
}

inline void conv_wgrad(Tensor result, Tensor scratch, Tensor a, Optional scale, Optional shift, Tensor dy, int64_t axes,
                       bool phased, int64_t way, double slope, int64_t plain) {
  Wgrad call = wgrad_call(a, scale, shift, dy, axes, phased);
  set_plain(call.a, plain, "a");
  const bool deep = axes == 3;
  const int64_t taps = phased ? 2 : 3, points = phased ? 25 : 36;
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
  call.slope = static_cast<float>(slope);
  const Kernels& table = kernels(call.a.element);
  if (way_of(way) == Way::kTiles) {
    STD_TORCH_CHECK(call.a.element == Element::kBFloat16, "matrix tiles take bfloat16 maps");
    STD_TORCH_CHECK(call.scratch_size >= table.wgrad_tiles_scratch(call), "scratch is too small");
    table.conv_wgrad_tiles(call);
    return;
  }
  const int64_t k = padded(call.a.channels, table.lanes), co = padded(call.dy.channels, table.lanes);
  STD_TORCH_CHECK(way_of(way) == Way::kWinograd && call.scratch_size >= points * (k + co), "scratch is too small for one tile");
  table.conv_wgrad(call);
}

}  // namespace unetpp
