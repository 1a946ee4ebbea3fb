#pragma once

#include "runtime/tensor.h"

#include <span>

namespace lowband {

/// Causal self-attention of one process's heads. Query head h reads key and value head
/// h / (heads / kv_heads).
struct AttentionShape {
  Index sequences = 0;
  Index sequence = 0;  // tokens of one sequence
  Index heads = 0;     // query heads of this process
  Index kv_heads = 0;  // key and value heads of this process
  Index head_dim = 0;

  constexpr Index tokens() const { return sequences * sequence; }
  constexpr Index query_cols() const { return heads * head_dim; }
  constexpr Index kv_cols() const { return kv_heads * head_dim; }
  constexpr Index qkv_cols() const { return query_cols() + 2 * kv_cols(); }
  /// Maximum and reciprocal sum of every softmax row.
  constexpr Index statistics() const { return sequences * heads * sequence * 2; }
  /// Elements of working memory that each compute thread needs.
  Index scratch_cols() const;
};

/// out <- softmax(q k^T / sqrt(head_dim)) v, each query seeing the keys up to its own position.
///
/// Shapes: qkv (tokens, qkv_cols): all query heads, then all key heads, then all value heads;
/// out (tokens, query_cols); scratch (threads, scratch_cols), overwritten.
/// At most `scratch.rows` threads work; results do not depend on their number.
template <class Real>
void attention(const AttentionShape& shape, MatrixView<const Real> qkv, MatrixView<Real> out,
               std::span<Real> statistics, MatrixView<Real> scratch);

/// d_qkv <- gradient, from the statistics that `attention` left for the same qkv.
template <class Real>
void attention_backward(const AttentionShape& shape, MatrixView<const Real> qkv, MatrixView<const Real> d_out,
                        std::span<const Real> statistics, MatrixView<Real> d_qkv, MatrixView<Real> scratch);

}  // namespace lowband
