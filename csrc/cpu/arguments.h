// From tensors to the structures of kernels.h, with checks; an error names the argument.
#pragma once

#include "../map_checks.h"
#include "kernels.h"

namespace unetpp {

inline void check_floats(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, name, " must be float32 on a CPU");
}

// The element type of the maps of a call, by one of them.
inline Element element_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::Float ? Element::kFloat : Element::kBFloat16;
}

inline void check_element(const Tensor& x, Element element, const char* name) {
  const ScalarType type = element == Element::kFloat ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type, name, " must be on a CPU, of the type of the other maps");
}

// A channels-last map [N, D, H, W, C] at a constant distance from pixel to pixel.
inline Map map_of(const Tensor& x, Element element, const char* name, const Optional& scale = {},
                  const Optional& shift = {}) {
  check_element(x, element, name);
  STD_TORCH_CHECK(x.dim() == 5, name, " must be [N, D, H, W, C]");
  const bool empty = x.numel() == 0;  // whose strides mean nothing
  STD_TORCH_CHECK(x.size(4) == 1 || x.stride(4) == 1 || empty, name, " must be channels-last");
  Map map;
  map.pixel = pixel_stride(x, name);
  map.element = element;
  map.data = x.data_ptr();
  map.image = x.size(0) > 1 ? x.stride(0) : 0;
  map.depth = static_cast<int>(x.size(1));
  map.height = static_cast<int>(x.size(2));
  map.width = static_cast<int>(x.size(3));
  map.channels = static_cast<int>(x.size(4));
  const Affine affine = affine_of(x, scale, shift, name, check_floats);
  map.scale = affine.scale;
  map.shift = affine.shift;
  map.affine_image = affine.image;
  return map;
}

// The first `plain` channels of a map are read as they are.
inline void set_plain(Map& map, int64_t plain, const char* name) {
  STD_TORCH_CHECK(plain >= 0 && plain <= map.channels, name, " has ", map.channels, " channels, of which ", plain,
                  " cannot be read as they are");
  map.plain = static_cast<int>(plain);
}

inline const float* values(const Optional& x, int64_t count, const char* name) {
  if (!x) return nullptr;
  check_floats(*x, name);
  STD_TORCH_CHECK(x->is_contiguous() && x->numel() == count, name, " must be contiguous with ", count, " values");
  return static_cast<const float*>(x->data_ptr());
}

// Weights that are packed for matrix tiles.
inline const BFloat16* pairs(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous() && x.numel() == count, name,
                  " must be contiguous bfloat16 on a CPU with ", count, " values");
  return static_cast<const BFloat16*>(x.data_ptr());
}

// Weights [filters, filters, filters, rows of taps, taps of a row, K, CO], of any strides.
inline Filters filters_of(const Tensor& x, const char* name) {
  check_floats(x, name);
  STD_TORCH_CHECK(x.dim() == 7, name, " must have 7 dimensions: filters in 3, taps in 2, inputs and outputs");
  Filters filters;
  filters.data = static_cast<const float*>(x.data_ptr());
  for (int axis = 0; axis < 3; axis++) {
    filters.counts[axis] = static_cast<int>(x.size(axis));
    filters.filter[axis] = x.stride(axis);
  }
  filters.taps = static_cast<int>(x.size(3) * x.size(4));
  filters.width = static_cast<int>(x.size(4));
  STD_TORCH_CHECK(filters.taps > 0 && filters.taps <= 64, name, " has ", filters.taps, " taps, not 1 to 64");
  filters.row = x.stride(3);
  filters.column = x.stride(4);
  filters.k = x.stride(5);
  filters.co = x.stride(6);
  filters.channels = static_cast<int>(x.size(5));
  filters.outputs = static_cast<int>(x.size(6));
  return filters;
}

inline void check_filters(const Filters& x, int64_t count, int width, int channels, int outputs, const char* name) {
  STD_TORCH_CHECK(x.count() == count && x.width == width && x.taps == width * width && x.channels == channels &&
                      x.outputs == outputs, name, " must be ", count, " filters of ", width, "x", width, " taps for ",
                  channels, " input and ", outputs, " output channels");
}

// Class scores [N, classes, *S], as `values`.
inline void* scores(const Tensor& x, Element element, int64_t count, const char* name) {
  check_element(x, element, name);
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == count, name, " must be contiguous with ", count, " values");
  return x.data_ptr();
}

inline void check_size(const Map& map, int depth, int height, int width, const char* name) {
  STD_TORCH_CHECK(map.depth == depth && map.height == height && map.width == width, name, " is ", map.depth, "x", map.height,
                  "x", map.width, " where ", depth, "x", height, "x", width, " is needed");
}

inline void check_images(const Tensor& x, int64_t images, const char* name) {
  STD_TORCH_CHECK(x.size(0) == images, name, " has ", x.size(0), " images, not ", images);
}

inline void check_images(const Tensor& x, const Tensor& like, const char* name) { check_images(x, like.size(0), name); }

inline void check_even(int64_t axes, const Map& map) {
  STD_TORCH_CHECK(map.height % 2 == 0 && map.width % 2 == 0 && (axes == 2 || map.depth % 2 == 0), "phases need even sizes");
}

}  // namespace unetpp
