#include "sharding/rank_profile.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace lowband {

namespace {

Index largest_rank(const ParameterInfo& matrix) { return std::min(matrix.rows, matrix.cols); }

/// Elements that one more rank adds to the factors of `matrix`: m + n.
Index rank_cost(const ParameterInfo& matrix) { return matrix.rows + matrix.cols; }

bool is_ffn(Role role) { return role == Role::kGate || role == Role::kUp || role == Role::kDown; }

/// ceil(numerator * extent / denominator). With extent = whole * denominator + rest no product exceeds
/// numerator * extent or denominator^2. A double product would make 8 of 0.07 * 100.
Index ceil_fraction(Index extent, Index numerator, Index denominator) {
  const Index whole = extent / denominator;
  const Index rest = extent % denominator;
  return numerator * whole + (numerator * rest + denominator - 1) / denominator;
}

/// The rank that the rule names for a matrix before scale, rounding and clipping.
double unscaled_rank(const ProfileSpec& spec, const ParameterInfo& matrix) {
  const auto width = static_cast<double>(spec.width);
  const auto head_dim = static_cast<double>(spec.head_dim);
  switch (spec.kind) {
    case ProfileSpec::Kind::kUniform:
      return static_cast<double>(spec.uniform_rank);
    case ProfileSpec::Kind::kStructural:
      if (is_ffn(matrix.role)) return width;
      return matrix.role == Role::kValue ? head_dim : 4 * head_dim;
    case ProfileSpec::Kind::kInverted:
      if (is_ffn(matrix.role)) return width;
      return matrix.role == Role::kValue ? width : head_dim;
    case ProfileSpec::Kind::kFraction:
      return static_cast<double>(spec.fraction_numerator) * static_cast<double>(largest_rank(matrix)) /
             static_cast<double>(spec.fraction_denominator);
    case ProfileSpec::Kind::kExplicit:
      return static_cast<double>(spec.explicit_ranks.at(matrix.name));
  }
  return 0;
}

std::string spec_name(const ProfileSpec& spec) {
  const std::string scale = spec.scale == 1.0 ? "" : cat("*", spec.scale);
  switch (spec.kind) {
    case ProfileSpec::Kind::kUniform:
      return cat("uniform:", spec.uniform_rank);
    case ProfileSpec::Kind::kStructural:
      return "structural" + scale;
    case ProfileSpec::Kind::kInverted:
      return "inverted" + scale;
    case ProfileSpec::Kind::kFraction:
      return cat("fraction:", spec.fraction_numerator, "/", spec.fraction_denominator);
    case ProfileSpec::Kind::kExplicit:
      return "explicit";
  }
  return "?";
}

void check_explicit_ranks(const ProfileSpec& spec, std::span<const ParameterInfo> matrices) {
  std::set<std::string> names;
  for (const ParameterInfo& matrix : matrices) {
    names.insert(matrix.name);
    const auto found = spec.explicit_ranks.find(matrix.name);
    LB_EXPECTS(found != spec.explicit_ranks.end(), "profile: found no rank for ", matrix.name,
               ", expected 1 to ", largest_rank(matrix));
    LB_EXPECTS(found->second >= 1 && found->second <= largest_rank(matrix), "profile: found rank ",
               found->second, " for ", matrix.name, ", expected 1 to min(m, n) = ", largest_rank(matrix));
  }
  for (const auto& [name, rank] : spec.explicit_ranks)
    LB_EXPECTS(names.contains(name), "profile: found a rank for ", name,
               ", expected the name of a layer matrix of this model");
}

void check_spec(const ProfileSpec& spec, std::span<const ParameterInfo> matrices) {
  using Kind = ProfileSpec::Kind;
  LB_EXPECTS(spec.scale > 0 && std::isfinite(spec.scale), "profile.scale: found ", spec.scale,
             ", expected a positive number");
  const bool by_shape = spec.kind == Kind::kStructural || spec.kind == Kind::kInverted;
  if (by_shape) {
    LB_EXPECTS(spec.width >= 1, "profile: found width ", spec.width, ", expected the model's");
    LB_EXPECTS(spec.head_dim >= 1, "profile: found head_dim ", spec.head_dim, ", expected the model's");
  } else {
    LB_EXPECTS(spec.scale == 1.0, "profile.scale: found ", spec.scale,
               ", expected 1: only structural and inverted ranks are scaled");
  }
  if (spec.kind == Kind::kFraction) {
    // Keeps ceil_fraction inside 64 bits.
    constexpr Index kLargestDenominator = 1'000'000'000;
    LB_EXPECTS(spec.fraction_denominator >= 1 && spec.fraction_denominator <= kLargestDenominator,
               "profile.denominator: found ", spec.fraction_denominator, ", expected 1 to ",
               kLargestDenominator);
    LB_EXPECTS(spec.fraction_numerator >= 1 && spec.fraction_numerator <= spec.fraction_denominator,
               "profile.numerator: found ", spec.fraction_numerator, ", expected 1 to the denominator ",
               spec.fraction_denominator);
  }
  if (spec.kind == Kind::kExplicit) check_explicit_ranks(spec, matrices);
}

Index sum_over_matrices(const RankProfile& profile, Index (*term)(const ParameterInfo&, Index factor_rank)) {
  Index sum = 0;
  for (std::size_t l = 0; l < profile.matrices.size(); ++l)
    sum += term(profile.matrices[l], profile.factor_ranks[l]);
  return sum;
}

}  // namespace

std::vector<std::vector<Index>> ranks_by_parameter(const RankProfile& profile,
                                                   std::span<const ParameterInfo> parameters) {
  LB_EXPECTS(profile.matrices.size() == profile.factor_ranks.size(), "rank profile ", profile.name,
             ": found ", profile.factor_ranks.size(), " ranks for ", profile.matrices.size(), " matrices");
  std::map<std::string, Index> rank_of;
  for (std::size_t l = 0; l < profile.matrices.size(); ++l)
    rank_of[profile.matrices[l].name] = profile.factor_ranks[l];
  std::vector<std::vector<Index>> ranks(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    for (const ParameterInfo& matrix : layer_matrices(parameters.subspan(i, 1))) {
      const auto found = rank_of.find(matrix.name);
      LB_EXPECTS(found != rank_of.end(), "rank profile ", profile.name, ": found no rank for ", matrix.name,
                 ", expected one for every layer matrix");
      ranks[i].push_back(found->second);
      rank_of.erase(found);
    }
  }
  LB_EXPECTS(rank_of.empty(), "rank profile ", profile.name, ": found a rank for ", rank_of.begin()->first,
             ", expected layer matrices of the model only");
  return ranks;
}

bool travels_dense(const ReplicaTraffic& traffic, Index rows, Index cols, Index factor_rank) {
  switch (traffic.exchange) {
    case ExchangeChoice::kFactors:
      return false;
    case ExchangeChoice::kDense:
      return true;
    case ExchangeChoice::kAuto:
      return factor_rank * (rows + cols) * traffic.factor_element_bytes >=
             rows * cols * traffic.dense_element_bytes;
  }
  return false;
}

double break_even_rank(const ReplicaTraffic& traffic, Index rows, Index cols) {
  return static_cast<double>(rows * cols * traffic.dense_element_bytes) /
         static_cast<double>((rows + cols) * traffic.factor_element_bytes);
}

Index factor_elements(const RankProfile& profile) {
  return sum_over_matrices(profile, [](const ParameterInfo& matrix, Index factor_rank) {
    return factor_rank * rank_cost(matrix);
  });
}

Index dense_elements(const RankProfile& profile) {
  return sum_over_matrices(profile, [](const ParameterInfo& matrix, Index) { return matrix.elements(); });
}

double budget_ratio(const RankProfile& profile, const RankProfile& reference) {
  return static_cast<double>(factor_elements(profile)) / static_cast<double>(factor_elements(reference));
}

RankProfile make_profile(const ProfileSpec& spec, std::span<const ParameterInfo> parameters) {
  RankProfile profile{spec_name(spec), layer_matrices(parameters), {}};
  check_spec(spec, profile.matrices);
  for (const ParameterInfo& matrix : profile.matrices) {
    const Index limit = largest_rank(matrix);
    switch (spec.kind) {
      case ProfileSpec::Kind::kUniform:
        LB_EXPECTS(spec.uniform_rank >= 1 && spec.uniform_rank <= limit, "profile.rank: found ",
                   spec.uniform_rank, ", expected 1 to min(m, n) = ", limit, " of ", matrix.name);
        profile.factor_ranks.push_back(spec.uniform_rank);
        break;
      case ProfileSpec::Kind::kStructural:
      case ProfileSpec::Kind::kInverted: {
        const double scaled =
            std::clamp(spec.scale * unscaled_rank(spec, matrix), 1.0, static_cast<double>(limit));
        profile.factor_ranks.push_back(std::llround(scaled));
        break;
      }
      case ProfileSpec::Kind::kFraction:
        profile.factor_ranks.push_back(
            ceil_fraction(limit, spec.fraction_numerator, spec.fraction_denominator));
        break;
      case ProfileSpec::Kind::kExplicit:
        profile.factor_ranks.push_back(spec.explicit_ranks.at(matrix.name));
        break;
    }
  }
  return profile;
}

RankProfile matched_uniform(const RankProfile& reference) {
  const Index budget = factor_elements(reference);
  const Index cost =
      sum_over_matrices(reference, [](const ParameterInfo& matrix, Index) { return rank_cost(matrix); });
  LB_EXPECTS(cost > 0, "profile: found no layer matrix, expected at least one");
  const Index nearest = std::max<Index>(1, (2 * budget + cost) / (2 * cost));
  RankProfile profile{cat("uniform:", nearest), reference.matrices, {}};
  for (const ParameterInfo& matrix : profile.matrices)
    profile.factor_ranks.push_back(std::min(nearest, largest_rank(matrix)));
  return profile;
}

namespace {

/// Moves the ranks of a profile, one at a time, until its B(r) is as near to a budget as single moves allow.
///
/// `targets` are the real-valued ranks that would spend the budget exactly; a move up takes the matrix whose
/// rank lies furthest below its target, a move down the one furthest above, ties to the lower index.
class BudgetFit {
 public:
  BudgetFit(RankProfile& profile, std::vector<double> targets, Index budget)
      : profile_(profile), targets_(std::move(targets)), unspent_(budget - factor_elements(profile)) {
    std::set<Index> costs;
    for (const ParameterInfo& matrix : profile.matrices) costs.insert(rank_cost(matrix));
    costs_.assign(costs.begin(), costs.end());
  }

  /// While one rank up or down brings B(r) nearer to the budget, makes the move that agrees best with the
  /// targets.
  void move_single_ranks() {
    while (unspent_ != 0) {
      const Index direction = unspent_ > 0 ? 1 : -1;
      const auto order = movable(direction, [&](Index cost) { return cost < 2 * std::abs(unspent_); });
      if (order.empty()) return;
      move(order.front(), direction);
    }
  }

  /// What is left is spent by a ranks of one cost and b of another: a c_A + b c_B nearest to `unspent_`, then
  /// |a| + |b| least. Every a is tried, b follows. Each matrix moves by at most one.
  /// With costs 1536 = 6 * 256 and 2816 = 11 * 256 any rest of 256 is met: 2 * 6 - 11 = 1.
  void scan_cost_classes() {
    struct Choice {
      Index left;
      Index moves;
      std::size_t class_a = 0, class_b = 0;
      Index a = 0, b = 0;
    } best{std::abs(unspent_), 0};
    for (std::size_t class_a = 0; class_a < costs_.size(); ++class_a) {
      for (std::size_t class_b = class_a + 1; class_b < costs_.size(); ++class_b) {
        const Index cost_a = costs_[class_a], cost_b = costs_[class_b];
        const Index most_a = room(cost_a, 1), least_b = -room(cost_b, -1), most_b = room(cost_b, 1);
        for (Index a = -room(cost_a, -1); a <= most_a; ++a) {
          const Index rest = unspent_ - a * cost_a;
          const Index truncated = rest / cost_b;
          for (Index b = std::max(truncated - 1, least_b); b <= std::min(truncated + 1, most_b); ++b) {
            const Choice choice{
                std::abs(rest - b * cost_b), std::abs(a) + std::abs(b), class_a, class_b, a, b};
            if (std::pair(choice.left, choice.moves) < std::pair(best.left, best.moves)) best = choice;
          }
        }
      }
    }
    move_class(costs_[best.class_a], best.a);
    move_class(costs_[best.class_b], best.b);
  }

 private:
  /// Matrices that can move in `direction` and whose cost satisfies `wanted`, the most willing first.
  template <class Predicate>
  std::vector<std::size_t> movable(Index direction, Predicate wanted) const {
    std::vector<std::size_t> order;
    for (std::size_t l = 0; l < targets_.size(); ++l) {
      const Index next = profile_.factor_ranks[l] + direction;
      if (next >= 1 && next <= largest_rank(profile_.matrices[l]) && wanted(rank_cost(profile_.matrices[l])))
        order.push_back(l);
    }
    const auto reluctance = [&](std::size_t l) {
      return static_cast<double>(direction) * (static_cast<double>(profile_.factor_ranks[l]) - targets_[l]);
    };
    std::ranges::stable_sort(order, {}, reluctance);
    return order;
  }

  Index room(Index cost, Index direction) const {
    return std::ssize(movable(direction, [cost](Index c) { return c == cost; }));
  }

  void move(std::size_t l, Index direction) {
    profile_.factor_ranks[l] += direction;
    unspent_ -= direction * rank_cost(profile_.matrices[l]);
  }

  void move_class(Index cost, Index moves) {
    const Index direction = moves > 0 ? 1 : -1;
    const auto order = movable(direction, [cost](Index c) { return c == cost; });
    for (Index i = 0; i < std::abs(moves); ++i) move(order[static_cast<std::size_t>(i)], direction);
  }

  RankProfile& profile_;
  std::vector<double> targets_;
  Index unspent_;  // budget - B(r)
  std::vector<Index> costs_;
};

}  // namespace

RankProfile matched_to(const ProfileSpec& spec, const RankProfile& reference) {
  const std::vector<ParameterInfo>& matrices = reference.matrices;
  ProfileSpec shape = spec;
  shape.scale = 1.0;
  // Uniform ranks keep their shape under any scale: rank 1 stands for all of them.
  if (shape.kind == ProfileSpec::Kind::kUniform) shape.uniform_rank = 1;
  check_spec(shape, matrices);
  LB_EXPECTS(!matrices.empty(), "profile: found no layer matrix, expected at least one");

  const auto scaled_ranks = [&](double scale) {
    std::vector<double> ranks;
    for (const ParameterInfo& matrix : matrices) {
      const auto limit = static_cast<double>(largest_rank(matrix));
      ranks.push_back(std::clamp(scale * unscaled_rank(shape, matrix), 1.0, limit));
    }
    return ranks;
  };
  const auto real_budget = [&](const std::vector<double>& ranks) {
    double sum = 0;
    for (std::size_t l = 0; l < matrices.size(); ++l)
      sum += ranks[l] * static_cast<double>(rank_cost(matrices[l]));
    return sum;
  };

  // B(scale) rises from "every rank 1" to "every rank min(m, n)": bisection, to the last bit of a double.
  const Index budget = factor_elements(reference);
  double below = 0, above = 0;
  for (const ParameterInfo& matrix : matrices)
    above = std::max(above, static_cast<double>(largest_rank(matrix)) / unscaled_rank(shape, matrix));
  for (int halving = 0; halving < 200; ++halving) {
    const double middle = 0.5 * (below + above);
    (real_budget(scaled_ranks(middle)) < static_cast<double>(budget) ? below : above) = middle;
  }

  std::vector<double> targets = scaled_ranks(above);
  std::string shape_name = shape.kind == ProfileSpec::Kind::kUniform ? "uniform" : spec_name(shape);
  RankProfile profile{cat(shape_name, " matched to ", reference.name), matrices, {}};
  for (const double target : targets) profile.factor_ranks.push_back(std::llround(target));
  BudgetFit fit(profile, std::move(targets), budget);
  fit.move_single_ranks();
  fit.scan_cost_classes();
  return profile;
}

}  // namespace lowband
