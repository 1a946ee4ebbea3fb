#pragma once

#include "collectives/byte_budget.h"
#include "optimizers/muon.h"

namespace lowband {

/// The steps in which MuonBP takes the signs of whole matrices, and sends something to do so: 0, period, ...
StepPhase whole_sign_steps(const OptimizerOptions& options);

/// MuonBP, block-periodic Muon: matrices are brought together for their signs in one of `period` steps.
///
///     M     <- mu M + G                               as Muon, in every step
///     t mod period = 0:
///         U <- sign(M), W <- (1 - eta wd) W - eta c(m, n) U
///     otherwise, on each of the K blocks M^(j), m_j x n_j, that the mesh cuts M into; nothing is sent:
///         U <- sign(M^(j)), W^(j) <- (1 - eta wd) W^(j) - eta_block c(m_j, n_j) U
///
/// eta_block = muonbp_block_rate eta: its theory asks for a rate of its own, since the spectral norm of K
/// signs side by side lies anywhere between 1 and sqrt(K). Decay has one rate in all steps.
///
/// Depends on how the shard and tensor axes cut matrices, by design; not on the number of replicas. Period 1
/// is Muon; so is a replica of one process where eta_block = eta.
///
/// State: "<name>.M".
/// Reference: "MuonBP", arXiv 2510.16981; conventions of algorithms.md 2.5.
template <class Real>
class MuonBp final : public Muon<Real> {
 public:
  using typename SignDescent<Real>::Piece;
  using Muon<Real>::Muon;

 private:
  bool signs_whole(const StepInfo& info) const;
  void form_signs(std::span<const Piece> pieces, const StepInfo& info) override;
  double step_size(Index i, const StepInfo& info) const override;
};

}  // namespace lowband
