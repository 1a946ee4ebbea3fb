#pragma once

#include "optimizers/options.h"
#include "sharding/parameter.h"

#include <cstdint>
#include <vector>

namespace lowband::test {

/// A matrix in double with the plainest arithmetic there is.
struct Dense {
  Index rows = 0;
  Index cols = 0;
  std::vector<double> a;

  Dense() = default;
  Dense(Index rows_, Index cols_) : rows(rows_), cols(cols_), a(static_cast<std::size_t>(rows_ * cols_)) {}
  double& operator()(Index i, Index j) { return a[static_cast<std::size_t>(i * cols + j)]; }
  double operator()(Index i, Index j) const { return a[static_cast<std::size_t>(i * cols + j)]; }
};

Dense transpose(const Dense& x);
Dense operator*(const Dense& x, const Dense& y);
Dense operator*(double s, const Dense& x);
Dense operator+(const Dense& x, const Dense& y);
Dense operator-(const Dense& x, const Dense& y);
double norm(const Dense& x);     // Frobenius
double largest(const Dense& x);  // max |x_ij|, NaN where there is one

/// Q of the QR factorisation by Gram-Schmidt, each column swept twice; a column of which less than 1e-5
/// remains is dead and becomes zero.
Dense orthonormal_factor(Dense x, std::vector<bool>& dead);

/// What a replica keeps of B after a step. kNoFeedback forgets what was not sent: M = mu P R^T.
enum class Kept { kLocal, kAggregated, kNoFeedback };

/// What the published algorithms do with one matrix up to the factors, replicas side by side in one process:
/// algorithms.md 2.7, steps 1 to 5, and 2.9, 1 to 6. Shares nothing with the production code but the random
/// numbers of Q.
struct ReferenceFactors {
  ReferenceFactors(const ParameterInfo& info, Index factor_rank, int replicas, std::uint64_t seed);

  /// B, P, R_own and R from the states and the gradients.
  void exchange(const std::vector<Dense>& gradients);
  /// L R^T in the orientation of the weights.
  Dense product(const Dense& left, const Dense& right) const;
  /// Dead columns of Q <- unit vectors.
  void refill(Index step_number);

  ParameterInfo info;
  Index factor_rank;
  std::uint64_t seed;
  Dense W;
  std::vector<Dense> S;  // (m, n), one for each replica: M or e
  Dense Q;               // (min(m, n), r)
  std::vector<Dense> B, R_own;
  Dense P, R;
  std::vector<bool> dead;
  Index dead_columns = 0;
};

/// Dion, steps 6 to 9.
struct ReferenceDion : ReferenceFactors {
  using ReferenceFactors::ReferenceFactors;
  void step(const std::vector<Dense>& gradients, Index step_number, double learning_rate);

  double mu = 0.95;
  double weight_decay = 0;
  Kept kept = Kept::kLocal;
};

/// PowerSGD, steps 7 and 8, with the gradient that it applies multiplied by `update_scale`.
struct ReferencePowerSgd : ReferenceFactors {
  ReferencePowerSgd(const ParameterInfo& info, Index factor_rank, int replicas, std::uint64_t seed);
  void step(const std::vector<Dense>& gradients, Index step_number, double learning_rate,
            double update_scale = 1);

  double lambda = 0.9;
  double weight_decay = 0;
  Kept kept = Kept::kLocal;
  Dense u;
};

/// p(p(... U ...)), p(X) = a X + (b A + c A^2) X with A = X X^T, from U / (safety |U| + eps).
Dense reference_sign(const Dense& u, SignPolynomial polynomial);

/// Muon on one matrix, algorithms.md 2.4
struct ReferenceMuon {
  explicit ReferenceMuon(Dense weight) : W(weight), M(weight.rows, weight.cols) {}
  void step(const Dense& gradient, double learning_rate);

  double mu = 0.95, weight_decay = 0;
  bool nesterov = false;
  bool normalises_rows = false;  // NorMuon, algorithms.md 2.6
  double beta2 = 0.95;
  std::vector<double> v = {};
  SignPolynomial polynomial = SignPolynomial::kPolarExpress5;
  UpdateScale scale = UpdateScale::kRmsToRms;
  Dense W, M;
};

/// AdamW on one array.
struct ReferenceAdamW {
  explicit ReferenceAdamW(Dense weight);
  void step(const Dense& gradient, double learning_rate);

  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
  Dense W, m, v;
  int t = 0;
};

/// algorithms.md 2.1
struct ReferenceSgd {
  explicit ReferenceSgd(Dense weight) : W(weight), v(weight.rows, weight.cols) {}
  void step(const Dense& gradient, double learning_rate);

  double mu = 0.9, weight_decay = 0;
  bool nesterov = false;
  Dense W, v;
};

/// algorithms.md 2.3
struct ReferenceLion {
  explicit ReferenceLion(Dense weight) : W(weight), m(weight.rows, weight.cols) {}
  void step(const Dense& gradient, double learning_rate);

  double beta1 = 0.9, beta2 = 0.99, weight_decay = 0;
  Dense W, m;
};

}  // namespace lowband::test
