#include "plugin/callback_rendezvous.h"

#include "runtime/error.h"
#include "runtime/types.h"

#include <algorithm>

namespace lowband::plugin {
namespace {

// Of nothing: how long to wait is up to the callback.
constexpr std::chrono::seconds kDeadline{120};

}  // namespace

CallbackRendezvous::CallbackRendezvous(int process, int processes, lowband_all_gather function, void* context)
    : Rendezvous(process, processes, kDeadline), all_gather_(function), context_(context) {
  LB_EXPECTS(processes >= 1, "processes: found ", processes, ", expected at least 1");
  LB_EXPECTS(process >= 0 && process < processes, "process: found ", process, ", expected 0 .. ",
             processes - 1);
  LB_EXPECTS(function != nullptr, "all_gather: found NULL, expected a function");
}

void CallbackRendezvous::gather(const void* own, void* all, int64_t bytes) {
  const int failure = all_gather_(context_, own, all, bytes);
  if (failure != 0)
    throw Error(cat("all_gather: found ", failure, " returned by the program's function, expected 0"));
}

// The callback gathers equally many bytes, so lengths come first and the longest text decides.
std::vector<std::string> CallbackRendezvous::all_gather(std::string_view own) {
  const auto processes = static_cast<std::size_t>(size());
  const auto length = static_cast<Index>(own.size());
  std::vector<Index> lengths(processes);
  gather(&length, lengths.data(), sizeof(Index));

  const Index longest = *std::max_element(lengths.begin(), lengths.end());
  const auto stride = static_cast<std::size_t>(longest);
  std::string padded(own);
  padded.resize(stride);
  std::string all(processes * stride, '\0');
  if (longest > 0) gather(padded.data(), all.data(), longest);

  std::vector<std::string> texts;
  for (std::size_t p = 0; p < processes; ++p)
    texts.push_back(all.substr(p * stride, static_cast<std::size_t>(lengths[p])));
  return texts;
}

}  // namespace lowband::plugin
