#pragma once

#include <cstddef>

namespace lowband {

inline constexpr std::size_t kCacheLineBytes = 64;

/// Memory of the host, not initialised, aligned to a cache line. From 2 MiB on in huge pages where the system
/// gives them on request: a page of 4 KiB ends every 100 ns of a stream, and what was asked for ahead waits
/// for its translation.
/// Throws: std::bad_alloc.
void* allocate_host(std::size_t bytes);
void release_host(void* memory) noexcept;

}  // namespace lowband
