#include "collectives/process_device.h"

#include "collectives/agreement.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

namespace lowband {
namespace {

// Equal for processes of one host alone: names of hosts need not be different, containers of one host may
// have several.
std::string host_identity() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  const std::string id(std::istreambuf_iterator<char>(boot), {});
  return name.data() + (" " + id);
}

}  // namespace

int place_on_host(Communicator& world) {
  constexpr std::size_t kBytes = 320;
  std::string own = host_identity();
  own.resize(kBytes);
  const auto processes = static_cast<std::size_t>(world.size());
  std::vector<std::uint8_t> all(processes * kBytes);
  world.all_gather<std::uint8_t>({reinterpret_cast<const std::uint8_t*>(own.data()), kBytes}, all,
                                 std::vector<Index>(processes, kBytes), {Purpose::kControl});
  int before = 0;
  for (int p = 0; p < world.process(); ++p)
    before += std::equal(own.begin(), own.end(), all.begin() + static_cast<std::ptrdiff_t>(kBytes) * p,
                         [](char a, std::uint8_t b) { return static_cast<std::uint8_t>(a) == b; });
  return before;
}

ProcessDevice open_device_of(Communicator& world, std::string_view asked, std::string_view otherwise) {
  CudaStatus cuda;
  agree(world, [&] {
    cuda = cuda_status();
    LB_EXPECTS(!cuda.devices.empty(), asked, ", expected ", otherwise, ": ", cuda.reason);
  });
  const int index = device_index_of(world, static_cast<int>(cuda.devices.size()));
  const CudaDevice& found = cuda.devices[static_cast<std::size_t>(index)];
  std::unique_ptr<Device> device = open_device(index);
  std::string description = cat(device->name(), ", ", found.name, " (", found.compute_capability, ")");
  return {std::move(device), std::move(description)};
}

}  // namespace lowband
