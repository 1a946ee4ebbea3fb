#include "runtime/host_memory.h"

#include <cstdlib>
#include <new>

#include <sys/mman.h>

namespace lowband {

void* allocate_host(std::size_t bytes) {
  constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : kCacheLineBytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  // Advice: a system without huge pages refuses it, and nothing is lost.
  if (alignment == kHugePageBytes) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void release_host(void* memory) noexcept { std::free(memory); }

}  // namespace lowband
