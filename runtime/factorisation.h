#pragma once

#include <cstdint>

namespace lowband {

/// How the columns of one matrix became orthonormal.
enum class Factorisation : std::uint8_t {
  kCholesky,     // two passes of Cholesky QR
  kHouseholder,  // two passes were not accurate: gathered, and factorised by every process
  kGramSchmidt,  // likewise, on a device that holds the whole matrix
  kZero,         // the matrix is zero and stays so; every column is dead
  kNonFinite,    // the input holds a NaN or an infinity and was left alone
};

}  // namespace lowband
