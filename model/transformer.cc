#include "model/transformer.h"

#include "model/activations.h"
#include "model/arrangement.h"
#include "model/attention.h"
#include "model/cross_entropy.h"
#include "model/initial_values.h"
#include "model/layers.h"
#include "model/row_blocks.h"
#include "runtime/cpu.h"

#include <cmath>

namespace lowband {
namespace {

// What one RMSNorm reads and leaves: x is the residual stream at this point.
struct NormIds {
  std::size_t x, y, s;
};
struct LayerIds {
  NormIds attention_norm, ffn_norm;
  std::size_t qkv, statistics, attended, gate_up, h;
};

}  // namespace

template <class Real>
struct Transformer<Real>::State {
  State(const ModelConfig& config_, Communicator& tensor_, std::uint64_t seed, Index max_sequences_);

  void plan_activations();

  double forward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets);
  void backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                double gradient_scale, const std::function<void(Index)>& ready);

  // The layer's two halves; d_x is the gradient of the residual stream, replaced on the way down.
  void attention_forward(Index layer);
  void ffn_forward(Index layer);
  void attention_backward_half(Index layer, MatrixView<Real> d_x, const std::function<void(Index)>& ready);
  void ffn_backward_half(Index layer, MatrixView<Real> d_x, const std::function<void(Index)>& ready);

  void norm(const NormIds& ids, MatrixView<const Real> gain, MatrixView<const Real> residual);
  void norm_backward(const NormIds& ids, MatrixView<const Real> gain, MatrixView<const Real> d_y,
                     MatrixView<Real> d_gain, MatrixView<Real> d_x);
  void sum_over_processes(MatrixView<Real> x) {
    tensor->all_reduce(x.flat(), Reduction::kSum, Tag{Purpose::kActivation});
  }

  // Activations of the current micro-batch.
  MatrixView<Real> act(std::size_t id) { return activations.matrix(id, attention_shape.tokens()); }
  std::span<Real> act_span(std::size_t id, Index elements) { return activations.span(id, elements); }
  const NormIds& norm_after(Index layer) const {
    return layer + 1 < config.layers ? layer_ids[static_cast<std::size_t>(layer + 1)].attention_norm
                                     : final_norm;
  }
  MatrixView<const Real> gain_after(Index layer) const {
    return layer + 1 < config.layers ? weight.layers[static_cast<std::size_t>(layer + 1)].attention_gain
                                     : weight.final_gain;
  }

  ModelConfig config;
  Communicator* tensor;
  Index max_sequences;
  Range vocabulary;  // ids whose embedding and logits live here
  Index ffn_cols;    // of the feed-forward width
  RotaryTable<Real> rotary;

  std::vector<ParameterInfo> table;
  Buffer<Real> weights, gradients;  // in the order of the table
  std::vector<Parameter<Real>> parameters;
  ModelMatrices<MatrixView<Real>> weight, gradient;

  AttentionShape attention_shape;  // .sequences is that of the current micro-batch
  Activations<Real> activations;
  std::vector<LayerIds> layer_ids;
  NormIds final_norm{};
  std::size_t logits = 0, loss_message = 0, loss_gathered = 0;
  std::size_t d_stream = 0, d_normed = 0, d_qkv = 0, d_attended = 0, d_gate_up = 0, d_h = 0;
  std::size_t gain_scratch = 0, attention_scratch = 0;
};

template <class Real>
Transformer<Real>::State::State(const ModelConfig& config_, Communicator& tensor_, std::uint64_t seed,
                                Index max_sequences_)
    : config((validate(config_, tensor_.size()), config_)),
      tensor(&tensor_),
      max_sequences(max_sequences_),
      vocabulary(split_range(config.vocabulary, tensor_.size(), tensor_.process())),
      ffn_cols(split_range(config.ffn_width, tensor_.size(), tensor_.process()).size()),
      rotary(config.sequence, config.head_dim, config.rope_base),
      table(parameter_table(config)) {
  LB_EXPECTS(max_sequences >= 1, "sequences per micro-batch: found ", max_sequences, ", expected at least 1");
  const auto piece = [&](const ParameterInfo& info) {
    const MatrixLayout layout(info.rows, info.cols, info.cut, tensor->size(), 1);
    return std::pair(layout.tensor_rows(tensor->process()).size(),
                     layout.tensor_cols(tensor->process()).size());
  };
  Index elements = 0;
  for (const ParameterInfo& info : table) elements += piece(info).first * piece(info).second;
  weights = Buffer<Real>(elements);
  gradients = Buffer<Real>(elements);

  std::vector<MatrixView<Real>> weight_views, gradient_views;
  Index offset = 0;
  for (const ParameterInfo& info : table) {
    const auto [rows, cols] = piece(info);
    weight_views.push_back(weights.matrix(offset, rows, cols));
    gradient_views.push_back(gradients.matrix(offset, rows, cols));
    parameters.push_back({info, weight_views.back(), gradient_views.back()});
    offset += rows * cols;
  }
  weight = arrange(config, weight_views);
  gradient = arrange(config, gradient_views);

  for (const Parameter<Real>& parameter : parameters) {
    draw_initial_values<Real>(parameter.info, config.layers, seed, tensor->size(), tensor->process(),
                              parameter.weight);
  }
  plan_activations();
}

template <class Real>
void Transformer<Real>::State::plan_activations() {
  const Index processes = tensor->size(), width = config.width;
  attention_shape = {.sequences = max_sequences,
                     .sequence = config.sequence,
                     .heads = config.heads / processes,
                     .kv_heads = config.kv_heads / processes,
                     .head_dim = config.head_dim};
  const Index tokens = attention_shape.tokens();
  const auto plan = [&](std::string name, Index cols) {
    return activations.plan(std::move(name), tokens, cols);
  };
  const auto plan_norm = [&](const std::string& name) {
    return NormIds{plan(name + ".x", width), plan(name + ".y", width), plan(name + ".s", 1)};
  };
  for (Index layer = 0; layer < config.layers; ++layer) {
    const std::string name = cat("layers.", layer);
    layer_ids.push_back(
        {.attention_norm = plan_norm(name + ".attention_norm"),
         .ffn_norm = plan_norm(name + ".ffn_norm"),
         .qkv = plan(name + ".qkv", attention_shape.qkv_cols()),
         .statistics = activations.plan(name + ".statistics", 1, attention_shape.statistics()),
         .attended = plan(name + ".attended", attention_shape.query_cols()),
         .gate_up = plan(name + ".gate_up", 2 * ffn_cols),
         .h = plan(name + ".h", ffn_cols)});
  }
  final_norm = plan_norm("final_norm");
  logits = plan("logits", vocabulary.size());
  loss_message = plan("loss_message", 3);
  loss_gathered = plan("loss_gathered", 3 * processes);
  d_stream = plan("d_stream", width);
  d_normed = plan("d_normed", width);
  d_qkv = plan("d_qkv", attention_shape.qkv_cols());
  d_attended = plan("d_attended", attention_shape.query_cols());
  d_gate_up = plan("d_gate_up", 2 * ffn_cols);
  d_h = plan("d_h", ffn_cols);
  gain_scratch = activations.plan("gain_scratch", row_blocks(tokens), width);
  attention_scratch =
      activations.plan("attention_scratch", compute_threads(), attention_shape.scratch_cols());
  activations.allocate();
}

template <class Real>
void Transformer<Real>::State::norm(const NormIds& ids, MatrixView<const Real> gain,
                                    MatrixView<const Real> residual) {
  rms_norm<Real>(residual, act(ids.x), gain, config.norm_epsilon, act(ids.y),
                 act_span(ids.s, attention_shape.tokens()));
}

template <class Real>
void Transformer<Real>::State::norm_backward(const NormIds& ids, MatrixView<const Real> gain,
                                             MatrixView<const Real> d_y, MatrixView<Real> d_gain,
                                             MatrixView<Real> d_x) {
  rms_norm_backward<Real>(act(ids.x), gain, act_span(ids.s, attention_shape.tokens()), d_y, d_gain, d_x,
                          activations.matrix(gain_scratch));
}

// In every layer, with E the sum over the processes of the tensor axis:
//   x' = x + E(attention(rotate(W_qkv norm(x))) W_o^T),   x'' = x' + E(swiglu(W_gate_up norm(x')) W_down^T).
// The residual enters after the sum, so it is added once.
template <class Real>
double Transformer<Real>::State::forward(std::span<const std::int32_t> tokens,
                                         std::span<const std::int32_t> targets) {
  const NormIds& first = layer_ids.front().attention_norm;
  embed<Real>(tokens, vocabulary, weight.embedding, act(first.x));
  sum_over_processes(act(first.x));
  norm(first, weight.layers.front().attention_gain, {});
  for (Index layer = 0; layer < config.layers; ++layer) {
    attention_forward(layer);
    ffn_forward(layer);
  }
  linear<Real>(act(final_norm.y), weight.head, act(logits));
  const Index message = 3 * attention_shape.tokens();
  return cross_entropy<Real>(act(logits), vocabulary, targets, *tensor, act_span(loss_message, message),
                             act_span(loss_gathered, message * tensor->size()));
}

template <class Real>
void Transformer<Real>::State::attention_forward(Index layer) {
  const LayerIds& ids = layer_ids[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& w = weight.layers[static_cast<std::size_t>(layer)];
  const MatrixView<Real> qkv = act(ids.qkv);
  linear<Real>(act(ids.attention_norm.y), w.qkv, qkv);
  rotate<Real>(rotary, qkv.block(0, qkv.rows, 0, attention_shape.query_cols() + attention_shape.kv_cols()));
  attention<Real>(attention_shape, qkv, act(ids.attended),
                  act_span(ids.statistics, attention_shape.statistics()),
                  activations.matrix(attention_scratch));
  linear<Real>(act(ids.attended), w.output, act(ids.ffn_norm.x));
  sum_over_processes(act(ids.ffn_norm.x));
  norm(ids.ffn_norm, w.ffn_gain, act(ids.attention_norm.x));
}

template <class Real>
void Transformer<Real>::State::ffn_forward(Index layer) {
  const LayerIds& ids = layer_ids[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& w = weight.layers[static_cast<std::size_t>(layer)];
  linear<Real>(act(ids.ffn_norm.y), w.gate_up, act(ids.gate_up));
  swiglu<Real>(act(ids.gate_up), act(ids.h));
  linear<Real>(act(ids.h), w.down, act(norm_after(layer).x));
  sum_over_processes(act(norm_after(layer).x));
  norm(norm_after(layer), gain_after(layer), act(ids.ffn_norm.x));
}

// Each all-reduce sums the input gradient of one column-parallel matrix; the rest is local or replicated.
template <class Real>
void Transformer<Real>::State::backward(std::span<const std::int32_t> tokens,
                                        std::span<const std::int32_t> targets, double gradient_scale,
                                        const std::function<void(Index)>& ready) {
  const Index message = 3 * attention_shape.tokens();
  const MatrixView<Real> d_logits = act(logits), d_y = act(d_normed), d_x = act(d_stream);
  cross_entropy_backward<Real>(d_logits, vocabulary, targets, *tensor,
                               act_span(loss_gathered, message * tensor->size()), gradient_scale);
  linear_input_gradient<Real>(d_logits, weight.head, d_y);
  sum_over_processes(d_y);
  linear_weight_gradient<Real>(d_logits, act(final_norm.y), gradient.head);
  const Index final_gain = parameter_of(config.layers, kAttentionGain);
  if (!config.tied_head) ready(final_gain + 1);

  std::fill_n(d_x.data, d_x.elements(), Real{0});
  norm_backward(final_norm, weight.final_gain, d_y, gradient.final_gain, d_x);
  ready(final_gain);
  for (Index layer = config.layers - 1; layer >= 0; --layer) {
    ffn_backward_half(layer, d_x, ready);
    attention_backward_half(layer, d_x, ready);
  }
  embed_backward<Real>(tokens, vocabulary, d_x, gradient.embedding);
  ready(0);
}

template <class Real>
void Transformer<Real>::State::ffn_backward_half(Index layer, MatrixView<Real> d_x,
                                                 const std::function<void(Index)>& ready) {
  const LayerIds& ids = layer_ids[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& w = weight.layers[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& d_w = gradient.layers[static_cast<std::size_t>(layer)];
  linear_input_gradient<Real>(d_x, w.down, act(d_h));
  linear_weight_gradient<Real>(d_x, act(ids.h), d_w.down);
  ready(parameter_of(layer, kDownProj));

  swiglu_backward<Real>(act(ids.gate_up), act(d_h), act(d_gate_up));
  linear_input_gradient<Real>(act(d_gate_up), w.gate_up, act(d_normed));
  sum_over_processes(act(d_normed));
  linear_weight_gradient<Real>(act(d_gate_up), act(ids.ffn_norm.y), d_w.gate_up);
  ready(parameter_of(layer, kUpProj));
  ready(parameter_of(layer, kGateProj));

  norm_backward(ids.ffn_norm, w.ffn_gain, act(d_normed), d_w.ffn_gain, d_x);
  ready(parameter_of(layer, kFfnGain));
}

template <class Real>
void Transformer<Real>::State::attention_backward_half(Index layer, MatrixView<Real> d_x,
                                                       const std::function<void(Index)>& ready) {
  const LayerIds& ids = layer_ids[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& w = weight.layers[static_cast<std::size_t>(layer)];
  const LayerMatrices<MatrixView<Real>>& d_w = gradient.layers[static_cast<std::size_t>(layer)];
  linear_input_gradient<Real>(d_x, w.output, act(d_attended));
  linear_weight_gradient<Real>(d_x, act(ids.attended), d_w.output);
  ready(parameter_of(layer, kO));

  const MatrixView<Real> d = act(d_qkv);
  attention_backward<Real>(attention_shape, act(ids.qkv), act(d_attended),
                           act_span(ids.statistics, attention_shape.statistics()), d,
                           activations.matrix(attention_scratch));
  rotate_backward<Real>(rotary,
                        d.block(0, d.rows, 0, attention_shape.query_cols() + attention_shape.kv_cols()));
  linear_input_gradient<Real>(d, w.qkv, act(d_normed));
  sum_over_processes(act(d_normed));
  linear_weight_gradient<Real>(d, act(ids.attention_norm.y), d_w.qkv);
  for (const InLayer which : {kV, kK, kQ}) ready(parameter_of(layer, which));

  norm_backward(ids.attention_norm, w.attention_gain, act(d_normed), d_w.attention_gain, d_x);
  ready(parameter_of(layer, kAttentionGain));
}

template <class Real>
Transformer<Real>::Transformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed,
                               Index max_sequences)
    : state_(std::make_unique<State>(config, tensor, seed, max_sequences)) {}
template <class Real>
Transformer<Real>::~Transformer() = default;

template <class Real>
const ModelConfig& Transformer<Real>::config() const {
  return state_->config;
}

template <class Real>
std::span<Parameter<Real>> Transformer<Real>::parameters() {
  return state_->parameters;
}

template <class Real>
void Transformer<Real>::zero_gradients() {
  state_->gradients.fill(0);
}

template <class Real>
double Transformer<Real>::forward_backward(std::span<const std::int32_t> tokens,
                                           std::span<const std::int32_t> targets, Index sequences,
                                           double gradient_scale,
                                           const std::function<void(Index)>& gradient_ready) {
  const double sum = loss(tokens, targets, sequences);
  const auto ready = [&](Index parameter) {
    if (gradient_ready) gradient_ready(parameter);
  };
  state_->backward(tokens, targets, gradient_scale, ready);
  return sum;
}

template <class Real>
double Transformer<Real>::loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                               Index sequences) {
  validate_batch(state_->config, state_->max_sequences, tokens, targets, sequences);
  state_->attention_shape.sequences = sequences;
  return state_->forward(tokens, targets);
}

template <class Real>
Index Transformer<Real>::parameter_bytes() const {
  return 2 * state_->weights.size() * static_cast<Index>(sizeof(Real));
}

template <class Real>
Index Transformer<Real>::activation_bytes() const {
  return state_->activations.bytes();
}

template class Transformer<float>;
template class Transformer<double>;

}  // namespace lowband
