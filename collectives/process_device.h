#pragma once

#include "collectives/communicator.h"

#include <memory>
#include <string>
#include <string_view>

namespace lowband {

/// How many processes of smaller numbers run on the host of this one.
/// Collective: all processes of `world`; recorded with Purpose::kControl.
int place_on_host(Communicator& world);

/// Which of `devices` devices of its host this process uses: those of a host take them in turns.
/// Collective: all processes of `world`. Requires devices >= 1, which may differ between hosts.
inline int device_index_of(Communicator& world, int devices) { return place_on_host(world) % devices; }

/// The device of this process, and how its driver describes it.
struct ProcessDevice {
  std::unique_ptr<Device> device;
  std::string description;  // "cuda:0, NVIDIA H200 (9.0)"
};
/// Opens device_index_of. Collective: all processes of `world`.
/// Throws: AgreedFailure "`asked`, expected `otherwise`: reason" where a process has no device; CudaError.
ProcessDevice open_device_of(Communicator& world, std::string_view asked, std::string_view otherwise);

/// Sets the device of a group, and of groups that are split from it meanwhile, for a scope.
class DeviceScope {
 public:
  DeviceScope(Communicator& group, Device& device) : group_(group) { group.set_device(&device); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { group_.set_device(nullptr); }

 private:
  Communicator& group_;
};

}  // namespace lowband
