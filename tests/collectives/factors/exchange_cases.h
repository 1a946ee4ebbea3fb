#pragma once

#include "collectives/communicator.h"

#include <ostream>
#include <span>

namespace lowband {

/// What the factor exchange must do on every backend: one claim, run by all processes of a fresh world of any
/// size, in every mesh of replica x shard x tensor processes that fits it.
struct ExchangeCase {
  const char* name;
  void (*body)(Communicator& world);
};
std::span<const ExchangeCase> exchange_cases();

inline std::ostream& operator<<(std::ostream& out, const ExchangeCase& c) { return out << c.name; }

}  // namespace lowband
