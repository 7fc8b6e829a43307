// The race build: a kernel's file is compiled with -fsanitize=thread, and instead of the sanitizer's library this file
// gets to see every load and store of it. Two accesses of a byte race when they come from different threads, one of
// them writes, and no __syncthreads (or __syncwarp within a warp) lies between; different blocks are never in order.
#include <unordered_map>

#include "simt.h"

namespace {

struct Access {
  int thread = -1;  // none yet
  unsigned block = 0, barriers = 0, warp_syncs = 0;

  bool before(const Access& later) const {
    if (block != later.block) return false;
    if (thread == later.thread || barriers != later.barriers) return true;
    return thread / 32 == later.thread / 32 && warp_syncs != later.warp_syncs;
  }
};

struct Byte {
  Access write, reads[2];  // the last write, and the last reads by two threads
};

std::unordered_map<uintptr_t, Byte> history;
unsigned current_block;
simt::Segment static_shared;

bool is_shared(uintptr_t a) {
  const auto& dynamic = simt::block.dynamic;
  return static_shared.holds(a) || (a >= uintptr_t(dynamic.data()) && a < uintptr_t(dynamic.data() + dynamic.size()));
}

// The thread's own stack, and what belongs to simt.h.
bool is_private(uintptr_t a) {
  const auto in = [a](const void* p, size_t size) { return a >= uintptr_t(p) && a < uintptr_t(p) + size; };
  const auto& b = simt::block;
  return in(b.current->stack, simt::kStack) || in(&b, sizeof b) ||
         in(b.threads.data(), b.threads.size() * sizeof(simt::Thread)) || in(&simt::seed, sizeof simt::seed) ||
         in(&threadIdx, sizeof threadIdx) || in(&blockIdx, sizeof blockIdx) || in(&blockDim, sizeof blockDim) ||
         in(&gridDim, sizeof gridDim);
}

void access(const void* p, size_t size, bool writes) {
  const simt::Thread* t = simt::block.current;
  if (!t || !simt::block.error.empty() || is_private(uintptr_t(p))) return;
  const Access now{t->number, current_block, simt::block.barriers, t->warp_syncs};
  for (uintptr_t a = uintptr_t(p); a < uintptr_t(p) + size; ++a) {
    const auto report = [&](const std::string& what, int other) {
      simt::note(what + " in " + (is_shared(a) ? "shared" : "global") + " memory, threads " + std::to_string(other) +
                 " and " + t->where());
    };
    Byte& byte = history[a];
    if (!writes && byte.write.thread < 0 && is_shared(a)) return report("read of uninitialised memory", t->number);
    if (byte.write.thread >= 0 && !byte.write.before(now))
      return report(writes ? "race (write after write)" : "race (read after write)", byte.write.thread);
    if (!writes) {
      if (byte.reads[0].thread != now.thread) byte.reads[1] = byte.reads[0];
      byte.reads[0] = now;
      continue;
    }
    for (const Access& read : byte.reads)
      if (read.thread >= 0 && !read.before(now)) return report("race (write after read)", read.thread);
    byte = {now, {}};
  }
}

}  // namespace

extern "C" {
void simt_race_new_block(bool new_launch) {
  if (new_launch) return history.clear();
  ++current_block;
  static_shared = simt::static_shared();
  for (char* p = static_shared.begin; p < static_shared.end; ++p) history.erase(uintptr_t(p));
  for (char& byte : simt::block.dynamic) history.erase(uintptr_t(&byte));
}

#define HOOKS(size)                                                     \
  void __tsan_read##size(void* p) { access(p, size, false); }           \
  void __tsan_write##size(void* p) { access(p, size, true); }           \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false); } \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* p, size_t size) { access(p, size, false); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
