#include "runtime/cuda/matrix_sign.h"

#include <algorithm>
#include <utility>

namespace lowband {

template <class T>
DeviceMatrixSign<T>::DeviceMatrixSign(std::span<const Step> steps, double safety, double epsilon, Index rows,
                                      Index cols, CudaBlas& blas)
    : steps_(steps.begin(), steps.end()),
      safety_(safety),
      epsilon_(epsilon),
      rows_(rows),
      cols_(cols),
      blas_(&blas),
      sums_(1, blas.stream()),
      sum_of_squares_(1, blas.stream()),
      gram_(std::min(rows, cols) * std::min(rows, cols), blas.stream()),
      polynomial_(gram_.size(), blas.stream()),
      next_(rows * cols, blas.stream()) {}

template <class T>
void DeviceMatrixSign<T>::compute(DeviceMatrix<const float> u, DeviceMatrix<T> x) {
  const auto fits = [&](const auto& view) {
    return view.rows == rows_ && view.cols == cols_ && view.count == 1 && view.contiguous();
  };
  LB_EXPECTS(fits(u) && fits(x), "DeviceMatrixSign: found U (", u.rows, ", ", u.cols, "), X (", x.rows, ", ",
             x.cols, "), expected both (", rows_, ", ", cols_, ") and contiguous");
  const bool wide = rows_ <= cols_;
  const Index side = std::min(rows_, cols_);
  const DeviceMatrix<T> a = gram_.matrix(0, side, side), p = polynomial_.matrix(0, side, side);

  // The iterates alternate between x and next, so that the last one is in x.
  DeviceMatrix<T> current = x, other = next_.matrix(0, rows_, cols_);
  if (steps_.size() % 2 == 1) std::swap(current, other);
  sums_.sum_of_squares(u.data, u.elements(), sum_of_squares_.data());
  divide_by_norm(u.data, sum_of_squares_.data(), safety_, epsilon_, current.data, u.elements(),
                 blas_->stream());
  for (const Step& step : steps_) {
    // A <- X X^T or X^T X ;  P <- c A A + b A
    blas_->symmetric_gemm<T>(wide ? Op::kNone : Op::kTranspose, wide ? Op::kTranspose : Op::kNone, 1, current,
                             current, 0, a, a);
    blas_->symmetric_gemm<T>(Op::kNone, Op::kNone, step.c, a, a, step.b, a, p);
    // X <- P X + a X, or X P + a X: a I stays out of P, where it would take the digits of b A.
    if (wide) {
      blas_->gemm<T, T>(Op::kNone, Op::kNone, 1, p, current, step.a, current, other);
    } else {
      blas_->gemm<T, T>(Op::kNone, Op::kNone, 1, current, p, step.a, current, other);
    }
    std::swap(current, other);
  }
}

template class DeviceMatrixSign<float>;
template class DeviceMatrixSign<BFloat16>;

}  // namespace lowband
