#pragma once

#include <functional>
#include <vector>

struct CUstream_st;

namespace lowband::cuda_on_host {

/// How often the host has waited: for a stream, for an event, or for a copy from a device to memory that is
/// not pinned, which ends before the call does.
long host_waits();

/// Puts something that goes on after the call into the stream: later work waits until `over()`, which is
/// asked whenever somebody asks for the stream or an event in it, says so.
void enqueue_until(CUstream_st* stream, std::function<bool()> over);

/// Work of `later` that is enqueued after this waits for that of `earlier` before it.
struct StreamOrder {
  const void* earlier;
  const void* later;
};
/// What a stream was told to wait for since logging began, which ends it or begins anew.
std::vector<StreamOrder> log_stream_order(bool on);

}  // namespace lowband::cuda_on_host
