// What is checked of the tensors of a map [N, D, H, W, C], whatever device its kernels are for; an error names the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The distance between the pixels of a channels-last map, in values; the strides of an empty one mean nothing.
inline int64_t pixel_stride(const Tensor& x, const char* name) {
  int64_t stride = x.size(4), inner = 1;
  if (x.numel() == 0) return stride;
  bool found = false;
  for (int axis : {3, 2, 1}) {
    if (x.size(axis) > 1) {
      if (!found) stride = x.stride(axis) / inner;
      found = true;
      STD_TORCH_CHECK(x.stride(axis) == stride * inner, "the pixels of ", name, " are not evenly spaced");
    }
    inner *= x.size(axis);
  }
  return stride;
}

// What is multiplied with and added to the channels of a map as they are read; null without. `image`: from one image's to
// the next one's, in values.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t image = 0;
};

// `check_floats`: of a tensor and its name, that it is float32 where the kernels run.
template <typename Check>
Affine affine_of(const Tensor& x, const Optional& scale, const Optional& shift, const char* name, Check check_floats) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift of ", name, " come together");
  if (!scale) return {};
  for (const Tensor* part : {&*scale, &*shift}) {
    check_floats(*part, "scale and shift");
    STD_TORCH_CHECK(part->dim() == 2 && part->size(1) == x.size(4) && (part->size(0) == 1 || part->size(0) == x.size(0)) &&
                        (part->size(1) == 1 || part->stride(1) == 1),
                    "scale and shift of ", name, " must be [1 or N, C]");
  }
  STD_TORCH_CHECK(scale->size(0) == shift->size(0) && (scale->size(0) == 1 || scale->stride(0) == shift->stride(0)),
                  "scale and shift of ", name, " differ in shape or strides");
  return {static_cast<const float*>(scale->data_ptr()), static_cast<const float*>(shift->data_ptr()),
          scale->size(0) > 1 ? scale->stride(0) : 0};
}

inline void check_axes(int64_t axes, int64_t depth) {
  STD_TORCH_CHECK(axes == 2 || axes == 3, "axes is 2 or 3");
  STD_TORCH_CHECK(axes == 3 || depth == 1, "a map of two axes has depth 1");
}
