// What the CPU can do at most: products and sums that wait for nothing. Benchmarks state the share of it that kernels reach.
#pragma once

#include "simd.h"

namespace unetpp {
namespace ISA {

// `count` rounds of 12 independent fused products and sums of a vector each; what they give means nothing.
static float fused_products(int64_t count) {
  V sums[12], x = splat(0.5f), y = splat(0.25f);
  for (int r = 0; r < 12; r++) sums[r] = splat(static_cast<float>(r));
  for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 12
    for (int r = 0; r < 12; r++) sums[r] = sums[r] * x + y;
  V total = {};
  for (int r = 0; r < 12; r++) total += sums[r];
  return sum(total);
}

}  // namespace ISA
}  // namespace unetpp
