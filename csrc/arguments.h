// From tensors to the structures of kernels.h, with checks: kernels read and write what these describe, and nothing else.
// An error names the argument.
#pragma once

#include "kernels.h"
#include "map_checks.h"

// Output pixels of a tile, by configuration: a tile is a part of the statistics.
struct TileSize {
  int rows, columns;
  bool gathered;
};
constexpr TileSize TILE_SIZES[] = {{16, 32, false}, {8, 32, false}, {8, 32, false}, {8, 32, false},
                                   {16, 16, true},  {8, 16, true},  {8, 16, true},  {4, 16, true}};
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

inline Map map_of(const Tensor& x, const Tensor& like, const char* name, const Optional& scale = {},
                  const Optional& shift = {}) {
  check_values(x, like, like.scalar_type(), name);
  STD_TORCH_CHECK(x.dim() == 5 && x.numel() > 0, name, " must be [N, D, H, W, C], and not empty");
  STD_TORCH_CHECK(x.size(4) == 1 || x.stride(4) == 1, name, " must be channels-last");
  Map map;
  map.data = static_cast<const char*>(x.data_ptr());
  map.image_stride = x.stride(0);
  map.pixel_stride = static_cast<int>(pixel_stride(x, name));
  map.depth = static_cast<int>(x.size(1));
  map.height = static_cast<int>(x.size(2));
  map.width = static_cast<int>(x.size(3));
  map.channels = static_cast<int>(x.size(4));
  const auto check_floats = [&](const Tensor& part, const char* what) { check_values(part, like, ScalarType::Float, what); };
  const Affine affine = affine_of(x, scale, shift, name, check_floats);
  map.scale = affine.scale;
  map.shift = affine.shift;
  map.affine_stride = static_cast<int>(affine.image);
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

inline int64_t power(int64_t base, int64_t exponent) { return exponent ? base * power(base, exponent - 1) : 1; }
