#include "runtime/cpu/gemm.h"

#include <oneapi/dnnl/dnnl.h>

namespace lowband {

void library_gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b,
                  float beta, MatrixView<float> c, Index inner) {
  const auto letter = [](Op op) { return op == Op::kNone ? 'N' : 'T'; };
  const dnnl_status_t status = dnnl_sgemm(letter(op_a), letter(op_b), c.rows, c.cols, inner, alpha, a.data,
                                          a.row_stride, b.data, b.row_stride, beta, c.data, c.row_stride);
  if (status != dnnl_success) throw Error(cat("dnnl_sgemm failed with status ", static_cast<int>(status)));
}

std::string float_gemm_library() {
  const dnnl_version_t* version = dnnl_version();
  return cat("oneDNN ", version->major, ".", version->minor, ".", version->patch);
}

}  // namespace lowband
