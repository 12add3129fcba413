// Vectors of LANES floats by the compiler's own vector types, one namespace per instruction set (ISA), and scratch memory.
//
// Maps are read and written through `load` and `store`, which widen and round their elements E: float or BFloat16.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if LANES >= 8
#include <immintrin.h>
#endif

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

// Compiled once, for all callers: elsewhere a compiler may fuse other products with sums, which gives other bits.
#if defined(__clang__)
#define ONCE __attribute__((noinline))
#else
#define ONCE __attribute__((noinline, noclone))
#endif

namespace unetpp {
namespace ISA {

typedef float V __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE V splat(float x) { return x - V{}; }

INLINE V widen(Halves halves) { return reinterpret_cast<V>(__builtin_convertvector(halves, Words) << 16); }
INLINE Halves upper(V v) { return __builtin_convertvector(reinterpret_cast<Words>(v) >> 16, Halves); }

// v as a map of E holds it: rounded to the nearest, ties to even; NaN stays NaN.
template <class E>
INLINE V rounded(V v) {
  if (std::is_same<E, float>::value) return v;
  const Words bits = reinterpret_cast<Words>(v), quiet = bits | 0x400000u, nearest = bits + (0x7fffu + (bits >> 16 & 1u));
  return reinterpret_cast<V>((v == v ? nearest : quiet) & 0xffff0000u);
}

INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }

INLINE V load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return widen(halves);
}

INLINE float scalar(float x) { return x; }

INLINE float scalar(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}


// Stores return what they have stored.
INLINE V store(float* p, V v) { return *reinterpret_cast<Unaligned*>(p) = v; }

INLINE V store(BFloat16* p, V v) {
  v = rounded<BFloat16>(v);
  const Halves halves = upper(v);
  std::memcpy(p, &halves, sizeof halves);
  return v;
}

// Copies `count` < LANES elements in pieces of 8, 4, 2 and 1.
template <class E>
INLINE void copy_part(E* to, const E* from, int count) {
#pragma GCC unroll 4
  for (int size = LANES / 2; size > 0; size /= 2)
    if (count & size) {
      std::memcpy(to, from, sizeof(E) * size);
      to += size;
      from += size;
    }
}

template <class E>
INLINE V load_part(const E* p, int count) {
  E part[LANES] = {};
  copy_part(part, p, count);
  return load(part);
}

template <class E>
INLINE void store_part(E* p, V v, int count) {
  E part[LANES];
  store(part, v);
  copy_part(p, part, count);
}

// Instructions with masks, where they are fast.
#if LANES == 16
INLINE V load_part(const float* p, int count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
INLINE V load_part(const BFloat16* p, int count) {
  return widen(reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16((1u << count) - 1, p)));
}
INLINE void store_part(float* p, V v, int count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, v); }
#elif LANES == 8
INLINE __m256i mask_of(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load_part(const float* p, int count) { return _mm256_maskload_ps(p, mask_of(count)); }
INLINE void store_part(float* p, V v, int count) { _mm256_maskstore_ps(p, mask_of(count), v); }
#endif

// The first `count` elements, at most LANES; no others are touched.
template <class E>
INLINE V load_some(const E* p, int count) {
  return count >= LANES ? load(p) : load_part(p, count);
}

template <class E>
INLINE V store_some(E* p, V v, int count) {
  if (count >= LANES) return store(p, v);
  store_part(p, v, count);
  return rounded<E>(v);
}

// As `store_some`; whole aligned vectors go past the caches, where the CPU can. After the last, `stream_end`.
template <class E>
INLINE V stream_some(E* p, V v, int count) {
#if LANES == 16
  if (count >= LANES && reinterpret_cast<uintptr_t>(p) % (LANES * sizeof(E)) == 0) {
    v = rounded<E>(v);
    if constexpr (sizeof(E) == sizeof(float))
      _mm512_stream_ps(reinterpret_cast<float*>(p), v);
    else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(upper(v)));
    return v;
  }
#endif
  return store_some(p, v, count);
}

INLINE void stream_end() {
#if LANES == 16
  _mm_sfence();
#endif
}

// The place of a pixel, counted in row-major order, in the map of one image.
template <class E>
INLINE E* at(const Map& map, int64_t image, int64_t pixel) {
  return static_cast<E*>(map.data) + image * map.image + pixel * map.pixel;
}

// x in the first `count` lanes, y in the others.
INLINE V first_lanes(int count, V x, V y) {
  V lane = {};
  for (int i = 0; i < LANES; i++) lane[i] = static_cast<float>(i);
  return lane < splat(static_cast<float>(count)) ? x : y;
}

// Leaky ReLU; NaN passes, and a slope of 0 makes 0 of -inf.
INLINE V activate(V x, float slope) { return slope == 0 ? (x < 0 ? V{} : x) : (x < 0 ? x * slope : x); }

// e^x of x within +-87; within two roundings.
INLINE V exponential(V x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: its last bit is worth 1
  const V shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;  // -ln(2) / 2 to ln(2) / 2
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * reinterpret_cast<V>((reinterpret_cast<Words>(shifted) + 127u) << 23);
}

INLINE V clamped(V x, float least, float most) {
  x = x < least ? splat(least) : x;
  return x > most ? splat(most) : x;
}

// Any activation; NaN passes. `kind` is not kNone.
INLINE V activate(V x, Activation kind, float slope) {
  if (kind == Activation::kLeaky) return activate(x, slope);
  if (kind == Activation::kRelu6) return clamped(x, 0, 6);
  if (kind == Activation::kHardswish) return x * clamped(x + 3.0f, 0, 6) * (1.0f / 6);
  return x / (1.0f + exponential(clamped(-x, -87, 87)));
}

INLINE float sum(V v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int WIDTH = 2 * LANES;  // output channels of a block

// Memory that a thread keeps from call to call; what was in it is lost.
struct Scratch {
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kPage = sizeof(float);  // exactly what is asked for, every time, so that its end is seen
#else
  static constexpr size_t kPage = 1 << 21;  // a huge one
#endif
  float* data = nullptr;
  size_t size = 0;
  float* get(size_t count) {
    if (count > size || kPage == sizeof(float)) {
      release();
      const size_t bytes = (count * sizeof(float) + kPage - 1) / kPage * kPage;
      data = static_cast<float*>(::operator new(bytes, std::align_val_t(kPage), std::nothrow));
      size = data ? bytes / sizeof(float) : 0;
      if (!data) std::abort();
    }
    return data;
  }
  void release() { ::operator delete(data, std::align_val_t(kPage)); }
  ~Scratch() { release(); }
};

static thread_local Scratch scratch;

// Rows of a left operand and the packed right operand that belongs to them.
struct Segment {
  const float* rows;
  int64_t row;           // from row to row
  const float* weights;  // [k, WIDTH]
  int k;
};

// Rows of a product: their sums, two vectors each, stay in registers.
#if LANES == 16
#define MOST_ROWS 12  // of 32 registers
#elif defined(__aarch64__)
#define MOST_ROWS 8  // of 32, which hold a value of every row too
#else
#define MOST_ROWS 6  // of 16
#endif

// Keeps x in a register: folding loads of weights into products doubles the loads. Elsewhere products take registers only.
#if !defined(__x86_64__)
#define KEEP(x)
#elif LANES == 16
#define KEEP(x) asm("" : "+v"(x))
#else
#define KEEP(x) asm("" : "+x"(x))
#endif

// result[r, 0..WIDTH) (+)= sum over segments and k of rows[r, k] weights[k, :].
template <int R, bool ADD>
static void multiply(const Segment* segments, int count, float* result, int64_t stride) {
  V sums[R][2] = {};
  for (int s = 0; s < count; s++) {
    const float *weights = segments[s].weights, *rows = segments[s].rows;
    const int64_t row = segments[s].row;
#pragma GCC unroll 4
    for (int k = segments[s].k; k > 0; k--) {
      V w0 = load(weights), w1 = load(weights + LANES);
      KEEP(w0);
      KEEP(w1);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        V x = splat(rows[r * row]);
        sums[r][0] += x * w0;
        sums[r][1] += x * w1;
      }
      weights += WIDTH;
      rows++;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) {
      float* place = result + r * stride + v * LANES;
      store(place, ADD ? load(place) + sums[r][v] : sums[r][v]);
    }
}

// body(R) for a constant R equal to value, of 1 to MOST.
template <int MOST, class F>
INLINE void with_constant(int value, const F& body) {
  if constexpr (MOST > 0) {
    if (value == MOST)
      body(std::integral_constant<int, MOST>());
    else
      with_constant<MOST - 1>(value, body);
  }
}

// body(first, R) for pieces of `count` rows, nearly equal, at most MOST each.
template <int MOST, class F>
INLINE void for_pieces(int count, const F& body) {
  const int pieces = (count + MOST - 1) / MOST;
  for (int piece = 0, first = 0; piece < pieces; piece++) {
    const int take = (count - first + pieces - piece - 1) / (pieces - piece);
    with_constant<MOST>(take, [&](auto rows) { body(first, rows); });
    first += take;
  }
}

// Products of consecutive channels, of all operands one after the other, that are summed before they are added to the sum of
// all: the rounding error of one sum grows with the root of their number.
constexpr int STRETCH = 64;

// As `multiply`, for any number of rows.
template <bool ADD>
static void multiply_rows(const Segment* segments, int count, int rows, float* result, int64_t stride) {
  for_pieces<MOST_ROWS>(rows, [&](int first, auto take) {
    Segment part[STRETCH];
    for (int s = 0; s < count; s++) {
      part[s] = segments[s];
      part[s].rows += first * part[s].row;
    }
    multiply<take, ADD>(part, count, result + first * stride, stride);
  });
}

// body(i, k, rows, place): channels k to k + rows of operand i are at `place` of a stretch; end(whether it was the first) after
// every stretch. channels(i): of operand i of `count`, a multiple of 4.
template <class Channels, class Body, class End>
INLINE void each_stretch(int count, const Channels& channels, const Body& body, const End& end) {
  int place = 0;
  bool first = true;
  for (int i = 0; i < count; i++)
    for (int k = 0, rows; k < channels(i); k += rows) {
      rows = std::min(STRETCH - place, channels(i) - k);
      body(i, k, rows, place);
      place += rows;
      if (place < STRETCH) continue;
      end(first);
      first = false;
      place = 0;
    }
  if (first || place) end(first);
}

// As `multiply`, for any number of rows and channels, stretch by stretch.
static void multiply_all(const Segment* segments, int count, int rows, float* result, int64_t stride) {
  Segment parts[STRETCH];
  int used = 0;
  const auto add = [&](int i, int k, int channels, int) {
    const Segment& whole = segments[i];
    parts[used++] = {whole.rows + k, whole.row, whole.weights + static_cast<int64_t>(k) * WIDTH, channels};
  };
  each_stretch(count, [&](int i) { return segments[i].k; }, add, [&](bool first) {
    if (first)
      multiply_rows<false>(parts, used, rows, result, stride);
    else
      multiply_rows<true>(parts, used, rows, result, stride);
    used = 0;
  });
}

}  // namespace ISA
}  // namespace unetpp
