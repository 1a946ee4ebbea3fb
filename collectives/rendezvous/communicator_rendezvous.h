#pragma once

#include "collectives/communicator.h"
#include "collectives/rendezvous/rendezvous.h"

namespace lowband {

/// Processes that share a communicator already, for example MPI's, meet over it. Borrows the communicator;
/// what is exchanged is recorded there with Purpose::kControl.
class CommunicatorRendezvous final : public Rendezvous {
 public:
  explicit CommunicatorRendezvous(Communicator& communicator)
      : Rendezvous(communicator.process(), communicator.size(), communicator.deadline()),
        communicator_(communicator) {}

  std::vector<std::string> all_gather(std::string_view own) override;

 private:
  Communicator& communicator_;
};

}  // namespace lowband
