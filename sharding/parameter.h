#pragma once

#include "runtime/tensor.h"
#include "sharding/layout.h"

#include <string>
#include <string_view>

namespace lowband {

/// What a parameter does in the transformer. Rank profiles and the choice between matrix and element-wise
/// optimizer follow from it.
enum class Role : std::uint8_t { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kEmbedding, kHead, kNorm };
std::string_view role_name(Role role);
/// True for the matrices inside the layers: what matrix optimizers treat and low-rank exchange compresses.
constexpr bool is_layer_matrix(Role role) { return role <= Role::kDown; }

/// A parameter as everybody agrees on it: no memory, global shape.
/// A vector (norm gain) is one row: rows = 1.
struct ParameterInfo {
  std::string name;  // Hugging Face's, "model.layers.0.self_attn.q_proj.weight"
  Role role;
  Index rows = 0;  // fan-out
  Index cols = 0;  // fan-in
  TensorCut cut = TensorCut::kNone;
  Index elements() const { return rows * cols; }
};

/// A parameter as one process holds it: its tensor-axis piece of weight and gradient.
template <class Real>
struct Parameter {
  ParameterInfo info;
  MatrixView<Real> weight;    // (piece rows, piece cols), contiguous
  MatrixView<Real> gradient;  // same shape, contiguous
};

}  // namespace lowband
