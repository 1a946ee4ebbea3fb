#include "model/attention.h"

#include "runtime/cpu.h"
#include "runtime/linalg.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

// Queries are taken in blocks of this many rows. A block meets only the keys up to its last row, so at most
// half a block per row is computed in vain, and scores of 64 x sequence stay in cache.
constexpr Index kQueryBlock = 64;

// body(sequence, kv_head, scratch row) for every pair; each worker has a scratch row and every workers-th
// pair. One pair owns the gradients of its keys and values.
template <class Real, class Body>
void for_kv_heads(const AttentionShape& shape, MatrixView<Real> scratch, Body body) {
  const Index pairs = shape.sequences * shape.kv_heads;
  const Index workers = std::min<Index>(compute_threads(), scratch.rows);
#pragma omp parallel for schedule(static)
  for (Index worker = 0; worker < workers; ++worker) {
    for (Index pair = worker; pair < pairs; pair += workers)
      body(pair / shape.kv_heads, pair % shape.kv_heads, scratch.row(worker));
  }
}

// The columns of one head among the rows of one sequence.
template <class T>
struct Heads {
  MatrixView<T> query(Index head) const { return columns(head * shape.head_dim); }
  MatrixView<T> key(Index head) const { return columns(shape.query_cols() + head * shape.head_dim); }
  MatrixView<T> value(Index head) const {
    return columns(shape.query_cols() + shape.kv_cols() + head * shape.head_dim);
  }
  MatrixView<T> columns(Index begin) const {
    return rows.block(sequence * shape.sequence, shape.sequence, begin, shape.head_dim);
  }
  const AttentionShape& shape;
  MatrixView<T> rows;
  Index sequence;
};

template <class Real>
Real score_scale(const AttentionShape& shape) {
  return static_cast<Real>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

}  // namespace

Index AttentionShape::scratch_cols() const { return 2 * std::min(kQueryBlock, sequence) * sequence; }

template <class Real>
void attention(const AttentionShape& shape, MatrixView<const Real> qkv, MatrixView<Real> out,
               std::span<Real> statistics, MatrixView<Real> scratch) {
  const auto& kernels = vector_kernels<Real>();
  const Real scale = score_scale<Real>(shape);
  const Index group = shape.heads / shape.kv_heads;
  for_kv_heads(shape, scratch, [&](Index sequence, Index kv_head, Real* memory) {
    const Heads<const Real> in{shape, qkv, sequence};
    const Heads<Real> result{shape, out, sequence};
    const auto K = in.key(kv_head), V = in.value(kv_head);
    for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      Real* head_statistics = statistics.data() + (sequence * shape.heads + head) * shape.sequence * 2;
      for (Index begin = 0; begin < shape.sequence; begin += kQueryBlock) {
        const Index rows = std::min(kQueryBlock, shape.sequence - begin), keys = begin + rows;
        const MatrixView<Real> P(memory, rows, keys);
        // P <- softmax(Q K^T scale), O <- P V
        gemm<Real>(Op::kNone, Op::kTranspose, 1, in.query(head).row_block(begin, rows), K.row_block(0, keys),
                   0, P);
        for (Index i = 0; i < rows; ++i)
          kernels.softmax(P.row(i), begin + i + 1, keys, scale, head_statistics + 2 * (begin + i));
        gemm<Real>(Op::kNone, Op::kNone, 1, P, V.row_block(0, keys), 0,
                   result.query(head).row_block(begin, rows));
      }
    }
  });
}

template <class Real>
void attention_backward(const AttentionShape& shape, MatrixView<const Real> qkv, MatrixView<const Real> d_out,
                        std::span<const Real> statistics, MatrixView<Real> d_qkv, MatrixView<Real> scratch) {
  const auto& kernels = vector_kernels<Real>();
  const Real scale = score_scale<Real>(shape);
  const Index group = shape.heads / shape.kv_heads;
  const Index last_block = (shape.sequence - 1) / kQueryBlock * kQueryBlock;
  for_kv_heads(shape, scratch, [&](Index sequence, Index kv_head, Real* memory) {
    const Heads<const Real> in{shape, qkv, sequence}, d_result{shape, d_out, sequence};
    const Heads<Real> d_in{shape, d_qkv, sequence};
    const auto K = in.key(kv_head), V = in.value(kv_head);
    const auto dK = d_in.key(kv_head), dV = d_in.value(kv_head);
    for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Real* head_statistics = statistics.data() + (sequence * shape.heads + head) * shape.sequence * 2;
      // From the last block, which sees every key: it overwrites dK and dV, the others add.
      for (Index begin = last_block; begin >= 0; begin -= kQueryBlock) {
        const Index rows = std::min(kQueryBlock, shape.sequence - begin), keys = begin + rows;
        const Real add = head == kv_head * group && begin == last_block ? Real{0} : Real{1};
        const auto Q = in.query(head).row_block(begin, rows),
                   dO = d_result.query(head).row_block(begin, rows);
        const MatrixView<Real> P(memory, rows, keys), dS(memory + rows * keys, rows, keys);
        // P again from the scores: attention takes 1-5 % longer than with a stored P (sequences of 128 to
        // 512), but needs no memory that grows with the square of the sequence.
        gemm<Real>(Op::kNone, Op::kTranspose, 1, Q, K.row_block(0, keys), 0, P);
        // dP <- dO V^T, dS <- scale P (dP - rowsum(P dP))
        gemm<Real>(Op::kNone, Op::kTranspose, 1, dO, V.row_block(0, keys), 0, dS);
        for (Index i = 0; i < rows; ++i) {
          kernels.softmax_again(P.row(i), begin + i + 1, keys, scale, head_statistics + 2 * (begin + i));
          kernels.softmax_backward(P.row(i), dS.row(i), begin + i + 1, keys, scale);
        }
        // dV += P^T dO, dK += dS^T Q, dQ <- dS K
        gemm<Real>(Op::kTranspose, Op::kNone, 1, P, dO, add, dV.row_block(0, keys));
        gemm<Real>(Op::kTranspose, Op::kNone, 1, dS, Q, add, dK.row_block(0, keys));
        gemm<Real>(Op::kNone, Op::kNone, 1, dS, K.row_block(0, keys), 0,
                   d_in.query(head).row_block(begin, rows));
      }
    }
  });
}

#define LB_INSTANTIATE(Real)                                                                                \
  template void attention(const AttentionShape&, MatrixView<const Real>, MatrixView<Real>, std::span<Real>, \
                          MatrixView<Real>);                                                                \
  template void attention_backward(const AttentionShape&, MatrixView<const Real>, MatrixView<const Real>,   \
                                   std::span<const Real>, MatrixView<Real>, MatrixView<Real>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
