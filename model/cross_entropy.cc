#include "model/cross_entropy.h"

#include "model/row_blocks.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lowband {
namespace {

// What the processes know together about one token.
struct TokenSoftmax {
  double maximum;  // m
  double sum;      // Z
  double target;   // logit
};

// Element i of process j's three numbers for token t: gathered is (processes, tokens, 3).
template <class Real>
double piece(std::span<const Real> gathered, Index tokens, Index j, Index t, Index i) {
  return static_cast<double>(gathered[static_cast<std::size_t>((j * tokens + t) * 3 + i)]);
}

template <class Real>
TokenSoftmax combine(std::span<const Real> gathered, Index tokens, Index processes, Index t) {
  TokenSoftmax all{piece(gathered, tokens, 0, t, 0), 0.0, 0.0};
  for (Index j = 1; j < processes; ++j) all.maximum = std::max(all.maximum, piece(gathered, tokens, j, t, 0));
  for (Index j = 0; j < processes; ++j) {
    all.sum += piece(gathered, tokens, j, t, 1) * std::exp(piece(gathered, tokens, j, t, 0) - all.maximum);
    all.target += piece(gathered, tokens, j, t, 2);
  }
  return all;
}

}  // namespace

template <class Real>
double cross_entropy(MatrixView<Real> logits, Range owned, std::span<const std::int32_t> targets,
                     Communicator& tensor, std::span<Real> message, std::span<Real> gathered) {
  const auto& kernels = vector_kernels<Real>();
  const Index tokens = logits.rows;
  for_row_blocks(tokens, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      Real* numbers = message.data() + 3 * t;
      const Index id = targets[static_cast<std::size_t>(t)];
      numbers[2] = owned.begin <= id && id < owned.end ? logits(t, id - owned.begin) : Real{0};
      kernels.exp_row(logits.row(t), logits.cols, &numbers[0], &numbers[1]);
    }
  });
  const std::vector<Index> counts(static_cast<std::size_t>(tensor.size()), 3 * tokens);
  tensor.all_gather<Real>(message, gathered, counts, Tag{Purpose::kActivation});

  double loss = 0;
  for (Index t = 0; t < tokens; ++t) {
    const TokenSoftmax all = combine<Real>(gathered, tokens, tensor.size(), t);
    loss += std::log(all.sum) + all.maximum - all.target;
  }
  return loss;
}

template <class Real>
void cross_entropy_backward(MatrixView<Real> logits, Range owned, std::span<const std::int32_t> targets,
                            const Communicator& tensor, std::span<const Real> gathered,
                            double gradient_scale) {
  const auto& kernels = vector_kernels<Real>();
  const Index tokens = logits.rows;
  for_row_blocks(tokens, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      // softmax = exp(l - m_j) exp(m_j - m) / Z
      const TokenSoftmax all = combine<Real>(gathered, tokens, tensor.size(), t);
      const double own_maximum = piece(gathered, tokens, tensor.process(), t, 0);
      kernels.scale(static_cast<Real>(gradient_scale * std::exp(own_maximum - all.maximum) / all.sum),
                    logits.row(t), logits.cols);
      const Index id = targets[static_cast<std::size_t>(t)];
      if (owned.begin <= id && id < owned.end)
        logits(t, id - owned.begin) -= static_cast<Real>(gradient_scale);
    }
  });
}

#define LB_INSTANTIATE(Real)                                                                           \
  template double cross_entropy(MatrixView<Real>, Range, std::span<const std::int32_t>, Communicator&, \
                                std::span<Real>, std::span<Real>);                                     \
  template void cross_entropy_backward(MatrixView<Real>, Range, std::span<const std::int32_t>,         \
                                       const Communicator&, std::span<const Real>, double);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
