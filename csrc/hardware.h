// Everything the kernels ask of a GPU, and nothing else. A kernel that includes only this header also compiles as plain
// C++ with -DUNETPP_EMULATE, where emulation/hardware.h defines every name here for a CPU (see README.md).
//
// Shared memory is addressed by byte offsets into the block's dynamic shared memory. Tags name how 16 bytes are read:
// Half and BFloat16 hold eight values, float four (multiplied as TF32).
#pragma once

#include <cstdint>
#include <type_traits>

#include "stream.h"

namespace hw {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct alignas(16) Vec {
  uint32_t word[4];
};
struct alignas(8) Pair {
  float first, second;
};
// Blocks along each axis; a GPU takes 2^31 - 1 along x, MOST_BLOCKS along the others.
struct Grid {
  int x, y = 1, z = 1;
};
constexpr int MOST_BLOCKS = 65535;

// Faults that the emulation commits on request, to check that the tests notice them. On a GPU there are none.
enum class Fault { none, halo, plane, bounds, barrier, reuse, wait, mask, tail, phase, unwritten, reduction };

}  // namespace hw

#ifdef UNETPP_EMULATE
#include "emulation/hardware.h"
#else

#include <cuda_runtime.h>

#include "device_guard.h"

#define HW_FUNCTION __device__ __forceinline__
#define HW_KERNEL __global__
#define HW_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define HW_CONSTANT const __grid_constant__
#define HW_UNROLL _Pragma("unroll")
#define HW_NO_UNROLL _Pragma("unroll 1")

namespace hw {

// 32 bits of a matrix's factor. The emulation knows whether they were written.
using Word = uint32_t;

HW_FUNCTION int thread() { return threadIdx.x; }
#define HW_BLOCK(AXIS)                                                  \
  HW_FUNCTION int block_##AXIS() {                                      \
    int index;                                                          \
    asm volatile("mov.u32 %0, %%ctaid." #AXIS ";" : "=r"(index));       \
    return index;                                                       \
  }
HW_BLOCK(x)
HW_BLOCK(y)
HW_BLOCK(z)
#undef HW_BLOCK
HW_FUNCTION void barrier() { __syncthreads(); }
HW_FUNCTION void warp_barrier() { __syncwarp(); }
HW_FUNCTION constexpr bool fault(Fault) { return false; }

// The same value, from which the compiler computes anew what it would else keep in registers until here.
HW_FUNCTION uint32_t again(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The same address of global memory, in registers: sums with it are not taken apart.
template <typename Byte>
HW_FUNCTION Byte* kept(Byte* from) {
  size_t address = __cvta_generic_to_global(from);
  asm volatile("" : "+l"(address));
  return static_cast<Byte*>(__cvta_global_to_generic(address));
}

// from + count * bytes, by a product of 32 bits each.
template <typename Byte>
HW_FUNCTION Byte* advance(Byte* from, int count, int bytes) {
  int64_t offset;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(count), "r"(bytes));
  return from + offset;
}

HW_FUNCTION char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

HW_FUNCTION uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

template <typename V>
HW_FUNCTION V load_shared(uint32_t offset) {
  return *reinterpret_cast<const V*>(shared_memory() + offset);
}

template <typename V>
HW_FUNCTION void store_shared(uint32_t offset, V value) {
  *reinterpret_cast<V*>(shared_memory() + offset) = value;
}

// Copies 16 bytes to shared memory, or zeros if not `given`; complete after wait_copies by the same thread.
HW_FUNCTION void copy_async(uint32_t offset, const void* from, bool given) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)), "l"(from), "r"(given ? 16 : 0)
               : "memory");
}

HW_FUNCTION void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
HW_FUNCTION void load_matrices(Word (&r)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset)));
}

HW_FUNCTION void load_matrices_transposed(Word (&r)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset)));
}

// d += a b, for a of 16 rows and 32 bytes, b of 32 bytes and 8 columns.
template <typename T>
HW_FUNCTION void multiply(float (&d)[4], const Word (&a)[4], const Word (&b)[2]);

#define HW_MULTIPLY(T, INSTRUCTION)                                                                     \
  template <>                                                                                           \
  HW_FUNCTION void multiply<T>(float (&d)[4], const Word (&a)[4], const Word (&b)[2]) {                 \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
HW_MULTIPLY(Half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
HW_MULTIPLY(BFloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
HW_MULTIPLY(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef HW_MULTIPLY

template <typename V>
HW_FUNCTION V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Two values as one word, rounded to nearest, and back.
template <typename T>
HW_FUNCTION uint32_t pack(float first, float second);
template <>
HW_FUNCTION uint32_t pack<Half>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
HW_FUNCTION uint32_t pack<BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// The same of what is left of two values by ReLU: NaN, and no other value below zero.
template <typename T>
HW_FUNCTION uint32_t pack_relu(float first, float second);
template <>
HW_FUNCTION uint32_t pack_relu<Half>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
HW_FUNCTION uint32_t pack_relu<BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <typename T>
HW_FUNCTION Pair unpack(uint32_t word);
template <>
HW_FUNCTION Pair unpack<Half>(uint32_t word) {
  Pair pair;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(pair.first), "=f"(pair.second)
      : "r"(word));
  return pair;
}
template <>
HW_FUNCTION Pair unpack<BFloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

// The bits of a float rounded to TF32's ten bits of mantissa.
HW_FUNCTION uint32_t tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// 1 / value, to the last bit but one.
HW_FUNCTION float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

HW_FUNCTION float as_float(uint32_t bits) { return __uint_as_float(bits); }
HW_FUNCTION uint32_t as_bits(float value) { return __float_as_uint(value); }

// Returns nullptr, or an error message.
template <auto KERNEL, typename Arguments>
const char* launch(Grid grid, int threads, int shared_bytes, Stream stream, const Arguments& arguments) {
  const DeviceGuard guard(stream.device);  // this library has its own CUDA runtime
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess)
    KERNEL<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(arguments);
  const cudaError_t last = cudaGetLastError();  // always called, so that no later call reports this error
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hw

#endif
