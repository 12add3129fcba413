// What the CPU kernels take: plain structures, filled by bindings.cpp, and one table of functions per instruction set and
// element type. Maps are channels-last, [N, D, H, W, C] with D = 1 in 2D, at a constant distance from pixel to pixel; all
// maps of a call hold float32 or all hold bfloat16. Everything else is float32.
#pragma once

#include <cstdint>

namespace unetpp {

struct BFloat16 {  // the upper half of a float32
  uint16_t bits;
};

enum class Element { kFloat, kBFloat16 };

// A map, and how to read it: act(scale x + shift) where scale is given, but for the first `plain` channels; x otherwise.
struct Map {
  Element element = Element::kFloat;
  void* data = nullptr;
  int64_t image = 0, pixel = 0;  // distances in values
  int depth = 0, height = 0, width = 0, channels = 0;
  int origin = 0;  // the row of the map that is the first in memory, in 2D
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t affine_image = 0;  // from the row of one image to the next; 0 where all share one
  int plain = 0;
};

// The weights of convolutions as they lie in the caller's tensor, [counts[0..2], taps, channels, outputs]: `rows` of taps, and
// distances in values. All counts of filters in one index: the last varies fastest.
struct Filters {
  const float* data = nullptr;
  int counts[3] = {1, 1, 1};
  int64_t filter[3] = {0, 0, 0};
  int taps = 0, width = 1;  // taps in all, and of a row
  int64_t row = 0, column = 0, k = 0, co = 0;
  int channels = 0, outputs = 0;

  int count() const { return counts[0] * counts[1] * counts[2]; }
  int64_t offset(int tap) const { return tap / width * row + tap % width * column; }
  const float* at(int index) const {
    const int last = index % counts[2], middle = index / counts[2] % counts[1], first = index / counts[2] / counts[1];
    return data + first * filter[0] + middle * filter[1] + last * filter[2];
  }
};

// How the taps of a convolution lie: 3 at stride 1; 3 at stride 2 with b by phases (2 taps); 4 at stride 2.
enum class Geometry { kPlain, kPhased, kGathered };

// What computes a convolution: sums of taps; Winograd's minimal filtering; or sums of taps in matrix tiles, of bfloat16 maps.
enum class Way { kDirect, kWinograd, kTiles };

// What becomes of a sum: nothing, leaky ReLU, ReLU6, SiLU or Hardswish.
enum class Activation { kNone, kLeaky, kRelu6, kSilu, kHardswish };

// out = epilogue(conv(a) + conv(b)), as kernels/naive.py:conv. Weights are packed, ua and ub, or as they are, wa and wb, or
// packed for tiles, ta and tb.
struct Conv {
  int images = 0, axes = 2;
  Geometry geometry = Geometry::kPlain;
  Map out, a, b;
  const float* ua = nullptr;
  const float* ub = nullptr;
  Filters wa, wb;
  const BFloat16* ta = nullptr;
  const BFloat16* tb = nullptr;
  const float* bias = nullptr;
  const float* border = nullptr;  // [3^axes, CO]
  float* stats = nullptr;         // [N, parts, 3, CO]
  float slope = 0;
  Activation act = Activation::kNone;
  bool add = false;
  bool linear = false, align_corners = false;  // b has half the size, and is up-sampled linearly
  bool past = false;      // the result goes past the caches: it is large, and not read soon
  int begin = 0, end = 0;  // the rows of the result that are computed
};

// result = the gradient of a convolution's weights, as kernels/naive.py:conv_wgrad.
struct Wgrad {
  int images = 0, axes = 2;
  bool phased = false;
  Map a, dy;
  float slope = 0;
  float* result = nullptr;  // [phases, taps^axes, K, CO], of any strides
  int64_t phase = 0, tap = 0, k = 0, co = 0;
  float* scratch = nullptr;
  int64_t scratch_size = 0;  // in values
};

struct Pass {  // one pass over maps of one size
  int images = 0, axes = 2;
  Map x, y, g;  // what each is depends on the pass
  float slope = 0;
  bool add = false, frozen = false;
  int64_t chunk = 0;  // pixels per partial sum
  const float* mean = nullptr;
  const float* inverse = nullptr;
  const float* averages = nullptr;
  int64_t averages_image = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  int classes = 0;
  float* sums = nullptr;
};

struct Kernels {
  const char* name;
  int lanes;   // channels of a vector; a block of output channels is twice as wide
  bool tiles;  // multiplied by the CPU
  void (*conv_winograd)(const Conv&);
  void (*conv_few)(const Conv&);
  void (*conv_direct)(const Conv&, int taps, int stride);
  void (*conv_point)(const Conv&);
  void (*conv_tiles)(const Conv&);
  void (*conv_wgrad)(const Wgrad&);
  void (*conv_wgrad_tiles)(const Wgrad&);
  int64_t (*wgrad_tiles_scratch)(const Wgrad&);
  void (*pack)(const Filters&, bool winograd, float* to);
  void (*pack_tiles)(const Filters&, BFloat16* to);
  void (*pool)(const Pass&);
  void (*pool_backward)(const Pass&);
  void (*head)(const Pass&);
  void (*head_backward)(const Pass&);
  void (*norm_sums)(const Pass&);
  void (*norm_apply)(const Pass&);
  void (*act_backward)(const Pass&);
  float (*fused_products)(int64_t count);
};

const Kernels& kernels_plain(Element element);
#if defined(__x86_64__)
const Kernels& kernels_avx2(Element element);
const Kernels& kernels_avx512(Element element);
#endif


// body(context, i) for i = 0..count-1, each taken by the next free thread of PyTorch's pool.
void parallel(int64_t count, void (*body)(void* context, int64_t index), void* context);
int threads();

template <class F>
void parallel_for(int64_t count, const F& f) {
  parallel(count, [](void* context, int64_t index) { (*static_cast<const F*>(context))(index); }, const_cast<F*>(&f));
}

}  // namespace unetpp
