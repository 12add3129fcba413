// What this CPU has and its system saves when it changes threads. Read from the CPU itself: what compilers offer for it is not
// linked on Windows.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace unetpp {

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx512 = false, tiles = false;

  Features() {
    constexpr unsigned kFma = 1u << 12, kSaves = 1u << 27;                              // of ecx of leaf 1
    constexpr unsigned kAvx2 = 1u << 5;                                                 // of ebx of leaf 7
    constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;             // f, dq, bw and vl
    constexpr unsigned kTiles = 1u << 22 | 1u << 24;                                    // of edx of leaf 7: for bfloat16
    constexpr unsigned kVectors = 0x6, kWideVectors = 0xe6, kTileRegisters = 3u << 17;  // that a system may save
    const Leaf first(1);
    if (Leaf(0).a < 7 || !all(first.c, kFma | kSaves)) return;
    const Leaf seventh(7);
    unsigned saved, high;
    asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    avx2 = all(saved, kVectors) && all(seventh.b, kAvx2);
    avx512 = avx2 && all(saved, kWideVectors) && all(seventh.b, kAvx512);
    tiles = avx512 && all(saved, kTileRegisters) && all(seventh.d, kTiles);
  }

 private:
  struct Leaf {
    unsigned a, b, c, d;
    explicit Leaf(unsigned number) { asm("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(number), "c"(0)); }
  };
  static bool all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }
};

#endif

// Linux gives a process the registers of tiles when it asks for them. Elsewhere nobody has tried.
inline bool cpu_has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kAsk = 0x1023, kTileData = 18;
  return Features().tiles && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace unetpp
