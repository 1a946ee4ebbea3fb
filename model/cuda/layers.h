#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "sharding/layout.h"

#include <cstdint>

namespace lowband {

// The pieces of model/layers.h and model/cross_entropy.h on a device. T, the type of what products read:
// float or BFloat16. The residual stream, its gradient, statistics, gains and the gradients of parameters are
// float, and so is every sum. All memory is the device's and contiguous, but for the rows of
// logits, their gradient and what is rotated; matrices have a row for each token.
// Stream: enqueued, not waited for. Determinism: the same bits in every run.

/// y <- gain * x * s, s = 1 / sqrt(mean(x^2) + epsilon).
///
/// Shapes: x, y (tokens, width); gain has `width` elements, s `tokens`.
template <class T>
void device_rms_norm(DeviceMatrix<const float> x, const float* gain, float epsilon, DeviceMatrix<T> y,
                     float* s, const CudaStream& stream);

/// Elements of `scratch` for `tokens` rows.
Index device_rms_norm_scratch(Index tokens, Index width);
/// d_x <- d_x + gradient, d_gain <- d_gain + gradient, rounded <- d_x.
template <class T>
void device_rms_norm_backward(DeviceMatrix<const float> x, const float* gain, const float* s,
                              DeviceMatrix<const float> d_y, float* d_gain, DeviceMatrix<float> d_x,
                              DeviceMatrix<T> rounded, float* scratch, const CudaStream& stream);

/// Turns the first heads * 2 half columns of every row, token t by position t mod sequence; `backward`: the
/// opposite turn. Shapes: cosine, sine (sequence, half).
template <class T>
void device_rotate(const float* cosine, const float* sine, Index sequence, Index half, Index heads,
                   bool backward, DeviceMatrix<T> x, const CudaStream& stream);

/// h <- silu(g) u.  Shapes: gate_up (tokens, 2 ffn) with g in the left half, h (tokens, ffn).
template <class T>
void device_swiglu(DeviceMatrix<const T> gate_up, DeviceMatrix<T> h, const CudaStream& stream);
/// d_gate_up <- gradient
template <class T>
void device_swiglu_backward(DeviceMatrix<const T> gate_up, DeviceMatrix<const T> d_h,
                            DeviceMatrix<T> d_gate_up, const CudaStream& stream);

/// x_t <- row of token t if its id is in `owned`, else 0.  Shapes: weight (owned.size(), width).
void device_embed(const std::int32_t* tokens, Range owned, DeviceMatrix<const float> weight,
                  DeviceMatrix<float> x, const CudaStream& stream);
/// d_weight <- d_weight + gradient; each row adds its tokens in their order.
///
/// `by_id`: the numbers of the tokens, sorted by id and then by number.
void device_embed_backward(const std::int32_t* tokens, const std::int32_t* by_id, Range owned,
                           DeviceMatrix<const float> d_x, DeviceMatrix<float> d_weight,
                           const CudaStream& stream);

/// What this process tells of each token: maximum m_j of its logits, sum of exp(l - m_j), the target's logit
/// or 0. Shapes: logits (tokens, owned.size()), message (tokens, 3).
void device_cross_entropy_message(DeviceMatrix<const float> logits, Range owned, const std::int32_t* targets,
                                  float* message, const CudaStream& stream);
/// losses[t] <- -log softmax(logits)[target] in nats, from the messages of all processes of the tensor axis;
/// d_logits <- *gradient_scale times the gradient, unless its data are null; then the scale is not read.
///
/// Shapes: gathered (processes, tokens, 3), d_logits as logits.
template <class T>
void device_cross_entropy(DeviceMatrix<const float> logits, Range owned, const std::int32_t* targets,
                          const float* gathered, int processes, const double* gradient_scale, double* losses,
                          DeviceMatrix<T> d_logits, const CudaStream& stream);
/// *sum <- sum of losses
void device_sum(const double* losses, Index count, double* sum, const CudaStream& stream);

}  // namespace lowband
