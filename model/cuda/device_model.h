#pragma once

#include "model/model.h"

namespace lowband {

/// A DeviceTransformer on the device of `tensor`. Throws: as its constructor; CudaError when CUDA is not
/// built in.
std::unique_ptr<Model<float>> make_device_model(const ModelConfig& config, Communicator& tensor,
                                                std::uint64_t seed, Index max_sequences,
                                                const DeviceModelOptions& options);

}  // namespace lowband
