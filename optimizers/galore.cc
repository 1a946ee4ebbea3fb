#include "optimizers/galore.h"

#include "runtime/linalg.h"
#include "runtime/low_rank.h"
#include "runtime/random.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace lowband {
namespace {

/// Of Adam in the subspace. Reference: public GaLore code.
constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.999;
constexpr double kEpsilon = 1e-6;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::uint64_t bits_of(const ParameterInfo& matrix, Index index) {
  return RandomStream(0, matrix.name + ".basis").bits(index);
}

template <class Real>
void fix_signs(MatrixView<Real> basis) {
  for (Index j = 0; j < basis.cols; ++j) {
    Real largest = 0;
    for (Index i = 0; i < basis.rows; ++i) {
      if (std::abs(basis(i, j)) > std::abs(largest)) largest = basis(i, j);
    }
    if (largest >= 0) continue;
    for (Index i = 0; i < basis.rows; ++i) basis(i, j) = -basis(i, j);
  }
}

}  // namespace

StepPhase basis_steps(const ParameterInfo& matrix, Index interval) {
  const auto offset = static_cast<Index>(bits_of(matrix, 0) % static_cast<std::uint64_t>(interval));
  return {.period = interval, .offset = offset, .and_first = true};
}

int basis_owner(const ParameterInfo& matrix, const MeshShape& mesh) {
  return static_cast<int>(bits_of(matrix, 1) % static_cast<std::uint64_t>(mesh.processes()));
}

template <class Real>
Galore<Real>::Galore(ProcessMesh& exchange_mesh, ProcessMesh& update_mesh,
                     const std::vector<LayerMatrix>& matrices, const OptimizerOptions& options)
    : mesh_(&exchange_mesh),
      options_(options),
      matrices_(make_matrices(exchange_mesh, matrices, options.galore_interval)),
      basis_(shapes_of_basis(exchange_mesh, matrices_)),
      h_(shapes_of_h(exchange_mesh, matrices_)),
      n_(shapes_of_h(update_mesh, matrices_)),
      squares_(matrices_.size()) {
  LB_EXPECTS(options.wire == FactorWire::kAsComputed || (std::is_same_v<Real, float>),
             "optimizer.wire: found bf16 with numbers in ", dtype_name(dtype_of<Real>), ", expected f32");
  const auto owned = static_cast<Index>(h_.all_owned().size());
  sums_ = Buffer<Real>(owned);
  if (options.wire == FactorWire::kBF16) wire_ = Buffer<BFloat16>(owned);
  Index largest = 0;
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    matrix.m1 = Buffer<Real>(h_.owned(i).elements());
    matrix.m2 = Buffer<Real>(h_.owned(i).elements());
    largest = std::max(largest, matrix.rows.size() * matrix.cols.size());
    const MatrixView<Real> basis = basis_.owned(i);
    for (Index row = 0; row < basis.rows; ++row) {
      if (matrix.kept.begin + row < basis.cols) basis(row, matrix.kept.begin + row) = 1;
    }
  }
  block_ = Buffer<Real>(largest);
}

template <class Real>
std::vector<typename Galore<Real>::Matrix> Galore<Real>::make_matrices(
    const ProcessMesh& mesh, const std::vector<LayerMatrix>& definitions, Index interval) {
  std::vector<Matrix> matrices;
  for (const LayerMatrix& definition : definitions) {
    const ParameterInfo& info = definition.info;
    Matrix matrix{.definition = definition,
                  .tall = definition.tall(),
                  .basis_steps = lowband::basis_steps(info, interval),
                  .owner = basis_owner(info, mesh.shape()),
                  .rows = definition.cut.rows_of(mesh.position()),
                  .cols = definition.cut.cols_of(mesh.position()),
                  .kept = definition.cut.kept_rows(!definition.tall(), mesh.position()),
                  .m1 = {},
                  .m2 = {}};
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

// H has the rows of the longer side, and is summed over the axis that cuts the shorter one.
template <class Real>
std::vector<typename FactorRows<Real>::Shape> Galore<Real>::shapes_of_h(ProcessMesh& mesh,
                                                                        const std::vector<Matrix>& matrices) {
  std::vector<typename FactorRows<Real>::Shape> shapes;
  shapes.reserve(matrices.size());
  for (const Matrix& matrix : matrices)
    shapes.push_back(
        left_rows<Real>(factor_shape(matrix.definition, matrix.definition.factor_rank, !matrix.tall, mesh)));
  return shapes;
}

// It has the rows of the shorter side, which the processes that the longer one is cut over share.
template <class Real>
std::vector<typename FactorRows<Real>::Shape> Galore<Real>::shapes_of_basis(
    ProcessMesh& mesh, const std::vector<Matrix>& matrices) {
  std::vector<typename FactorRows<Real>::Shape> shapes;
  shapes.reserve(matrices.size());
  for (const Matrix& matrix : matrices)
    shapes.push_back(
        right_rows<Real>(factor_shape(matrix.definition, matrix.definition.factor_rank, !matrix.tall, mesh)));
  return shapes;
}

template <class Real>
void Galore<Real>::exchange(std::span<const Piece> pieces, Real gradient_scale, Index step) {
  if (matrices_.empty()) return;
  basis_.all_gather();
  std::vector<bool> from_means;
  for (Index i = 0; i < size(); ++i) {
    const Matrix& matrix = matrices_[at(i)];
    const MatrixView<Real> h = h_.piece(i);
    from_means.push_back(matrix.basis_steps.contains(step));
    if (from_means.back()) {
      project_mean(i, pieces[at(i)], gradient_scale);
    } else if (pieces[at(i)].skipped) {
      std::ranges::fill(h.flat(), Real{0});
    } else {
      multiply<Real>(matrix.op(), pieces[at(i)].gradient, basis_.piece(i), h);
      vector_kernels<Real>().scale(gradient_scale, h.data, h.elements());
    }
  }
  h_.reduce_scatter();
  average(from_means);
  for (std::size_t i = 0; i < squares_.size(); ++i)
    squares_[i] = lowband::sum_of_squares<Real>(h_.owned(static_cast<Index>(i)));
  if (mesh_->within_replica().size() > 1)
    mesh_->within_replica().all_reduce(std::span(squares_), Reduction::kSum, {Purpose::kControl});
}

// A skipped matrix takes part with zeros, which leave the basis as it is.
template <class Real>
void Galore<Real>::project_mean(Index i, const Piece& piece, Real gradient_scale) {
  const Matrix& matrix = matrices_[at(i)];
  const MatrixView<Real> block = block_.matrix(0, matrix.rows.size(), matrix.cols.size());
  if (piece.skipped) {
    std::ranges::fill(block.flat(), Real{0});
  } else {
    std::ranges::transform(piece.gradient.flat(), block.data, [=](Real x) { return gradient_scale * x; });
  }
  const PayloadShare share{matrix.definition.cut.name, block.elements()};
  mesh_->replica().all_reduce(block.flat(), Reduction::kSum, {Purpose::kDense, {&share, 1}});
  for (Real& x : block.flat()) x /= static_cast<Real>(mesh_->shape().replica);
  take_basis(i, block);
  multiply<Real>(matrix.op(), block, basis_.piece(i), h_.piece(i));
}

// The owner gets the blocks of its replica, sends B to the processes that hold the same block in other
// replicas, and each of these, like the owner, to all of its replica. Zeros say that there is none.
template <class Real>
void Galore<Real>::take_basis(Index i, MatrixView<const Real> block) {
  const Matrix& matrix = matrices_[at(i)];
  const ParameterInfo& info = matrix.definition.info;
  const CutMatrix& cut = matrix.definition.cut;
  const Index r = matrix.definition.factor_rank;
  Communicator& within = mesh_->within_replica();
  const MeshShape& shape = mesh_->shape();
  const int processes = within.size();
  const int owner = matrix.owner % processes, owner_replica = matrix.owner / processes;
  const bool holds_whole = within.process() == owner && mesh_->position().replica == owner_replica;

  Buffer<Real> basis(std::min(info.rows, info.cols) * r);
  Buffer<Real> parts;
  if (mesh_->position().replica == owner_replica && processes > 1) {
    std::vector<Index> counts(at(Index{processes} * processes));
    for (int p = 0; p < processes; ++p)
      counts[at(p * processes + owner)] =
          cut.rows_of(mesh_position(shape, p)).size() * cut.cols_of(mesh_position(shape, p)).size();
    parts = Buffer<Real>(holds_whole ? info.elements() : 0);
    const PayloadShare share{cut.name, info.elements()};
    within.all_to_all<Real>(block.flat(), parts.span(), counts, {Purpose::kPeriodic, {&share, 1}});
  }
  if (holds_whole) {
    Buffer<Real> storage(info.elements());
    const MatrixView<Real> whole = storage.matrix(0, info.rows, info.cols);
    const Real* part = processes > 1 ? parts.data() : block.data;
    for (int p = 0; p < processes; ++p) {
      const Range rows = cut.rows_of(mesh_position(shape, p)), cols = cut.cols_of(mesh_position(shape, p));
      for (Index row = rows.begin; row < rows.end; ++row, part += cols.size())
        std::copy_n(part, cols.size(), whole.row(row) + cols.begin);
    }
    if (lowband::sum_of_squares<Real>(whole) > 0) {
      const MatrixView<Real> vectors = basis.matrix(0, std::min(info.rows, info.cols), r);
      matrix.tall ? right_singular_vectors<Real>(whole, vectors)
                  : left_singular_vectors<Real>(whole, vectors);
      fix_signs(vectors);
    }
  }
  const PayloadShare share{cut.name, basis.size()};
  if (within.process() == owner)
    mesh_->replica().broadcast(basis.span(), owner_replica, {Purpose::kFactor, {&share, 1}});
  if (processes > 1) within.broadcast(basis.span(), owner, {Purpose::kPeriodic, {&share, 1}});
  if (std::ranges::all_of(basis.span(), [](Real x) { return x == 0; })) return;
  const MatrixView<Real> piece = basis_.piece(i), owned = basis_.owned(i);
  std::copy_n(basis.data() + matrix.basis_rows().begin * r, piece.elements(), piece.data);
  std::copy_n(basis.data() + matrix.kept.begin * r, owned.elements(), owned.data);
}

template <class Real>
void Galore<Real>::average(const std::vector<bool>& from_means) {
  std::vector<PayloadShare> shares;
  Index elements = 0;
  for (std::size_t i = 0; i < from_means.size(); ++i) {
    if (from_means[i]) continue;
    const MatrixView<Real> h = h_.owned(static_cast<Index>(i));
    shares.push_back({matrices_[i].definition.cut.name, h.elements()});
    std::copy_n(h.data, h.elements(), sums_.data() + elements);
    elements += h.elements();
  }
  if (shares.empty()) return;
  const Tag tag{Purpose::kFactor, shares};
  if (wire_.size() > 0) {
    const std::span<BFloat16> wire = wire_.span(0, elements);
    vector_kernels<Real>().round_to_bf16(sums_.data(), wire.data(), elements);
    mesh_->replica().all_reduce(wire, Reduction::kSum, tag);
    vector_kernels<Real>().widen_bf16(wire.data(), sums_.data(), elements);
  } else {
    mesh_->replica().all_reduce(sums_.span(0, elements), Reduction::kSum, tag);
  }
  const Real* sum = sums_.data();
  for (std::size_t i = 0; i < from_means.size(); ++i) {
    if (from_means[i]) continue;
    for (Real& x : h_.owned(static_cast<Index>(i)).flat())
      x = *sum++ / static_cast<Real>(mesh_->shape().replica);
  }
}

template <class Real>
double Galore<Real>::sum_of_squares() const {
  double sum = 0;
  for (const double squares : squares_) sum += squares;
  return sum;
}

template <class Real>
typename Galore<Real>::Outcome Galore<Real>::update(std::span<const Piece> pieces, Real update_scale,
                                                    const StepInfo& info, Diagnosis<Real>* /*diagnosis*/) {
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const MatrixView<Real> n = n_.owned(i);
    if (pieces[at(i)].skipped) {
      std::ranges::fill(n.flat(), Real{0});
      continue;
    }
    // N <- sqrt(1 - b2^t) / (1 - b1^t) m1 / (sqrt m2 + eps)
    matrix.t[0] += 1;
    const double t = static_cast<double>(matrix.t[0]);
    const auto correction = static_cast<Real>(std::sqrt(1 - std::pow(kBeta2, t)) / (1 - std::pow(kBeta1, t)));
    const MatrixView<const Real> h = h_.owned(i);
    for (Index e = 0; e < h.elements(); ++e) {
      const Real x = update_scale * h.data[e];
      Real &m1 = matrix.m1[e], &m2 = matrix.m2[e];
      m1 = static_cast<Real>(kBeta1) * m1 + static_cast<Real>(1 - kBeta1) * x;
      m2 = static_cast<Real>(kBeta2) * m2 + static_cast<Real>(1 - kBeta2) * x * x;
      n.data[e] = correction * m1 / (std::sqrt(m2) + static_cast<Real>(kEpsilon));
    }
  }
  n_.all_gather();
  const double eta = info.learning_rate;
  const double decay = 1 - eta * options_.weight_decay;
  for (Index i = 0; i < size(); ++i) {
    if (pieces[at(i)].skipped) continue;
    // W <- (1 - eta wd) (W - alpha eta N B^T)
    const Matrix& matrix = matrices_[at(i)];
    const MatrixView<const Real> n = n_.piece(i), basis = basis_.piece(i);
    add_product<Real>(static_cast<Real>(-decay * options_.galore_scale * eta),
                      matrix.tall ? FactorPair<Real>{n, basis} : FactorPair<Real>{basis, n},
                      static_cast<Real>(decay), pieces[at(i)].weight);
  }
  return {};
}

template <class Real>
std::vector<StateTensor<Real>> Galore<Real>::state(Index i) {
  Matrix& matrix = matrices_[at(i)];
  const LayerMatrix& definition = matrix.definition;
  const Index r = definition.factor_rank, rows = matrix.m1.size() / r;
  return {{definition.state_name("basis"), basis_.owned(i)},
          {definition.state_name("m1"), matrix.m1.matrix(0, rows, r)},
          {definition.state_name("m2"), matrix.m2.matrix(0, rows, r)},
          {definition.state_name("t"), matrix.t.matrix(0, 1, 1)}};
}

template class Galore<float>;
template class Galore<double>;

}  // namespace lowband
