#pragma once

#include "collectives/communicator.h"

#include <functional>

namespace lowband {

/// What `agree` throws, the same on every process. The message names the first process that failed, unless
/// all of them did.
class AgreedFailure : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// Runs `local_work` on every process and lets nobody go on alone: when it threw InvalidArgument, IoError
/// or a file system's error on any process, every process throws AgreedFailure with the message of the first
/// of them.
///
/// For work that touches only this process (files, configuration, memory) and that the others cannot see
/// fail. Collective: all processes of `world`; `local_work` must not communicate. Other exceptions pass
/// through.
void agree(Communicator& world, const std::function<void()>& local_work);

}  // namespace lowband
