// The kernels' interface, used by the binding to PyTorch and by the emulation's server.
// Maps and weights are byte pointers, and their precision is a separate argument. All other values are float32.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "stream.h"

// Whether what begins any number of steps of bytes after `first` is aligned to 16 bytes.
inline bool is_aligned(const void* first, int64_t step) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && step % 16 == 0;
}

// A channels-last map of one precision; strides in values.
struct Map {
  const char* data = nullptr;
  int64_t image_stride = 0;
  int pixel_stride = 0, depth = 1, height = 0, width = 0, channels = 0;
  const float* scale = nullptr;  // [1 or N, channels]; null: no affine
  const float* shift = nullptr;
  int affine_stride = 0;  // from image to image
  // Set by the launch. Whether all pixels, and all eight values of scale and shift, are whole pieces of 16 bytes.
  bool vector = false, vector_affine = false;
  int pixel_bytes = 0, row_bytes = 0;
  int64_t plane_bytes = 0, image_bytes = 0;

  // Returns nullptr, or an error message.
  const char* prepare(int value_bytes) {
    const int64_t row = int64_t{width} * pixel_stride * value_bytes;
    if (row >= int64_t{1} << 31) return "a row of a map has 2^31 bytes or more";
    pixel_bytes = pixel_stride * value_bytes;
    row_bytes = static_cast<int>(row);
    plane_bytes = row * height;
    image_bytes = image_stride * value_bytes;
    vector = is_aligned(data, pixel_bytes) && is_aligned(data, image_bytes) && channels * value_bytes % 16 == 0;
    vector_affine = is_aligned(scale, affine_stride * int64_t{4}) && is_aligned(shift, 0);
    return nullptr;
  }
};

struct ConvArguments {
  Map a, b;  // b.data null: one operand
  const char* weights_a = nullptr;
  const char* weights_b = nullptr;
  bool phased = false;  // b is of half the size, with weights for each phase; else of the size of `out`
  char* out = nullptr;
  int64_t out_image_stride = 0;
  int out_pixel_stride = 0, images = 0, depth = 1, height = 0, width = 0, channels = 0;
  const float* bias = nullptr;    // [CO]
  const float* border = nullptr;  // [9, CO], [27, CO] in 3D
  float* stats = nullptr;         // [N, tiles, 3, CO]
  float slope = 0;
  bool deep = false;  // 3D
  bool act = false, add = false;
  // Set by the launch.
  int tiles_y = 0, tiles_x = 0, co_blocks = 0, stages_a = 0, stages = 0, planes_a = 1, planes_b = 1;
  bool vector_weights = false, vector_out = false, relu = false;  // relu: the slope is 0
  int out_pixel_bytes = 0, out_row_bytes = 0;
  int64_t out_plane_bytes = 0, out_image_bytes = 0;

  // What does not depend on a configuration. Returns nullptr, or an error message.
  const char* prepare(int value_bytes) {
    Map map;  // `out` as one
    map.data = out, map.image_stride = out_image_stride, map.pixel_stride = out_pixel_stride;
    map.height = height, map.width = width, map.channels = channels;
    for (Map* each : {&a, &b, &map})
      if (const char* error = each->prepare(value_bytes)) return error;
    out_pixel_bytes = map.pixel_bytes, out_row_bytes = map.row_bytes;
    out_plane_bytes = map.plane_bytes, out_image_bytes = map.image_bytes;
    vector_out = map.vector;
    const int64_t tap_bytes = int64_t{a.channels > b.channels ? a.channels : b.channels} * channels * value_bytes;
    if (tap_bytes >= int64_t{1} << 31) return "the weights of a tap have 2^31 bytes or more";
    vector_weights = is_aligned(weights_a, channels * value_bytes) && is_aligned(weights_b, channels * value_bytes);
    relu = slope == 0;
    return nullptr;
  }
};

struct WgradArguments {
  Map a, dy;  // phased: a is of half the size
  float* partial = nullptr;  // [parts, taps, K, CO]
  float* result = nullptr;   // [taps, K, CO]
  int images = 0, parts = 0;
  bool phased = false, deep = false;
  float slope = 0;
  // Set by the launch.
  int tiles = 0, tiles_x = 0, tiles_each = 0, planes = 0, taps = 0;  // tiles: of a plane
  bool relu = false;  // the slope is 0

  // As ConvArguments::prepare.
  const char* prepare(int value_bytes) {
    relu = slope == 0;
    const char* error = a.prepare(value_bytes);
    return error ? error : dy.prepare(value_bytes);
  }
};

// Each returns nullptr, or an error message. `precision`: 0 float16, 1 bfloat16, 2 float32 multiplied as TF32. `config`: the
// number of a configuration in dispatch_conv.
const char* run_conv(int precision, int config, const ConvArguments& arguments, Stream stream);
const char* run_wgrad(int precision, const WgradArguments& arguments, Stream stream);
