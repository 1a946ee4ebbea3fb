#pragma once

#include "runtime/buffer.h"
#include "runtime/tensor.h"
#include "sharding/layout.h"

#include <cstdint>
#include <span>

namespace lowband {

// The pieces of a decoder layer that work on token rows and send nothing. Row t of every matrix belongs to
// token t of the micro-batch. Work is split over OpenMP threads by blocks of rows; results do not depend on
// their number. "d_x" is the gradient of the loss in x; backward functions add to it where the contract
// says "+".

/// Rows per unit of parallel work and per partial sum of a gain's gradient. A constant, so that sums do not
/// depend on the number of threads.
inline constexpr Index kRowBlock = 64;
constexpr Index row_blocks(Index rows) { return (rows + kRowBlock - 1) / kRowBlock; }

/// y <- x W^T.  Shapes: x (tokens, in), w (out, in), y (tokens, out).
template <class Real>
void linear(MatrixView<const Real> x, MatrixView<const Real> w, MatrixView<Real> y);
/// d_x <- d_y W
template <class Real>
void linear_input_gradient(MatrixView<const Real> d_y, MatrixView<const Real> w, MatrixView<Real> d_x);
/// d_w <- d_w + d_y^T x
template <class Real>
void linear_weight_gradient(MatrixView<const Real> d_y, MatrixView<const Real> x, MatrixView<Real> d_w);

/// x <- x + residual when `residual` has rows; then, per row, y <- gain * x * s with
/// s = 1 / sqrt(mean(x^2) + epsilon).
///
/// Shapes: x, y, residual (tokens, width), gain (1, width); s has `tokens` elements.
template <class Real>
void rms_norm(MatrixView<const Real> residual, MatrixView<Real> x, MatrixView<const Real> gain,
              double epsilon, MatrixView<Real> y, std::span<Real> s);
/// d_x <- d_x + gradient, d_gain <- d_gain + gradient, from the x and s of `rms_norm`.
///
/// Shapes: scratch (row_blocks(tokens), width), overwritten.
template <class Real>
void rms_norm_backward(MatrixView<const Real> x, MatrixView<const Real> gain, std::span<const Real> s,
                       MatrixView<const Real> d_y, MatrixView<Real> d_gain, MatrixView<Real> d_x,
                       MatrixView<Real> scratch);

/// Angles of rotary positions: position p turns pair j by p * base^(-2j / head_dim).
///
/// The pair of element j is element j + head_dim / 2, as in Hugging Face's LLaMA.
template <class Real>
class RotaryTable {
 public:
  RotaryTable(Index sequence, Index head_dim, double base);
  Index sequence() const { return sequence_; }
  Index half() const { return half_; }
  const Real* cosine(Index position) const { return cosine_.data() + position * half_; }
  const Real* sine(Index position) const { return sine_.data() + position * half_; }

 private:
  Index sequence_, half_;
  Buffer<Real> cosine_, sine_;
};

/// Turns the heads in the columns of x, (tokens, heads * head_dim), in place.
/// Token t is at position t mod sequence.
template <class Real>
void rotate(const RotaryTable<Real>& table, MatrixView<Real> x);
/// The opposite turn: the gradient of `rotate`, in place.
template <class Real>
void rotate_backward(const RotaryTable<Real>& table, MatrixView<Real> d_x);

/// h <- silu(g) u.  Shapes: gate_up (tokens, 2 ffn) with g in the left half, h (tokens, ffn).
template <class Real>
void swiglu(MatrixView<const Real> gate_up, MatrixView<Real> h);
/// d_gate_up <- gradient
template <class Real>
void swiglu_backward(MatrixView<const Real> gate_up, MatrixView<const Real> d_h, MatrixView<Real> d_gate_up);

/// x_t <- row of token t if its id is in `owned`, else 0.
///
/// Shapes: weight (owned.size(), width), x (tokens, width).
template <class Real>
void embed(std::span<const std::int32_t> tokens, Range owned, MatrixView<const Real> weight,
           MatrixView<Real> x);
/// d_weight <- d_weight + gradient; each row sums its tokens in their order.
template <class Real>
void embed_backward(std::span<const std::int32_t> tokens, Range owned, MatrixView<const Real> d_x,
                    MatrixView<Real> d_weight);

}  // namespace lowband
