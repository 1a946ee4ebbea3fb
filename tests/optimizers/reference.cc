#include "reference.h"

#include "runtime/random.h"

#include <algorithm>
#include <cmath>

namespace lowband::test {

Dense transpose(const Dense& x) {
  Dense y(x.cols, x.rows);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < x.cols; ++j) y(j, i) = x(i, j);
  }
  return y;
}

Dense operator*(const Dense& x, const Dense& y) {
  Dense z(x.rows, y.cols);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index k = 0; k < x.cols; ++k) {
      for (Index j = 0; j < y.cols; ++j) z(i, j) += x(i, k) * y(k, j);
    }
  }
  return z;
}

Dense operator*(double s, const Dense& x) {
  Dense y = x;
  for (double& value : y.a) value *= s;
  return y;
}

Dense operator+(const Dense& x, const Dense& y) {
  Dense z = x;
  for (std::size_t k = 0; k < z.a.size(); ++k) z.a[k] += y.a[k];
  return z;
}

Dense operator-(const Dense& x, const Dense& y) { return x + (-1.0) * y; }

double norm(const Dense& x) {
  double squares = 0;
  for (const double value : x.a) squares += value * value;
  return std::sqrt(squares);
}

double largest(const Dense& x) {
  double result = 0;
  for (const double value : x.a) {
    if (!(std::abs(value) <= result)) result = std::abs(value);
  }
  return result;
}

namespace {

double column_norm(const Dense& x, Index j) {
  double squares = 0;
  for (Index i = 0; i < x.rows; ++i) squares += x(i, j) * x(i, j);
  return std::sqrt(squares);
}

}  // namespace

Dense orthonormal_factor(Dense x, std::vector<bool>& dead) {
  dead.assign(static_cast<std::size_t>(x.cols), false);
  for (Index j = 0; j < x.cols; ++j) {
    const double before = column_norm(x, j);
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (Index k = 0; k < j; ++k) {
        double dot = 0;
        for (Index i = 0; i < x.rows; ++i) dot += x(i, k) * x(i, j);
        for (Index i = 0; i < x.rows; ++i) x(i, j) -= dot * x(i, k);
      }
    }
    const double after = column_norm(x, j);
    dead[static_cast<std::size_t>(j)] = after <= 1e-5 * before;
    for (Index i = 0; i < x.rows; ++i) x(i, j) = dead[static_cast<std::size_t>(j)] ? 0.0 : x(i, j) / after;
  }
  return x;
}

ReferenceFactors::ReferenceFactors(const ParameterInfo& info_, Index factor_rank_, int replicas,
                                   std::uint64_t seed_)
    : info(info_),
      factor_rank(factor_rank_),
      seed(seed_),
      W(info_.rows, info_.cols),
      S(static_cast<std::size_t>(replicas), Dense(info_.rows, info_.cols)),
      Q(std::min(info_.rows, info_.cols), factor_rank_) {
  const RandomStream stream(seed, info.name + ".Q", 0);
  for (std::size_t k = 0; k < Q.a.size(); ++k) Q.a[k] = stream.normal(static_cast<Index>(k));
}

void ReferenceFactors::exchange(const std::vector<Dense>& gradients) {
  const bool tall = info.rows >= info.cols;
  const double replicas = static_cast<double>(gradients.size());
  B.clear();
  R_own.clear();
  Dense P_mean;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const Dense sum = S[i] + gradients[i];
    B.push_back(tall ? sum : transpose(sum));
    P_mean = i == 0 ? B[i] * Q : P_mean + B[i] * Q;
  }
  P = orthonormal_factor((1 / replicas) * P_mean, dead);
  dead_columns = std::count(dead.begin(), dead.end(), true);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    R_own.push_back(transpose(B[i]) * P);
    R = i == 0 ? R_own[i] : R + R_own[i];
  }
  R = (1 / replicas) * R;
}

Dense ReferenceFactors::product(const Dense& left, const Dense& right) const {
  const Dense product = left * transpose(right);
  return info.rows >= info.cols ? product : transpose(product);
}

void ReferenceFactors::refill(Index step_number) {
  const RandomStream stream(seed, info.name + ".Q", step_number + 1);
  for (Index j = 0; j < factor_rank; ++j) {
    if (!dead[static_cast<std::size_t>(j)]) continue;
    for (Index i = 0; i < Q.rows; ++i) Q(i, j) = stream.normal(i * factor_rank + j);
    const double scale = column_norm(Q, j);
    for (Index i = 0; i < Q.rows; ++i) Q(i, j) /= scale;
  }
}

void ReferenceDion::step(const std::vector<Dense>& gradients, Index step_number, double learning_rate) {
  exchange(gradients);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const Dense B_i = info.rows >= info.cols ? B[i] : transpose(B[i]);
    S[i] = B_i - (1 - mu) * product(P, kept == Kept::kLocal ? R_own[i] : R);
    if (kept == Kept::kNoFeedback) S[i] = mu * product(P, R_own[i]);
  }
  for (Index j = 0; j < factor_rank; ++j) {
    const double scale = column_norm(R, j) + 1e-8;
    for (Index i = 0; i < Q.rows; ++i) Q(i, j) = R(i, j) / scale;
  }
  const double eta =
      learning_rate * std::sqrt(static_cast<double>(info.rows) / static_cast<double>(info.cols));
  W = (1 - learning_rate * weight_decay) * W - eta * product(P, Q);
  refill(step_number);
}

ReferencePowerSgd::ReferencePowerSgd(const ParameterInfo& info_, Index factor_rank_, int replicas,
                                     std::uint64_t seed_)
    : ReferenceFactors(info_, factor_rank_, replicas, seed_), u(info_.rows, info_.cols) {}

void ReferencePowerSgd::step(const std::vector<Dense>& gradients, Index step_number, double learning_rate,
                             double update_scale) {
  exchange(gradients);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const Dense B_i = info.rows >= info.cols ? B[i] : transpose(B[i]);
    S[i] = B_i - product(P, kept == Kept::kLocal ? R_own[i] : R);
  }
  Q = R;
  const Dense D = update_scale * product(P, R);
  u = lambda * u + D;
  W = (1 - learning_rate * weight_decay) * W - learning_rate * (D + u);
  refill(step_number);
}

ReferenceAdamW::ReferenceAdamW(Dense weight) : W(std::move(weight)), m(W.rows, W.cols), v(W.rows, W.cols) {}

void ReferenceAdamW::step(const Dense& gradient, double learning_rate) {
  ++t;
  for (std::size_t k = 0; k < W.a.size(); ++k) {
    const double g = gradient.a[k];
    m.a[k] = beta1 * m.a[k] + (1 - beta1) * g;
    v.a[k] = beta2 * v.a[k] + (1 - beta2) * g * g;
    const double m_hat = m.a[k] / (1 - std::pow(beta1, t));
    const double v_hat = v.a[k] / (1 - std::pow(beta2, t));
    W.a[k] =
        (1 - learning_rate * weight_decay) * W.a[k] - learning_rate * m_hat / (std::sqrt(v_hat) + epsilon);
  }
}

Dense reference_sign(const Dense& u, SignPolynomial polynomial) {
  struct Abc {
    double a, b, c;
  };
  std::vector<Abc> steps(5, {3.4445, -4.7750, 2.0315});
  double divisor = norm(u) + 1e-7;
  if (polynomial == SignPolynomial::kPolarExpress5) {
    steps = {{8.156554524902461, -22.48329292557795, 15.878769915207462},
             {4.042929935166739, -2.808917465908714, 0.5000178451051316},
             {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
             {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
             {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};
    divisor = 1.02 * norm(u) + 1e-8;
  } else if (polynomial == SignPolynomial::kPolarExpress8) {
    steps = {{8.2051, -22.9019, 16.4607}, {4.0664, -2.8612, 0.5184}, {3.9096, -2.8234, 0.5250},
             {3.2856, -2.4153, 0.4853},   {2.2779, -1.6198, 0.3985}, {1.8726, -1.2307, 0.3585},
             {1.8564, -1.2132, 0.3568},   {1.8750, -1.2500, 0.3750}};
    divisor = norm(u) + 1e-15;
  }
  Dense X = (1 / divisor) * u;
  for (const auto& [a, b, c] : steps) {
    const Dense A = X * transpose(X);
    X = a * X + (b * A + c * (A * A)) * X;
  }
  return X;
}

void ReferenceMuon::step(const Dense& gradient, double learning_rate) {
  M = mu * M + gradient;
  const double m = static_cast<double>(W.rows), n = static_cast<double>(W.cols);
  double c = 1;
  if (scale == UpdateScale::kRmsToRms) c = std::sqrt(m / n);
  if (scale == UpdateScale::kAdamRms) c = 0.2 * std::sqrt(std::max(m, n));
  if (scale == UpdateScale::kShape) c = std::sqrt(std::max(1.0, m / n));
  Dense U = reference_sign(nesterov ? gradient + mu * M : M, polynomial);
  if (normalises_rows) {
    const double before = norm(U);
    v.resize(static_cast<std::size_t>(W.rows));
    for (Index i = 0; i < W.rows; ++i) {
      double squares = 0;
      for (Index j = 0; j < W.cols; ++j) squares += U(i, j) * U(i, j);
      double& mean = v[static_cast<std::size_t>(i)];
      mean = beta2 * mean + (1 - beta2) * squares / n;
      for (Index j = 0; j < W.cols; ++j) U(i, j) /= std::sqrt(mean) + 1e-8;
    }
    U = (before / norm(U)) * U;
  }
  W = (1 - learning_rate * weight_decay) * W - learning_rate * c * U;
}

void ReferenceSgd::step(const Dense& gradient, double learning_rate) {
  v = mu * v + gradient;
  W = (1 - learning_rate * weight_decay) * W - learning_rate * (nesterov ? gradient + mu * v : v);
}

void ReferenceLion::step(const Dense& gradient, double learning_rate) {
  const Dense u = beta1 * m + (1 - beta1) * gradient;
  m = beta2 * m + (1 - beta2) * gradient;
  W = (1 - learning_rate * weight_decay) * W;
  for (std::size_t k = 0; k < W.a.size(); ++k)
    W.a[k] -= learning_rate * static_cast<double>((u.a[k] > 0) - (u.a[k] < 0));
}

}  // namespace lowband::test
