#include "model/layers.h"

#include "collectives/local/local_world.h"
#include "model/attention.h"
#include "model/cross_entropy.h"
#include "runtime/random.h"
#include "tests/model/finite_differences.h"

#include <gtest/gtest.h>

// Every layer function against finite differences in double. The scalar is sum(c * output) with random c, so
// that no element of the gradient is zero by symmetry. Sizes are odd on purpose: rows cross the blocks of 64,
// columns leave lanes over.

namespace lowband {
namespace {

using finite_differences::expect_gradient;

Buffer<double> draw(std::string_view name, Index elements, double deviation = 1.0) {
  const RandomStream stream(3, name);
  Buffer<double> values(elements);
  for (Index i = 0; i < elements; ++i) values[i] = deviation * stream.normal(i);
  return values;
}

double dot(const Buffer<double>& a, const Buffer<double>& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

TEST(LayerGradients, Linear) {
  const Index tokens = 5, in = 7, out = 3;
  auto x = draw("x", tokens * in), w = draw("w", out * in), c = draw("c", tokens * out);
  const auto loss = [&] {
    Buffer<double> y(tokens * out);
    linear<double>(x.matrix(0, tokens, in), w.matrix(0, out, in), y.matrix(0, tokens, out));
    return dot(c, y);
  };
  Buffer<double> d_x(tokens * in), d_w(out * in);
  linear_input_gradient<double>(c.matrix(0, tokens, out), w.matrix(0, out, in), d_x.matrix(0, tokens, in));
  linear_weight_gradient<double>(c.matrix(0, tokens, out), x.matrix(0, tokens, in), d_w.matrix(0, out, in));
  expect_gradient("x", x.span(), d_x.span(), loss);
  expect_gradient("w", w.span(), d_w.span(), loss);
}

TEST(LayerGradients, RmsNorm) {
  const Index tokens = 70, width = 21;
  auto x = draw("x", tokens * width), gain = draw("gain", width), c = draw("c", tokens * width);
  const double epsilon = 0.1;  // large enough to matter
  Buffer<double> s(tokens), y(tokens * width);
  const auto loss = [&] {
    rms_norm<double>({}, x.matrix(0, tokens, width), gain.matrix(0, 1, width), epsilon,
                     y.matrix(0, tokens, width), s.span());
    return dot(c, y);
  };
  loss();
  // Gradients are added to what is there.
  Buffer<double> d_x(tokens * width), d_gain(width), scratch(row_blocks(tokens) * width);
  d_x.fill(1), d_gain.fill(1);
  rms_norm_backward<double>(x.matrix(0, tokens, width), gain.matrix(0, 1, width), s.span(),
                            c.matrix(0, tokens, width), d_gain.matrix(0, 1, width),
                            d_x.matrix(0, tokens, width), scratch.matrix(0, row_blocks(tokens), width));
  for (double& value : d_x.span()) value -= 1;
  for (double& value : d_gain.span()) value -= 1;
  expect_gradient("x", x.span(), d_x.span(), loss);
  expect_gradient("gain", gain.span(), d_gain.span(), loss);
}

TEST(LayerGradients, RmsNormAddsTheResidualFirst) {
  const Index tokens = 3, width = 18;
  auto x = draw("x", tokens * width), residual = draw("residual", tokens * width);
  const auto before = draw("x", tokens * width);
  Buffer<double> gain(width), y(tokens * width), s(tokens);
  gain.fill(1);
  rms_norm<double>(residual.matrix(0, tokens, width), x.matrix(0, tokens, width), gain.matrix(0, 1, width),
                   0.5, y.matrix(0, tokens, width), s.span());
  for (Index t = 0; t < tokens; ++t) {
    double squares = 0;
    for (Index j = 0; j < width; ++j) {
      EXPECT_EQ(x[t * width + j], before[t * width + j] + residual[t * width + j]);
      squares += x[t * width + j] * x[t * width + j];
    }
    const double expected = 1 / std::sqrt(squares / static_cast<double>(width) + 0.5);
    EXPECT_NEAR(s[t], expected, 1e-15);
    EXPECT_NEAR(y[t * width + 4], x[t * width + 4] * expected, 1e-14);
  }
}

TEST(LayerGradients, Rotate) {
  const Index tokens = 10, heads = 3, head_dim = 6, cols = heads * head_dim;
  const RotaryTable<double> table(5, head_dim, 100.0);  // two sequences of 5
  auto x = draw("x", tokens * cols), c = draw("c", tokens * cols);
  const auto loss = [&] {
    Buffer<double> y(tokens * cols);
    std::copy_n(x.data(), x.size(), y.data());
    rotate<double>(table, y.matrix(0, tokens, cols));
    return dot(c, y);
  };
  Buffer<double> d_x(tokens * cols);
  std::copy_n(c.data(), c.size(), d_x.data());
  rotate_backward<double>(table, d_x.matrix(0, tokens, cols));
  expect_gradient("x", x.span(), d_x.span(), loss);
}

TEST(LayerGradients, RotateTurnsPairsByTheirAngle) {
  const RotaryTable<double> table(4, 6, 100.0);
  double x[6 * 4] = {};
  double* row = x + 3 * 6;  // position 3
  row[1] = 2, row[1 + 3] = -1;
  rotate<double>(table, MatrixView<double>(x, 4, 6));
  const double angle = 3 * std::pow(100.0, -2.0 * 1 / 6);
  EXPECT_NEAR(row[1], 2 * std::cos(angle) + 1 * std::sin(angle), 1e-15);
  EXPECT_NEAR(row[4], -1 * std::cos(angle) + 2 * std::sin(angle), 1e-15);
  EXPECT_EQ(row[0], 0);
  EXPECT_EQ(row[2], 0);
}

TEST(LayerGradients, Swiglu) {
  const Index tokens = 4, ffn = 19;
  auto gate_up = draw("gate_up", tokens * 2 * ffn), c = draw("c", tokens * ffn);
  const auto loss = [&] {
    Buffer<double> h(tokens * ffn);
    swiglu<double>(gate_up.matrix(0, tokens, 2 * ffn), h.matrix(0, tokens, ffn));
    return dot(c, h);
  };
  Buffer<double> d(tokens * 2 * ffn);
  swiglu_backward<double>(gate_up.matrix(0, tokens, 2 * ffn), c.matrix(0, tokens, ffn),
                          d.matrix(0, tokens, 2 * ffn));
  expect_gradient("gate_up", gate_up.span(), d.span(), loss);
}

// 70 positions: two query blocks, so that the block-wise masks and the accumulation of dK and dV are covered.
void check_attention(AttentionShape shape) {
  const Index tokens = shape.tokens(), cols = shape.qkv_cols();
  auto qkv = draw("qkv", tokens * cols, 1.5), c = draw("c", tokens * shape.query_cols());
  Buffer<double> statistics(shape.statistics()), scratch(shape.scratch_cols()),
      out(tokens * shape.query_cols());
  const auto scratch_view = scratch.matrix(0, 1, shape.scratch_cols());
  const auto loss = [&] {
    attention<double>(shape, qkv.matrix(0, tokens, cols), out.matrix(0, tokens, shape.query_cols()),
                      statistics.span(), scratch_view);
    return dot(c, out);
  };
  loss();
  Buffer<double> d_qkv(tokens * cols);
  d_qkv.fill(77);  // overwritten
  attention_backward<double>(shape, qkv.matrix(0, tokens, cols), c.matrix(0, tokens, shape.query_cols()),
                             statistics.span(), d_qkv.matrix(0, tokens, cols), scratch_view);
  expect_gradient("qkv", qkv.span(), d_qkv.span(), loss);
}
TEST(LayerGradients, Attention) {
  check_attention({.sequences = 2, .sequence = 5, .heads = 3, .kv_heads = 3, .head_dim = 6});
}
TEST(LayerGradients, AttentionOverSeveralBlocks) {
  check_attention({.sequences = 1, .sequence = 70, .heads = 1, .kv_heads = 1, .head_dim = 4});
}
TEST(LayerGradients, AttentionWithGroupedQueries) {
  check_attention({.sequences = 2, .sequence = 7, .heads = 6, .kv_heads = 2, .head_dim = 4});
}

TEST(LayerGradients, Embedding) {
  const Range owned{4, 11};
  const Index width = 5;
  const std::vector<std::int32_t> tokens{4, 9, 3, 4, 10, 11, 4};
  const Index count = static_cast<Index>(tokens.size());
  auto weight = draw("weight", owned.size() * width), c = draw("c", count * width);
  const auto loss = [&] {
    Buffer<double> x(count * width);
    x.fill(5);
    embed<double>(tokens, owned, weight.matrix(0, owned.size(), width), x.matrix(0, count, width));
    EXPECT_EQ(x[2 * width], 0);  // id 3 lives elsewhere
    return dot(c, x);
  };
  Buffer<double> d(owned.size() * width);
  embed_backward<double>(tokens, owned, c.matrix(0, count, width), d.matrix(0, owned.size(), width));
  expect_gradient("weight", weight.span(), d.span(), loss);
}

TEST(LayerGradients, CrossEntropy) {
  const Index tokens = 6, vocabulary = 19;
  const std::vector<std::int32_t> targets{0, 18, 7, 7, 3, 12};
  const auto start = draw("logits", tokens * vocabulary, 3.0);
  const double scale = 0.25;
  run_world(1, [&](Communicator& tensor) {
    Buffer<double> x(start.size()), logits(start.size()), message(3 * tokens), gathered(3 * tokens);
    std::copy_n(start.data(), start.size(), x.data());
    const auto loss = [&] {
      std::copy_n(x.data(), x.size(), logits.data());
      return scale * cross_entropy<double>(logits.matrix(0, tokens, vocabulary), {0, vocabulary}, targets,
                                           tensor, message.span(), gathered.span());
    };
    loss();
    cross_entropy_backward<double>(logits.matrix(0, tokens, vocabulary), {0, vocabulary}, targets, tensor,
                                   gathered.span(), scale);
    const std::vector<double> d(logits.span().begin(), logits.span().end());
    expect_gradient("logits", x.span(), d, loss);
  });
}

TEST(LayerGradients, CrossEntropySurvivesLargeLogits) {
  run_world(1, [&](Communicator& tensor) {
    double logits[3] = {5000.0, 4990.0, -1e30}, message[3], gathered[3];
    const std::vector<std::int32_t> targets{1};
    const double loss =
        cross_entropy<double>(MatrixView<double>(logits, 1, 3), {0, 3}, targets, tensor, message, gathered);
    EXPECT_NEAR(loss, 10.0 + std::log1p(std::exp(-10.0)), 1e-12);
  });
}

}  // namespace
}  // namespace lowband
