// lowband's side of train_step_vs_torch.py: one process, one thread, float32.
//
//   train_step FOLDER WIDTH HEADS FFN_WIDTH SEQUENCE TOKENS_PER_STEP
//
// Writes the initial weights, the tokens and shape.json into FOLDER and prints "ready". Then, for every
// number n read from standard input, trains n steps (forward, backward, AdamW) and prints the seconds they
// took and their n losses.

#include "collectives/local/local_world.h"
#include "model/transformer.h"
#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/random.h"
#include "runtime/vector_kernels.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>

namespace lowband {
namespace {

constexpr Index kBatches = 4;
constexpr double kLearningRate = 1e-3, kBeta1 = 0.9, kBeta2 = 0.95, kEpsilon = 1e-8, kWeightDecay = 0.1;

// Sequences of sequence + 1 bytes, each byte a noisy function of the one before, so that the loss falls.
std::vector<std::int32_t> draw_tokens(const ModelConfig& config, Index sequences) {
  const RandomStream stream(1, "tokens");
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < sequences * (config.sequence + 1); ++i) {
    const auto bits = stream.bits(i);
    const std::int32_t previous = tokens.empty() ? 0 : tokens.back();
    tokens.push_back(static_cast<std::int32_t>(
        (bits & 3U) != 0 ? static_cast<std::uint64_t>(previous * 5 + 7) % 256 : (bits >> 8) % 256));
  }
  return tokens;
}

template <class T>
void write_file(const std::filesystem::path& path, const T* data, Index elements) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(data), elements * static_cast<Index>(sizeof(T)));
  if (!file) throw IoError(cat("cannot write ", path.string()));
}

class Trainer {
 public:
  Trainer(const ModelConfig& config, Communicator& world, Index sequences)
      : sequences_(sequences),
        model_(config, world, 1, sequences),
        tokens_(draw_tokens(config, kBatches * sequences)),
        mean_(total_elements()),
        square_(total_elements()) {}

  void write(const std::filesystem::path& folder) {
    const ModelConfig& c = model_.config();
    std::ofstream json(folder / "shape.json");
    json << "{\"vocabulary\": " << c.vocabulary << ", \"width\": " << c.width << ", \"layers\": " << c.layers
         << ", \"heads\": " << c.heads << ", \"head_dim\": " << c.head_dim << ", \"sequence\": " << c.sequence
         << ", \"rope_base\": " << c.rope_base << ", \"norm_epsilon\": " << c.norm_epsilon
         << ", \"batches\": " << kBatches << ", \"parameters\": [";
    const char* separator = "";
    for (const auto& p : model_.parameters()) {
      json << separator << "{\"name\": \"" << p.info.name << "\", \"rows\": " << p.info.rows
           << ", \"cols\": " << p.info.cols << "}";
      separator = ", ";
      write_file(folder / p.info.name, p.weight.data, p.weight.elements());
    }
    json << "]}\n";
    write_file(folder / "tokens", tokens_.data(), static_cast<Index>(tokens_.size()));
  }

  // Mean loss per token.
  double step() {
    const Index length = model_.config().sequence, count = sequences_ * length;
    std::vector<std::int32_t> inputs, targets;
    for (Index s = 0; s < sequences_; ++s) {
      const auto block = tokens_.begin() + ((step_ % kBatches) * sequences_ + s) * (length + 1);
      inputs.insert(inputs.end(), block, block + length);
      targets.insert(targets.end(), block + 1, block + length + 1);
    }
    ++step_;
    model_.zero_gradients();
    const double mean = 1.0 / static_cast<double>(count);
    const double loss = model_.forward_backward(inputs, targets, sequences_, mean, {}) * mean;
    update();
    return loss;
  }

 private:
  Index total_elements() {
    Index elements = 0;
    for (const auto& p : model_.parameters()) elements += p.weight.elements();
    return elements;
  }
  void update() {
    const double t = static_cast<double>(step_);
    const auto step_size = static_cast<float>(kLearningRate / (1 - std::pow(kBeta1, t)));
    const auto correction = static_cast<float>(1 / std::sqrt(1 - std::pow(kBeta2, t)));
    Index offset = 0;
    for (const auto& p : model_.parameters()) {
      const double decay = p.info.role == Role::kNorm ? 0.0 : kWeightDecay;
      adamw_update<float>(p.weight.data, mean_.data() + offset, square_.data() + offset, p.gradient.data,
                          p.weight.elements(), static_cast<float>(kBeta1), static_cast<float>(kBeta2),
                          step_size, correction, static_cast<float>(kEpsilon),
                          static_cast<float>(1 - kLearningRate * decay), 1);
      offset += p.weight.elements();
    }
  }

  Index sequences_;
  Transformer<float> model_;
  std::vector<std::int32_t> tokens_;
  Buffer<float> mean_, square_;  // AdamW's m and v, in the order of the parameters
  Index step_ = 0;
};

void serve(const std::filesystem::path& folder, const ModelConfig& config, Index sequences) {
  run_world(1,
            [&](Communicator& world) {
              Trainer trainer(config, world, sequences);
              trainer.write(folder);
              std::cout << "ready" << std::endl << std::setprecision(9);
              for (int steps = 0; std::cin >> steps;) {
                std::vector<double> losses;
                const auto begin = std::chrono::steady_clock::now();
                const std::clock_t cpu_begin = std::clock();
                for (int i = 0; i < steps; ++i) losses.push_back(trainer.step());
                const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
                const std::clock_t cpu_elapsed = std::clock() - cpu_begin;
                std::cout << elapsed.count() << " " << static_cast<double>(cpu_elapsed) / CLOCKS_PER_SEC;
                for (const double loss : losses) std::cout << " " << loss;
                std::cout << std::endl;
              }
            },
            {.total_deadline = std::chrono::hours(24)});
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  if (argc != 7) {
    std::cerr << "usage: train_step FOLDER WIDTH HEADS FFN_WIDTH SEQUENCE TOKENS_PER_STEP\n";
    return 64;
  }
  try {
    const auto number = [&](int i) { return lowband::Index{std::atoll(argv[i])}; };
    const lowband::ModelConfig config{.width = number(2),
                                      .heads = number(3),
                                      .kv_heads = number(3),
                                      .ffn_width = number(4),
                                      .sequence = number(5)};
    lowband::serve(argv[1], config, number(6) / config.sequence);
  } catch (const lowband::Error& error) {
    std::cerr << "train_step: " << error.what() << "\n";
    return 1;
  }
}
