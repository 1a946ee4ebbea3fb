// The model's kernels against the host's layers in double, on the same (rounded) numbers. Sizes are odd where
// they may be: rows cross warps and blocks, columns leave lanes over.
#include "collectives/local/local_world.h"
#include "model/cross_entropy.h"
#include "model/cuda/attention.h"
#include "model/cuda/layers.h"
#include "model/layers.h"
#include "runtime/buffer.h"
#include "tests/runtime/cuda/device_checks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace lowband {
namespace {

using namespace test;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

// Half the distance between neighbours of T around one: what storing a result costs.
template <class T>
constexpr double kRounding = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-8;
constexpr double kFloat = 0x1p-24;

template <class T>
Buffer<double> in_double(const std::vector<T>& x) {
  Buffer<double> wide(static_cast<Index>(x.size()));
  for (std::size_t e = 0; e < x.size(); ++e) wide[static_cast<Index>(e)] = number(x[e]);
  return wide;
}

// |found - expected| <= absolute + relative |expected|
template <class T>
void expect_close(const std::vector<T>& found, const Buffer<double>& expected, double absolute,
                  double relative, std::string_view what) {
  expect(static_cast<Index>(found.size()) == expected.size(), what, ": ", found.size(), " elements");
  for (Index e = 0; e < expected.size(); ++e) {
    const double off = std::abs(number(found[at(e)]) - expected[e]);
    const double most = absolute + relative * std::abs(expected[e]);
    expect(off <= most, what, ": element ", e, " is ", number(found[at(e)]), ", expected ", expected[e],
           " to ", most);
  }
}

// Sums of `width` terms of at most about 16 in float, of which errors beyond a factor sqrt(width) are as good
// as impossible; then a rounding to T.
template <class T>
void check_rms_norm_of(Index tokens, Index width, const CudaStream& stream) {
  const Index elements = tokens * width;
  const float epsilon = 0.1F;  // large enough to matter
  const std::vector<float> x = noise(elements, 1), gain = noise(width, 3);
  Buffer<double> wide_x = in_double(x), y(elements), s(tokens), scratch(row_blocks(tokens) * width);
  const Buffer<double> wide_gain = in_double(gain);
  rms_norm<double>({}, wide_x.matrix(0, tokens, width), wide_gain.matrix(0, 1, width),
                   static_cast<double>(epsilon), y.matrix(0, tokens, width), s.span());

  auto device_x = on_device(x, stream);
  const auto device_gain = on_device(gain, stream);
  DeviceBuffer<T> device_y(elements, stream), rounded(elements, stream);
  DeviceBuffer<float> device_s(tokens, stream);
  device_rms_norm<T>(device_x.matrix(0, tokens, width), device_gain.data(), epsilon,
                     device_y.matrix(0, tokens, width), device_s.data(), stream);
  const double sum_error = 16 * std::sqrt(static_cast<double>(width)) * kFloat;
  expect_close(on_host(device_s), s, 0, sum_error, "s");
  expect_close(on_host(device_y), y, 0, sum_error + 4 * kRounding<T>, "y");

  const std::vector<float> d_y = noise(elements, 4), d_x = noise(elements, 5), d_gain = noise(width, 6);
  Buffer<double> wide_d_x = in_double(d_x), wide_d_gain = in_double(d_gain);
  const Buffer<double> wide_d_y = in_double(d_y);
  rms_norm_backward<double>(wide_x.matrix(0, tokens, width), wide_gain.matrix(0, 1, width), s.span(),
                            wide_d_y.matrix(0, tokens, width), wide_d_gain.matrix(0, 1, width),
                            wide_d_x.matrix(0, tokens, width), scratch.matrix(0, row_blocks(tokens), width));
  auto device_d_x = on_device(d_x, stream), device_d_gain = on_device(d_gain, stream);
  auto device_d_y = on_device(d_y, stream);
  DeviceBuffer<float> device_scratch(device_rms_norm_scratch(tokens, width), stream);
  device_rms_norm_backward<T>(device_x.matrix(0, tokens, width), device_gain.data(), device_s.data(),
                              device_d_y.matrix(0, tokens, width), device_d_gain.data(),
                              device_d_x.matrix(0, tokens, width), rounded.matrix(0, tokens, width),
                              device_scratch.data(), stream);
  expect_close(on_host(device_d_x), wide_d_x, 64 * sum_error, 0, "d_x");
  expect_close(on_host(rounded), wide_d_x, 64 * sum_error, kRounding<T>, "d_x rounded");
  expect_close(on_host(device_d_gain), wide_d_gain, 64 * static_cast<double>(tokens) * kFloat, 0, "d_gain");
}

// Element by element; by packs of 16 bytes, more blocks of rows than a warp adds up at once; so wide that a
// block has fewer warps.
template <class T>
void check_rms_norm(const CudaStream& stream) {
  check_rms_norm_of<T>(131, 117, stream);
  check_rms_norm_of<T>(530, 136, stream);
  check_rms_norm_of<T>(19, 9000, stream);
}

// A product of two numbers of at most 4, twice: a few roundings of at most 32, and one of T.
template <class T>
void check_rotate_of(Index half, const CudaStream& stream) {
  const Index sequence = 37, tokens = 2 * sequence + 5, heads = 3, cols = (heads + 1) * 2 * half;
  const RotaryTable<float> table(sequence, 2 * half, 100);
  const std::vector<float> cosine(table.cosine(0), table.cosine(0) + sequence * half);
  const std::vector<float> sine(table.sine(0), table.sine(0) + sequence * half);
  const auto device_cosine = on_device(cosine, stream), device_sine = on_device(sine, stream);
  const std::vector<T> x = as<T>(noise(tokens * cols, 7));
  for (const bool backward : {false, true}) {
    Buffer<double> expected = in_double(x);
    const RotaryTable<double> wide_table(sequence, 2 * half, 100);
    const auto turned = expected.matrix(0, tokens, cols).block(0, tokens, 0, heads * 2 * half);
    backward ? rotate_backward<double>(wide_table, turned) : rotate<double>(wide_table, turned);
    auto device = on_device(x, stream);
    device_rotate<T>(device_cosine.data(), device_sine.data(), sequence, half, heads, backward,
                     device.matrix(0, tokens, cols), stream);
    expect_close(on_host(device), expected, 32 * kFloat, kRounding<T>, "rotated");
  }
}

// By packs of 16 bytes, and element by element.
template <class T>
void check_rotate(const CudaStream& stream) {
  check_rotate_of<T>(8, stream);
  check_rotate_of<T>(5, stream);
}

// The exponential of float is good to 2 ulp, its argument at most 4; products of numbers of at most 4.
template <class T, Index ffn>
void check_swiglu_of(const CudaStream& stream) {
  const Index tokens = 67;
  const std::vector<T> gate_up = as<T>(noise(tokens * 2 * ffn, 8)), d_h = as<T>(noise(tokens * ffn, 9));
  const Buffer<double> wide = in_double(gate_up), wide_d_h = in_double(d_h);
  Buffer<double> h(tokens * ffn), d_gate_up(tokens * 2 * ffn);
  swiglu<double>(wide.matrix(0, tokens, 2 * ffn), h.matrix(0, tokens, ffn));
  swiglu_backward<double>(wide.matrix(0, tokens, 2 * ffn), wide_d_h.matrix(0, tokens, ffn),
                          d_gate_up.matrix(0, tokens, 2 * ffn));
  const auto device_gate_up = on_device(gate_up, stream), device_d_h = on_device(d_h, stream);
  DeviceBuffer<T> device_h(tokens * ffn, stream), device_d(tokens * 2 * ffn, stream);
  device_swiglu<T>(device_gate_up.matrix(0, tokens, 2 * ffn), device_h.matrix(0, tokens, ffn), stream);
  device_swiglu_backward<T>(device_gate_up.matrix(0, tokens, 2 * ffn), device_d_h.matrix(0, tokens, ffn),
                            device_d.matrix(0, tokens, 2 * ffn), stream);
  expect_close(on_host(device_h), h, 64 * kFloat, kRounding<T>, "h");
  expect_close(on_host(device_d), d_gate_up, 256 * kFloat, kRounding<T>, "d_gate_up");
}

// Element by element, and by packs of 16 bytes, more of them than a block has threads.
template <class T>
void check_swiglu(const CudaStream& stream) {
  check_swiglu_of<T, 29>(stream);
  check_swiglu_of<T, 2080>(stream);
}

// Copies, and sums in the order of the host: its bits.
void embeddings_have_the_bits_of_the_host(const CudaStream& stream) {
  const Index tokens = 300, width = 37, vocabulary = 50;
  std::vector<std::int32_t> ids, by_id(at(tokens));
  for (const float x : noise(tokens, 10))
    ids.push_back(std::clamp(static_cast<std::int32_t>(20 * (x + 1.2F)), 0, 49));
  std::iota(by_id.begin(), by_id.end(), 0);
  std::stable_sort(by_id.begin(), by_id.end(), [&](std::int32_t a, std::int32_t b) {
    return ids[static_cast<std::size_t>(a)] < ids[static_cast<std::size_t>(b)];
  });
  const auto device_ids = on_device(ids, stream), device_by_id = on_device(by_id, stream);
  const Index half = vocabulary / 2;
  for (const Range owned : {Range{0, vocabulary}, Range{0, half}, Range{half, vocabulary}}) {
    std::vector<float> weight = noise(owned.size() * width, 11), d_x = noise(tokens * width, 12);
    std::vector<float> d_weight = noise(owned.size() * width, 13), x(at(tokens * width));
    auto device_weight = on_device(weight, stream), device_d_x = on_device(d_x, stream);
    auto device_d_weight = on_device(d_weight, stream);
    DeviceBuffer<float> device_x(tokens * width, stream);
    embed<float>(ids, owned, {weight.data(), owned.size(), width}, {x.data(), tokens, width});
    embed_backward<float>(ids, owned, {d_x.data(), tokens, width}, {d_weight.data(), owned.size(), width});
    device_embed(device_ids.data(), owned, device_weight.matrix(0, owned.size(), width),
                 device_x.matrix(0, tokens, width), stream);
    device_embed_backward(device_ids.data(), device_by_id.data(), owned, device_d_x.matrix(0, tokens, width),
                          device_d_weight.matrix(0, owned.size(), width), stream);
    expect_near(on_host(device_x), x, 0, "x");
    expect_near(on_host(device_d_weight), d_weight, 0, "d_weight");
  }
}

// The vocabulary of two processes, one after the other, as their messages would meet.
template <class T>
void check_cross_entropy(const CudaStream& stream) {
  const Index tokens = 19, vocabulary = 700;
  const double gradient_scale = 0.25;
  std::vector<float> logits = noise(tokens * vocabulary, 14);
  for (Index e = 0; e < tokens * vocabulary; ++e)  // some rows far below zero
    logits[at(e)] = 5 * logits[at(e)] - (e / vocabulary % 2 == 0 ? 0.0F : 300.0F);
  std::vector<std::int32_t> targets;
  for (Index t = 0; t < tokens; ++t) targets.push_back(static_cast<std::int32_t>(t * 36 + (t % 2) * 20));
  Buffer<double> d_logits = in_double(logits);
  double loss = 0;
  run_world(1, [&](Communicator& world) {
    Buffer<double> message(3 * tokens), gathered(3 * tokens);
    const MatrixView<double> view = d_logits.matrix(0, tokens, vocabulary);
    loss = cross_entropy<double>(view, {0, vocabulary}, targets, world, message.span(), gathered.span());
    cross_entropy_backward<double>(view, {0, vocabulary}, targets, world, gathered.span(), gradient_scale);
  });

  const auto device_targets = on_device(targets, stream);
  const auto device_scale = on_device(std::vector<double>{gradient_scale}, stream);
  for (const int processes : {1, 2}) {
    std::vector<float> gathered;
    std::vector<DeviceBuffer<float>> parts;
    std::vector<Range> owned;
    for (int process = 0; process < processes; ++process) {
      owned.push_back(split_range(vocabulary, processes, process));
      std::vector<float> part;
      for (Index t = 0; t < tokens; ++t) {
        const auto row = logits.begin() + t * vocabulary;
        part.insert(part.end(), row + owned.back().begin, row + owned.back().end);
      }
      parts.push_back(on_device(part, stream));
      DeviceBuffer<float> message(3 * tokens, stream);
      device_cross_entropy_message(parts.back().matrix(0, tokens, owned.back().size()), owned.back(),
                                   device_targets.data(), message.data(), stream);
      for (const float x : on_host(message)) gathered.push_back(x);
    }
    const auto device_gathered = on_device(gathered, stream);
    for (std::size_t p = 0; p < owned.size(); ++p) {
      const Index cols = owned[p].size();
      DeviceBuffer<double> losses(tokens, stream), sum(1, stream);
      DeviceBuffer<T> d(tokens * cols, stream);
      device_cross_entropy<T>(parts[p].matrix(0, tokens, cols), owned[p], device_targets.data(),
                              device_gathered.data(), processes, device_scale.data(), losses.data(),
                              d.matrix(0, tokens, cols), stream);
      device_sum(losses.data(), tokens, sum.data(), stream);
      // Sums of 700 positive terms in float, each good to some ulps: a relative error of at most 700 of them.
      expect(std::abs(on_host(sum)[0] - loss) <= static_cast<double>(tokens) * 700 * kFloat, "the loss is ",
             on_host(sum)[0], ", expected ", loss);
      Buffer<double> expected(tokens * cols);
      for (Index t = 0; t < tokens; ++t) {
        for (Index j = 0; j < cols; ++j)
          expected[t * cols + j] = d_logits[t * vocabulary + owned[p].begin + j];
      }
      expect_close(on_host(d), expected, gradient_scale * 700 * kFloat, 700 * kFloat + kRounding<T>,
                   "d_logits");
    }
  }
}

// Scores of at most 4 x 4 x sqrt(head_dim) before their scale: softmax weights to some 1e-6 in float. In bf16
// weights and gradients of scores are rounded before they are summed: of `sequence` terms with random signs.
template <class T>
void check_attention(const AttentionShape& shape, const CudaStream& stream) {
  const Index tokens = shape.tokens();
  const std::vector<T> qkv = as<T>(noise(tokens * shape.qkv_cols(), 15));
  const std::vector<T> d_out = as<T>(noise(tokens * shape.query_cols(), 16));
  const Buffer<double> wide = in_double(qkv), wide_d_out = in_double(d_out);
  Buffer<double> out(tokens * shape.query_cols()), statistics(shape.statistics());
  Buffer<double> scratch(shape.scratch_cols()), d_qkv(tokens * shape.qkv_cols());
  const auto view = wide.matrix(0, tokens, shape.qkv_cols());
  attention<double>(shape, view, out.matrix(0, tokens, shape.query_cols()), statistics.span(),
                    scratch.matrix(0, 1, shape.scratch_cols()));
  attention_backward<double>(shape, view, wide_d_out.matrix(0, tokens, shape.query_cols()), statistics.span(),
                             d_qkv.matrix(0, tokens, shape.qkv_cols()),
                             scratch.matrix(0, 1, shape.scratch_cols()));

  const auto device_qkv = on_device(qkv, stream), device_d_out = on_device(d_out, stream);
  DeviceBuffer<T> device_out(out.size(), stream), device_d_qkv(d_qkv.size(), stream);
  DeviceBuffer<float> device_statistics(shape.statistics(), stream);
  DeviceBuffer<float> row_products(shape.statistics() / 2, stream);
  device_attention<T>(shape, device_qkv.matrix(0, tokens, shape.qkv_cols()),
                      device_out.matrix(0, tokens, shape.query_cols()), device_statistics.data(), stream);
  const DeviceBuffer<T>& left = device_out;
  device_attention_backward<T>(shape, device_qkv.matrix(0, tokens, shape.qkv_cols()),
                               left.matrix(0, tokens, shape.query_cols()),
                               device_d_out.matrix(0, tokens, shape.query_cols()), device_statistics.data(),
                               row_products.data(), device_d_qkv.matrix(0, tokens, shape.qkv_cols()), stream);
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const double weight_error = kIsFloat ? 1e-5 : 0x1p-8;
  expect_close(on_host(device_statistics), statistics, kIsFloat ? 1e-5 : 1e-5, 1e-5, "statistics");
  // The weights of a row add up to one, V is at most 4.
  expect_close(on_host(device_out), out, 4 * weight_error, kRounding<T>, "out");
  // dS = scale P (dP - mean): at most 4 x 4 x head_dim^(1/2) P, and the group's heads in dK and dV.
  const double largest = 16 * static_cast<double>(shape.heads) / static_cast<double>(shape.kv_heads);
  expect_close(on_host(device_d_qkv), d_qkv, largest * weight_error, kRounding<T>, "d_qkv");
}

template <void (*kFloatBody)(const CudaStream&), void (*kHalfBody)(const CudaStream&)>
void both(const CudaStream& stream) {
  kFloatBody(stream);
  kHalfBody(stream);
}

template <class T>
void check_attentions(const CudaStream& stream) {
  // A tile and less; several, with a remainder and groups of heads; head dimensions from 16 to 128, also
  // those that a kernel widens.
  check_attention<T>({.sequences = 1, .sequence = 20, .heads = 1, .kv_heads = 1, .head_dim = 16}, stream);
  check_attention<T>({.sequences = 2, .sequence = 150, .heads = 4, .kv_heads = 2, .head_dim = 32}, stream);
  check_attention<T>({.sequences = 1, .sequence = 128, .heads = 1, .kv_heads = 1, .head_dim = 128}, stream);
  check_attention<T>({.sequences = 1, .sequence = 65, .heads = 2, .kv_heads = 2, .head_dim = 64}, stream);
  check_attention<T>({.sequences = 2, .sequence = 70, .heads = 2, .kv_heads = 1, .head_dim = 112}, stream);
}

void other_head_dimensions_are_refused(const CudaStream& stream) {
  const AttentionShape shape{.sequences = 1, .sequence = 4, .heads = 1, .kv_heads = 1, .head_dim = 24};
  DeviceBuffer<float> x(1000, stream);
  try {
    device_attention<float>(shape, x.matrix(0, 4, 72), x.matrix(0, 4, 24), x.data(), stream);
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    expect(text.find("found head_dim 24, expected 16, 32, ... 128") != std::string::npos, text);
    return;
  }
  throw CheckFailed("head_dim 24 was taken");
}

constexpr DeviceCheck kChecks[] = {
    {"rms_norm_is_that_of_double", both<check_rms_norm<float>, check_rms_norm<BFloat16>>},
    {"rotations_are_those_of_double", both<check_rotate<float>, check_rotate<BFloat16>>},
    {"swiglu_is_that_of_double", both<check_swiglu<float>, check_swiglu<BFloat16>>},
    {"embeddings_have_the_bits_of_the_host", embeddings_have_the_bits_of_the_host},
    {"cross_entropy_is_that_of_double", both<check_cross_entropy<float>, check_cross_entropy<BFloat16>>},
    {"attention_is_that_of_double", both<check_attentions<float>, check_attentions<BFloat16>>},
    {"other_head_dimensions_are_refused", other_head_dimensions_are_refused},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
