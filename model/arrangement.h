#pragma once

#include "model/model.h"

#include <vector>

namespace lowband {

// View: MatrixView<Real>, or DeviceMatrix<T>.

/// The matrices of one layer as the GEMMs see them: q, k, v are consecutive rows of one matrix, and so are
/// gate and up.
template <class View>
struct LayerMatrices {
  View attention_gain, qkv, output, ffn_gain, gate_up, down;
};
template <class View>
struct ModelMatrices {
  View embedding, final_gain, head;  // head is the embedding when tied
  std::vector<LayerMatrices<View>> layers;
};

/// Positions in parameter_table(): the embedding, nine per layer, the final gain, the head when untied.
inline constexpr Index kPerLayer = 9;
enum InLayer : Index { kAttentionGain, kQ, kK, kV, kO, kFfnGain, kGateProj, kUpProj, kDownProj };
constexpr Index parameter_of(Index layer, InLayer which) { return 1 + layer * kPerLayer + which; }

/// Consecutive parameters with equal columns as one matrix.
template <class View>
View joined(const std::vector<View>& views, Index first, Index count) {
  View all = views[static_cast<std::size_t>(first)];
  for (Index i = 1; i < count; ++i) all.rows += views[static_cast<std::size_t>(first + i)].rows;
  return all;
}

template <class View>
ModelMatrices<View> arrange(const ModelConfig& config, const std::vector<View>& views) {
  ModelMatrices<View> m;
  m.embedding = views[0];
  for (Index layer = 0; layer < config.layers; ++layer) {
    const auto at = [&](InLayer which, Index count) {
      return joined(views, parameter_of(layer, which), count);
    };
    m.layers.push_back({.attention_gain = at(kAttentionGain, 1),
                        .qkv = at(kQ, 3),
                        .output = at(kO, 1),
                        .ffn_gain = at(kFfnGain, 1),
                        .gate_up = at(kGateProj, 2),
                        .down = at(kDownProj, 1)});
  }
  m.final_gain = views[static_cast<std::size_t>(parameter_of(config.layers, kAttentionGain))];
  m.head = config.tied_head ? m.embedding : views.back();
  return m;
}

}  // namespace lowband
