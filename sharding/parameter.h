#pragma once

#include "runtime/tensor.h"
#include "sharding/layout.h"

#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// What a parameter does in the transformer. Rank profiles and the choice between matrix and element-wise
/// optimizer follow from it.
enum class Role : std::uint8_t { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kEmbedding, kHead, kNorm };
std::string_view role_name(Role role);
/// True for the matrices inside the layers: what matrix optimizers treat and low-rank exchange compresses.
constexpr bool is_layer_matrix(Role role) { return role <= Role::kDown; }

/// A parameter made of several matrices, side by side or interleaved: the heads of a query projection, the
/// parts of a fused one. Its rows, or its columns, belong to one matrix each.
struct ParameterBlocks {
  bool of_rows = true;                          // otherwise of columns
  std::vector<std::vector<Range>> ranges = {};  // by matrix, increasing; none: the parameter is one matrix
  std::vector<Role> roles = {};                 // by matrix; none: that of the parameter
  bool empty() const { return ranges.empty(); }
};

/// A parameter as everybody agrees on it: no memory, global shape.
/// A vector (norm gain) is one row: rows = 1.
struct ParameterInfo {
  std::string name;  // Hugging Face's, "model.layers.0.self_attn.q_proj.weight"
  Role role;
  Index rows = 0;  // fan-out
  Index cols = 0;  // fan-in
  TensorCut cut = TensorCut::kNone;
  ParameterBlocks blocks = {};
  Index elements() const { return rows * cols; }
};

/// Throws: InvalidArgument naming the parameter, when some row or column is in no block of it or in several,
/// or when roles are not as many as blocks, or not all of layer matrices.
void validate_blocks(const ParameterInfo& info);

/// A parameter as one process holds it: its tensor-axis piece of weight and gradient.
template <class Real>
struct Parameter {
  ParameterInfo info;
  MatrixView<Real> weight;    // (piece rows, piece cols), contiguous
  MatrixView<Real> gradient;  // same shape, contiguous
};

}  // namespace lowband
