#pragma once

#include "runtime/tensor.h"
#include "sharding/layout.h"

#include <span>
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

/// The matrices that a layer matrix is made of, as parameters: itself, or its blocks "<name>[0]" and on, with
/// their own roles and shapes. Throws: InvalidArgument as validate_blocks.
std::vector<ParameterInfo> matrices_of(const ParameterInfo& info);
/// Those of all layer matrices among `parameters`, one after the other.
std::vector<ParameterInfo> layer_matrices(std::span<const ParameterInfo> parameters);

/// A parameter with one block for each head: rows of query, key and value, columns of output. Others, and
/// those that have blocks, stay as they are. Throws: InvalidArgument naming the parameter, when heads of this
/// size do not divide it.
ParameterInfo with_heads(ParameterInfo info, Index head_dim);

/// A parameter as one process holds it: its tensor-axis piece of weight and gradient.
template <class Real>
struct Parameter {
  ParameterInfo info;
  MatrixView<Real> weight;    // (piece rows, piece cols), contiguous
  MatrixView<Real> gradient;  // same shape, contiguous
};

}  // namespace lowband
