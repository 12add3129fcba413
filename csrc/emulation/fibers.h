// One thread block on the CPU: a fiber a thread, switched only where threads wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

constexpr int WARP = 32;

// Stops the process and says why, with the thread it happened in.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Copy {
  uint32_t offset;
  const void* from;
  int bytes;
};

struct Thread {
  int index;
  enum { ready, at_collective, at_barrier, done } state;
  void* stack_pointer;
  std::vector<Copy> copies;  // asked for and not waited for
};

// What the lanes of a warp hand over to an instruction that they execute together.
struct Collective {
  const char* name;
  void* lanes[WARP];
};

// The thread that runs, and the grid's place of its block.
Thread& current();
extern int block_x, block_y;
extern char* shared;
extern uint32_t shared_bytes;

// What the blocks have needed: shared memory of the largest, and how many rows of an 8x8 matrix lay in one group of banks at
// the worst (1: ldmatrix reads without conflicts).
struct Seen {
  int64_t shared_bytes = 0, conflicts = 0;
};
extern Seen seen;

// Waits until all lanes of the warp ask for `name`; the last one runs `execute` for all.
void collective(const char* name, void* mine, void (*execute)(Collective&));
void barrier();

// Runs `body(arguments)` in every thread of a block. `order` chooses who goes first: 0 ascending and 1 descending warps,
// each as far as it can; larger numbers seed a random choice at every switch.
void run_block(int threads, uint32_t bytes, void (*body)(const void*), const void* arguments, uint32_t order);

extern uint32_t order;  // of the blocks that `hw::launch` runs
extern int fault;       // hw::Fault, committed by the kernels

}  // namespace emulation
