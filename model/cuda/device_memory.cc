#include "model/cuda/device_memory.h"

#include "sharding/layout.h"

namespace lowband {

DeviceMemory plan_device_memory(const ModelConfig& config, int processes, int process, Index max_sequences,
                                KeptActivations kept, Index element_bytes) {
  validate(config, processes);
  const Index b = element_bytes, w = config.width, d = config.head_dim, n = max_sequences * config.sequence;
  const Index h = config.heads / processes, k = config.kv_heads / processes;
  const Index f = split_range(config.ffn_width, processes, process).size();
  const Index ids = padded_ids(split_range(config.vocabulary, processes, process).size());
  const Index attention_cols = (2 * h + 2 * k) * d;  // q, k, v and what comes out
  Index elements = 0;
  for (const ParameterInfo& info : parameter_table(config)) {
    const MatrixLayout layout(info.rows, info.cols, info.cut, processes, 1);
    elements += layout.tensor_rows(process).size() * layout.tensor_cols(process).size();
  }

  const Index norm = b * w + 4;
  const Index layer = n * (2 * norm + 4 * w + 8 * h + b * attention_cols + 3 * b * f);
  const Index layers = kept == KeptActivations::kAll ? config.layers : 1;
  const Index ends = n * (norm + 4 * ids + 12 * processes);  // the final norm, logits, softmax
  return {
      .weights = elements * (4 + b),
      .gradients = elements * 4,
      .activations = layers * layer + 4 * (config.layers + 1) * n * w + ends,
      .workspace = n * (32 + 8 * w + 4 * h + b * (ids + w + attention_cols + 3 * f)) +
                   4 * w * ((n + 15) / 16) + 4 * config.sequence * d + 16,
  };
}

}  // namespace lowband
