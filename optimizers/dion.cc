#include "optimizers/dion.h"

#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <cmath>

namespace lowband {
namespace {

/// Added to the norm of a column of R. Reference: public Dion code.
constexpr double kColumnNormEpsilon = 1e-8;

}  // namespace

template <class Real>
void Dion<Real>::apply(Index i, MatrixView<Real> weight, const Scalar& /*update_scale*/,
                       const StepInfo& info) {
  const auto& matrix = this->matrix(i);
  const MatrixView<const Real> p = this->p(i);
  const MatrixView<const Real> r = this->mean_r(i);
  const MatrixView<Real> q = this->next_q(matrix);

  // M <- B - (1 - mu) P R^T
  add_product<Real>(static_cast<Real>(this->options().mu - 1), matrix.pair(p, this->residual_r(i)), Real{1},
                    matrix.s);

  // Q_j <- R_j / (|R_j| + eps); 0 for a dead column
  add<Real>(Real{1}, r, Real{0}, q);
  divide_columns<Real>(this->r_norms(i), static_cast<Real>(kColumnNormEpsilon), q);

  // W <- (1 - eta wd) W - eta sqrt(m/n) P Q^T
  const ParameterInfo& shape = matrix.definition.info;
  const double eta = info.learning_rate;
  const double aspect = static_cast<double>(shape.rows) / static_cast<double>(shape.cols);
  add_product<Real>(static_cast<Real>(-eta * std::sqrt(aspect)), matrix.pair(p, q),
                    static_cast<Real>(1 - eta * this->options().weight_decay), weight);
}

template class Dion<float>;
template class Dion<double>;

}  // namespace lowband
