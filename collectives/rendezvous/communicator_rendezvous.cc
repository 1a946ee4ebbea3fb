#include "collectives/rendezvous/communicator_rendezvous.h"

#include <cstdint>
#include <numeric>
#include <span>

namespace lowband {

std::vector<std::string> CommunicatorRendezvous::all_gather(std::string_view own) {
  const auto processes = static_cast<std::size_t>(size());
  const std::vector<Index> own_bytes{static_cast<Index>(own.size())};
  std::vector<Index> bytes(processes);
  communicator_.all_gather<Index>(own_bytes, bytes, std::vector<Index>(processes, 1), {Purpose::kControl});

  const std::vector<std::uint8_t> send(own.begin(), own.end());
  std::vector<std::uint8_t> all(
      static_cast<std::size_t>(std::accumulate(bytes.begin(), bytes.end(), Index{0})));
  communicator_.all_gather<std::uint8_t>(send, all, bytes, {Purpose::kControl});

  std::vector<std::string> result;
  auto begin = all.begin();
  for (const Index count : bytes) {
    result.emplace_back(begin, begin + count);
    begin += count;
  }
  return result;
}

}  // namespace lowband
