// The kernels as `torch.ops.unetpp_fast_cuda`, through PyTorch's stable ABI: one library for every torch >= 2.10 and every
// Python. kernels/cuda_ops.py decides which calls come here; arguments.h checks them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"

namespace {

Stream stream_of(const Tensor& x) {
  Stream stream;
  stream.device = x.get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(stream.device, &stream.handle) == 0, "no CUDA stream");
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(!error, error ? error : ""); }

void conv(Tensor out, Tensor a, Tensor wa, Optional scale_a, Optional shift_a, Optional b, Optional wb, Optional scale_b,
          Optional shift_b, Optional bias, Optional border, Optional stats, int64_t axes, bool phased, double slope,
          bool act, bool add, int64_t config) {
  const int precision = precision_of(out, "out");
  STD_TORCH_CHECK(config >= 0 && config < CONFIGURATIONS, "config is 0 to ", CONFIGURATIONS - 1);
  const TileSize tile = TILE_SIZES[config];
  const Map to = map_of(out, out, "out");
  check_axes(axes, to.depth);
  ConvArguments p;
  p.a = map_of(a, out, "a", scale_a, shift_a);
  check_images(a, out, "a");
  const int around = tile.gathered ? 2 : 1;
  check_size(p.a, axes == 3 ? to.depth * around : 1, to.height * around, to.width * around, "a");
  const int64_t taps = power(tile.gathered ? 4 : 3, axes);
  p.weights_a = static_cast<char*>(values_of(wa, out, out.scalar_type(), taps * p.a.channels * to.channels, "wa"));
  STD_TORCH_CHECK(b.has_value() == wb.has_value(), "b and wb come together");
  STD_TORCH_CHECK(!tile.gathered || !b, "b has no place in a data gradient");
  STD_TORCH_CHECK(b || !phased, "phased needs b");
  if (b) {
    p.b = map_of(*b, out, "b", scale_b, shift_b);
    check_images(*b, out, "b");
    const int half = phased ? 2 : 1;
    STD_TORCH_CHECK(to.height % half == 0 && to.width % half == 0 && (axes == 2 || to.depth % half == 0),
                    "phases need even sizes of out");
    check_size(p.b, axes == 3 ? to.depth / half : 1, to.height / half, to.width / half, "b");
    const int64_t taps_b = power(phased ? 4 : 3, axes);
    p.weights_b = static_cast<char*>(values_of(*wb, out, out.scalar_type(), taps_b * p.b.channels * to.channels, "wb"));
  }
  p.deep = axes == 3;
  p.phased = phased;
  p.out = static_cast<char*>(out.data_ptr());
  p.out_image_stride = to.image_stride;
  p.out_pixel_stride = to.pixel_stride;
  p.images = static_cast<int>(out.size(0));
  p.depth = to.depth;
  p.height = to.height;
  p.width = to.width;
  p.channels = to.channels;
  p.bias = floats_of(bias, out, p.channels, "bias");
  p.border = floats_of(border, out, power(3, axes) * p.channels, "border");
  const int64_t tiles_y = (p.height + tile.rows - 1) / tile.rows, tiles_x = (p.width + tile.columns - 1) / tile.columns;
  p.stats = floats_of(stats, out, p.images * p.depth * tiles_y * tiles_x * 3 * p.channels, "stats");
  p.slope = static_cast<float>(slope);
  p.act = act;
  p.add = add;
  check(run_conv(precision, static_cast<int>(config), p, stream_of(out)));
}

void conv_wgrad(Tensor a, Optional scale, Optional shift, Tensor dy, Tensor partial, Tensor result, int64_t axes,
                bool phased, double slope) {
  const int precision = precision_of(a, "a");
  WgradArguments p;
  p.a = map_of(a, a, "a", scale, shift);
  check_axes(axes, p.a.depth);
  p.dy = map_of(dy, a, "dy");
  check_images(dy, a, "dy");
  const int around = phased ? 2 : 1;
  check_size(p.dy, axes == 3 ? p.a.depth * around : 1, p.a.height * around, p.a.width * around, "dy");
  const int64_t size = power(phased ? 4 : 3, axes) * p.a.channels * p.dy.channels;
  STD_TORCH_CHECK(partial.dim() > 0 && partial.size(0) > 0, "partial must be [parts, taps, K, CO], of one part at least");
  p.partial = floats_of(partial, a, partial.size(0) * size, "partial");
  p.result = floats_of(result, a, size, "result");
  p.images = static_cast<int>(a.size(0));
  p.parts = static_cast<int>(partial.size(0));
  p.deep = axes == 3;
  p.phased = phased;
  p.slope = static_cast<float>(slope);
  check(run_wgrad(precision, p, stream_of(a)));
}

}  // namespace

STABLE_TORCH_LIBRARY(unetpp_fast_cuda, library) {
  library.def(
      "conv(Tensor(a!) out, Tensor a, Tensor wa, Tensor? scale_a, Tensor? shift_a, Tensor? b, Tensor? wb, Tensor? scale_b, "
      "Tensor? shift_b, Tensor? bias, Tensor? border, Tensor(b!)? stats, int axes, bool phased, float slope, bool act, "
      "bool add, int config) -> ()");
  library.def(
      "conv_wgrad(Tensor a, Tensor? scale, Tensor? shift, Tensor dy, Tensor(a!) partial, Tensor(b!) result, int axes, "
      "bool phased, float slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unetpp_fast_cuda, CUDA, library) {
  library.impl("conv", TORCH_BOX(&conv));
  library.impl("conv_wgrad", TORCH_BOX(&conv_wgrad));
}
