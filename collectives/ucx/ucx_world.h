#pragma once

#include "collectives/communicator.h"
#include "collectives/rendezvous/rendezvous.h"

#include <chrono>
#include <memory>
#include <string>
#include <string_view>

namespace lowband {

/// Whether UCX is built into this binary.
bool ucx_available();

/// "UCX 1.13.1"; empty when it is not built in.
std::string ucx_version();

struct UcxTransport;

/// UCX for the life of this object, which a job may have with MPI or without.
///
/// Between hosts it takes InfiniBand where there is any and TCP otherwise, on one host shared memory; UCX's
/// own environment variables (UCX_TLS, UCX_NET_DEVICES, ...) come before that choice. A thread of its own
/// lets messages progress while the program computes.
///
/// A process that dies, or tells that it failed, breaks all groups of all others within milliseconds: their
/// calls throw PeerFailed naming it. One that hangs is named at a call's deadline.
/// Threads: its groups may be used by different threads at the same time, each by one.
/// Throws: UcxError, also when UCX is not built in; what the rendezvous throws.
class UcxWorld {
 public:
  /// Collective: all processes of `rendezvous`, which is not needed afterwards. `deadline` is that of the
  /// calls on its groups.
  explicit UcxWorld(Rendezvous& rendezvous, std::chrono::milliseconds deadline = std::chrono::seconds(20));
  /// Collective when no exception is in flight: waits for the others, at most for the deadline. With an
  /// exception this process is gone to the others.
  ~UcxWorld();
  UcxWorld(const UcxWorld&) = delete;
  UcxWorld& operator=(const UcxWorld&) = delete;

  /// A communicator of all processes with a ledger of its own; made once. It and all groups split from it end
  /// before this object.
  std::unique_ptr<Communicator> world() const;

  /// Tells all other processes that this one failed, and why, which breaks their groups.
  void tell_failure(std::string_view reason) const;
  /// The same, and ends this process.
  [[noreturn]] void abort(int exit_code, std::string_view reason) const;

 private:
  std::shared_ptr<UcxTransport> transport_;
  [[maybe_unused]] std::chrono::milliseconds deadline_;  // unused in a build without UCX
  [[maybe_unused]] int exceptions_in_flight_;
};

}  // namespace lowband
