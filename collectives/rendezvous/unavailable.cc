#include "collectives/rendezvous/star.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "runtime/error.h"

namespace lowband {

struct Star::Connections {};
Star::~Star() = default;

TcpRendezvous::TcpRendezvous(const TcpMeeting& meeting)
    : Rendezvous(meeting.process, meeting.size, meeting.deadline) {
  throw UcxError("lowband was built without UCX (LOWBAND_UCX): processes cannot meet without MPI");
}
TcpRendezvous::~TcpRendezvous() = default;
std::vector<std::string> TcpRendezvous::all_gather(std::string_view) { return {}; }

}  // namespace lowband
