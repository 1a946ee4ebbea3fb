#pragma once

#include "runtime/types.h"

#include <cstdint>
#include <string>

namespace lowband {

/// What the kernel counts on a network interface of this process's network namespace: headers and
/// acknowledgements too.
class InterfaceCounter {
 public:
  /// Throws: InvalidArgument naming --interface and the interfaces there are.
  explicit InterfaceCounter(std::string name);

  /// Bytes sent since the interface came up, by whomever. Throws: IoError when it has gone.
  Index sent_bytes() const;
  /// Equal for processes that share the interface.
  std::uint64_t identity() const;

 private:
  std::string name_;
};

}  // namespace lowband
