#pragma once

#include "collectives/factors/factor_exchange.h"
#include "sharding/rank_profile.h"

#include <cstdint>

namespace lowband {

/// What updates the layer matrices. Everything else (embedding, head, norm gains) is updated by an
/// elementwise optimizer.
enum class OptimizerKind : std::uint8_t {
  kDion,
  kPowerSgd,
  kAdamW,
  kSgd,
  kLion,
  kMuon,
  kNorMuon,
  kMuonBp,
  kDion2,
  kNorDion2,
  kSpecGd,
  kSpectra,
  kAcpSgd,
  kGalore
};

/// What updates parameters element by element.
enum class ElementwiseKind : std::uint8_t { kAdamW, kSgd, kLion };

/// What a replica keeps of what it did not send: Dion's momentum B_i - (1 - mu) P R^T, PowerSGD's error
/// B_i - P R^T, with
enum class Residual : std::uint8_t {
  kLocal,       // the replica's own R_i: differences between replicas stay bounded
  kAggregated,  // the mean R: as the public Dion; differences grow like sqrt(steps)
};

/// Where the gradient norm that Dion's clipping needs comes from. The others always know theirs exactly:
/// PowerSGD and its relatives clip by the norm of the gradient that they decompressed, |P R^T| = |R|.
enum class NormEstimator : std::uint8_t {
  kSketch,    // unbiased estimate from a count sketch, works under compressed exchange
  kTrueNorm,  // exact; needs a dense exchange or a single replica
};

/// The polynomials whose iteration is taken for the sign of a matrix, and where they send singular values of
/// 0.001 to 1 times the Frobenius norm.
enum class SignPolynomial : std::uint8_t {
  kNewtonSchulz5,  // 0.47 to 1.20, five equal steps
  kPolarExpress5,  // 0.85 to 1.14, five steps
  kPolarExpress8,  // 1 to four digits, eight steps
};

/// What an orthonormal update of an m x n matrix is multiplied by, besides the learning rate; m rows.
enum class UpdateScale : std::uint8_t {
  kRmsToRms,  // sqrt(m / n): the step's RMS-to-RMS operator norm is the rate
  kAdamRms,   // 0.2 sqrt(max(m, n)): its entries have a root mean square of 0.2 times the rate
  kShape,     // sqrt(max(1, m / n)), as in the first Muon
  kNone,      // 1: its spectral norm is the rate
};

/// Which slices of its momentum Dion2 signs in a step.
enum class SliceSelection : std::uint8_t {
  kLargest,  // by L1 norm
  kRandom,   // drawn anew in each step, the same for all processes
};

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kDion;
  double mu = 0.95;       // momentum of Dion, Muon and their relatives, and of Spectra
  double lambda = 0.9;    // momentum of PowerSGD and ACP-SGD, after decompression
  bool nesterov = false;  // Muon looks ahead: its update is made of G + mu M
  SignPolynomial sign = SignPolynomial::kPolarExpress5;
  UpdateScale update_scale = UpdateScale::kRmsToRms;
  double normuon_beta2 = 0.95;   // of NorMuon's mean squares of rows
  Index muonbp_period = 1;       // steps from one sign of whole matrices to the next, blocks between them
  double muonbp_block_rate = 1;  // learning rate of those steps between, relative to that of the others
  /// Dion2 signs ceil(numerator / denominator x slices) of its momentum.
  Index dion2_numerator = 1;
  Index dion2_denominator = 4;
  SliceSelection dion2_selection = SliceSelection::kLargest;
  double spectra_fraction = 0.015;  // k of min(m, n) singular values that Spectra brings down
  Index spectra_iterations = 1;     // of a step
  double galore_scale = 0.25;       // alpha, beside the learning rate
  Index galore_interval = 200;      // steps from one basis to the next
  Residual residual = Residual::kLocal;
  double weight_decay = 0.01;  // decoupled, of every parameter but norm gains
  /// Of what is not a layer matrix, beside an optimizer of matrices; an elementwise `kind` takes everything.
  ElementwiseKind scalar_optimizer = ElementwiseKind::kAdamW;
  double adamw_beta1 = 0.9;
  double adamw_beta2 = 0.95;
  double adamw_epsilon = 1e-8;
  double sgd_momentum = 0.9;
  bool sgd_nesterov = false;
  double lion_beta1 = 0.9;
  double lion_beta2 = 0.99;
  double clip_norm = 1.0;  // 0: gradients are not clipped; their norm is reported all the same
  NormEstimator clip_estimator = NormEstimator::kSketch;
  ExchangeChoice exchange = ExchangeChoice::kFactors;
  FactorWire wire = FactorWire::kAsComputed;
  /// Exchange while the backward pass runs, on a communication thread, in buckets of at least
  /// `bucket_elements` gradient elements. Otherwise all in one bucket, in `step`. The factors of Dion wait
  /// for the norm of the whole gradient when clip_norm > 0, so that only their reduction over shards and the
  /// dense exchange overlap.
  bool overlap = false;
  Index bucket_elements = Index{8} << 20;
  std::uint64_t seed = 0;
};

/// Whether P and R of layer matrices are exchanged in every step, or the matrix in their place.
constexpr bool exchanges_both_factors(OptimizerKind kind) {
  return kind == OptimizerKind::kDion || kind == OptimizerKind::kPowerSgd;
}

/// Whether layer matrices cross the replica axis compressed, and have factor ranks.
constexpr bool exchanges_factors(OptimizerKind kind) {
  return exchanges_both_factors(kind) || kind == OptimizerKind::kAcpSgd || kind == OptimizerKind::kGalore;
}

/// Whether replicas keep what they did not send of layer matrices, for later steps.
constexpr bool feeds_back(OptimizerKind kind) {
  return exchanges_factors(kind) && kind != OptimizerKind::kGalore;
}

/// Whether what is exchanged depends on the number of the step.
constexpr bool exchange_follows_the_step(OptimizerKind kind) {
  return kind == OptimizerKind::kAcpSgd || kind == OptimizerKind::kGalore;
}

/// Whether what becomes of a layer matrix is decided on the host in the middle of a step, which therefore
/// waits for a device; of the others no step of one process waits.
constexpr bool decides_on_the_host(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kNorMuon:
    case OptimizerKind::kDion2:
    case OptimizerKind::kNorDion2:
    case OptimizerKind::kSpecGd:
    case OptimizerKind::kSpectra:
    case OptimizerKind::kAcpSgd:
    case OptimizerKind::kGalore:
      return true;
    default:
      return false;
  }
}

/// Whether a part of the momentum of a layer matrix is signed in each step.
constexpr bool selects_slices(OptimizerKind kind) {
  return kind == OptimizerKind::kDion2 || kind == OptimizerKind::kNorDion2;
}

/// Whether the momentum of a layer matrix is signed as Muon does, ahead of itself if asked to.
constexpr bool is_muon(OptimizerKind kind) {
  return kind == OptimizerKind::kMuon || kind == OptimizerKind::kNorMuon || kind == OptimizerKind::kMuonBp;
}

/// Whether the mean gradient of a layer matrix is exchanged, and signs of whole matrices move the weights.
constexpr bool takes_signs(OptimizerKind kind) {
  return is_muon(kind) || selects_slices(kind) || kind == OptimizerKind::kSpecGd;
}

/// Whether layer matrices are updated as matrices, otherwise element by element like everything else.
constexpr bool has_matrix_optimizer(OptimizerKind kind) {
  return exchanges_factors(kind) || takes_signs(kind) || kind == OptimizerKind::kSpectra;
}

/// What updates everything that is not a layer matrix; nothing else where `kind` is elementwise.
constexpr ElementwiseKind elementwise_kind(const OptimizerOptions& options) {
  switch (options.kind) {
    case OptimizerKind::kAdamW:
      return ElementwiseKind::kAdamW;
    case OptimizerKind::kSgd:
      return ElementwiseKind::kSgd;
    case OptimizerKind::kLion:
      return ElementwiseKind::kLion;
    default:
      return options.scalar_optimizer;
  }
}

/// How layer matrices cross the replica axis when `computed` is the type of the numbers.
ReplicaTraffic replica_traffic(const OptimizerOptions& options, DType computed);

/// Throws: InvalidArgument naming the field, the value found and the values expected.
void validate(const OptimizerOptions& options);

}  // namespace lowband
