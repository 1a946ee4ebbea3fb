#pragma once

#include "runtime/device.h"
#include "runtime/tensor.h"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace lowband {

// Numbers that decide what a step does to matrices: they lie where the matrices lie, and what is decided by
// them (`unless`, Scalar) is decided there, so that nobody waits. What brings them to the host says so.
//
// Shapes: rows of numbers, contiguous; one row for what is said of one number. Real: float, double; float on
// a Device. Threads: one. Throws: InvalidArgument for numbers in different places.

/// x <- 0
void zero(MatrixView<double> x);
/// flags_k <- whether x_k is NaN
void find_nan(MatrixView<const double> x, MatrixView<std::uint8_t> flags);
/// found <- whether flag is set or x = value, all of one number
template <class Real>
void find_equal(Real value, MatrixView<const Real> x, MatrixView<const std::uint8_t> flag,
                MatrixView<std::uint8_t> found);
/// sum <- sum + (sum over p in places, whose flags_p is not set, of x_p) / divisor
void add_unflagged(MatrixView<const Index> places, MatrixView<const double> x,
                   MatrixView<const std::uint8_t> flags, double divisor, MatrixView<double> sum);
/// sum <- sum + sum of x_k^2
void add_squares(MatrixView<const double> x, MatrixView<double> sum);
/// x_k <- sqrt(x_k)
void square_roots(MatrixView<double> x);
/// norm_and_scale <- (n, min(1, limit / n)) with n^2 = squares_0 + squares_1 + squares_2 / last_divisor
void clip(double limit, MatrixView<const double> squares, double last_divisor,
          MatrixView<double> norm_and_scale);

/// X <- X / (safety sqrt(square) + epsilon), as a product with the rounded quotient
template <class Real>
void divide_by_norm(MatrixView<const double> square, double safety, double epsilon, MatrixView<Real> x);
/// X_ij <- X_ij / (norms_j + epsilon), likewise
template <class Real>
void divide_columns(MatrixView<const double> norms, Real epsilon, MatrixView<Real> x);

/// On the host now: these wait for a number that lies on a device.
bool is_set(MatrixView<const std::uint8_t> flag);
template <class Real>
Real on_host(const Scalar& scalar);

/// Numbers as they are now (on a device, when the work so far is over), on their way to the host. Copies
/// share them. Ownership: of a device's, borrows the device until they are read.
template <class T>
class Arriving {
 public:
  explicit Arriving(MatrixView<const T> from) : size_(static_cast<std::size_t>(from.elements())) {
    if (size_ == 0) return;
    if (from.device == nullptr) {
      here_ = std::make_shared<std::vector<T>>(from.data, from.data + size_);
    } else {
      coming_ = from.device->send_to_host(from.data, static_cast<Index>(size_ * sizeof(T)));
    }
  }
  bool over() const { return coming_ == nullptr || coming_->over(); }
  /// Waits for what is still on its way.
  std::span<const T> get() const {
    if (size_ == 0) return {};
    return {coming_ ? static_cast<const T*>(coming_->wait()) : here_->data(), size_};
  }

 private:
  std::size_t size_;
  std::shared_ptr<std::vector<T>> here_;
  std::shared_ptr<Device::Arrival> coming_;
};

}  // namespace lowband
