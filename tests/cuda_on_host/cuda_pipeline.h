#pragma once

// Copies from device to shared memory that go on while their thread does something else. With threads
// backward they are over at once, otherwise not before they are waited for: memory that is read too early, or
// still, gives other bits.

#include <cuda_runtime.h>

/// The last `zeros` of the bytes become zero. Errors: as on a GPU addresses are multiples of `bytes`.
inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes, std::size_t zeros = 0,
                                    CallSite site = CallSite::current()) {
  lowband::cuda_on_host::copy_later(to, from, bytes, zeros, site);
}
/// Makes one batch of the thread's copies since the last.
inline void __pipeline_commit() { lowband::cuda_on_host::close_batch_of_copies(); }
/// Waits for all of the thread's batches but the last ones.
inline void __pipeline_wait_prior(std::size_t last) { lowband::cuda_on_host::finish_copies(last); }
