// The kernels as `torch.ops.unetpp_fast_cuda`, through PyTorch's stable ABI: one library for every torch >= 2.10 and every
// Python. Shapes and precisions are checked by kernels/cuda_ops.py; here tensors become pointers and strides.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

Stream stream_of(const Tensor& x) {
  Stream stream;
  stream.device = x.get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(stream.device, &stream.handle) == 0, "no CUDA stream");
  return stream;
}

int precision_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "maps are float16, bfloat16 or float32");
  return type == ScalarType::Half ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}

template <typename V>
V* data_of(const Optional& x) {
  return x ? static_cast<V*>(x->data_ptr()) : nullptr;
}

// The distance between pixels of a channels-last map [N, D, H, W, C], in values.
int pixel_stride(const Tensor& x) {
  for (int axis : {3, 2, 1})
    if (x.size(axis) > 1) return static_cast<int>(x.stride(axis));
  return static_cast<int>(x.size(4));
}

Map map_of(const Tensor& x, const Optional& scale, const Optional& shift) {
  Map map;
  map.data = static_cast<const char*>(x.data_ptr());
  map.image_stride = x.stride(0);
  map.pixel_stride = pixel_stride(x);
  map.depth = static_cast<int>(x.size(1));
  map.height = static_cast<int>(x.size(2));
  map.width = static_cast<int>(x.size(3));
  map.channels = static_cast<int>(x.size(4));
  map.scale = data_of<const float>(scale);
  map.shift = data_of<const float>(shift);
  map.affine_stride = scale && scale->size(0) > 1 ? static_cast<int>(scale->stride(0)) : 0;
  return map;
}

void check(const char* error) { STD_TORCH_CHECK(!error, error ? error : ""); }

void conv(Tensor out, Tensor a, Tensor wa, Optional scale_a, Optional shift_a, Optional b, Optional wb, Optional scale_b,
          Optional shift_b, Optional bias, Optional border, Optional stats, int64_t axes, bool phased, double slope,
          bool act, bool add, int64_t config) {
  ConvArguments p;
  p.a = map_of(a, scale_a, shift_a);
  if (b) p.b = map_of(*b, scale_b, shift_b);
  p.weights_a = static_cast<const char*>(wa.data_ptr());
  p.weights_b = data_of<const char>(wb);
  p.deep = axes == 3;
  p.phased = phased;
  p.out = static_cast<char*>(out.data_ptr());
  p.out_image_stride = out.stride(0);
  p.out_pixel_stride = pixel_stride(out);
  p.images = static_cast<int>(out.size(0));
  p.depth = static_cast<int>(out.size(1));
  p.height = static_cast<int>(out.size(2));
  p.width = static_cast<int>(out.size(3));
  p.channels = static_cast<int>(out.size(4));
  p.bias = data_of<const float>(bias);
  p.border = data_of<const float>(border);
  p.stats = data_of<float>(stats);
  p.slope = static_cast<float>(slope);
  p.act = act;
  p.add = add;
  check(run_conv(precision_of(out), static_cast<int>(config), p, stream_of(out)));
}

void conv_wgrad(Tensor a, Optional scale, Optional shift, Tensor dy, Tensor partial, Tensor result, int64_t axes,
                bool phased, double slope) {
  WgradArguments p;
  p.a = map_of(a, scale, shift);
  p.dy = map_of(dy, {}, {});
  p.partial = static_cast<float*>(partial.data_ptr());
  p.result = static_cast<float*>(result.data_ptr());
  p.images = static_cast<int>(a.size(0));
  p.parts = static_cast<int>(partial.size(0));
  p.deep = axes == 3;
  p.phased = phased;
  p.slope = static_cast<float>(slope);
  check(run_wgrad(precision_of(a), p, stream_of(a)));
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
