#include "sharding/budget.h"

#include "runtime/error.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace lowband {

namespace {

/// "model.layers.0.mlp.up_proj.weight 5 -> 4, ..., and 3 more" from one profile to another.
std::string rank_changes(const RankProfile& from, const RankProfile& to) {
  constexpr Index kMostNamed = 4;
  std::string text;
  Index changes = 0;
  for (std::size_t l = 0; l < from.matrices.size(); ++l) {
    if (from.factor_ranks[l] == to.factor_ranks[l] || ++changes > kMostNamed) continue;
    text += cat(text.empty() ? "" : ", ", from.matrices[l].name, " ", from.factor_ranks[l], " -> ",
                to.factor_ranks[l]);
  }
  return changes > kMostNamed ? cat(text, " and ", changes - kMostNamed, " more") : text;
}

ProfileSpec explicit_spec(const RankProfile& profile) {
  ProfileSpec spec{.kind = ProfileSpec::Kind::kExplicit};
  for (std::size_t l = 0; l < profile.matrices.size(); ++l)
    spec.explicit_ranks[profile.matrices[l].name] = profile.factor_ranks[l];
  return spec;
}

}  // namespace

MatrixBytes matrix_bytes(const RankProfile& profile, const ReplicaTraffic& traffic) {
  MatrixBytes bytes;
  for (std::size_t l = 0; l < profile.matrices.size(); ++l) {
    const Index rows = profile.matrices[l].rows, cols = profile.matrices[l].cols;
    const Index factor_rank = profile.factor_ranks[l];
    if (travels_dense(traffic, rows, cols, factor_rank)) {
      bytes.dense += rows * cols * traffic.dense_element_bytes;
    } else {
      bytes.factor += factor_rank * (rows + cols) * traffic.factor_element_bytes;
    }
  }
  return bytes;
}

double budget_ratio(const RankProfile& profile, const RankProfile& reference, const ReplicaTraffic& traffic) {
  return static_cast<double>(matrix_bytes(profile, traffic).sum()) /
         static_cast<double>(matrix_bytes(reference, traffic).sum());
}

RankProfile nearest_uniform(const RankProfile& reference, const ReplicaTraffic& traffic) {
  const Index budget = matrix_bytes(reference, traffic).sum();
  Index highest = std::numeric_limits<Index>::max();
  for (const ParameterInfo& matrix : reference.matrices)
    highest = std::min({highest, matrix.rows, matrix.cols});
  RankProfile nearest;
  Index least_distance = std::numeric_limits<Index>::max();
  for (Index factor_rank = 1; factor_rank <= highest; ++factor_rank) {
    RankProfile candidate{cat("uniform:", factor_rank), reference.matrices, {}};
    candidate.factor_ranks.assign(reference.matrices.size(), factor_rank);
    const Index distance = std::abs(matrix_bytes(candidate, traffic).sum() - budget);
    if (distance >= least_distance) continue;
    least_distance = distance;
    nearest = std::move(candidate);
  }
  return nearest;
}

void expect_within_budget(const RankProfile& profile, const RankProfile& reference,
                          const ReplicaTraffic& traffic, double tolerance) {
  const double ratio = budget_ratio(profile, reference, traffic);
  if (std::abs(ratio - 1) <= tolerance) return;
  const RankProfile uniform = nearest_uniform(reference, traffic);
  std::string nearest = cat("nearest uniform rank ", uniform.factor_ranks.front(), ": ratio ",
                            budget_ratio(uniform, reference, traffic));
  if (matrix_bytes(profile, traffic).dense == 0 && matrix_bytes(reference, traffic).dense == 0) {
    const RankProfile matched = matched_to(explicit_spec(profile), reference);
    const std::string changes = rank_changes(profile, matched);
    nearest += cat("; nearest ranks of this shape: ", changes.empty() ? "these" : changes, ": ratio ",
                   budget_ratio(matched, reference, traffic));
  }
  throw InvalidArgument(cat("budget.reference: found ", matrix_bytes(profile, traffic).sum(),
                            " bytes per step and replica of ", profile.name, ", expected ",
                            matrix_bytes(reference, traffic).sum(), " of ", reference.name, " within ",
                            tolerance, ": ratio ", ratio, "; ", nearest));
}

}  // namespace lowband
