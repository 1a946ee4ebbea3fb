#include "model/cuda/device_model.h"
#include "model/transformer.h"

namespace lowband {

template <class Real>
std::unique_ptr<Model<Real>> make_model(const ModelConfig& config, Communicator& tensor, std::uint64_t seed,
                                        Index max_sequences, const DeviceModelOptions& on_device) {
  if (tensor.device() == nullptr)
    return std::make_unique<Transformer<Real>>(config, tensor, seed, max_sequences);
  if constexpr (kOnDevices<Real>) return make_device_model(config, tensor, seed, max_sequences, on_device);
  throw InvalidArgument(
      cat("precision: found F64 on ", place_name(tensor.device()), ", expected F32 or BF16"));
}

template std::unique_ptr<Model<float>> make_model(const ModelConfig&, Communicator&, std::uint64_t, Index,
                                                  const DeviceModelOptions&);
template std::unique_ptr<Model<double>> make_model(const ModelConfig&, Communicator&, std::uint64_t, Index,
                                                   const DeviceModelOptions&);

}  // namespace lowband
