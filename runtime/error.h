#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lowband {

/// Base of everything lowband throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller's mistake: a configuration field, an argument, a file that does not belong to this run.
/// The program exits with code 64.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A transfer that would cost more than its budget; it was not sent.
class BudgetExceeded : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// A file could not be read or written. The message names the path and the system's reason.
class IoError : public Error {
 public:
  using Error::Error;
};

/// Another process failed, disappeared, or did not answer before the deadline.
class PeerFailed : public Error {
 public:
  using Error::Error;
};

/// Processes called different collectives; the message names both sides.
class CollectiveMismatch : public Error {
 public:
  using Error::Error;
};

class MpiError : public Error {
 public:
  using Error::Error;
};

class UcxError : public Error {
 public:
  using Error::Error;
};

class NcclError : public Error {
 public:
  using Error::Error;
};

class CudaError : public Error {
 public:
  using Error::Error;
};

/// Joins the arguments as an output stream would print them.
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream text;
  text.precision(10);
  (text << ... << parts);
  return text.str();
}

/// Checks a precondition; on failure throws InvalidArgument with the joined message. Always on.
#define LB_EXPECTS(condition, ...)                                                   \
  do {                                                                               \
    if (!(condition)) throw ::lowband::InvalidArgument(::lowband::cat(__VA_ARGS__)); \
  } while (false)

}  // namespace lowband
