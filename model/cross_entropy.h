#pragma once

#include "collectives/communicator.h"
#include "runtime/tensor.h"
#include "sharding/layout.h"

#include <cstdint>
#include <span>

namespace lowband {

/// Sum over tokens of -log softmax(logits)[target], in nats, with the vocabulary split over `tensor`.
///
/// One message: process j sends per token its maximum m_j, its sum s_j of exp(l - m_j), and the target's
/// logit or 0 if it does not own it. Then m = max_j m_j, Z = sum_j s_j exp(m_j - m), and the loss is
/// log Z + m - target; every process forms the same bits.
/// Afterwards `logits` holds exp(l - m_j), and `gathered` what `cross_entropy_backward` needs.
///
/// Shapes: logits (tokens, owned.size()), `owned` not empty; message has 3 tokens elements, gathered 3 tokens
/// for each process.
/// Collective: the tensor group, equal targets.
template <class Real>
double cross_entropy(MatrixView<Real> logits, Range owned, std::span<const std::int32_t> targets,
                     Communicator& tensor, std::span<Real> message, std::span<Real> gathered);

/// Turns what `cross_entropy` left in `logits` into gradient_scale * d(sum of losses) / d logits.
/// Sends nothing.
template <class Real>
void cross_entropy_backward(MatrixView<Real> logits, Range owned, std::span<const std::int32_t> targets,
                            const Communicator& tensor, std::span<const Real> gathered,
                            double gradient_scale);

}  // namespace lowband
