#include "fibers.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

int block_x, block_y, block_z;
char* shared;
uint32_t shared_bytes, order;
Seen seen;
int fault;

namespace {

constexpr size_t STACK = 96 * 1024;

struct Warp {
  Collective collective{};
  int arrived = 0;
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<std::unique_ptr<char[]>> stacks;
Thread* running;
int at_barrier;
void (*body)(const void*);
const void* arguments;

#if defined(__x86_64__)

// Saves the registers that a call preserves, and continues where `to` was saved. No system call, unlike swapcontext.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

void* scheduler;

void* prepare(char* stack, void (*entry)()) {
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t{63});
  *--top = nullptr;  // where a return address would be, so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  return top;
}

void to_thread(Thread& thread) { emulation_switch(&scheduler, thread.stack_pointer); }
void to_scheduler(Thread& thread) { emulation_switch(&thread.stack_pointer, scheduler); }

#else

std::vector<ucontext_t> contexts;
ucontext_t scheduler;

void* prepare(char* stack, void (*entry)()) {
  contexts.reserve(stacks.size());  // keeps the addresses
  contexts.emplace_back();
  ucontext_t& context = contexts.back();
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  makecontext(&context, entry, 0);
  return &context;
}

void to_thread(Thread& thread) { swapcontext(&scheduler, static_cast<ucontext_t*>(thread.stack_pointer)); }
void to_scheduler(Thread& thread) { swapcontext(static_cast<ucontext_t*>(thread.stack_pointer), &scheduler); }

#endif

void entry() {
  body(arguments);
  if (!running->copies.empty()) fail("left with %zu copies that it never waited for", running->copies.size());
  running->state = Thread::done;
  to_scheduler(*running);
  abort();
}

void wait(decltype(Thread::state) state) {
  Thread& me = *running;
  me.state = state;
  to_scheduler(me);
}

void resume(Thread& thread) {
  running = &thread;
  to_thread(thread);
}

// Runs a warp until none of its threads can continue; returns whether any could.
bool run_warp(int warp) {
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (int lane = 0; lane < WARP; ++lane) {
      Thread& thread = threads[warp * WARP + lane];
      if (thread.state == Thread::ready) {
        resume(thread);
        any = again = true;
      }
    }
  }
  return any;
}

bool run_random(std::minstd_rand& random) {
  std::vector<int> ready;
  for (Thread& thread : threads)
    if (thread.state == Thread::ready) ready.push_back(thread.index);
  for (size_t left = ready.size(); left; --left) {
    std::swap(ready[random() % left], ready[left - 1]);
    Thread& thread = threads[ready[left - 1]];
    if (thread.state == Thread::ready) resume(thread);
  }
  return !ready.empty();
}

bool run_some(uint32_t order, std::minstd_rand& random) {
  if (order > 1) return run_random(random);
  bool any = false;
  const int count = static_cast<int>(warps.size());
  for (int k = 0; k < count; ++k) any |= run_warp(order ? count - 1 - k : k);
  return any;
}

}  // namespace

void fail(const char* format, ...) {
  fprintf(stderr, "emulation: block (%d, %d, %d) thread %d: ", block_x, block_y, block_z, running ? running->index : -1);
  va_list list;
  va_start(list, format);
  vfprintf(stderr, format, list);
  va_end(list);
  fputc('\n', stderr);
  abort();
}

Thread& current() { return *running; }

void collective(const char* name, void* mine, void (*execute)(Collective&)) {
  Thread& me = *running;
  const int first = me.index / WARP * WARP;
  Warp& warp = warps[me.index / WARP];
  if (warp.arrived && strcmp(warp.collective.name, name) != 0)
    fail("asks for %s while other lanes of its warp ask for %s", name, warp.collective.name);
  warp.collective.name = name;
  warp.collective.lanes[me.index % WARP] = mine;
  if (++warp.arrived < WARP) return wait(Thread::at_collective);
  warp.arrived = 0;
  execute(warp.collective);
  for (int lane = 0; lane < WARP; ++lane) threads[first + lane].state = Thread::ready;
}

void barrier() {
  if (++at_barrier < static_cast<int>(threads.size())) return wait(Thread::at_barrier);
  at_barrier = 0;
  for (Thread& thread : threads) thread.state = Thread::ready;
}

void run_block(int count, uint32_t bytes, void (*given_body)(const void*), const void* given_arguments, uint32_t order) {
  if (count % WARP) fail("%d threads are not a whole number of warps", count);
  body = given_body;
  arguments = given_arguments;
  at_barrier = 0;
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[STACK]);
#if !defined(__x86_64__)
  contexts.clear();
#endif
  // A separate allocation, so that the sanitizer sees its end; 0xff in every byte is NaN in every format.
  std::unique_ptr<char[]> memory(new char[bytes]);
  memset(memory.get(), 0xff, bytes);
  shared = memory.get();
  shared_bytes = bytes;
  if (bytes > seen.shared_bytes) seen.shared_bytes = bytes;
  warps.assign(count / WARP, {});
  threads.assign(count, {});
  for (int k = 0; k < count; ++k) {
    threads[k].index = k;
    ASAN_UNPOISON_MEMORY_REGION(stacks[k].get(), STACK);  // the previous thread there did not return from `entry`
    threads[k].stack_pointer = prepare(stacks[k].get(), entry);
  }
  std::minstd_rand random(order + 1);
  while (run_some(order, random)) {
  }
  running = nullptr;
  int waiting[4] = {};
  for (Thread& thread : threads) ++waiting[thread.state];
  if (waiting[Thread::done] != count)
    fail("deadlock: %d threads wait at a barrier, %d for other lanes, %d are done", waiting[Thread::at_barrier],
         waiting[Thread::at_collective], waiting[Thread::done]);
}

}  // namespace emulation
