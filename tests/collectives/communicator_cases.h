#pragma once

#include "collectives/communicator.h"

#include <ostream>
#include <span>

namespace lowband {

/// What every backend must do: one claim, run by all processes of a fresh group of any size.
struct CommunicatorCase {
  const char* name;
  void (*body)(Communicator& group);
};
std::span<const CommunicatorCase> communicator_cases();

inline std::ostream& operator<<(std::ostream& out, const CommunicatorCase& c) { return out << c.name; }

}  // namespace lowband
