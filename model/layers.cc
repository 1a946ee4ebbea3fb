#include "model/layers.h"

#include "model/row_blocks.h"
#include "runtime/linalg.h"
#include "runtime/vector_kernels.h"

#include <cmath>

namespace lowband {

template <class Real>
void linear(MatrixView<const Real> x, MatrixView<const Real> w, MatrixView<Real> y) {
  gemm<Real>(Op::kNone, Op::kTranspose, 1, x, w, 0, y);
}

template <class Real>
void linear_input_gradient(MatrixView<const Real> d_y, MatrixView<const Real> w, MatrixView<Real> d_x) {
  gemm<Real>(Op::kNone, Op::kNone, 1, d_y, w, 0, d_x);
}

template <class Real>
void linear_weight_gradient(MatrixView<const Real> d_y, MatrixView<const Real> x, MatrixView<Real> d_w) {
  gemm<Real>(Op::kTranspose, Op::kNone, 1, d_y, x, 1, d_w);
}

template <class Real>
void rms_norm(MatrixView<const Real> residual, MatrixView<Real> x, MatrixView<const Real> gain,
              double epsilon, MatrixView<Real> y, std::span<Real> s) {
  const auto& kernels = vector_kernels<Real>();
  for_row_blocks(x.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (residual.rows > 0) kernels.add(x.row(t), residual.row(t), x.cols);
      s[static_cast<std::size_t>(t)] =
          kernels.rms_norm(x.row(t), gain.data, static_cast<Real>(epsilon), y.row(t), x.cols);
    }
  });
}

template <class Real>
void rms_norm_backward(MatrixView<const Real> x, MatrixView<const Real> gain, std::span<const Real> s,
                       MatrixView<const Real> d_y, MatrixView<Real> d_gain, MatrixView<Real> d_x,
                       MatrixView<Real> scratch) {
  const auto& kernels = vector_kernels<Real>();
  for_row_blocks(x.rows, [&](Index block, Index begin, Index end) {
    std::fill_n(scratch.row(block), scratch.cols, Real{0});
    for (Index t = begin; t < end; ++t) {
      kernels.rms_norm_backward(x.row(t), gain.data, s[static_cast<std::size_t>(t)], d_y.row(t),
                                scratch.row(block), d_x.row(t), x.cols);
    }
  });
  for (Index block = 0; block < row_blocks(x.rows); ++block)
    kernels.add(d_gain.data, scratch.row(block), d_gain.cols);
}

template <class Real>
void rotate(const RotaryTable<Real>& table, MatrixView<Real> x) {
  const auto& kernels = vector_kernels<Real>();
  const Index half = table.half(), heads = x.cols / (2 * half);
  for_row_blocks(x.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index position = t % table.sequence();
      kernels.rotate(x.row(t), table.cosine(position), table.sine(position), heads, half);
    }
  });
}

template <class Real>
void rotate_backward(const RotaryTable<Real>& table, MatrixView<Real> d_x) {
  const auto& kernels = vector_kernels<Real>();
  const Index half = table.half(), heads = d_x.cols / (2 * half);
  for_row_blocks(d_x.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index position = t % table.sequence();
      kernels.rotate_back(d_x.row(t), table.cosine(position), table.sine(position), heads, half);
    }
  });
}

template <class Real>
void swiglu(MatrixView<const Real> gate_up, MatrixView<Real> h) {
  const auto& kernels = vector_kernels<Real>();
  for_row_blocks(h.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t)
      kernels.swiglu(gate_up.row(t), gate_up.row(t) + h.cols, h.row(t), h.cols);
  });
}

template <class Real>
void swiglu_backward(MatrixView<const Real> gate_up, MatrixView<const Real> d_h, MatrixView<Real> d_gate_up) {
  const auto& kernels = vector_kernels<Real>();
  const Index ffn = d_h.cols;
  for_row_blocks(d_h.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      kernels.swiglu_backward(gate_up.row(t), gate_up.row(t) + ffn, d_h.row(t), d_gate_up.row(t),
                              d_gate_up.row(t) + ffn, ffn);
    }
  });
}

template <class Real>
void embed(std::span<const std::int32_t> tokens, Range owned, MatrixView<const Real> weight,
           MatrixView<Real> x) {
  for_row_blocks(x.rows, [&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index id = tokens[static_cast<std::size_t>(t)];
      if (owned.begin <= id && id < owned.end) {
        std::copy_n(weight.row(id - owned.begin), x.cols, x.row(t));
      } else {
        std::fill_n(x.row(t), x.cols, Real{0});
      }
    }
  });
}

template <class Real>
void embed_backward(std::span<const std::int32_t> tokens, Range owned, MatrixView<const Real> d_x,
                    MatrixView<Real> d_weight) {
  const auto& kernels = vector_kernels<Real>();
  // Parallel over vocabulary rows: each reads all token ids and adds its own tokens in their order.
  for_row_blocks(owned.size(), [&](Index, Index begin, Index end) {
    for (Index t = 0; t < d_x.rows; ++t) {
      const Index row = tokens[static_cast<std::size_t>(t)] - owned.begin;
      if (begin <= row && row < end) kernels.add(d_weight.row(row), d_x.row(t), d_x.cols);
    }
  });
}

#define LB_INSTANTIATE(Real)                                                                              \
  template void linear(MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>);                 \
  template void linear_input_gradient(MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>);  \
  template void linear_weight_gradient(MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>); \
  template void rms_norm(MatrixView<const Real>, MatrixView<Real>, MatrixView<const Real>, double,        \
                         MatrixView<Real>, std::span<Real>);                                              \
  template void rms_norm_backward(MatrixView<const Real>, MatrixView<const Real>, std::span<const Real>,  \
                                  MatrixView<const Real>, MatrixView<Real>, MatrixView<Real>,             \
                                  MatrixView<Real>);                                                      \
  template void rotate(const RotaryTable<Real>&, MatrixView<Real>);                                       \
  template void rotate_backward(const RotaryTable<Real>&, MatrixView<Real>);                              \
  template void swiglu(MatrixView<const Real>, MatrixView<Real>);                                         \
  template void swiglu_backward(MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>);        \
  template void embed(std::span<const std::int32_t>, Range, MatrixView<const Real>, MatrixView<Real>);    \
  template void embed_backward(std::span<const std::int32_t>, Range, MatrixView<const Real>,              \
                               MatrixView<Real>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
