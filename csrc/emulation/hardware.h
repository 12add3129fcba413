// hardware.h for a CPU. Included by hardware.h only.
#pragma once

#include <cstring>

#include "fibers.h"

#define HW_FUNCTION inline
#define HW_KERNEL
#define HW_BOUNDS(threads, blocks)
#define HW_CONSTANT const
#define HW_UNROLL
#define HW_NO_UNROLL

namespace emulation {

// The address of `bytes` of shared memory, after a check of alignment and end.
inline char* at(uint32_t offset, uint32_t bytes) {
  if (offset % bytes) fail("shared memory: %u bytes at offset %u are not aligned", bytes, offset);
  if (offset + bytes > shared_bytes)
    fail("shared memory: %u bytes at offset %u, past its end %u", bytes, offset, shared_bytes);
  return shared + offset;
}

struct Matrices {
  uint32_t* result;
  uint32_t offset;
};
struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
struct Exchange {
  uint32_t value, result;
  int mask;
};

void execute_load(Collective& warp);
void execute_load_transposed(Collective& warp);
void execute_shuffle(Collective& warp);
template <typename T>
void execute_multiply(Collective& warp);

uint16_t to_half(float value);
float from_half(uint16_t bits);
uint16_t to_bfloat16(float value);

template <typename T>
T bits_as(auto value) {
  static_assert(sizeof(T) == sizeof(value));
  T result;
  memcpy(&result, &value, sizeof(T));
  return result;
}

inline float from_bfloat16(uint16_t bits) { return bits_as<float>(uint32_t{bits} << 16); }

}  // namespace emulation

namespace hw {

// A register of a matrix's factor. A copy counts as a read too: compilers may do anything with values that nobody wrote.
// The build fills variables without a value with a pattern (-ftrivial-auto-var-init), which leaves `unwritten` not 0.
class Word {
 public:
  Word() = default;
  Word(uint32_t bits) : bits_(bits), unwritten_(0) {}
  Word(const Word& other) : Word(uint32_t{other}) {}
  Word& operator=(const Word& other) {
    bits_ = other;
    unwritten_ = 0;
    return *this;
  }
  operator uint32_t() const {
    if (unwritten_) emulation::fail("reads a register that was never written");
    return bits_;
  }

 private:
  uint32_t bits_, unwritten_;
};

inline int thread() { return emulation::current().index; }
inline uint32_t again(uint32_t value) { return value; }
template <typename Byte>
Byte* kept(Byte* from) {
  return from;
}
inline int block_x() { return emulation::block_x; }
inline int block_y() { return emulation::block_y; }
inline int block_z() { return emulation::block_z; }
inline void barrier() { emulation::barrier(); }
inline void warp_barrier() {
  emulation::collective("syncwarp", nullptr, [](emulation::Collective&) {});
}
inline bool fault(Fault which) { return emulation::fault == static_cast<int>(which); }

template <typename Byte>
Byte* advance(Byte* from, int count, int bytes) {
  return from + int64_t{count} * bytes;
}

template <typename V>
V load_shared(uint32_t offset) {
  V value;
  memcpy(&value, emulation::at(offset, sizeof(V)), sizeof(V));
  return value;
}

template <typename V>
void store_shared(uint32_t offset, V value) {
  memcpy(emulation::at(offset, sizeof(V)), &value, sizeof(V));
}

// On a GPU the bytes may arrive at any time before the wait; until then neither old nor new ones can be relied on.
inline void copy_async(uint32_t offset, const void* from, bool given) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("copies from %p, which is not aligned to 16 bytes", from);
  memset(emulation::at(offset, 16), 0xff, 16);
  emulation::current().copies.push_back({offset, given ? from : nullptr});
}

inline void wait_copies() {
  if (fault(Fault::wait)) return;
  auto& copies = emulation::current().copies;
  for (const emulation::Copy& copy : copies) {
    char* to = emulation::at(copy.offset, 16);
    if (copy.from)
      memcpy(to, copy.from, 16);
    else
      memset(to, 0, 16);
  }
  copies.clear();
}

inline void load_matrices(Word (&r)[4], uint32_t offset) {
  uint32_t loaded[4] = {};
  emulation::Matrices mine{loaded, offset};
  emulation::collective("ldmatrix", &mine, emulation::execute_load);
  for (int k = 0; k < 4; ++k) r[k] = loaded[k];
}

inline void load_matrices_transposed(Word (&r)[4], uint32_t offset) {
  uint32_t loaded[4] = {};
  emulation::Matrices mine{loaded, offset};
  emulation::collective("ldmatrix.trans", &mine, emulation::execute_load_transposed);
  for (int k = 0; k < 4; ++k) r[k] = loaded[k];
}

template <typename T>
void multiply(float (&d)[4], const Word (&a)[4], const Word (&b)[2]) {
  const uint32_t first[4] = {a[0], a[1], a[2], a[3]}, second[2] = {b[0], b[1]};
  emulation::Product mine{d, first, second};
  emulation::collective("mma", &mine, emulation::execute_multiply<T>);
}

template <typename V>
V shuffle_xor(V value, int mask) {
  emulation::Exchange mine{emulation::bits_as<uint32_t>(value), 0, mask};
  emulation::collective("shfl", &mine, emulation::execute_shuffle);
  return emulation::bits_as<V>(mine.result);
}

template <typename T>
uint32_t pack(float first, float second);
template <>
inline uint32_t pack<Half>(float first, float second) {
  return emulation::to_half(first) | uint32_t{emulation::to_half(second)} << 16;
}
template <>
inline uint32_t pack<BFloat16>(float first, float second) {
  return emulation::to_bfloat16(first) | uint32_t{emulation::to_bfloat16(second)} << 16;
}

template <typename T>
uint32_t pack_relu(float first, float second) {
  return pack<T>(first <= 0 ? 0.0f : first, second <= 0 ? 0.0f : second);
}

template <typename T>
Pair unpack(uint32_t word);
template <>
inline Pair unpack<Half>(uint32_t word) {
  return {emulation::from_half(word & 0xffff), emulation::from_half(word >> 16)};
}
template <>
inline Pair unpack<BFloat16>(uint32_t word) {
  return {emulation::from_bfloat16(word & 0xffff), emulation::from_bfloat16(word >> 16)};
}

inline float reciprocal(float value) { return 1 / value; }

inline float as_float(uint32_t bits) { return emulation::bits_as<float>(bits); }
inline uint32_t as_bits(float value) { return emulation::bits_as<uint32_t>(value); }

inline uint32_t tf32(float value) {
  const uint32_t bits = as_bits(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

template <auto KERNEL, typename Arguments>
const char* launch(Grid grid, int threads, int shared_bytes, Stream, const Arguments& arguments) {
  for (emulation::block_z = 0; emulation::block_z < grid.z; ++emulation::block_z)
    for (emulation::block_y = 0; emulation::block_y < grid.y; ++emulation::block_y)
      for (emulation::block_x = 0; emulation::block_x < grid.x; ++emulation::block_x)
        emulation::run_block(
            threads, shared_bytes, [](const void* given) { KERNEL(*static_cast<const Arguments*>(given)); }, &arguments,
            emulation::order);
  return nullptr;
}

}  // namespace hw
