#pragma once

#include "collectives/rendezvous/rendezvous.h"

#include <chrono>
#include <memory>
#include <string>

namespace lowband {

class Star;

/// Where and as whom a process meets the others.
struct TcpMeeting {
  int process = 0;      // RANK
  int size = 1;         // WORLD_SIZE
  std::string address;  // MASTER_ADDR: a name or address of process 0's host
  int port = 0;         // MASTER_PORT: free on that host
  /// LOWBAND_TOKEN, optional: a secret of the job, equal on all processes. It keeps jobs and strangers apart,
  /// and is sent as it is.
  std::string token;
  /// LOWBAND_RENDEZVOUS_SECONDS: processes started by hand or by a scheduler come one after the other.
  std::chrono::milliseconds deadline = std::chrono::seconds(120);
};

/// Whether the environment names a process, as torchrun and many schedulers do: WORLD_SIZE is there.
bool tcp_meeting_in_environment();

/// The meeting that RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOWBAND_TOKEN and LOWBAND_RENDEZVOUS_SECONDS
/// describe.
///
/// Throws: InvalidArgument naming the variable that is missing or is not what it should be.
TcpMeeting tcp_meeting_from_environment();

/// Processes meet at a port of process 0, without MPI.
///
/// Collective: constructed by all processes, with equal size, address, port and token.
/// Throws: InvalidArgument when the port is in use, the host unknown, the token another, a process number
/// taken twice or the sizes differ; PeerFailed at the deadline, naming who is missing; Error when TCP is not
/// built in.
class TcpRendezvous final : public Rendezvous {
 public:
  explicit TcpRendezvous(const TcpMeeting& meeting);
  ~TcpRendezvous() override;

  std::vector<std::string> all_gather(std::string_view own) override;

 private:
  std::unique_ptr<Star> star_;
};

}  // namespace lowband
