#pragma once

#include "model/model.h"

namespace lowband {

/// What backward finds of a layer. kLayerInputs: the residual stream at its entrance alone, from which the
/// layer is computed once more; on several processes with its all-reduce after attention.
enum class KeptActivations : std::uint8_t { kAll, kLayerInputs };

/// Columns in memory of logits and their gradient for `ids` ids: rows then begin where products by tensor
/// cores can read 16 bytes at once, which an odd vocabulary would rule out.
constexpr Index padded_ids(Index ids) { return (ids + 63) / 64 * 64; }

/// Device memory of a `DeviceTransformer` in bytes: what its buffers hold.
struct DeviceMemory {
  Index weights = 0;      // master weights and the copy that products read
  Index gradients = 0;    // of the parameters
  Index activations = 0;  // what backward and the loss read of forward
  Index workspace = 0;    // the batch, tables, messages, gradients of activations
  Index total() const { return weights + gradients + activations + workspace; }
  friend bool operator==(const DeviceMemory&, const DeviceMemory&) = default;
};

/// With, on this process, P elements of parameters, V ids (padded), h and k query and key heads of d columns,
/// f columns of the feed-forward layer, and everywhere width w, sequence s, n = max_sequences s tokens, T
/// processes, L layers of which l keep their activations (L or 1), b bytes of a number in products:
///
///   weights      P (4 + b)
///   gradients    4 P
///   activations  l n [2 (b w + 4) + 4 w + 8 h + b (2 h + 2 k) d + 3 b f] + 4 (L + 1) n w
///                + n (b w + 4) + 4 n V + 12 n T
///   workspace    n [12 + 12 + 8 + 8 w + 4 h + b (V + w + (2 h + 2 k) d + 3 f)] + 4 w ceil(n / 16)
///                + 4 s d + 16
///
/// Of the 12 n T gathered numbers of softmax; of the workspace's first terms tokens, targets and their order,
/// the own message, the losses. Allocates nothing. Throws: InvalidArgument, see validate().
DeviceMemory plan_device_memory(const ModelConfig& config, int processes, int process, Index max_sequences,
                                KeptActivations kept, Index element_bytes);

}  // namespace lowband
