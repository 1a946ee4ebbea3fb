#include "model/transformer.h"

#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

const ModelConfig k166M{.vocabulary = 50304,
                        .width = 768,
                        .layers = 18,
                        .heads = 6,
                        .kv_heads = 6,
                        .head_dim = 128,
                        .ffn_width = 2048,
                        .sequence = 1024};

Index total_elements(const ModelConfig& config) {
  Index elements = 0;
  for (const ParameterInfo& info : parameter_table(config)) elements += info.elements();
  return elements;
}

// 18 layers of 4 C^2 + 3 C I matrices and two gains, one embedding, one final gain.
TEST(ParameterTable, CountsTheElementsOfThe166MModel) {
  EXPECT_EQ(total_elements(k166M), 18 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 50304 * 768 + 768);
  ModelConfig untied = k166M;
  untied.tied_head = false;
  EXPECT_EQ(total_elements(untied) - total_elements(k166M), 50304 * 768);
}

TEST(ParameterTable, NamesAndShapesFollowHuggingFace) {
  ModelConfig config{.vocabulary = 50,
                     .width = 24,
                     .layers = 2,
                     .heads = 6,
                     .kv_heads = 2,
                     .head_dim = 10,
                     .ffn_width = 35,
                     .tied_head = false};
  const auto table = parameter_table(config);
  ASSERT_EQ(table.size(), 3U + 2U * 9U);
  std::set<std::string> names;
  for (const auto& info : table) names.insert(info.name);
  EXPECT_EQ(names.size(), table.size());

  const auto expect_at = [&](std::size_t i, const char* name, Role role, Index rows, Index cols,
                             TensorCut cut) {
    EXPECT_EQ(table[i].name, name);
    EXPECT_EQ(table[i].role, role) << name;
    EXPECT_EQ(table[i].rows, rows) << name;
    EXPECT_EQ(table[i].cols, cols) << name;
    EXPECT_EQ(table[i].cut, cut) << name;
  };
  expect_at(0, "model.embed_tokens.weight", Role::kEmbedding, 50, 24, TensorCut::kRows);
  expect_at(1, "model.layers.0.input_layernorm.weight", Role::kNorm, 1, 24, TensorCut::kNone);
  expect_at(11, "model.layers.1.self_attn.q_proj.weight", Role::kQuery, 60, 24, TensorCut::kRows);
  expect_at(12, "model.layers.1.self_attn.k_proj.weight", Role::kKey, 20, 24, TensorCut::kRows);
  expect_at(13, "model.layers.1.self_attn.v_proj.weight", Role::kValue, 20, 24, TensorCut::kRows);
  expect_at(14, "model.layers.1.self_attn.o_proj.weight", Role::kOutput, 24, 60, TensorCut::kCols);
  expect_at(15, "model.layers.1.post_attention_layernorm.weight", Role::kNorm, 1, 24, TensorCut::kNone);
  expect_at(16, "model.layers.1.mlp.gate_proj.weight", Role::kGate, 35, 24, TensorCut::kRows);
  expect_at(17, "model.layers.1.mlp.up_proj.weight", Role::kUp, 35, 24, TensorCut::kRows);
  expect_at(18, "model.layers.1.mlp.down_proj.weight", Role::kDown, 24, 35, TensorCut::kCols);
  expect_at(19, "model.norm.weight", Role::kNorm, 1, 24, TensorCut::kNone);
  expect_at(20, "lm_head.weight", Role::kHead, 50, 24, TensorCut::kRows);
}

// trainer.md 4.2: 74 all-reduces of 4096 x 768 and 12 bytes per token and process, here in f32.
TEST(ParameterTable, ActivationBytesOfThe166MModel) {
  EXPECT_EQ(activation_payload_bytes(k166M, 4096, 2, 4), 74 * 4096 * 768 * 4 + 2 * 4096 * 12);
}

std::string validation_message(const ModelConfig& config, int tensor_processes) {
  try {
    validate(config, tensor_processes);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ModelConfigValidation, NamesFieldFoundAndExpected) {
  const auto broken = [](auto change, int tensor = 1) {
    ModelConfig config;
    change(config);
    return validation_message(config, tensor);
  };
  EXPECT_EQ(validation_message(ModelConfig{}, 4), "accepted");
  EXPECT_EQ(broken([](auto& c) { c.heads = c.kv_heads = 6; }, 4),
            "model.heads: found 6, expected a multiple of mesh.tensor = 4");
  EXPECT_EQ(broken([](auto& c) { c.kv_heads = 2; }, 4),
            "model.kv_heads: found 2, expected a multiple of mesh.tensor = 4");
  EXPECT_EQ(broken([](auto& c) { c.kv_heads = 3; }),
            "model.heads: found 8, expected a multiple of model.kv_heads = 3");
  EXPECT_EQ(broken([](auto& c) { c.layers = 0; }), "model.layers: found 0, expected at least 1");
  EXPECT_THAT(broken([](auto& c) { c.head_dim = 33; }), testing::StartsWith("model.head_dim: found 33"));
  EXPECT_EQ(broken([](auto& c) { c.ffn_width = 3; }, 4),
            "model.ffn_width: found 3, expected at least mesh.tensor = 4");
  EXPECT_THAT(broken([](auto& c) { c.rope_base = 1.0; }), testing::StartsWith("model.rope_base: found 1"));
  EXPECT_THAT(broken([](auto& c) { c.norm_epsilon = 0.0; }),
              testing::StartsWith("model.norm_epsilon: found 0"));
  EXPECT_THAT(broken([](auto& c) { c.vocabulary = -1; }), testing::StartsWith("model.vocabulary: found -1"));
}

}  // namespace
}  // namespace lowband
