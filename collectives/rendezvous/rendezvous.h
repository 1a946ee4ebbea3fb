#pragma once

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// How the processes of a job find each other. Addresses and ids travel here, never data.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  int process() const { return process_; }  // of the job, 0 <= process < size
  int size() const { return size_; }
  /// No call waits longer.
  std::chrono::milliseconds deadline() const { return deadline_; }

  /// The bytes that every process gave, by process; they may differ in length.
  ///
  /// Collective: all processes of the job, in the same order.
  /// Throws: PeerFailed, naming the process that is gone or silent.
  virtual std::vector<std::string> all_gather(std::string_view own) = 0;

 protected:
  Rendezvous(int process, int size, std::chrono::milliseconds deadline)
      : process_(process), size_(size), deadline_(deadline) {}

 private:
  int process_;
  int size_;
  std::chrono::milliseconds deadline_;
};

}  // namespace lowband
