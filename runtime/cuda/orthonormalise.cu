#include "runtime/cuda/elements.cuh"
#include "runtime/cuda/orthonormalise.h"
#include "runtime/factorisation.h"

#include <algorithm>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;
constexpr int kEliminationRows = 16;  // warps of the block that factorises, a row of the matrix each

/// Largest deviation of the second Gram matrix from I that the second pass repairs to rounding; as
/// collectives/factors/orthonormalise.cc.
constexpr double kLargestDeviation = 0.1;

constexpr Index kStaticBytes = 1024;  // shared memory of block_max and what the compiler adds
// What eliminate_kernel takes for a block of so many columns.
constexpr Index shared_bytes(Index columns) { return (columns + 1) * columns * Index{sizeof(double)}; }

constexpr auto kGramSchmidt = static_cast<std::int32_t>(DeviceFactorisation::kGramSchmidt);
constexpr auto kNonFinite = static_cast<std::int32_t>(DeviceFactorisation::kNonFinite);

// blockIdx.y is the matrix in all kernels of this kind.
__global__ void find_non_finite_kernel(const float* p, Index elements, std::int32_t* factorisation) {
  const float* const own = p + Index{blockIdx.y} * elements;
  bool finite = true;
  for (Index i = first_element(); i < elements; i += element_stride()) finite &= isfinite(own[i]);
  if (!finite) factorisation[blockIdx.y] = kNonFinite;
}

// What is not finite is left out as zeros, so that it spoils nothing on the way.
__global__ void widen_kernel(const float* p, Index elements, const std::int32_t* factorisation,
                             double* wide) {
  const Index begin = Index{blockIdx.y} * elements;
  const bool left_alone = factorisation[blockIdx.y] == kNonFinite;
  for (Index i = first_element(); i < elements; i += element_stride())
    wide[begin + i] = left_alone ? 0.0 : static_cast<double>(p[begin + i]);
}

__global__ void narrow_kernel(const double* wide, Index elements, const std::int32_t* factorisation,
                              float* p) {
  if (factorisation[blockIdx.y] == kNonFinite) return;
  const Index begin = Index{blockIdx.y} * elements;
  for (Index i = first_element(); i < elements; i += element_stride())
    p[begin + i] = static_cast<float>(wide[begin + i]);
}

// The largest x of the block, for all its threads; a NaN counts as infinite.
__device__ double block_max(double x) {
  __shared__ double of_warp[kEliminationRows];
  if (isnan(x)) x = INFINITY;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmax(x, __shfl_xor_sync(~0U, x, distance));
  if (threadIdx.x == 0) of_warp[threadIdx.y] = x;
  __syncthreads();
  double largest = 0;
  for (const double of_one : of_warp) largest = fmax(largest, of_one);
  return largest;
}

// Keeps the diagonal of each G. In the second pass G should be I already: where it is further away than the
// pass can repair, the matrix is left to gram_schmidt_kernel. One block per matrix, of (32,
// kEliminationRows) threads.
__global__ void inspect_kernel(const double* gram, int n, bool second, double* diagonal,
                               const std::uint8_t* dead, std::int32_t* factorisation) {
  const double* const own = gram + Index{blockIdx.x} * n * n;
  const std::uint8_t* const own_dead = dead + Index{blockIdx.x} * n;
  double deviation = 0;
  for (Index i = threadIdx.y; i < n; i += kEliminationRows) {
    if (threadIdx.x == 0) diagonal[Index{blockIdx.x} * n + i] = own[i * n + i];
    if (!second || own_dead[i]) continue;
    for (Index k = threadIdx.x; k < n; k += kWarp) {
      const double off = own_dead[k] ? 0 : fabs(own[i * n + k] - (i == k ? 1.0 : 0.0));
      if (!(off <= deviation)) deviation = isnan(off) ? INFINITY : off;
    }
  }
  if (second && block_max(deviation) > kLargestDeviation && threadIdx.x == 0 && threadIdx.y == 0)
    factorisation[blockIdx.x] = kGramSchmidt;
}

// T with T S T^T = I on the live columns of the diagonal block S of G that begins at (begin, begin): T = L^-1
// for S = L L^T, lower triangular, rows of dead columns zero.
//
// One block of threads per matrix, (32, kEliminationRows); S lies in shared memory. Elimination of [S | I]:
// before column j, the part of S right of and below (j, j) is the Schur complement of the live columns so
// far, and the part left of column j is L^-1, its diagonal kept apart. Dead is a column whose pivot is at
// most tolerance^2 of its entry in `diagonal`, that of G before all elimination, or whose entry is 0 or not
// finite.
__global__ void eliminate_kernel(DeviceMatrix<const double> gram, Index begin, int n, double tolerance,
                                 const double* diagonal, DeviceMatrix<double> inverse, std::uint8_t* dead) {
  double* const reciprocal = dynamic_shared<double>();  // diagonal of L^-1
  double* const a = reciprocal + n;
  const Index place = begin * gram.row_stride + begin;
  const double* const from = gram.data + Index{blockIdx.x} * gram.matrix_stride + place;
  double* const to = inverse.data + Index{blockIdx.x} * inverse.matrix_stride + place;
  const double* const own_diagonal = diagonal + Index{blockIdx.x} * gram.cols + begin;
  std::uint8_t* const own_dead = dead + Index{blockIdx.x} * gram.cols + begin;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  for (int i = y; i < n; i += kEliminationRows) {
    for (int k = x; k < n; k += kWarp) a[i * n + k] = from[i * gram.row_stride + k];
  }
  __syncthreads();

  for (int j = 0; j < n; ++j) {
    const double pivot = a[j * n + j], entry = own_diagonal[j];
    const bool is_dead = !(isfinite(entry) && entry > 0 && pivot > tolerance * tolerance * entry);
    const double scale = is_dead ? 0.0 : 1 / sqrt(pivot);
    if (y == 0) {  // nobody else reads row j now but for its pivot, which stays
      for (int k = x; k < n; k += kWarp) {
        if (k != j) a[j * n + k] = is_dead ? 0.0 : a[j * n + k] * scale;
      }
      if (x == 0) {
        reciprocal[j] = scale;
        own_dead[j] = is_dead;
      }
    }
    __syncthreads();
    // row i <- row i - L_ij row j, where row j of a dead column is zero
    for (int i = j + 1 + y; i < n; i += kEliminationRows) {
      const double factor = a[j * n + i];
      for (int k = x; k < n; k += kWarp) {
        if (k < j || k >= i) {
          a[i * n + k] -= factor * a[j * n + k];
        } else if (k == j) {
          a[i * n + k] = -factor * scale;
        }
      }
    }
    __syncthreads();
  }
  for (int i = y; i < n; i += kEliminationRows) {
    for (int k = x; k < n; k += kWarp)
      to[i * inverse.row_stride + k] = k < i ? a[i * n + k] : k == i ? reciprocal[i] : 0.0;
  }
}

// Q <- unpivoted QR of P for matrices that two Cholesky passes could not do: from every column, twice, its
// parts along the live columns before it. Twice is enough (Giraud et al. 2005): the second time removes what
// rounding left of the first. One block per matrix; slow, and rare.
__global__ void gram_schmidt_kernel(const float* p, Index rows, int cols, double tolerance, double* q,
                                    std::uint8_t* dead, const std::int32_t* factorisation) {
  if (factorisation[blockIdx.x] != kGramSchmidt) return;
  const float* const from = p + Index{blockIdx.x} * rows * cols;
  double* const to = q + Index{blockIdx.x} * rows * cols;
  std::uint8_t* const own_dead = dead + Index{blockIdx.x} * cols;
  // Every thread has rows of its own, so nobody reads what another writes but through block_sum.
  const auto dot = [&](int k, int j) {
    double sum = 0;
    for (Index i = threadIdx.x; i < rows; i += kThreads) sum += to[i * cols + k] * to[i * cols + j];
    return block_sum(sum);
  };
  for (int j = 0; j < cols; ++j) {
    for (Index i = threadIdx.x; i < rows; i += kThreads)
      to[i * cols + j] = static_cast<double>(from[i * cols + j]);
    const double before = dot(j, j);
    for (int time = 0; time < 2; ++time) {
      for (int k = 0; k < j; ++k) {  // a dead column is zero
        const double along = dot(k, j);
        for (Index i = threadIdx.x; i < rows; i += kThreads) to[i * cols + j] -= along * to[i * cols + k];
      }
    }
    const double left = dot(j, j);
    const bool is_dead = !(before > 0 && left > tolerance * tolerance * before);
    const double scale = is_dead ? 0.0 : 1 / sqrt(left);
    for (Index i = threadIdx.x; i < rows; i += kThreads) to[i * cols + j] *= scale;
    if (threadIdx.x == 0) own_dead[j] = is_dead;
  }
}

// A block for each matrix. A zero matrix has dead columns alone.
__global__ void outcomes_kernel(const std::uint8_t* dead, const std::int32_t* factorisation, Index cols,
                                float* outcomes) {
  const std::uint8_t* const own_dead = dead + Index{blockIdx.x} * cols;
  float* const own = outcomes + Index{blockIdx.x} * (1 + cols);
  float live = 0;
  for (Index j = threadIdx.x; j < cols; j += blockDim.x) {
    own[1 + j] = own_dead[j];
    live += 1.0F - static_cast<float>(own_dead[j]);
  }
  live = block_sum(live);
  if (threadIdx.x != 0) return;
  const std::int32_t how = factorisation[blockIdx.x];
  const Factorisation found = how == kNonFinite     ? Factorisation::kNonFinite
                              : live == 0           ? Factorisation::kZero
                              : how == kGramSchmidt ? Factorisation::kGramSchmidt
                                                    : Factorisation::kCholesky;
  own[0] = static_cast<float>(found);
}

}  // namespace

DeviceOrthonormaliser::DeviceOrthonormaliser(Index count, Index rows, Index cols, double dead_tolerance,
                                             CudaBlas& blas)
    : count_(count), rows_(rows), cols_(cols), dead_tolerance_(dead_tolerance), blas_(&blas) {
  // 65,535 is what a launch takes in its second direction; a Gram matrix is indexed with int.
  LB_EXPECTS(count >= 1 && count <= 65'535 && cols >= 1 && rows >= cols && cols <= 8192,
             "DeviceOrthonormaliser: found ", count, " matrices (", rows, ", ", cols,
             "), expected 1 to 65535 with rows >= columns, 1 to 8192 of them");
  const CudaStream& stream = blas.stream();
  wide_ = DeviceBuffer<double>(count * rows * cols, stream);
  other_ = DeviceBuffer<double>(count * rows * cols, stream);
  dead_ = DeviceBuffer<std::uint8_t>(count * cols, stream);
  factorisation_ = DeviceBuffer<std::int32_t>(count, stream);

  // As many columns at a time as leave their block of G in shared memory.
  int most_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device()),
             "cudaDeviceGetAttribute");
  const auto fits = [&](Index columns) { return shared_bytes(columns) + kStaticBytes <= most_bytes; };
  block_ = cols;
  for (Index columns = 128; !fits(block_); columns -= kWarp) block_ = columns;

  gram_ = DeviceBuffer<double>(count * cols * cols, stream);
  inverse_ = DeviceBuffer<double>(count * cols * cols, stream);
  diagonal_ = DeviceBuffer<double>(count * cols, stream);
  if (block_ == cols) return;
  lower_ = DeviceBuffer<double>(count * cols * cols, stream);
  product_ = DeviceBuffer<double>(count * block_ * cols, stream);
}

// G <- from^T from ;  T <- L^-1 ;  to <- from T^T
void DeviceOrthonormaliser::pass(DeviceMatrix<const double> from, DeviceMatrix<double> to, bool second) {
  const DeviceMatrix<double> g = gram_.matrix(0, cols_, cols_, count_);
  blas_->gemm<double, double>(Op::kTranspose, Op::kNone, 1, from, from, 0, g, g);
  launch("orthonormalise, inspect", blas_->stream(),
         {static_cast<unsigned>(count_), dim3(kWarp, kEliminationRows)}, inspect_kernel, gram_.data(),
         static_cast<int>(cols_), second, diagonal_.data(), dead_.data(), factorisation_.data());
  for (Index begin = 0; begin < cols_; begin += block_) eliminate(begin, std::min(block_, cols_ - begin));
  blas_->gemm<double, double>(Op::kNone, Op::kTranspose, 1, from, inverse_.matrix(0, cols_, cols_, count_), 0,
                              to, to);
}

// Columns [begin, end), with b for their block, before those of all blocks, after all that follow:
//   T_bb <- L_bb^-1 of the Schur complement in G_bb
//   T_b,before <- -T_bb (L_b,before T_before,before)
//   L_after,b <- G_after,b T_bb^T ;  G_after,after <- G_after,after - L_after,b L_after,b^T
// Rows of T and columns of L of dead columns are zero.
void DeviceOrthonormaliser::eliminate(Index begin, Index columns) {
  const DeviceMatrix<double> g = gram_.matrix(0, cols_, cols_, count_);
  const DeviceMatrix<double> t = inverse_.matrix(0, cols_, cols_, count_);
  launch("orthonormalise, eliminate", blas_->stream(),
         {static_cast<unsigned>(count_), dim3(kWarp, kEliminationRows), shared_bytes(columns)},
         eliminate_kernel, DeviceMatrix<const double>(g), begin, static_cast<int>(columns), dead_tolerance_,
         diagonal_.data(), t, dead_.data());
  if (block_ == cols_) return;
  const DeviceMatrix<double> l = lower_.matrix(0, cols_, cols_, count_);
  const DeviceMatrix<double> own = t.block(begin, columns, begin, columns);
  if (begin > 0) {
    const DeviceMatrix<double> product = product_.matrix(0, columns, begin, count_);
    const DeviceMatrix<double> before = t.block(begin, columns, 0, begin);
    blas_->gemm<double, double>(Op::kNone, Op::kNone, 1, l.block(begin, columns, 0, begin),
                                t.block(0, begin, 0, begin), 0, product, product);
    blas_->gemm<double, double>(Op::kNone, Op::kNone, -1, own, product, 0, before, before);
  }
  const Index end = begin + columns, left = cols_ - end;
  if (left == 0) return;
  const DeviceMatrix<double> below = l.block(end, left, begin, columns);
  const DeviceMatrix<double> rest = g.block(end, left, end, left);
  blas_->gemm<double, double>(Op::kNone, Op::kTranspose, 1, g.block(end, left, begin, columns), own, 0, below,
                              below);
  blas_->gemm<double, double>(Op::kNone, Op::kTranspose, -1, below, below, 1, rest, rest);
}

void DeviceOrthonormaliser::write_outcomes(float* outcomes) const {
  launch("orthonormalise, outcomes", blas_->stream(), {static_cast<unsigned>(count_), kThreads},
         outcomes_kernel, dead_.data(), factorisation_.data(), cols_, outcomes);
}

void DeviceOrthonormaliser::run(DeviceMatrix<float> p) {
  LB_EXPECTS(p.count == count_ && p.rows == rows_ && p.cols == cols_ && p.contiguous(),
             "DeviceOrthonormaliser: found ", p.count, " x (", p.rows, ", ", p.cols, "), expected ", count_,
             " x (", rows_, ", ", cols_, "), contiguous");
  const CudaStream& stream = blas_->stream();
  const Index elements = rows_ * cols_;
  const dim3 blocks(static_cast<unsigned>(std::clamp<Index>(elements / (4 * kThreads), 1, 1024)),
                    static_cast<unsigned>(count_));
  cuda_zero(factorisation_.data(), count_ * Index{sizeof(std::int32_t)}, stream);
  launch("orthonormalise, find_non_finite", stream, {blocks, kThreads}, find_non_finite_kernel, p.data,
         elements, factorisation_.data());
  launch("orthonormalise, widen", stream, {blocks, kThreads}, widen_kernel, p.data, elements,
         factorisation_.data(), wide_.data());
  const DeviceMatrix<double> wide = wide_.matrix(0, rows_, cols_, count_);
  const DeviceMatrix<double> other = other_.matrix(0, rows_, cols_, count_);
  pass(wide, other, false);
  pass(other, wide, true);
  launch("orthonormalise, gram_schmidt", stream, {static_cast<unsigned>(count_), kThreads},
         gram_schmidt_kernel, p.data, rows_, static_cast<int>(cols_), dead_tolerance_, wide_.data(),
         dead_.data(), factorisation_.data());
  launch("orthonormalise, narrow", stream, {blocks, kThreads}, narrow_kernel, wide_.data(), elements,
         factorisation_.data(), p.data);
}

}  // namespace lowband
