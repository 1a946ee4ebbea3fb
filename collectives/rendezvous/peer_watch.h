#pragma once

#include "collectives/rendezvous/rendezvous.h"

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace lowband {

/// Learns within milliseconds that a process of the job is gone, whatever carries the data.
///
/// Every process keeps a TCP connection with process 0, which tells the others. The system closes the
/// connections of a process that dies, however it dies; shared memory, in contrast, stays as it is. A lost
/// host is noticed by TCP within some ten seconds; a process that hangs, never.
class PeerWatch {
 public:
  /// What happened to `process` of the job: "is gone (End of file)", "failed: ...".
  using OnLoss = std::function<void(int process, const std::string& what)>;

  /// Collective: all processes of `rendezvous`, which is not needed afterwards. `on_loss` is called once at
  /// most, on a thread of this object.
  PeerWatch(Rendezvous& rendezvous, OnLoss on_loss);
  /// Ends without a word: to the others this process is gone, unless `leave` returned true.
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  /// Tells the others that this process failed, and why, before it ends. Quiet; waits a second at most.
  void tell_failure(std::string_view reason);
  /// Ends the watch once every process has called this. Whether that came about before `patience` ran out and
  /// before any process was lost. Collective.
  bool leave(std::chrono::milliseconds patience);

 private:
  struct Watch;
  std::unique_ptr<Watch> watch_;
};

}  // namespace lowband
