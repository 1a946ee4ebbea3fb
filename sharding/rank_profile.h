#pragma once

#include "sharding/parameter.h"

#include <map>
#include <span>
#include <string>
#include <vector>

namespace lowband {

/// A rule that gives every layer matrix its factor rank. Structural, inverted and fraction ranks are clipped
/// to 1 .. min(m, n); a uniform or explicit rank outside is an error.
struct ProfileSpec {
  enum class Kind : std::uint8_t { kUniform, kStructural, kInverted, kFraction, kExplicit };
  Kind kind = Kind::kUniform;
  Index uniform_rank = 0;        // kUniform
  Index width = 0;               // d, kStructural and kInverted
  Index head_dim = 0;            // d_h, kStructural and kInverted
  double scale = 1.0;            // multiplies structural and inverted ranks, rounded to nearest, at least 1
  Index fraction_numerator = 1;  // kFraction: rank = ceil(numerator * min(m, n) / denominator), exactly
  Index fraction_denominator = 1;
  std::map<std::string, Index> explicit_ranks = {};  // kExplicit: by the name of the matrix
};

/// Factor rank of every layer matrix, in the order of `matrices`. Blocks of a parameter are matrices.
struct RankProfile {
  std::string name;
  std::vector<ParameterInfo> matrices;
  std::vector<Index> factor_ranks;
};

/// The ranks of a profile by parameter, and in each by matrix (matrices_of); none of what is no layer matrix.
/// Throws: InvalidArgument when the profile lacks one of these matrices, or names another.
std::vector<std::vector<Index>> ranks_by_parameter(const RankProfile& profile,
                                                   std::span<const ParameterInfo> parameters);

/// What a layer matrix sends over the replica axis.
enum class ExchangeChoice : std::uint8_t {
  kFactors,  // P and R, r (m + n) elements
  kDense,    // the matrix itself, m n elements; P and R are computed from the mean, with the same result to
             // rounding
  kAuto,     // whichever is fewer bytes, dense when equal
};

/// How layer matrices cross the replica axis, and what an element of it costs.
struct ReplicaTraffic {
  ExchangeChoice exchange = ExchangeChoice::kFactors;
  Index factor_element_bytes = 4;  // of P and R on the wire
  Index dense_element_bytes = 4;   // of a matrix that travels dense
};
/// Whether a matrix of this shape and factor rank travels dense.
bool travels_dense(const ReplicaTraffic& traffic, Index rows, Index cols, Index factor_rank);
/// r_be = mn / (m + n) x dense_element_bytes / factor_element_bytes: factors of this rank or a higher one
/// save nothing.
double break_even_rank(const ReplicaTraffic& traffic, Index rows, Index cols);

/// B(r) in elements: sum of r_l (m_l + n_l).  Reference: Rank Allocation, eq. 3.
Index factor_elements(const RankProfile& profile);
/// Sum of m_l n_l over the same matrices.
Index dense_elements(const RankProfile& profile);

/// Applies the rule to the layer matrices among `parameters`, block by block (others are skipped).
///
/// structural: FFN d; q, k, o 4 d_h; v d_h.  inverted: FFN d; q, k, o d_h; v d.
/// Throws: InvalidArgument naming the parameter when an explicit or uniform rank is below 1 or above min(m,
/// n), when an explicit rank is missing, or names a parameter that is no layer matrix.
RankProfile make_profile(const ProfileSpec& spec, std::span<const ParameterInfo> parameters);

/// The uniform rank whose B(r) is nearest to that of `reference`: round(B / sum(m + n)), clipped per matrix.
RankProfile matched_uniform(const RankProfile& reference);

/// The profile shaped like `spec` whose B(r) is nearest to that of `reference`.
///
/// The real scale of `spec` that spends the budget exactly is found first (`spec.scale` and, for uniform,
/// `spec.uniform_rank` are ignored); ranks are rounded to nearest; single ranks then move until no move of up
/// to one rank per matrix, in any two classes of equal m + n, brings B(r) nearer. Deterministic, ties to the
/// lower index. With two classes (no grouped queries) the result is nearly always exact; judge it by
/// `budget_ratio`. Throws: InvalidArgument as `make_profile`.
RankProfile matched_to(const ProfileSpec& spec, const RankProfile& reference);

/// B(profile) / B(reference).
double budget_ratio(const RankProfile& profile, const RankProfile& reference);

/// Default tolerance of a match: |ratio - 1| <= 0.0005.
inline constexpr double kMatchTolerance = 0.0005;

}  // namespace lowband
