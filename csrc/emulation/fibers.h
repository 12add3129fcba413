// One thread block on the CPU: one fiber per thread, switched only where threads wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

constexpr int WARP = 32;

// Stops the process with a message that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Copy {
  uint32_t offset;
  const void* from;  // null: zeros
};

struct Thread {
  int index;
  enum { ready, at_collective, at_barrier, done } state;
  void* stack_pointer;
  std::vector<Copy> copies;  // started and not waited for
};

// What the lanes of a warp pass to an instruction that they execute together.
struct Collective {
  const char* name;
  void* lanes[WARP];
};

// The running thread, and the position of its block in the grid.
Thread& current();
extern int block_x, block_y, block_z;
extern char* shared;
extern uint32_t shared_bytes;

// The shared memory of the largest block, and the most rows of an 8x8 matrix in one group of banks (1: ldmatrix reads
// without conflicts).
struct Seen {
  int64_t shared_bytes = 0, conflicts = 0;
};
extern Seen seen;

// Waits until all lanes of the warp ask for `name`; the last one runs `execute` for all.
void collective(const char* name, void* mine, void (*execute)(Collective&));
void barrier();

// Runs `body(arguments)` in every thread of a block. `order` chooses which threads go first: 0 and 1 take the warps in
// ascending and descending order, each as far as it can go; larger numbers seed a random choice at every switch.
void run_block(int threads, uint32_t bytes, void (*body)(const void*), const void* arguments, uint32_t order);

extern uint32_t order;  // of the blocks that `hw::launch` runs
extern int fault;       // hw::Fault, committed by the kernels

}  // namespace emulation
