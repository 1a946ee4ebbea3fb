#include "collectives/factors/orthonormalise.h"

#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace lowband {
namespace {

/// Largest deviation of the second Gram matrix from I that the second pass repairs to rounding. Seen at most
/// 7.5e-3 where the first pass was meaningful, above 0.8 where it was not (numerics.md 3.4).
constexpr double kLargestDeviation = 0.1;

Index triangle_elements(Index n) { return n * (n + 1) / 2; }

// max |x|, infinity when an element is not finite. Sixteen running maxima fill vector registers; x - x is 0
// for a finite x and NaN otherwise, and a NaN survives the sum.
template <class Real>
double largest_magnitude(MatrixView<const Real> p) {
  constexpr std::size_t kRunning = 16;
  Real largest[kRunning] = {};
  Real not_finite[kRunning] = {};
  const std::span<const Real> x = p.flat();
  const std::size_t whole = x.size() / kRunning * kRunning;
  for (std::size_t i = 0; i < whole; i += kRunning) {
    for (std::size_t l = 0; l < kRunning; ++l) {
      const Real magnitude = std::abs(x[i + l]);
      largest[l] = magnitude > largest[l] ? magnitude : largest[l];
      not_finite[l] += magnitude - magnitude;
    }
  }
  for (std::size_t i = whole; i < x.size(); ++i) {
    largest[0] = std::max(largest[0], std::abs(x[i]));
    not_finite[0] += x[i] - x[i];
  }
  const Real sum = std::accumulate(not_finite, not_finite + kRunning, Real{0});
  if (!(sum == Real{0})) return std::numeric_limits<double>::infinity();
  return static_cast<double>(*std::max_element(largest, largest + kRunning));
}

void pack_triangle(MatrixView<const double> square, double* triangle) {
  for (Index i = 0; i < square.rows; ++i)
    triangle = std::copy(square.row(i) + i, square.row(i) + square.cols, triangle);
}

void unpack_triangle(const double* triangle, MatrixView<double> square) {
  for (Index i = 0; i < square.rows; ++i) {
    for (Index j = i; j < square.cols; ++j) square(i, j) = square(j, i) = *triangle++;
  }
}

/// max |G - I| over pairs of live columns; NaN counts as infinite.
double deviation_from_identity(MatrixView<const double> g, std::span<const std::uint8_t> dead) {
  double deviation = 0;
  for (Index i = 0; i < g.rows; ++i) {
    if (dead[static_cast<std::size_t>(i)]) continue;
    for (Index j = i; j < g.cols; ++j) {
      if (dead[static_cast<std::size_t>(j)]) continue;
      const double entry = std::abs(g(i, j) - (i == j ? 1.0 : 0.0));
      if (!(entry <= deviation))
        deviation = std::isnan(entry) ? std::numeric_limits<double>::infinity() : entry;
    }
  }
  return deviation;
}

/// max over j of sum over i of d_i |U^-1|_ij, where d_i is the norm of column i of U; infinity where it is
/// not finite.
double amplification(MatrixView<const double> u) {
  std::vector<double> norms(static_cast<std::size_t>(u.cols)), x(norms.size());
  const auto at = [](std::vector<double>& v, Index i) -> double& { return v[static_cast<std::size_t>(i)]; };
  for (Index j = 0; j < u.cols; ++j) {
    double squares = 0;
    for (Index i = 0; i <= j; ++i) squares += u(i, j) * u(i, j);
    at(norms, j) = std::sqrt(squares);
  }
  double largest = 0;
  for (Index j = 0; j < u.cols; ++j) {  // U x = e_j, from below
    double sum = 0;
    for (Index i = j; i >= 0; --i) {
      double rest = i == j ? 1 : 0;
      for (Index k = i + 1; k <= j; ++k) rest -= u(i, k) * at(x, k);
      at(x, i) = rest / u(i, i);
      sum += at(norms, i) * std::abs(at(x, i));
    }
    if (!(sum <= largest)) largest = std::isnan(sum) ? std::numeric_limits<double>::infinity() : sum;
  }
  return largest;
}

/// Whether live columns are finite and their largest elements not denormal, so that what was rounded is
/// relative to them. A follower is a product of second order in B and leaves that range first.
template <class Real>
bool columns_are_normal(MatrixView<const Real> f, std::span<const std::uint8_t> dead) {
  std::vector<Real> largest(static_cast<std::size_t>(f.cols));
  for (Index i = 0; i < f.rows; ++i) {
    for (Index j = 0; j < f.cols; ++j) {
      const Real magnitude = std::abs(f(i, j));
      if (!(magnitude <= std::numeric_limits<Real>::max())) return false;
      largest[static_cast<std::size_t>(j)] = std::max(largest[static_cast<std::size_t>(j)], magnitude);
    }
  }
  for (std::size_t j = 0; j < largest.size(); ++j) {
    if (!dead[j] && largest[j] < std::numeric_limits<Real>::min()) return false;
  }
  return true;
}

template <class Real>
void solve_live(MatrixView<Real> p, MatrixView<const double> u, std::span<const std::uint8_t> dead) {
  solve_upper_right<Real>(p, u);
  for (Index j = 0; j < p.cols; ++j) {
    if (dead[static_cast<std::size_t>(j)]) fill<Real>(Real{0}, p.block(0, p.rows, j, 1));
  }
}

}  // namespace

template <class Real>
Orthonormaliser<Real>::Orthonormaliser(Communicator& group, std::vector<MatrixView<Real>> blocks,
                                       std::vector<MatrixView<Real>> followers)
    : group_(&group) {
  // Rows of every matrix on every process: (processes, matrices)
  const Index matrices = static_cast<Index>(blocks.size());
  Buffer<Index> own_rows(matrices);
  Buffer<Index> all_rows(matrices * group.size());
  for (Index i = 0; i < matrices; ++i) own_rows[i] = blocks[static_cast<std::size_t>(i)].rows;
  const std::vector<Index> counts(static_cast<std::size_t>(group.size()), matrices);
  group.all_gather(std::as_const(own_rows).span(), all_rows.span(), std::span(counts), {Purpose::kControl});

  Index triangles = 0, outcomes = 0;
  Index widest = 0;
  for (Index i = 0; i < matrices; ++i) {
    const MatrixView<Real> p = blocks[static_cast<std::size_t>(i)];
    Block block;
    block.p = p;
    LB_EXPECTS(i == 0 || p.device == device_, "orthonormalise: matrix ", i, " lies in another place than 0");
    device_ = p.device;
    if (!followers.empty()) block.follower = followers[static_cast<std::size_t>(i)];
    LB_EXPECTS(block.follower.data == nullptr || group.size() == 1, "orthonormalise: matrix ", i,
               " has a follower in a group of ", group.size(), " processes, expected a group of one");
    for (int process = 0; process < group.size(); ++process)
      block.elements_of.push_back(all_rows[process * matrices + i] * p.cols);
    const Index elements = std::reduce(block.elements_of.begin(), block.elements_of.end());
    LB_EXPECTS(elements >= p.cols * p.cols, "orthonormalise: matrix ", i, " has ", elements / p.cols,
               " rows and ", p.cols, " columns, expected at least as many rows as columns");
    block.triangle_offset = triangles;
    block.scaled = Buffer<Real>(p.elements(), p.device);
    block.dead.resize(static_cast<std::size_t>(p.cols));
    block.outcome_offset = outcomes;
    outcomes += 1 + p.cols;
    triangles += triangle_elements(p.cols);
    widest = std::max(widest, p.cols);
    blocks_.push_back(std::move(block));
  }
  largest_ = Buffer<double>(matrices);
  square_ = Buffer<double>(widest * widest);
  if (group.size() > 1) triangles_ = Buffer<double>(triangles);
  if (group.size() == 1 && device_ != nullptr) outcomes_there_ = Buffer<Real>(outcomes, device_);
}

// For every matrix, with G and U (r, r) in double:
//   P <- 2^-e P, so that max |P| is near 1             G neither overflows nor underflows
//   twice: G <- sum over processes of P^T P ; U <- cholesky(G) ; P <- P U^-1 ; dead columns <- 0
// The second G measures how far the first pass was off: P^T P = I + E becomes I + O(|E| u). Where it was too
// far off, P is restored and factorised by Householder reflections.
template <class Real>
void Orthonormaliser<Real>::run_together(std::span<Block> blocks) {
  scale_to_unit(blocks);
  for (const bool second : {false, true}) {
    sum_grams(blocks);
    for (Block& block : blocks) {
      if (block.factorisable() && block.accurate) cholesky_pass(block, second);
    }
  }
  for (Block& block : blocks) {
    if (!block.accurate) householder(block);
  }
}

template <class Real>
void Orthonormaliser<Real>::run(Index count) {
  if (group_->size() == 1) {
    run_on_device(count);
    while (run_next(count)) continue;
  } else if (next_ < count) {
    run_together(
        std::span(blocks_).subspan(static_cast<std::size_t>(next_), static_cast<std::size_t>(count - next_)));
    next_ = count;
  }
}

// Whole batches of a device that does all of it, from double sums of float: nothing is scaled first.
template <class Real>
void Orthonormaliser<Real>::run_on_device(Index count) {
  if constexpr (kOnDevices<Real>) {
    if (device_ == nullptr || next_ >= count) return;
    const std::span<Block> blocks =
        std::span(blocks_).subspan(static_cast<std::size_t>(next_), static_cast<std::size_t>(count - next_));
    std::vector<MatrixView<float>> matrices;
    std::vector<float*> outcomes;
    for (Block& block : blocks) {
      matrices.push_back(block.p);
      outcomes.push_back(outcomes_there_.data() + block.outcome_offset);
      block.followed = false;
    }
    device_->orthonormalise(matrices, kDeadColumnTolerance, outcomes);
    told_ = false;
    next_ = count;
  }
}

template <class Real>
const typename Orthonormaliser<Real>::Block& Orthonormaliser<Real>::told(Index i) const {
  if (!told_) {
    const OnHost<Real> numbers(outcomes_there_.line());
    for (Block& block : blocks_) {
      const Real* const own = numbers.view().data + block.outcome_offset;
      block.factorisation = static_cast<Factorisation>(own[0]);
      for (std::size_t j = 0; j < block.dead.size(); ++j) block.dead[j] = own[1 + j] != Real{0};
    }
    told_ = true;
  }
  return at(i);
}

template <class Real>
void Orthonormaliser<Real>::copy_outcome(Index i, MatrixView<Real> to) const {
  if (outcomes_there_.size() > 0) return copy<Real>(outcome_there(at(i)), to);
  Buffer<Real> numbers(1 + at(i).p.cols);
  numbers[0] = static_cast<Real>(at(i).factorisation);
  std::ranges::copy(at(i).dead, numbers.data() + 1);
  copy<Real>(numbers.line(), to);
}

template <class Real>
bool Orthonormaliser<Real>::run_next(Index count) {
  if (group_->size() > 1 || next_ >= count || device_ != nullptr) return false;
  run_together(std::span(blocks_).subspan(static_cast<std::size_t>(next_), 1));
  ++next_;
  return true;
}

// Of a device's matrices their norms, which are zero or not finite in the same cases.
template <class Real>
void Orthonormaliser<Real>::find_largest(std::span<const Block> blocks, std::span<double> largest) {
  if constexpr (kOnDevices<Real>) {
    if (device_ != nullptr) {
      std::vector<MatrixView<const float>> matrices;
      for (const Block& block : blocks) matrices.push_back(block.p);
      Buffer<double> squares(std::ssize(largest), device_);
      device_->sums_of_squares(matrices, false, squares.data());
      copy<double>(squares.line(), MatrixView<double>(largest.data(), 1, squares.size()));
      for (double& x : largest) x = std::isfinite(x) ? x : std::numeric_limits<double>::infinity();
      return;
    }
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) largest[i] = largest_magnitude<Real>(blocks[i].p);
}

template <class Real>
void Orthonormaliser<Real>::scale_to_unit(std::span<Block> blocks) {
  const std::span<double> all_largest = largest_.span(0, static_cast<Index>(blocks.size()));
  find_largest(blocks, all_largest);
  if (group_->size() > 1) group_->all_reduce(all_largest, Reduction::kMax, {Purpose::kControl});

  for (std::size_t i = 0; i < blocks.size(); ++i) {
    Block& block = blocks[i];
    const double largest = all_largest[i];
    const bool zero = largest == 0;
    block.factorisation = zero                  ? Factorisation::kZero
                          : std::isinf(largest) ? Factorisation::kNonFinite
                                                : Factorisation::kCholesky;
    block.accurate = true;
    block.followed = zero && block.follower.data != nullptr;  // F = B^T 0
    std::fill(block.dead.begin(), block.dead.end(), std::uint8_t{zero});
    if (!block.factorisable()) continue;
    if (device_ != nullptr) {  // whose sums are in double: no square of a float leaves their range
      block.unit_scale = {1, 1};
      copy<Real>(block.p, block.scaled.matrix(0, block.p.rows, block.p.cols));
      continue;
    }
    // In two factors: 2^-e itself overflows for a denormal maximum.
    int exponent = 0;
    std::frexp(largest, &exponent);
    const Real first = std::ldexp(Real{1}, -(exponent / 2));
    const Real second = std::ldexp(Real{1}, -(exponent - exponent / 2));
    Real* const scaled = block.scaled.data();
    for (Index k = 0; k < block.p.elements(); ++k)
      scaled[k] = block.p.data[k] = block.p.data[k] * first * second;
    block.unit_scale = {first, second};
  }
}

template <class Real>
void Orthonormaliser<Real>::sum_grams(std::span<Block> blocks) {
  if (group_->size() == 1) return;  // each pass computes its own
  for (const Block& block : blocks) {
    const Index r = block.p.cols;
    double* triangle = triangles_.data() + block.triangle_offset;
    if (!block.factorisable() || !block.accurate) {
      std::fill_n(triangle, triangle_elements(r), 0.0);
      continue;
    }
    const MatrixView<double> g = square_.matrix(0, r, r);
    gram<Real>(block.p, g);
    pack_triangle(g, triangle);
  }
  group_->all_reduce(triangles_.span(), Reduction::kSum, {Purpose::kControl});
}

template <class Real>
void Orthonormaliser<Real>::cholesky_pass(Block& block, bool second) {
  const Index r = block.p.cols;
  const MatrixView<double> g = square_.matrix(0, r, r);
  if (group_->size() == 1) {
    gram<Real>(block.p, g);
  } else {
    unpack_triangle(triangles_.data() + block.triangle_offset, g);
  }
  if (second && deviation_from_identity(g, block.dead) > kLargestDeviation) {
    block.accurate = block.followed = false;
    return;
  }
  // A column that the first pass found dead is zero now, and found dead again.
  cholesky_with_dead_columns(g, kDeadColumnTolerance, block.dead);
  solve_live<Real>(block.p, g, block.dead);
  if (block.follower.data == nullptr) return;
  if (!second) {
    block.followed =
        columns_are_normal<Real>(block.follower, block.dead) && amplification(g) <= kLargestAmplification;
    scale<Real>(block.unit_scale[0], block.follower);
    scale<Real>(block.unit_scale[1], block.follower);
  }
  if (block.followed) solve_live<Real>(block.follower, g, block.dead);
}

template <class Real>
void Orthonormaliser<Real>::householder(Block& block) {
  const Index r = block.p.cols;
  const Index elements = std::reduce(block.elements_of.begin(), block.elements_of.end());
  // Allocated here: this path is taken for a few matrices of the first steps, if ever.
  Buffer<Real> gathered(elements, device_);
  if (group_->size() == 1) {
    copy<Real>(block.scaled.line(), gathered.line());
  } else {
    group_->all_gather(std::as_const(block.scaled).span(), gathered.span(),
                       std::span<const Index>(block.elements_of), {Purpose::kFactor});
  }
  // Rows come in the order of processes, not of the matrix: QR of permuted rows is the permuted factor.
  householder_orthonormalise<Real>(gathered.matrix(0, elements / r, r), kDeadColumnTolerance, block.dead);
  const Index before = std::reduce(block.elements_of.begin(), block.elements_of.begin() + group_->process());
  copy<Real>(gathered.matrix(before, block.p.rows, block.p.cols), block.p);
  block.factorisation = Factorisation::kHouseholder;
}

template class Orthonormaliser<float>;
template class Orthonormaliser<double>;

}  // namespace lowband
