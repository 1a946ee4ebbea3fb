#include "optimizers/planned_state.h"

#include "optimizers/spectra.h"
#include "optimizers/state_place.h"

namespace lowband {
namespace {

std::vector<StateLetter> of_elementwise(ElementwiseKind kind) {
  switch (kind) {
    case ElementwiseKind::kAdamW:
      return {{"m"}, {"v"}, {"t"}};
    case ElementwiseKind::kSgd:
      return {{"v"}};
    case ElementwiseKind::kLion:
      return {{"m"}};
  }
  throw InvalidArgument(cat("optimizer.scalar_optimizer: found ", static_cast<int>(kind)));
}

}  // namespace

std::vector<StateLetter> state_letters(const ParameterInfo& matrix, Index factor_rank,
                                       const OptimizerOptions& options) {
  if (!has_matrix_optimizer(options.kind) || !is_layer_matrix(matrix.role))
    return of_elementwise(elementwise_kind(options));
  switch (options.kind) {
    case OptimizerKind::kDion:
      return {{"M"}, {"Q", factor_rank}};
    case OptimizerKind::kPowerSgd:
      return {{"e"}, {"Q", factor_rank}, {"u"}};
    case OptimizerKind::kAcpSgd:
      return {{"e"}, {"u"}, {"left", factor_rank}, {"right", factor_rank}};
    case OptimizerKind::kGalore:
      return {{"basis", factor_rank}, {"m1", factor_rank}, {"m2", factor_rank}, {"t"}};
    case OptimizerKind::kMuon:
    case OptimizerKind::kMuonBp:
    case OptimizerKind::kDion2:
      return {{"M"}};
    case OptimizerKind::kSpecGd:
      return {};
    case OptimizerKind::kNorMuon:
    case OptimizerKind::kNorDion2:
      return {{"M"}, {"row_v"}};
    case OptimizerKind::kSpectra:
      return {{"M"}, {"V", spectra_rank(matrix, options.spectra_fraction)}};
    case OptimizerKind::kAdamW:
    case OptimizerKind::kSgd:
    case OptimizerKind::kLion:
      break;
  }
  throw InvalidArgument(cat("optimizer.kind: found ", static_cast<int>(options.kind),
                            ", expected one that updates whole matrices"));
}

Index planned_state_elements(const ParameterInfo& info, std::span<const Index> factor_ranks,
                             const MeshShape& mesh, const MeshPosition& position,
                             const OptimizerOptions& options) {
  const std::vector<ParameterInfo> matrices = matrices_of(info);
  Index elements = 0;
  for (std::size_t j = 0; j < matrices.size(); ++j) {
    for (const auto& [letter, factor_cols] :
         state_letters(matrices[j], factor_ranks.empty() ? 0 : factor_ranks[j], options)) {
      const std::string name = info.blocks.empty() ? std::string(letter) : cat(letter, "[", j, "]");
      elements += state_place(info, name, factor_cols, mesh, position).elements.size();
    }
  }
  return elements;
}

}  // namespace lowband
