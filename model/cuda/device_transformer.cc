#include "model/cuda/device_transformer.h"

#include "model/arrangement.h"
#include "model/cuda/attention.h"
#include "model/cuda/layers.h"
#include "model/initial_values.h"
#include "model/layers.h"
#include "runtime/buffer.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/timeline.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

namespace lowband {
namespace {

// What an RMSNorm leaves, beside the residual stream that it read.
template <class T>
struct NormBuffers {
  DeviceBuffer<T> y;
  DeviceBuffer<float> s;
};
template <class T>
struct LayerBuffers {
  NormBuffers<T> attention_norm, ffn_norm;
  DeviceBuffer<float> ffn_x, statistics;  // ffn_x: the residual stream between the halves
  DeviceBuffer<T> qkv, attended, gate_up, h;
};

}  // namespace

template <class T>
struct DeviceTransformer<T>::State {
  State(const ModelConfig& config_, Communicator& tensor_, std::uint64_t seed, Index max_sequences_,
        KeptActivations kept, PlanChoice plans);
  void expect_memory() const;
  void allocate_parameters(std::uint64_t seed);
  void allocate_activations();

  void take_batch(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                  Index sequences);
  void forward();
  void losses(bool with_gradient);
  double sum_of_losses();
  void backward(const std::function<void(Index)>& ready);
  void step(const std::function<void(Index)>& ready) {
    forward();
    losses(true);
    backward(ready);
  }
  void replayed_step();

  // x + attention, and x + feed-forward up to what `down` reads.
  void attention_half(Index layer);
  void ffn_half(Index layer);
  void ffn_backward_half(Index layer, const std::function<void(Index)>& ready);
  void attention_backward_half(Index layer, const std::function<void(Index)>& ready);
  void norm(DeviceBuffer<float>& x, DeviceMatrix<float> gain, NormBuffers<T>& into);
  void norm_backward(DeviceBuffer<float>& x, DeviceMatrix<float> gain, NormBuffers<T>& of,
                     DeviceMatrix<float> d_gain);

  // y <- x W^T ;  d_x <- d_y W ;  d_W <- d_W + d_y^T x
  template <class Out>
  void linear(DeviceMatrix<const T> x, DeviceMatrix<const T> w, DeviceMatrix<Out> y) {
    blas.gemm<T, Out>(Op::kNone, Op::kTranspose, 1, x, w, 0, y, y);
  }
  template <class Out>
  void linear_input_gradient(DeviceMatrix<const T> d_y, DeviceMatrix<const T> w, DeviceMatrix<Out> d_x) {
    blas.gemm<T, Out>(Op::kNone, Op::kNone, 1, d_y, w, 0, d_x, d_x);
  }
  void linear_weight_gradient(DeviceMatrix<const T> d_y, DeviceMatrix<const T> x, DeviceMatrix<float> d_w) {
    blas.gemm<T, float>(Op::kTranspose, Op::kNone, 1, d_y, x, 1, d_w, d_w);
  }
  // x' <- x + sum over the processes of y W^T. The first process adds x inside its product.
  void add_to_stream(DeviceBuffer<float>& x, DeviceMatrix<const T> y, DeviceMatrix<const T> w,
                     DeviceBuffer<float>& next) {
    const DeviceMatrix<float> to = rows(next, config.width);
    blas.gemm<T, float>(Op::kNone, Op::kTranspose, 1, y, w, tensor->process() == 0 ? 1 : 0,
                        rows(x, config.width), to);
    sum_over_processes(to);
  }
  void sum_over_processes(DeviceMatrix<float> x);
  void gather_messages();

  // A range of the communicator's timeline around what enqueues a phase. Bytes: of the tensors that it
  // writes.
  template <class... Tensors>
  [[nodiscard]] Timeline::Range phase(std::string_view name, const Tensors&... written) {
    const Index bytes = (Index{0} + ... + bytes_of(written));
    enqueued_bytes += bytes;
    return Timeline::Range(tensor->timeline(), name, bytes);
  }
  template <class U>
  static Index bytes_of(const DeviceMatrix<U>& x) {
    return x.elements() * static_cast<Index>(sizeof(U));
  }
  static Index bytes_of(Index bytes) { return bytes; }
  // What a norm hands on, and its scales.
  Index norm_bytes() const { return shape.tokens() * (config.width * static_cast<Index>(sizeof(T)) + 4); }
  // Of d_stream, its rounded copy and d_normed, and a gain's gradient: what leads from a product to the
  // stream.
  Index stream_gradient_bytes() const {
    return shape.tokens() * config.width * (8 + static_cast<Index>(sizeof(T))) + config.width * 4;
  }

  // A number for each id and token of the current micro-batch.
  template <class U>
  DeviceMatrix<U> of_ids(DeviceBuffer<U>& buffer) {
    const Index stride = padded_ids(vocabulary.size());
    return {buffer.data(), shape.tokens(), vocabulary.size(), stride, 1, shape.tokens() * stride};
  }
  // The first rows of a buffer: those of the current micro-batch.
  template <class U>
  DeviceMatrix<U> rows(DeviceBuffer<U>& buffer, Index cols) {
    return buffer.matrix(0, shape.tokens(), cols);
  }
  template <class U>
  DeviceBuffer<U> allocate(Index DeviceMemory::*kind, Index elements) {
    memory.*kind += elements * static_cast<Index>(sizeof(U));
    return DeviceBuffer<U>(elements, blas.stream());
  }
  LayerBuffers<T>& buffers(Index layer) {
    return layers[static_cast<std::size_t>(kept == KeptActivations::kAll ? layer : 0)];
  }
  DeviceBuffer<float>& input(Index layer) { return inputs[static_cast<std::size_t>(layer)]; }

  ModelConfig config;
  Communicator* tensor;
  Index max_sequences;
  KeptActivations kept;
  CudaBlas blas;  // on the stream of the device, with its workspace
  const CudaStream* stream;
  Range vocabulary;      // ids whose embedding and logits live here
  Index ffn_cols;        // of the feed-forward width
  AttentionShape shape;  // .sequences is that of the current micro-batch
  DeviceMemory memory;

  DeviceBuffer<float> weights, gradients;  // in the order of the table
  DeviceBuffer<T> rounded_weights;         // what products read
  std::vector<Parameter<float>> parameters;
  ModelMatrices<DeviceMatrix<float>> weight, gradient;
  ModelMatrices<DeviceMatrix<T>> rounded;

  DeviceBuffer<float> cosine, sine;
  DeviceBuffer<std::int32_t> tokens, targets, tokens_by_id;
  std::vector<DeviceBuffer<float>> inputs;  // of every layer, and of the final norm: the residual stream
  std::vector<LayerBuffers<T>> layers;      // one, where layers are computed again
  NormBuffers<T> final_norm;
  DeviceBuffer<float> logits, message, gathered;
  DeviceBuffer<double> token_losses, loss_sum, gradient_scale;
  DeviceBuffer<float> d_stream, d_normed, gain_scratch, row_products;
  DeviceBuffer<T> d_logits, d_stream_rounded, d_qkv, d_attended, d_gate_up, d_h;

  // Of steps without `gradient_ready`, by their number of sequences.
  struct StepGraph {
    Index bytes = 0;                   // of its phases
    std::unique_ptr<CudaGraph> graph;  // from the second time on
  };
  std::map<Index, StepGraph> graphs;
  Index enqueued_bytes = 0;  // of all phases so far
};

template <class T>
DeviceTransformer<T>::State::State(const ModelConfig& config_, Communicator& tensor_, std::uint64_t seed,
                                   Index max_sequences_, KeptActivations kept_, PlanChoice plans)
    : config((validate(config_, tensor_.size()), config_)),
      tensor(&tensor_),
      max_sequences(max_sequences_),
      kept(kept_),
      blas(blas_of(tensor_.device()), plans),
      stream(&blas.stream()),
      vocabulary(split_range(config.vocabulary, tensor_.size(), tensor_.process())),
      ffn_cols(split_range(config.ffn_width, tensor_.size(), tensor_.process()).size()) {
  LB_EXPECTS(max_sequences >= 1, "sequences per micro-batch: found ", max_sequences, ", expected at least 1");
  LB_EXPECTS(config.head_dim % 16 == 0 && config.head_dim <= 128, "model.head_dim: found ", config.head_dim,
             ", expected a multiple of 16 up to 128 on a device");
  shape = {.sequences = max_sequences,
           .sequence = config.sequence,
           .heads = config.heads / tensor->size(),
           .kv_heads = config.kv_heads / tensor->size(),
           .head_dim = config.head_dim};
  expect_memory();
  allocate_parameters(seed);
  allocate_activations();
}

template <class T>
void DeviceTransformer<T>::State::expect_memory() const {
  const DeviceMemory plan = plan_device_memory(config, tensor->size(), tensor->process(), max_sequences, kept,
                                               static_cast<Index>(sizeof(T)));
  const Index free = stream->free_bytes();
  if (plan.total() <= free) return;
  throw CudaError(cat("the model takes ", plan.total(), " bytes: weights ", plan.weights, ", gradients ",
                      plan.gradients, ", activations of ", max_sequences, " sequences ", plan.activations,
                      ", workspace ", plan.workspace, "; free on device ", stream->device(), " are ", free));
}

template <class T>
void DeviceTransformer<T>::State::allocate_parameters(std::uint64_t seed) {
  const std::vector<ParameterInfo> table = parameter_table(config);
  std::vector<std::pair<Index, Index>> pieces;
  Index elements = 0;
  for (const ParameterInfo& info : table) {
    const MatrixLayout layout(info.rows, info.cols, info.cut, tensor->size(), 1);
    pieces.emplace_back(layout.tensor_rows(tensor->process()).size(),
                        layout.tensor_cols(tensor->process()).size());
    elements += pieces.back().first * pieces.back().second;
  }
  weights = allocate<float>(&DeviceMemory::weights, elements);
  gradients = allocate<float>(&DeviceMemory::gradients, elements);
  rounded_weights = allocate<T>(&DeviceMemory::weights, elements);

  Buffer<float> initial(elements);
  std::vector<DeviceMatrix<float>> weight_views, gradient_views;
  std::vector<DeviceMatrix<T>> rounded_views;
  const auto on_device = [this](DeviceMatrix<float> a) {
    return MatrixView<float>(a.data, a.rows, a.cols, a.row_stride, tensor->device());
  };
  Index offset = 0;
  for (std::size_t i = 0; i < table.size(); ++i) {
    const auto [piece_rows, piece_cols] = pieces[i];
    draw_initial_values<float>(table[i], config.layers, seed, tensor->size(), tensor->process(),
                               initial.matrix(offset, piece_rows, piece_cols));
    weight_views.push_back(weights.matrix(offset, piece_rows, piece_cols));
    gradient_views.push_back(gradients.matrix(offset, piece_rows, piece_cols));
    rounded_views.push_back(rounded_weights.matrix(offset, piece_rows, piece_cols));
    parameters.push_back({table[i], on_device(weight_views.back()), on_device(gradient_views.back())});
    offset += piece_rows * piece_cols;
  }
  weights.fill_from(initial.span());
  weight = arrange(config, weight_views);
  gradient = arrange(config, gradient_views);
  rounded = arrange(config, rounded_views);
}

template <class T>
void DeviceTransformer<T>::State::allocate_activations() {
  constexpr Index DeviceMemory::*kActivations = &DeviceMemory::activations,
                  DeviceMemory::*kWorkspace = &DeviceMemory::workspace;
  const Index most = shape.tokens(), width = config.width;
  const auto make_norm = [&] {
    return NormBuffers<T>{allocate<T>(kActivations, most * width), allocate<float>(kActivations, most)};
  };
  for (Index layer = 0; layer < (kept == KeptActivations::kAll ? config.layers : 1); ++layer) {
    layers.push_back({.attention_norm = make_norm(),
                      .ffn_norm = make_norm(),
                      .ffn_x = allocate<float>(kActivations, most * width),
                      .statistics = allocate<float>(kActivations, shape.statistics()),
                      .qkv = allocate<T>(kActivations, most * shape.qkv_cols()),
                      .attended = allocate<T>(kActivations, most * shape.query_cols()),
                      .gate_up = allocate<T>(kActivations, most * 2 * ffn_cols),
                      .h = allocate<T>(kActivations, most * ffn_cols)});
  }
  for (Index layer = 0; layer <= config.layers; ++layer)
    inputs.push_back(allocate<float>(kActivations, most * width));
  final_norm = make_norm();
  tokens = allocate<std::int32_t>(kWorkspace, most);
  targets = allocate<std::int32_t>(kWorkspace, most);
  tokens_by_id = allocate<std::int32_t>(kWorkspace, most);
  logits = allocate<float>(kActivations, most * padded_ids(vocabulary.size()));
  message = allocate<float>(kWorkspace, 3 * most);
  gathered = allocate<float>(kActivations, 3 * most * tensor->size());
  token_losses = allocate<double>(kWorkspace, most);
  loss_sum = allocate<double>(kWorkspace, 1);
  gradient_scale = allocate<double>(kWorkspace, 1);
  d_stream = allocate<float>(kWorkspace, most * width);
  d_normed = allocate<float>(kWorkspace, most * width);
  gain_scratch = allocate<float>(kWorkspace, device_rms_norm_scratch(most, width));
  row_products = allocate<float>(kWorkspace, shape.statistics() / 2);
  d_logits = allocate<T>(kWorkspace, most * padded_ids(vocabulary.size()));
  d_stream_rounded = allocate<T>(kWorkspace, most * width);
  d_qkv = allocate<T>(kWorkspace, most * shape.qkv_cols());
  d_attended = allocate<T>(kWorkspace, most * shape.query_cols());
  d_gate_up = allocate<T>(kWorkspace, most * 2 * ffn_cols);
  d_h = allocate<T>(kWorkspace, most * ffn_cols);

  const RotaryTable<float> rotary(config.sequence, config.head_dim, config.rope_base);
  const auto angles = static_cast<std::size_t>(config.sequence * rotary.half());
  cosine = allocate<float>(kWorkspace, config.sequence * rotary.half());
  sine = allocate<float>(kWorkspace, config.sequence * rotary.half());
  cosine.fill_from({rotary.cosine(0), angles});
  sine.fill_from({rotary.sine(0), angles});
}

template <class T>
void DeviceTransformer<T>::State::sum_over_processes(DeviceMatrix<float> x) {
  if (tensor->size() == 1) return;
  tensor->all_reduce<float>({x.data, static_cast<std::size_t>(x.elements())}, Reduction::kSum,
                            Tag{Purpose::kActivation});
}

template <class T>
void DeviceTransformer<T>::State::gather_messages() {
  const auto own = static_cast<std::size_t>(3 * shape.tokens());
  const auto processes = static_cast<std::size_t>(tensor->size());
  if (processes == 1) {
    cuda_copy(gathered.data(), message.data(), static_cast<Index>(own * sizeof(float)), *stream);
    return;
  }
  tensor->all_gather<float>({message.data(), own}, {gathered.data(), own * processes},
                            std::vector<Index>(processes, static_cast<Index>(own)),
                            Tag{Purpose::kActivation});
}

template <class T>
void DeviceTransformer<T>::State::take_batch(std::span<const std::int32_t> token_ids,
                                             std::span<const std::int32_t> target_ids, Index sequences) {
  validate_batch(config, max_sequences, token_ids, target_ids, sequences);
  shape.sequences = sequences;
  // Tokens by id and then by number: each goes behind all of smaller ids and those of its own that came
  // before.
  std::vector<std::int32_t> place(static_cast<std::size_t>(config.vocabulary) + 1), by_id(token_ids.size());
  for (const std::int32_t id : token_ids) ++place[static_cast<std::size_t>(id) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (std::int32_t i = 0; const std::int32_t id : token_ids)
    by_id[static_cast<std::size_t>(place[static_cast<std::size_t>(id)]++)] = i++;
  const auto range = phase("batch", 3 * shape.tokens() * Index{sizeof(std::int32_t)});
  tokens.fill_from(token_ids);
  targets.fill_from(target_ids);
  tokens_by_id.fill_from(by_id);
}

template <class T>
void DeviceTransformer<T>::State::norm(DeviceBuffer<float>& x, DeviceMatrix<float> gain,
                                       NormBuffers<T>& into) {
  device_rms_norm<T>(rows(x, config.width), gain.data, static_cast<float>(config.norm_epsilon),
                     rows(into.y, config.width), into.s.data(), *stream);
}

// From d_normed, into d_stream and its rounded copy.
template <class T>
void DeviceTransformer<T>::State::norm_backward(DeviceBuffer<float>& x, DeviceMatrix<float> gain,
                                                NormBuffers<T>& of, DeviceMatrix<float> d_gain) {
  const Index width = config.width;
  device_rms_norm_backward<T>(rows(x, width), gain.data, of.s.data(), rows(d_normed, width), d_gain.data,
                              rows(d_stream, width), rows(d_stream_rounded, width), gain_scratch.data(),
                              *stream);
}

// With E the sum over the processes of the tensor axis:
//   x' = x + E(attention(rotate(W_qkv norm(x))) W_o^T),   x'' = x' + E(swiglu(W_gate_up norm(x')) W_down^T).
template <class T>
void DeviceTransformer<T>::State::forward() {
  const Index width = config.width;
  {
    const auto range =
        phase("embedding", rounded_weights.matrix(0, 1, rounded_weights.size()), rows(input(0), width));
    convert(1.0F, weights.data(), rounded_weights.data(), weights.size(), *stream);
    device_embed(tokens.data(), vocabulary, weight.embedding, rows(input(0), width), *stream);
    sum_over_processes(rows(input(0), width));
  }
  for (Index layer = 0; layer < config.layers; ++layer) {
    attention_half(layer);
    ffn_half(layer);
    LayerBuffers<T>& own = buffers(layer);
    const auto range = phase("down", rows(input(layer + 1), width));
    add_to_stream(own.ffn_x, rows(own.h, ffn_cols), rounded.layers[static_cast<std::size_t>(layer)].down,
                  input(layer + 1));
  }
  const auto range = phase("head", norm_bytes(), of_ids(logits), message.matrix(0, shape.tokens(), 3),
                           gathered.matrix(0, shape.tokens(), 3 * tensor->size()));
  norm(input(config.layers), weight.final_gain, final_norm);
  linear<float>(rows(final_norm.y, width), rounded.head, of_ids(logits));
  device_cross_entropy_message(of_ids(logits), vocabulary, targets.data(), message.data(), *stream);
  gather_messages();
}

template <class T>
void DeviceTransformer<T>::State::attention_half(Index layer) {
  const Index width = config.width, turned = shape.heads + shape.kv_heads;
  LayerBuffers<T>& own = buffers(layer);
  const auto& gains = weight.layers[static_cast<std::size_t>(layer)];
  const auto& w = rounded.layers[static_cast<std::size_t>(layer)];
  const DeviceMatrix<T> qkv = rows(own.qkv, shape.qkv_cols());
  const auto range = phase("attention", norm_bytes(), qkv, rows(own.attended, shape.query_cols()),
                           own.statistics.matrix(0, 1, shape.statistics()), rows(own.ffn_x, width));
  norm(input(layer), gains.attention_gain, own.attention_norm);
  linear<T>(rows(own.attention_norm.y, width), w.qkv, qkv);
  device_rotate<T>(cosine.data(), sine.data(), config.sequence, config.head_dim / 2, turned, false, qkv,
                   *stream);
  device_attention<T>(shape, qkv, rows(own.attended, shape.query_cols()), own.statistics.data(), *stream);
  add_to_stream(input(layer), rows(own.attended, shape.query_cols()), w.output, own.ffn_x);
}

template <class T>
void DeviceTransformer<T>::State::ffn_half(Index layer) {
  const Index width = config.width;
  LayerBuffers<T>& own = buffers(layer);
  const auto& gains = weight.layers[static_cast<std::size_t>(layer)];
  const auto& w = rounded.layers[static_cast<std::size_t>(layer)];
  const DeviceMatrix<T> h = rows(own.h, ffn_cols);
  const auto range = phase("feed-forward", norm_bytes(), rows(own.gate_up, 2 * ffn_cols), h);
  norm(own.ffn_x, gains.ffn_gain, own.ffn_norm);
  linear<T>(rows(own.ffn_norm.y, width), w.gate_up, rows(own.gate_up, 2 * ffn_cols));
  device_swiglu<T>(rows(own.gate_up, 2 * ffn_cols), h, *stream);
}

template <class T>
void DeviceTransformer<T>::State::losses(bool with_gradient) {
  const DeviceMatrix<T> d = of_ids(d_logits);
  const auto range =
      phase("loss", token_losses.matrix(0, shape.tokens(), 1), with_gradient ? bytes_of(d) : 0);
  device_cross_entropy<T>(of_ids(logits), vocabulary, targets.data(), gathered.data(), tensor->size(),
                          gradient_scale.data(), token_losses.data(),
                          with_gradient ? d : DeviceMatrix<T>(nullptr, d.rows, d.cols), *stream);
  device_sum(token_losses.data(), shape.tokens(), loss_sum.data(), *stream);
}

template <class T>
double DeviceTransformer<T>::State::sum_of_losses() {
  const Timeline::Range range(tensor->timeline(), "wait for the loss", Index{sizeof(double)});
  double sum = 0;
  loss_sum.copy_to({&sum, 1});
  tensor->throw_if_broken();
  return sum;
}

// As on the host: each all-reduce sums the input gradient of one column-parallel matrix.
template <class T>
void DeviceTransformer<T>::State::backward(const std::function<void(Index)>& ready) {
  const Index width = config.width;
  {
    const auto range = phase("head gradient", gradient.head, stream_gradient_bytes());
    const DeviceMatrix<T> d = of_ids(d_logits);
    linear_input_gradient<float>(d, rounded.head, rows(d_normed, width));
    sum_over_processes(rows(d_normed, width));
    linear_weight_gradient(d, rows(final_norm.y, width), gradient.head);
    const Index final_gain = parameter_of(config.layers, kAttentionGain);
    if (!config.tied_head) ready(final_gain + 1);

    cuda_zero(d_stream.data(), shape.tokens() * width * Index{sizeof(float)}, *stream);
    norm_backward(input(config.layers), weight.final_gain, final_norm, gradient.final_gain);
    ready(final_gain);
  }
  for (Index layer = config.layers - 1; layer >= 0; --layer) {
    if (kept == KeptActivations::kLayerInputs) {
      attention_half(layer);
      ffn_half(layer);
    }
    ffn_backward_half(layer, ready);
    attention_backward_half(layer, ready);
  }
  const auto range = phase("embedding gradient", gradient.embedding);
  device_embed_backward(tokens.data(), tokens_by_id.data(), vocabulary, rows(d_stream, width),
                        gradient.embedding, *stream);
  ready(0);
}

// The first time as it is, in which products choose their algorithms and kernels are loaded.
template <class T>
void DeviceTransformer<T>::State::replayed_step() {
  const auto enqueue = [&] { step([](Index) {}); };
  const auto [place, first_time] = graphs.try_emplace(shape.sequences);
  StepGraph& own = place->second;
  if (first_time) {
    const Index before = enqueued_bytes;
    enqueue();
    own.bytes = enqueued_bytes - before;
    return;
  }
  if (own.graph == nullptr) {
    const Timeline::Range range(tensor->timeline(), "recorded step", 0);
    own.graph = std::make_unique<CudaGraph>(*stream, enqueue);
  }
  const Timeline::Range range(tensor->timeline(), "replayed step", own.bytes);
  own.graph->launch(*stream);
}

template <class T>
void DeviceTransformer<T>::State::ffn_backward_half(Index layer, const std::function<void(Index)>& ready) {
  const Index width = config.width;
  LayerBuffers<T>& own = buffers(layer);
  const auto& w = rounded.layers[static_cast<std::size_t>(layer)];
  const auto& d_w = gradient.layers[static_cast<std::size_t>(layer)];
  const DeviceMatrix<T> d_x = rows(d_stream_rounded, width), d_gates = rows(d_gate_up, 2 * ffn_cols);
  const auto range = phase("feed-forward gradient", rows(d_h, ffn_cols), d_w.down, d_gates, d_w.gate_up,
                           stream_gradient_bytes());
  linear_input_gradient<T>(d_x, w.down, rows(d_h, ffn_cols));
  linear_weight_gradient(d_x, rows(own.h, ffn_cols), d_w.down);
  ready(parameter_of(layer, kDownProj));

  device_swiglu_backward<T>(rows(own.gate_up, 2 * ffn_cols), rows(d_h, ffn_cols), d_gates, *stream);
  linear_input_gradient<float>(d_gates, w.gate_up, rows(d_normed, width));
  sum_over_processes(rows(d_normed, width));
  linear_weight_gradient(d_gates, rows(own.ffn_norm.y, width), d_w.gate_up);
  ready(parameter_of(layer, kUpProj));
  ready(parameter_of(layer, kGateProj));

  norm_backward(own.ffn_x, weight.layers[static_cast<std::size_t>(layer)].ffn_gain, own.ffn_norm,
                d_w.ffn_gain);
  ready(parameter_of(layer, kFfnGain));
}

template <class T>
void DeviceTransformer<T>::State::attention_backward_half(Index layer,
                                                          const std::function<void(Index)>& ready) {
  const Index width = config.width;
  LayerBuffers<T>& own = buffers(layer);
  const auto& w = rounded.layers[static_cast<std::size_t>(layer)];
  const auto& d_w = gradient.layers[static_cast<std::size_t>(layer)];
  const DeviceMatrix<T> d_x = rows(d_stream_rounded, width), d = rows(d_qkv, shape.qkv_cols());
  const DeviceMatrix<T> attended = rows(own.attended, shape.query_cols());
  const auto range =
      phase("attention gradient", rows(d_attended, shape.query_cols()), d_w.output,
            row_products.matrix(0, 1, shape.statistics() / 2), d, d_w.qkv, stream_gradient_bytes());
  linear_input_gradient<T>(d_x, w.output, rows(d_attended, shape.query_cols()));
  linear_weight_gradient(d_x, attended, d_w.output);
  ready(parameter_of(layer, kO));

  device_attention_backward<T>(shape, rows(own.qkv, shape.qkv_cols()), attended,
                               rows(d_attended, shape.query_cols()), own.statistics.data(),
                               row_products.data(), d, *stream);
  device_rotate<T>(cosine.data(), sine.data(), config.sequence, config.head_dim / 2,
                   shape.heads + shape.kv_heads, true, d, *stream);
  linear_input_gradient<float>(d, w.qkv, rows(d_normed, width));
  sum_over_processes(rows(d_normed, width));
  linear_weight_gradient(d, rows(own.attention_norm.y, width), d_w.qkv);
  for (const InLayer which : {kV, kK, kQ}) ready(parameter_of(layer, which));

  norm_backward(input(layer), weight.layers[static_cast<std::size_t>(layer)].attention_gain,
                own.attention_norm, d_w.attention_gain);
  ready(parameter_of(layer, kAttentionGain));
}

template <class T>
DeviceTransformer<T>::DeviceTransformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed,
                                        Index max_sequences, KeptActivations kept, PlanChoice plans)
    : state_(std::make_unique<State>(config, tensor, seed, max_sequences, kept, plans)) {}
template <class T>
DeviceTransformer<T>::~DeviceTransformer() = default;

template <class T>
const ModelConfig& DeviceTransformer<T>::config() const {
  return state_->config;
}

template <class T>
std::span<Parameter<float>> DeviceTransformer<T>::parameters() {
  return state_->parameters;
}

template <class T>
void DeviceTransformer<T>::zero_gradients() {
  cuda_zero(state_->gradients.data(), state_->memory.gradients, *state_->stream);
}

template <class T>
double DeviceTransformer<T>::forward_backward(std::span<const std::int32_t> tokens,
                                              std::span<const std::int32_t> targets, Index sequences,
                                              double gradient_scale,
                                              const std::function<void(Index)>& gradient_ready) {
  state_->take_batch(tokens, targets, sequences);
  state_->gradient_scale.fill_from({&gradient_scale, 1});
  if (gradient_ready) {
    state_->step(gradient_ready);
  } else if (state_->tensor->size() > 1) {
    state_->step([](Index) {});
  } else {
    state_->replayed_step();
  }
  return state_->sum_of_losses();
}

template <class T>
double DeviceTransformer<T>::loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                                  Index sequences) {
  state_->take_batch(tokens, targets, sequences);
  state_->forward();
  state_->losses(false);
  return state_->sum_of_losses();
}

template <class T>
Index DeviceTransformer<T>::graphs() const {
  return std::count_if(state_->graphs.begin(), state_->graphs.end(),
                       [](const auto& step) { return step.second.graph != nullptr; });
}

template <class T>
const DeviceMemory& DeviceTransformer<T>::memory() const {
  return state_->memory;
}

template class DeviceTransformer<float>;
template class DeviceTransformer<BFloat16>;

}  // namespace lowband
