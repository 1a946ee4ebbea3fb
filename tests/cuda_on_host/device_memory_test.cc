#include "model/cuda/device_memory.h"

#include "collectives/local/local_world.h"
#include "collectives/process_device.h"
#include "model/cuda/device_transformer.h"
#include "runtime/cuda/stream_device.h"
#include "tests/cuda_on_host/block.h"

#include <mutex>

#include <gtest/gtest.h>

namespace lowband {
namespace {

constexpr ModelConfig kSmall{.vocabulary = 61,
                             .width = 40,
                             .layers = 3,
                             .heads = 4,
                             .kv_heads = 2,
                             .head_dim = 16,
                             .ffn_width = 51,
                             .sequence = 37};

// What the emulated device handed out while the processes, one after the other, made their models.
template <class T>
void expect_plan_is_what_is_allocated(const ModelConfig& config, int processes, Index sequences,
                                      KeptActivations kept) {
  std::mutex one_at_a_time;
  run_world(processes, [&](Communicator& tensor) {
    const std::lock_guard lock(one_at_a_time);
    const CudaStream stream;
    CudaBlas blas(stream);
    const std::unique_ptr<Device> device = device_on(blas);
    const DeviceScope scope(tensor, *device);
    const Index before = cuda_on_host::allocated_bytes();
    const DeviceTransformer<T> model(config, tensor, 1, sequences, kept);
    const DeviceMemory plan =
        plan_device_memory(config, processes, tensor.process(), sequences, kept, Index{sizeof(T)});
    EXPECT_EQ(cuda_on_host::allocated_bytes() - before, plan.total());
    EXPECT_EQ(model.memory().weights, plan.weights);
    EXPECT_EQ(model.memory().gradients, plan.gradients);
    EXPECT_EQ(model.memory().activations, plan.activations);
    EXPECT_EQ(model.memory().workspace, plan.workspace);
  });
}

// Extents that neither processes nor blocks of rows divide, tied heads and not.
TEST(DeviceMemory, ThePlanIsWhatIsAllocated) {
  ModelConfig untied = kSmall;
  untied.tied_head = false;
  untied.kv_heads = 4;
  for (const KeptActivations kept : {KeptActivations::kAll, KeptActivations::kLayerInputs}) {
    for (const int processes : {1, 2}) {
      for (const Index sequences : {1, 3}) {
        expect_plan_is_what_is_allocated<BFloat16>(kSmall, processes, sequences, kept);
        expect_plan_is_what_is_allocated<float>(untied, processes, sequences, kept);
      }
    }
  }
}

// The model of 166 million parameters, as it was added up by hand.
TEST(DeviceMemory, OfAKnownModel) {
  const ModelConfig config{.vocabulary = 50257,
                           .width = 768,
                           .layers = 18,
                           .heads = 6,
                           .kv_heads = 6,
                           .head_dim = 128,
                           .ffn_width = 2048,
                           .sequence = 1024};
  const Index parameters = 50257 * 768 + 18 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 768;
  const DeviceMemory plan = plan_device_memory(config, 1, 0, 4, KeptActivations::kAll, 2);
  EXPECT_EQ(plan.weights, 6 * parameters);
  EXPECT_EQ(plan.gradients, 4 * parameters);
  // Numbers of 2 and of 4 bytes of each token: two norms, q, k, v, attended, gate, up and their product; two
  // scales, the stream between the halves, 12 statistics. Then the streams, the final norm, logits, softmax.
  const Index layer = 2 * (2 * 768 + 4 * 768 + 3 * 2048) + 4 * (2 + 768 + 12);
  const Index ends = 19 * 4 * 768 + 2 * 768 + 4 + 4 * 50304 + 4 * 3;
  EXPECT_EQ(plan.activations, 4096 * (18 * layer + ends));
}

TEST(DeviceMemory, AModelThatTheDeviceCannotHoldIsRefusedBeforeItAllocates) {
  run_world(1, [&](Communicator& tensor) {
    const CudaStream stream;
    CudaBlas blas(stream);
    const std::unique_ptr<Device> device = device_on(blas);
    const DeviceScope scope(tensor, *device);
    ModelConfig large = kSmall;
    large.vocabulary = 10'000'000;
    const Index before = cuda_on_host::allocated_bytes();
    const DeviceMemory plan = plan_device_memory(large, 1, 0, 1, KeptActivations::kAll, 2);
    try {
      const DeviceTransformer<BFloat16> model(large, tensor, 1, 1, KeptActivations::kAll);
      ADD_FAILURE() << "there is room for " << plan.total();
    } catch (const CudaError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(cat("the model takes ", plan.total(), " bytes: weights ", plan.weights)),
                std::string::npos)
          << text;
      EXPECT_NE(text.find(cat("free on device 0 are ", (Index{4} << 30) - before)), std::string::npos)
          << text;
    }
  });
}

}  // namespace
}  // namespace lowband
