// Vectors of LANES floats by the compiler's own vector types, one namespace per instruction set (ISA), and scratch memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

namespace unetpp {
namespace ISA {

typedef float V __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
INLINE V splat(float x) { return x - V{}; }

INLINE V load_some(const float* p, int count) {
  if (count >= LANES) return load(p);
  V v = {};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}

INLINE void store_some(float* p, V v, int count) {
  if (count >= LANES)
    store(p, v);
  else
    std::memcpy(p, &v, sizeof(float) * count);
}

// Leaky ReLU; NaN passes, and a slope of 0 makes 0 of -inf.
INLINE V activate(V x, float slope) { return slope == 0 ? (x < 0 ? V{} : x) : (x < 0 ? x * slope : x); }

INLINE float sum(V v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int WIDTH = 2 * LANES;  // output channels of a block

// Memory that a thread keeps from call to call; what was in it is lost.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* get(size_t count) {
#ifdef __SANITIZE_ADDRESS__
    std::free(data);  // exactly what is asked for, so that its end is seen
    return data = static_cast<float*>(std::malloc(count * sizeof(float)));
#endif
    if (count > size) {
      std::free(data);
      size_t bytes = (count * sizeof(float) + (1 << 21) - 1) >> 21 << 21;
      data = static_cast<float*>(std::aligned_alloc(1 << 21, bytes));
      size = data ? bytes / sizeof(float) : 0;
      if (!data) std::abort();
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

// Rows of a left operand and the packed right operand that belongs to them.
struct Segment {
  const float* rows;
  int64_t row;  // from row to row
  const float* weights;  // [k, WIDTH]
  int k;
};

#if LANES == 16
constexpr int MOST_ROWS = 12;
#else
constexpr int MOST_ROWS = 6;
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define KEEP(x) asm("" : "+v"(x))  // in a register: folding loads of weights into products doubles the loads
#else
#define KEEP(x)
#endif
#if defined(__x86_64__) && LANES < 16
#undef KEEP
#define KEEP(x) asm("" : "+x"(x))
#endif

// result[r, 0..WIDTH) = sum over segments and k of rows[r, k] weights[k, :].
template <int R>
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
  for (int r = 0; r < R; r++) {
    store(result + r * stride, sums[r][0]);
    store(result + r * stride + LANES, sums[r][1]);
  }
}

// As `multiply`, for any number of rows.
static void multiply_rows(const Segment* segments, int count, int rows, float* result, int64_t stride) {
  Segment part[64];
  for (int s = 0; s < count; s++) part[s] = segments[s];
  const int pieces = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int piece = 0, done = 0; piece < pieces; piece++) {
    const int take = (rows - done + pieces - piece - 1) / (pieces - piece);
    switch (take) {
      case 1: multiply<1>(part, count, result, stride); break;
      case 2: multiply<2>(part, count, result, stride); break;
      case 3: multiply<3>(part, count, result, stride); break;
      case 4: multiply<4>(part, count, result, stride); break;
      case 5: multiply<5>(part, count, result, stride); break;
      case 6: multiply<6>(part, count, result, stride); break;
#if LANES == 16
      case 7: multiply<7>(part, count, result, stride); break;
      case 8: multiply<8>(part, count, result, stride); break;
      case 9: multiply<9>(part, count, result, stride); break;
      case 10: multiply<10>(part, count, result, stride); break;
      case 11: multiply<11>(part, count, result, stride); break;
      case 12: multiply<12>(part, count, result, stride); break;
#endif
    }
    for (int s = 0; s < count; s++) part[s].rows += take * part[s].row;
    result += take * stride;
    done += take;
  }
}

}  // namespace ISA
}  // namespace unetpp
