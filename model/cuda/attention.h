#pragma once

#include "model/attention.h"
#include "runtime/bfloat16.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"

namespace lowband {

/// `attention` of model/attention.h on a device, without the matrix of scores: queries in tiles meet keys in
/// tiles, with the running maximum and sum of every row.
///
/// Shapes: as there; `statistics` has shape.statistics() elements. T: float, or BFloat16, where softmax
/// weights are rounded before the product with V and all sums are float. Stream: enqueued.
/// Throws: InvalidArgument when head_dim is not a multiple of 16 up to 128.
/// Reference: Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 1; Dao, arXiv 2307.08691.
template <class T>
void device_attention(const AttentionShape& shape, DeviceMatrix<const T> qkv, DeviceMatrix<T> out,
                      float* statistics, const CudaStream& stream);

/// d_qkv <- gradient, from what `device_attention` left. `row_products` has statistics() / 2 elements and is
/// overwritten. Determinism: the same bits in every run: d_q is summed by tile of queries, d_k and d_v by
/// tile of keys.
template <class T>
void device_attention_backward(const AttentionShape& shape, DeviceMatrix<const T> qkv,
                               DeviceMatrix<const T> out, DeviceMatrix<const T> d_out,
                               const float* statistics, float* row_products, DeviceMatrix<T> d_qkv,
                               const CudaStream& stream);

template <>
void device_attention<float>(const AttentionShape&, DeviceMatrix<const float>, DeviceMatrix<float>, float*,
                             const CudaStream&);
template <>
void device_attention<BFloat16>(const AttentionShape&, DeviceMatrix<const BFloat16>, DeviceMatrix<BFloat16>,
                                float*, const CudaStream&);
template <>
void device_attention_backward<float>(const AttentionShape&, DeviceMatrix<const float>,
                                      DeviceMatrix<const float>, DeviceMatrix<const float>, const float*,
                                      float*, DeviceMatrix<float>, const CudaStream&);
template <>
void device_attention_backward<BFloat16>(const AttentionShape&, DeviceMatrix<const BFloat16>,
                                         DeviceMatrix<const BFloat16>, DeviceMatrix<const BFloat16>,
                                         const float*, float*, DeviceMatrix<BFloat16>, const CudaStream&);

}  // namespace lowband
