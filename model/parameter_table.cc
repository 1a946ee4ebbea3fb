#include "model/model.h"

namespace lowband {

void validate(const ModelConfig& config, int tensor_processes) {
  const auto positive = [](const char* field, Index value) {
    LB_EXPECTS(value >= 1, "model.", field, ": found ", value, ", expected at least 1");
  };
  positive("vocabulary", config.vocabulary);
  positive("width", config.width);
  positive("layers", config.layers);
  positive("heads", config.heads);
  positive("kv_heads", config.kv_heads);
  positive("head_dim", config.head_dim);
  positive("ffn_width", config.ffn_width);
  positive("sequence", config.sequence);
  LB_EXPECTS(config.head_dim % 2 == 0, "model.head_dim: found ", config.head_dim,
             ", expected an even number (rotary positions turn pairs)");
  LB_EXPECTS(config.heads % config.kv_heads == 0, "model.heads: found ", config.heads,
             ", expected a multiple of model.kv_heads = ", config.kv_heads);
  LB_EXPECTS(config.rope_base > 1.0, "model.rope_base: found ", config.rope_base, ", expected more than 1");
  LB_EXPECTS(config.norm_epsilon > 0.0 && config.norm_epsilon < 1.0, "model.norm_epsilon: found ",
             config.norm_epsilon, ", expected a number in (0, 1)");

  LB_EXPECTS(tensor_processes >= 1, "mesh.tensor: found ", tensor_processes, ", expected at least 1");
  LB_EXPECTS(config.heads % tensor_processes == 0, "model.heads: found ", config.heads,
             ", expected a multiple of mesh.tensor = ", tensor_processes);
  LB_EXPECTS(config.kv_heads % tensor_processes == 0, "model.kv_heads: found ", config.kv_heads,
             ", expected a multiple of mesh.tensor = ", tensor_processes);
  LB_EXPECTS(config.ffn_width >= tensor_processes, "model.ffn_width: found ", config.ffn_width,
             ", expected at least mesh.tensor = ", tensor_processes);
  LB_EXPECTS(config.vocabulary >= tensor_processes, "model.vocabulary: found ", config.vocabulary,
             ", expected at least mesh.tensor = ", tensor_processes);
}

void validate_batch(const ModelConfig& config, Index max_sequences, std::span<const std::int32_t> tokens,
                    std::span<const std::int32_t> targets, Index sequences) {
  LB_EXPECTS(sequences >= 1 && sequences <= max_sequences, "sequences: found ", sequences, ", expected 1 to ",
             max_sequences);
  const auto check = [&](std::string_view name, std::span<const std::int32_t> ids) {
    LB_EXPECTS(static_cast<Index>(ids.size()) == sequences * config.sequence, name, ": found ", ids.size(),
               " ids, expected ", sequences, " sequences of ", config.sequence);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      LB_EXPECTS(ids[i] >= 0 && ids[i] < config.vocabulary, name, "[", i, "]: found id ", ids[i],
                 ", expected 0 to model.vocabulary - 1 = ", config.vocabulary - 1);
    }
  };
  check("tokens", tokens);
  check("targets", targets);
}

std::vector<ParameterInfo> parameter_table(const ModelConfig& config) {
  const Index width = config.width;
  const Index query_rows = config.heads * config.head_dim;
  const Index kv_rows = config.kv_heads * config.head_dim;
  std::vector<ParameterInfo> table;
  table.push_back(
      {"model.embed_tokens.weight", Role::kEmbedding, config.vocabulary, width, TensorCut::kRows});
  for (Index layer = 0; layer < config.layers; ++layer) {
    const auto add = [&](const char* name, Role role, Index rows, Index cols, TensorCut cut) {
      table.push_back({cat("model.layers.", layer, ".", name, ".weight"), role, rows, cols, cut});
    };
    add("input_layernorm", Role::kNorm, 1, width, TensorCut::kNone);
    add("self_attn.q_proj", Role::kQuery, query_rows, width, TensorCut::kRows);
    add("self_attn.k_proj", Role::kKey, kv_rows, width, TensorCut::kRows);
    add("self_attn.v_proj", Role::kValue, kv_rows, width, TensorCut::kRows);
    add("self_attn.o_proj", Role::kOutput, width, query_rows, TensorCut::kCols);
    add("post_attention_layernorm", Role::kNorm, 1, width, TensorCut::kNone);
    add("mlp.gate_proj", Role::kGate, config.ffn_width, width, TensorCut::kRows);
    add("mlp.up_proj", Role::kUp, config.ffn_width, width, TensorCut::kRows);
    add("mlp.down_proj", Role::kDown, width, config.ffn_width, TensorCut::kCols);
  }
  table.push_back({"model.norm.weight", Role::kNorm, 1, width, TensorCut::kNone});
  if (!config.tied_head)
    table.push_back({"lm_head.weight", Role::kHead, config.vocabulary, width, TensorCut::kRows});
  return table;
}

Index activation_payload_bytes(const ModelConfig& config, Index tokens, int tensor_processes,
                               Index element_bytes) {
  const Index reductions = (4 * config.layers + 2) * tokens * config.width;
  const Index loss_numbers = 3 * tokens * tensor_processes;
  return (reductions + loss_numbers) * element_bytes;
}

}  // namespace lowband
