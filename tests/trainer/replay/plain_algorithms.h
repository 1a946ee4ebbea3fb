#pragma once

#include "runtime/types.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace lowband::test {

// Dion, PowerSGD and AdamW on whole matrices in double, replicas side by side, with loops over the entries of
// the published formulas. Shares nothing with the production code, random numbers included: the first Q is
// given.

/// Row-major, rows x cols.
struct Plain {
  Index rows = 0;
  Index cols = 0;
  std::vector<double> x;

  Plain() = default;
  Plain(Index rows_, Index cols_) : rows(rows_), cols(cols_), x(static_cast<std::size_t>(rows_ * cols_)) {}
  double& at(Index i, Index j) { return x[static_cast<std::size_t>(i * cols + j)]; }
  double at(Index i, Index j) const { return x[static_cast<std::size_t>(i * cols + j)]; }
};

inline Plain transposed(const Plain& a) {
  Plain b(a.cols, a.rows);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j) b.at(j, i) = a.at(i, j);
  }
  return b;
}

inline Plain product(const Plain& a, const Plain& b) {
  Plain c(a.rows, b.cols);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < b.cols; ++j) {
      for (Index k = 0; k < a.cols; ++k) c.at(i, j) += a.at(i, k) * b.at(k, j);
    }
  }
  return c;
}

/// a <- s a + t b
inline void combine(double s, Plain& a, double t, const Plain& b) {
  for (std::size_t k = 0; k < a.x.size(); ++k) a.x[k] = s * a.x[k] + t * b.x[k];
}

inline double column_norm(const Plain& a, Index j) {
  double squares = 0;
  for (Index i = 0; i < a.rows; ++i) squares += a.at(i, j) * a.at(i, j);
  return std::sqrt(squares);
}

/// qf(A): Gram-Schmidt with a second sweep.
inline Plain orthonormal(Plain a) {
  for (Index j = 0; j < a.cols; ++j) {
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (Index k = 0; k < j; ++k) {
        double dot = 0;
        for (Index i = 0; i < a.rows; ++i) dot += a.at(i, k) * a.at(i, j);
        for (Index i = 0; i < a.rows; ++i) a.at(i, j) -= dot * a.at(i, k);
      }
    }
    const double norm = column_norm(a, j);
    for (Index i = 0; i < a.rows; ++i) a.at(i, j) /= norm;
  }
  return a;
}

/// One matrix of Dion or PowerSGD with the local residual.
struct PlainMatrix {
  bool power_sgd = false;
  double mu = 0.95, lambda = 0.9, weight_decay = 0;
  Plain W, Q, u;
  std::vector<Plain> S;  // M or e of every replica

  double captured = 0, drift = 0;  // of the last step, as MatrixDiagnostics

  void step(const std::vector<Plain>& gradients, double eta) {
    const bool tall = W.rows >= W.cols;
    const double share = 1.0 / static_cast<double>(gradients.size());
    Plain P(std::max(W.rows, W.cols), Q.cols), R(std::min(W.rows, W.cols), Q.cols), B_mean(W.rows, W.cols);
    std::vector<Plain> B;
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      combine(1, S[i], 1, gradients[i]);
      combine(1, B_mean, share, S[i]);
      B.push_back(tall ? S[i] : transposed(S[i]));
      combine(1, P, share, product(B[i], Q));
    }
    P = orthonormal(P);
    Plain S_mean(W.rows, W.cols);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      const Plain R_i = product(transposed(B[i]), P);
      combine(1, R, share, R_i);
      combine(1, S[i], power_sgd ? -1 : mu - 1, oriented(P, R_i));
      combine(1, S_mean, share, S[i]);
    }
    measure(B_mean, S_mean, R);
    const double decay = 1 - eta * weight_decay;
    if (power_sgd) {
      Q = R;
      combine(lambda, u, 1, oriented(P, R));
      combine(decay, W, -eta, oriented(P, R));
      combine(1, W, -eta, u);
      return;
    }
    Q = R;
    for (Index j = 0; j < Q.cols; ++j) {
      const double norm = column_norm(R, j) + 1e-8;
      for (Index i = 0; i < Q.rows; ++i) Q.at(i, j) /= norm;
    }
    const double aspect = std::sqrt(static_cast<double>(W.rows) / static_cast<double>(W.cols));
    combine(decay, W, -eta * aspect, oriented(P, Q));
  }

 private:
  Plain oriented(const Plain& P, const Plain& R) const {
    const Plain whole = product(P, transposed(R));
    return W.rows >= W.cols ? whole : transposed(whole);
  }
  void measure(const Plain& B_mean, const Plain& S_mean, const Plain& R) {
    const auto squares = [](const Plain& a) {
      double sum = 0;
      for (const double v : a.x) sum += v * v;
      return sum;
    };
    captured = squares(R) / squares(B_mean);
    double apart = 0;
    for (Plain own : S) {
      combine(1, own, -1, S_mean);
      apart += squares(own) / static_cast<double>(S.size());
    }
    drift = std::sqrt(apart / squares(B_mean));
  }
};

struct PlainAdamW {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
  Plain W, m, v;
  double t = 0;

  void step(const std::vector<Plain>& gradients, double eta) {
    Plain g(W.rows, W.cols);
    for (const Plain& own : gradients) combine(1, g, 1.0 / static_cast<double>(gradients.size()), own);
    t += 1;
    for (std::size_t k = 0; k < g.x.size(); ++k) {
      m.x[k] = beta1 * m.x[k] + (1 - beta1) * g.x[k];
      v.x[k] = beta2 * v.x[k] + (1 - beta2) * g.x[k] * g.x[k];
      const double m_hat = m.x[k] / (1 - std::pow(beta1, t)), v_hat = v.x[k] / (1 - std::pow(beta2, t));
      W.x[k] = (1 - eta * weight_decay) * W.x[k] - eta * m_hat / (std::sqrt(v_hat) + epsilon);
    }
  }
};

}  // namespace lowband::test
