// From tensors to the structures of kernels.h, with checks: kernels read and write what these describe, and nothing else.
// An error names the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Output pixels of a tile, by configuration: a tile is a part of the statistics.
struct TileSize {
  int rows, columns;
  bool gathered;
};
constexpr TileSize TILE_SIZES[] = {{16, 32, false}, {8, 32, false}, {8, 32, false},
                                   {8, 32, false},  {8, 16, true},  {4, 16, true}};
constexpr int CONFIGURATIONS = sizeof(TILE_SIZES) / sizeof(TILE_SIZES[0]);

inline int precision_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, name,
                  " must be float16, bfloat16 or float32");
  return type == ScalarType::Half ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}

// `like`: a tensor on the device of the call.
inline void check_values(const Tensor& x, const Tensor& like, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of the other arguments");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ",
                  type == ScalarType::Float ? "float32" : "of the type of the other maps");
}

// The distance between pixels of a channels-last map [N, D, H, W, C], in values.
inline int pixel_stride(const Tensor& x, const char* name) {
  int64_t stride = x.size(4), inner = 1;
  bool found = false;
  for (int axis : {3, 2, 1}) {
    if (x.size(axis) > 1) {
      if (!found) stride = x.stride(axis) / inner;
      found = true;
      STD_TORCH_CHECK(x.stride(axis) == stride * inner, "the pixels of ", name, " are not evenly spaced");
    }
    inner *= x.size(axis);
  }
  return static_cast<int>(stride);
}

inline Map map_of(const Tensor& x, const Tensor& like, const char* name, const Optional& scale = {},
                  const Optional& shift = {}) {
  check_values(x, like, like.scalar_type(), name);
  STD_TORCH_CHECK(x.dim() == 5 && x.numel() > 0, name, " must be [N, D, H, W, C], and not empty");
  STD_TORCH_CHECK(x.size(4) == 1 || x.stride(4) == 1, name, " must be channels-last");
  Map map;
  map.data = static_cast<const char*>(x.data_ptr());
  map.image_stride = x.stride(0);
  map.pixel_stride = pixel_stride(x, name);
  map.depth = static_cast<int>(x.size(1));
  map.height = static_cast<int>(x.size(2));
  map.width = static_cast<int>(x.size(3));
  map.channels = static_cast<int>(x.size(4));
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift of ", name, " come together");
  if (scale) {
    for (const Tensor* part : {&*scale, &*shift}) {
      check_values(*part, like, ScalarType::Float, "scale and shift");
      STD_TORCH_CHECK(part->dim() == 2 && part->size(1) == x.size(4) && (part->size(0) == 1 || part->size(0) == x.size(0)) &&
                          (part->size(1) == 1 || part->stride(1) == 1),
                      "scale and shift of ", name, " must be [1 or N, C]");
    }
    STD_TORCH_CHECK(scale->size(0) == shift->size(0) && (scale->size(0) == 1 || scale->stride(0) == shift->stride(0)),
                    "scale and shift of ", name, " differ in shape or strides");
    map.scale = static_cast<const float*>(scale->data_ptr());
    map.shift = static_cast<const float*>(shift->data_ptr());
    map.affine_stride = scale->size(0) > 1 ? static_cast<int>(scale->stride(0)) : 0;
  }
  return map;
}

inline void* values_of(const Tensor& x, const Tensor& like, ScalarType type, int64_t count, const char* name) {
  check_values(x, like, type, name);
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == count, name, " must be contiguous with ", count, " values");
  return x.data_ptr();
}

inline float* floats_of(const Optional& x, const Tensor& like, int64_t count, const char* name) {
  return x ? static_cast<float*>(values_of(*x, like, ScalarType::Float, count, name)) : nullptr;
}

inline void check_size(const Map& map, int depth, int height, int width, const char* name) {
  STD_TORCH_CHECK(map.depth == depth && map.height == height && map.width == width, name, " is ", map.depth, "x", map.height,
                  "x", map.width, " where ", depth, "x", height, "x", width, " is needed");
}

inline void check_images(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.size(0) == like.size(0), name, " has ", x.size(0), " images, not ", like.size(0));
}

inline void check_axes(int64_t axes, int depth) {
  STD_TORCH_CHECK(axes == 2 || axes == 3, "axes is 2 or 3");
  STD_TORCH_CHECK(axes == 3 || depth == 1, "a map of two axes has depth 1");
}

inline int64_t power(int64_t base, int64_t exponent) { return exponent ? base * power(base, exponent - 1) : 1; }
