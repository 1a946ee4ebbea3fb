#pragma once

#include "collectives/rendezvous/rendezvous.h"
#include "plugin/lowband.h"

namespace lowband::plugin {

/// Processes that have a way to gather equally many bytes from each other, the caller's, meet over it.
class CallbackRendezvous final : public Rendezvous {
 public:
  /// Throws: InvalidArgument for a process outside 0 .. processes - 1 or no callback.
  CallbackRendezvous(int process, int processes, lowband_all_gather function, void* context);

  /// Throws: Error, when the callback returns anything but 0.
  std::vector<std::string> all_gather(std::string_view own) override;

 private:
  void gather(const void* own, void* all, int64_t bytes);

  lowband_all_gather all_gather_;
  void* context_;
};

}  // namespace lowband::plugin
