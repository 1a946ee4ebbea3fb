#include "model/cuda/device_model.h"

namespace lowband {

std::unique_ptr<Model<float>> make_device_model(const ModelConfig& /*config*/, Communicator& /*tensor*/,
                                                std::uint64_t /*seed*/, Index /*max_sequences*/,
                                                const DeviceModelOptions& /*options*/) {
  throw CudaError(cuda_status().reason);
}

}  // namespace lowband
