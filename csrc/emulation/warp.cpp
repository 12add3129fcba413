// The instructions that a warp executes together. Registers are laid out as the PTX manual describes.
#include "../hardware.h"

namespace emulation {

namespace {

void load(Collective& warp, bool transposed) {
  uint16_t values[4][8][8];
  uint32_t* results[WARP];
  int64_t rows[4][8] = {};  // of each matrix in each group of banks, 16 bytes wide
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& mine = *static_cast<Matrices*>(warp.lanes[lane]);
    memcpy(values[lane / 8][lane % 8], at(mine.offset, 16), 16);
    results[lane] = mine.result;
    int64_t& count = rows[lane / 8][mine.offset / 16 % 8];
    if (++count > seen.conflicts) seen.conflicts = count;
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto& m = values[matrix];
      const uint16_t low = transposed ? m[column][row] : m[row][column];
      const uint16_t high = transposed ? m[column + 1][row] : m[row][column + 1];
      results[lane][matrix] = low | uint32_t{high} << 16;
    }
}

// The values in one register: two of 16 bits, or one of 32, whose last 13 bits the tensor cores do not read.
template <typename T>
void values_of(uint32_t word, float* to) {
  if constexpr (sizeof(T) == 4) {
    to[0] = bits_as<float>(word & ~0x1fffu);
  } else {
    const hw::Pair pair = hw::unpack<T>(word);
    to[0] = pair.first, to[1] = pair.second;
  }
}

}  // namespace

void execute_load(Collective& warp) { load(warp, false); }
void execute_load_transposed(Collective& warp) { load(warp, true); }

void execute_shuffle(Collective& warp) {
  for (int lane = 0; lane < WARP; ++lane) {
    auto& mine = *static_cast<Exchange*>(warp.lanes[lane]);
    mine.result = static_cast<Exchange*>(warp.lanes[lane ^ mine.mask])->value;
  }
}

template <typename T>
void execute_multiply(Collective& warp) {
  constexpr int EACH = 4 / sizeof(T), DEPTH = 8 * EACH;  // values in a register; length of the sums
  float a[16][DEPTH], b[DEPTH][8], d[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& mine = *static_cast<Product*>(warp.lanes[lane]);
    const int group = lane / 4, quad = lane % 4;
    for (int k = 0; k < 4; ++k) {
      values_of<T>(mine.a[k], &a[group + k % 2 * 8][k / 2 * DEPTH / 2 + quad * EACH]);
      d[group + k / 2 * 8][quad * 2 + k % 2] = mine.d[k];
    }
    for (int k = 0; k < 2; ++k) {
      float pair[EACH];
      values_of<T>(mine.b[k], pair);
      for (int e = 0; e < EACH; ++e) b[k * DEPTH / 2 + quad * EACH + e][group] = pair[e];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < DEPTH; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& mine = *static_cast<Product*>(warp.lanes[lane]);
    for (int k = 0; k < 4; ++k) mine.d[k] = d[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2];
  }
}

template void execute_multiply<hw::Half>(Collective&);
template void execute_multiply<hw::BFloat16>(Collective&);
template void execute_multiply<float>(Collective&);

float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent's bias; of subnormal numbers too, which the multiplication makes normal.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f));
}

uint16_t to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded bits at the end of the mantissa
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation
