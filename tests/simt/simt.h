// Runs CUDA kernel source on the CPU with nothing but g++. Every thread of a block is a fiber, so that __syncthreads
// and the *_sync warp calls really wait; blocks run one after another, blocks and threads in random order.
//
// Reported as simt::Error: barriers and warp calls that some threads never reach, shuffles from absent lanes, launches
// no GPU would accept. With -fsanitize=address,undefined also accesses out of bounds and misaligned vectors; in the
// race build (race.cpp) also races and reads of shared memory nobody wrote.
//
// What it cannot show: speed, nvcc's contraction of multiply-adds, approximate intrinsics, memory-model reordering.
#pragma once
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

// ---- the language ----
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define __shared__ static  // AddressSanitizer puts red zones around statics ...
#else
#define __shared__ static thread_local  // ... else they make up one segment, which can be poisoned and watched
#endif
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::block.dynamic.data())
#define LAUNCH(kernel, grid, threads, shared, stream, ...) simt::launch(grid, threads, shared, kernel, __VA_ARGS__)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// The race build's hook, absent in the others.
extern "C" void simt_race_new_block(bool new_launch) __attribute__((weak));

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- the running block ----
enum class State { ready, at_barrier, in_warp_call, done };
enum class WarpCall { sync, shuffle };

struct Thread {
  uint3 index;
  int number;  // in the block
  State state = State::ready;
  WarpCall call;
  unsigned mask;           // of the warp call
  uint64_t value, result;  // of a shuffle
  int source;              // lane that a shuffle reads
  const char* file;        // where the thread waits
  int line;
  unsigned warp_syncs;  // passed so far, for the race build
  ucontext_t context;
  char* stack;

  int lane() const { return number % 32; }
  std::string where() const {
    return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ") thread " +
           std::to_string(number) + " at " + (file ? std::string(file).substr(std::string(file).rfind('/') + 1) : "?") +
           ":" + std::to_string(line);
  }
};

constexpr size_t kStack = 256 * 1024, kGuard = 4096, kSharedLimit = 48 * 1024;

struct Block {
  std::vector<Thread> threads;
  std::vector<char> dynamic;  // dynamic shared memory
  Thread* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned barriers;  // passed so far, for the race build
  std::string error;  // noted by a fiber, raised by the scheduler
};
inline Block block;
inline uint64_t seed = 1;

inline uint32_t random() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return uint32_t(seed >> 16);
}

// While one lives, launches run only `count` blocks from `first` on, of a grid that is too large to run whole.
struct Part {
  dim3 first, count;
  static inline const Part* current = nullptr;
  Part(dim3 first, dim3 count) : first(first), count(count) { current = this; }
  ~Part() { current = nullptr; }
};

inline void note(const std::string& message) {
  if (block.error.empty()) block.error = message;
}

// ---- fibers ----
inline void switch_to(ucontext_t& from, ucontext_t& to, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* kept;
  __sanitizer_start_switch_fiber(&kept, stack, size);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#else
  swapcontext(&from, &to);
#endif
}

inline const void* scheduler_stack;
inline size_t scheduler_size;

inline void wait() { switch_to(block.current->context, block.scheduler, scheduler_stack, scheduler_size); }

inline void run(Thread& thread) {
  block.current = &thread;
  threadIdx = thread.index;
  switch_to(block.scheduler, thread.context, thread.stack, kStack);
  block.current = nullptr;
}

inline void fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {  // once for every block of the launch
    block.body();
    block.current->state = State::done;
    wait();
  }
}

// ---- warp calls: whoever finds all lanes of the mask arrived answers for everybody ----
inline Thread* lane_of(const Thread& t, int lane) {
  const size_t number = t.number - t.lane() + lane;
  return number < block.threads.size() ? &block.threads[number] : nullptr;
}

inline bool all_arrived(const Thread& caller) {
  for (int lane = 0; lane < 32; ++lane) {
    const Thread* t = caller.mask >> lane & 1 ? lane_of(caller, lane) : nullptr;
    if (!t || t->state == State::done) continue;  // lanes that left, or never were, do not take part
    if (t->state != State::in_warp_call || t->mask != caller.mask || t->call != caller.call) return false;
  }
  return true;
}

inline void complete(const Thread& caller) {
  const auto takes_part = [&](int lane) {
    const Thread* t = caller.mask >> lane & 1 ? lane_of(caller, lane) : nullptr;
    return t && t->state == State::in_warp_call;
  };
  std::vector<Thread*> served;
  for (int lane = 0; lane < 32; ++lane) {
    if (!takes_part(lane)) continue;
    Thread& t = *lane_of(caller, lane);
    served.push_back(&t);
    if (t.call == WarpCall::sync) {
      ++t.warp_syncs;
    } else if (takes_part(t.source)) {
      t.result = lane_of(caller, t.source)->value;
    } else {
      t.result = ~0ull;
      note("shuffle reads lane " + std::to_string(t.source) + ", which does not take part: " + t.where());
    }
  }
  for (Thread* t : served) t->state = State::ready;
}

inline uint64_t warp_call(WarpCall call, unsigned mask, uint64_t value, int source, const char* file, int line) {
  Thread& t = *block.current;
  t.state = State::in_warp_call;
  t.call = call, t.mask = mask, t.value = value, t.source = source, t.file = file, t.line = line;
  if (!(mask >> t.lane() & 1)) note("a lane is not in its own mask: " + t.where());
  wait();
  return t.result;
}

inline void barrier(const char* file, int line) {
  Thread& t = *block.current;
  t.state = State::at_barrier;
  t.file = file, t.line = line;
  wait();
}

// ---- shared memory: the thread-local segment of this program, and the dynamic one ----
struct Segment {
  char *begin = nullptr, *end = nullptr;
  bool holds(uintptr_t a) const { return a >= uintptr_t(begin) && a < uintptr_t(end); }
};

inline Segment static_shared() {
  Segment segment;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {  // the first entry is the program itself
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
            char* begin = static_cast<char*>(info->dlpi_tls_data);
            *static_cast<Segment*>(out) = {begin, begin + info->dlpi_phdr[i].p_memsz};
          }
        return 1;
      },
      &segment);
  return segment;
}

__attribute__((no_sanitize("address", "thread"), noinline)) inline void poison(char* p, char* end) {
  for (; p < end; ++p) *const_cast<volatile char*>(p) = char(0xff);  // NaN, -1: nobody may count on zeros
}

// ---- scheduler ----
inline void release_barrier() {
  const Thread* first = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state == State::done) note("__syncthreads after thread " + std::to_string(t.number) + " has left");
    if (t.state != State::at_barrier) continue;
    if (first && first->line != t.line) note("divergent __syncthreads: " + first->where() + " and " + t.where());
    if (!first) first = &t;
  }
  for (Thread& t : block.threads) t.state = State::ready;
  ++block.barriers;
}

inline void run_block() {
  const Segment shared = static_shared();
  poison(shared.begin, shared.end);
  poison(block.dynamic.data(), block.dynamic.data() + block.dynamic.size());
  if (simt_race_new_block) simt_race_new_block(false);
  block.barriers = 0;
  for (Thread& t : block.threads) t.state = State::ready, t.warp_syncs = 0, t.file = nullptr;
  std::vector<Thread*> ready;
  for (;;) {
    ready.clear();
    for (Thread& t : block.threads)
      if (t.state == State::ready) ready.push_back(&t);
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[random() % i]);
    for (Thread* t : ready) run(*t);
    for (Thread& t : block.threads)
      if (t.state == State::in_warp_call && all_arrived(t)) complete(t);
    if (block.error.empty() && ready.empty()) {
      const Thread *stuck = nullptr, *waiting = nullptr;
      for (const Thread& t : block.threads) {
        if (t.state == State::in_warp_call) stuck = &t;
        if (t.state == State::at_barrier) waiting = &t;
      }
      const bool progress = std::any_of(block.threads.begin(), block.threads.end(),
                                        [](const Thread& t) { return t.state == State::ready; });
      if (!progress && stuck) note("a warp call never completes: " + stuck->where());
      if (!progress && !stuck && !waiting) return;  // all are done
      if (!progress && !stuck) release_barrier();
    }
    if (!block.error.empty()) throw Error(block.error);
  }
}

inline std::vector<char*> stacks;  // made once, for all launches

inline char* stack_of(size_t thread) {
  while (stacks.size() <= thread) {
    char* memory =
        static_cast<char*>(mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory, kGuard, PROT_NONE);
    stacks.push_back(memory + kGuard);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks[thread], kStack);  // the fiber before never returned
#endif
  return stacks[thread];
}

inline void make_threads(size_t count) {
  block.threads.assign(count, Thread{});
  for (size_t i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.number = int(i);
    t.stack = stack_of(i);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, fiber, 0);
  }
}

inline void drop_threads() {
  block.threads.clear();
  block.error.clear();
}

template <class... Params, class... Args>
void launch(dim3 grid, dim3 threads, size_t shared, void (*kernel)(Params...), Args... args) {
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (count == 0 || count > 1024 || !grid.x || !grid.y || grid.y > 65535 || grid.z != 1)
    throw Error("invalid launch configuration");
  if (shared > kSharedLimit) throw Error("too much shared memory");
  if ((0 + ... + sizeof(Params)) > 4096) throw Error("kernel parameters exceed 4 KB");
  make_threads(count);
  struct Cleanup {
    ~Cleanup() { drop_threads(); }
  } cleanup;
  for (Thread& t : block.threads)
    t.index = {t.number % threads.x, t.number / threads.x % threads.y, t.number / threads.x / threads.y};
  gridDim = grid, blockDim = threads;
  block.body = [=] { kernel(static_cast<Params>(args)...); };
  block.dynamic = std::vector<char>(shared);
  const dim3 first = Part::current ? Part::current->first : dim3(0, 0);
  const dim3 blocks = Part::current ? Part::current->count : grid;
  std::vector<uint3> order;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) order.push_back({first.x + x, first.y + y, 0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  if (simt_race_new_block) simt_race_new_block(true);
  for (uint3 index : order) {
    blockIdx = index;
    run_block();
  }
}

template <class T>
T shuffle(unsigned mask, T v, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = warp_call(WarpCall::shuffle, mask, bits, source, file, line);
  memcpy(&v, &bits, sizeof(T));
  return v;
}

}  // namespace simt

// ---- the library: what the kernels use ----
#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(SIMT_PLACE) { simt::barrier(file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_PLACE) {
  simt::warp_call(simt::WarpCall::sync, mask, 0, 0, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, SIMT_PLACE) {
  return simt::shuffle(mask, v, lane, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, SIMT_PLACE) {
  return simt::shuffle(mask, v, simt::block.current->lane() ^ bits, file, line);
}
