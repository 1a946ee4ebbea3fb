#pragma once

#include <cstdint>

namespace lowband {

enum class OptimizerKind : std::uint8_t {
  kDion,   // Dion for the layer matrices, AdamW for the rest
  kAdamW,  // AdamW for everything
};

/// What Dion keeps of each replica's momentum after a step: B_i - (1 - mu) P R^T with
enum class Residual : std::uint8_t {
  kLocal,       // the replica's own R_i: differences between replicas stay bounded
  kAggregated,  // the mean R: as the public Dion; differences grow like sqrt(steps)
};

/// Where the gradient norm that clipping needs comes from.
enum class NormEstimator : std::uint8_t {
  kSketch,    // unbiased estimate from a count sketch, works under compressed exchange
  kTrueNorm,  // exact; needs a dense exchange or a single replica
};

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kDion;
  double mu = 0.95;  // momentum of Dion
  Residual residual = Residual::kLocal;
  double weight_decay = 0.01;  // decoupled, of every parameter but norm gains
  double adamw_beta1 = 0.9;
  double adamw_beta2 = 0.95;
  double adamw_epsilon = 1e-8;
  double clip_norm = 1.0;  // 0: gradients are not clipped; their norm is reported all the same
  NormEstimator clip_estimator = NormEstimator::kSketch;
  std::uint64_t seed = 0;
};

/// Throws: InvalidArgument naming the field, the value found and the values expected.
void validate(const OptimizerOptions& options);

}  // namespace lowband
