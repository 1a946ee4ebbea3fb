#include "model/cuda/device_model.h"

#include "model/cuda/device_transformer.h"

namespace lowband {

std::unique_ptr<Model<float>> make_device_model(const ModelConfig& config, Communicator& tensor,
                                                std::uint64_t seed, Index max_sequences,
                                                const DeviceModelOptions& options) {
  const KeptActivations kept =
      options.recompute_activations ? KeptActivations::kLayerInputs : KeptActivations::kAll;
  const PlanChoice plans = options.measured_plans ? PlanChoice::kMeasured : PlanChoice::kHeuristic;
  switch (options.products) {
    case DType::kF32:
      return std::make_unique<DeviceTransformer<float>>(config, tensor, seed, max_sequences, kept, plans);
    case DType::kBF16:
      return std::make_unique<DeviceTransformer<BFloat16>>(config, tensor, seed, max_sequences, kept, plans);
    default:
      throw InvalidArgument(cat("products of the model: found ", dtype_name(options.products),
                                ", expected f32 or bf16 on a device"));
  }
}

}  // namespace lowband
