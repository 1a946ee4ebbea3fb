#pragma once

#include "runtime/linalg.h"

#include <string>

namespace lowband {

/// One row-major product on checked, non-empty shapes: the part of `gemm` that a library does.
/// Two sources implement it for float, with oneDNN or with the BLAS alone; CMake compiles one of them.
void library_gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b,
                  float beta, MatrixView<float> c, Index inner);
/// Library and version behind the float product.
std::string float_gemm_library();

}  // namespace lowband
