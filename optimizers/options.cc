#include "optimizers/options.h"

#include "runtime/error.h"

#include <cmath>

namespace lowband {
namespace {

/// Its product with any extent of a matrix fits 64 bits.
constexpr Index kLargestDenominator = 1'000'000;

void expect_fraction(const char* field, double value) {
  LB_EXPECTS(value >= 0 && value < 1, "optimizer.", field, ": found ", value, ", expected 0 <= ", field,
             " < 1");
}

}  // namespace

ReplicaTraffic replica_traffic(const OptimizerOptions& options, DType computed) {
  const DType wire = options.wire == FactorWire::kBF16 ? DType::kBF16 : computed;
  return {.exchange = options.exchange,
          .factor_element_bytes = dtype_bytes(wire),
          .dense_element_bytes = dtype_bytes(computed)};
}

void validate(const OptimizerOptions& options) {
  expect_fraction("mu", options.mu);
  expect_fraction("lambda", options.lambda);
  expect_fraction("adamw_beta1", options.adamw_beta1);
  expect_fraction("adamw_beta2", options.adamw_beta2);
  expect_fraction("normuon_beta2", options.normuon_beta2);
  // Millionths, of which spectra_rank is made.
  LB_EXPECTS(options.spectra_fraction >= 1e-6 && options.spectra_fraction <= 1,
             "optimizer.spectra_fraction: found ", options.spectra_fraction, ", expected 0.000001 to 1");
  LB_EXPECTS(options.spectra_iterations >= 1 && options.spectra_iterations <= 100,
             "optimizer.spectra_iterations: found ", options.spectra_iterations, ", expected 1 to 100");
  LB_EXPECTS(options.galore_scale > 0 && std::isfinite(options.galore_scale),
             "optimizer.galore_scale: found ", options.galore_scale, ", expected a positive number");
  LB_EXPECTS(options.galore_interval >= 1, "optimizer.galore_interval: found ", options.galore_interval,
             ", expected at least 1");
  expect_fraction("sgd_momentum", options.sgd_momentum);
  expect_fraction("lion_beta1", options.lion_beta1);
  expect_fraction("lion_beta2", options.lion_beta2);
  LB_EXPECTS(!options.sgd_nesterov || options.sgd_momentum > 0,
             "optimizer.sgd_nesterov: found true with sgd_momentum 0, expected a positive momentum");
  LB_EXPECTS(options.adamw_epsilon > 0 && std::isfinite(options.adamw_epsilon),
             "optimizer.adamw_epsilon: found ", options.adamw_epsilon, ", expected a positive number");
  LB_EXPECTS(options.weight_decay >= 0 && std::isfinite(options.weight_decay),
             "optimizer.weight_decay: found ", options.weight_decay, ", expected a number >= 0");
  LB_EXPECTS(options.clip_norm >= 0 && std::isfinite(options.clip_norm), "optimizer.clip_norm: found ",
             options.clip_norm, ", expected a number >= 0 (0 = no clipping)");
  LB_EXPECTS(options.muonbp_period >= 1, "optimizer.muonbp_period: found ", options.muonbp_period,
             ", expected at least 1");
  LB_EXPECTS(options.muonbp_block_rate > 0 && std::isfinite(options.muonbp_block_rate),
             "optimizer.muonbp_block_rate: found ", options.muonbp_block_rate,
             ", expected a positive number");
  LB_EXPECTS(options.dion2_denominator >= 1 && options.dion2_denominator <= kLargestDenominator,
             "optimizer.dion2_denominator: found ", options.dion2_denominator, ", expected 1 to ",
             kLargestDenominator);
  LB_EXPECTS(options.dion2_numerator >= 1 && options.dion2_numerator <= options.dion2_denominator,
             "optimizer.dion2_numerator: found ", options.dion2_numerator, ", expected 1 to ",
             options.dion2_denominator, ", the denominator");
  LB_EXPECTS(
      options.exchange == ExchangeChoice::kFactors || !exchanges_factors(options.kind) ||
          exchanges_both_factors(options.kind),
      "optimizer.exchange: found dense or auto, expected factors with an optimizer that does not exchange "
      "both of them in every step");
  LB_EXPECTS(options.residual == Residual::kLocal || !exchanges_factors(options.kind) ||
                 exchanges_both_factors(options.kind),
             "optimizer.residual: found aggregated, expected local with an optimizer that does not exchange "
             "both factors in every step");
  LB_EXPECTS(options.bucket_elements >= 1, "optimizer.bucket_elements: found ", options.bucket_elements,
             ", expected at least 1");
}

}  // namespace lowband
