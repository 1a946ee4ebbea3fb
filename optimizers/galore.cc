#include "optimizers/galore.h"

#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/low_rank.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"
#include "runtime/random.h"

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
      basis_(shapes_of_basis(exchange_mesh, matrices_), {0}, exchange_mesh.world().device()),
      h_(shapes_of_h(exchange_mesh, matrices_), {0}, exchange_mesh.world().device()),
      n_(shapes_of_h(update_mesh, matrices_), {0}, exchange_mesh.world().device()),
      squares_(matrices_.size()) {
  LB_EXPECTS(options.wire == FactorWire::kAsComputed || (std::is_same_v<Real, float>),
             "optimizer.wire: found bf16 with numbers in ", dtype_name(dtype_of<Real>), ", expected f32");
  const auto owned = static_cast<Index>(h_.all_owned().size());
  Device* const device = exchange_mesh.world().device();
  sums_ = Buffer<Real>(owned, device);
  if (options.wire == FactorWire::kBF16) wire_ = Buffer<BFloat16>(owned, device);
  Index largest = 0;
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    matrix.m1 = Buffer<Real>(h_.owned(i).elements(), device);
    matrix.m2 = Buffer<Real>(h_.owned(i).elements(), device);
    largest = std::max(largest, matrix.rows.size() * matrix.cols.size());
    const MatrixView<Real> basis = basis_.owned(i);
    for (Index row = 0; row < basis.rows; ++row) {
      if (matrix.kept.begin + row < basis.cols)
        fill<Real>(Real{1}, basis.block(row, 1, matrix.kept.begin + row, 1));
    }
  }
  block_ = Buffer<Real>(largest, device);
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
void Galore<Real>::exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) {
  if (matrices_.empty()) return;
  basis_.all_gather();
  std::vector<bool> from_means;
  for (Index i = 0; i < size(); ++i) {
    const Matrix& matrix = matrices_[at(i)];
    const MatrixView<Real> h = h_.piece(i);
    from_means.push_back(matrix.basis_steps.contains(step));
    if (from_means.back()) {
      project_mean(i, pieces[at(i)], gradient_scale);
    } else if (is_set(pieces[at(i)].skipped)) {
      fill<Real>(Real{0}, h);
    } else {
      multiply<Real>(matrix.op(), pieces[at(i)].gradient, basis_.piece(i), h);
      scale<Real>(on_host<Real>(gradient_scale), h);
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
void Galore<Real>::project_mean(Index i, const Piece& piece, const Scalar& gradient_scale) {
  const Matrix& matrix = matrices_[at(i)];
  const MatrixView<Real> block = block_.matrix(0, matrix.rows.size(), matrix.cols.size());
  if (is_set(piece.skipped)) {
    fill<Real>(Real{0}, block);
  } else {
    add<Real>(gradient_scale, piece.gradient, Real{0}, block);
  }
  const PayloadShare share{matrix.definition.cut.name, block.elements()};
  mesh_->replica().all_reduce(block.flat(), Reduction::kSum, {Purpose::kDense, {&share, 1}});
  scale<Real>(Real{1} / static_cast<Real>(mesh_->shape().replica), block);
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
    if (processes == 1) {
      copy<Real>(block, whole);
    } else {
      const Real* part = parts.data();
      for (int p = 0; p < processes; ++p) {
        const Range rows = cut.rows_of(mesh_position(shape, p)), cols = cut.cols_of(mesh_position(shape, p));
        for (Index row = rows.begin; row < rows.end; ++row, part += cols.size())
          std::copy_n(part, cols.size(), whole.row(row) + cols.begin);
      }
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
  copy<Real>(basis.matrix(matrix.basis_rows().begin * r, piece.rows, r), piece);
  copy<Real>(basis.matrix(matrix.kept.begin * r, owned.rows, r), owned);
}

template <class Real>
void Galore<Real>::average(const std::vector<bool>& from_means) {
  std::vector<PayloadShare> shares;
  Index elements = 0;
  for (std::size_t i = 0; i < from_means.size(); ++i) {
    if (from_means[i]) continue;
    const MatrixView<Real> h = h_.owned(static_cast<Index>(i));
    shares.push_back({matrices_[i].definition.cut.name, h.elements()});
    copy<Real>(h, sums_.matrix(elements, h.rows, h.cols));
    elements += h.elements();
  }
  if (shares.empty()) return;
  const Tag tag{Purpose::kFactor, shares};
  if (wire_.size() > 0) {
    const std::span<BFloat16> wire = wire_.span(0, elements);
    const MatrixView<BFloat16> rounded = wire_.matrix(0, 1, elements);
    round_to_bf16<Real>(sums_.matrix(0, 1, elements), rounded);
    mesh_->replica().all_reduce(wire, Reduction::kSum, tag);
    widen_bf16<Real>(rounded, sums_.matrix(0, 1, elements));
  } else {
    mesh_->replica().all_reduce(sums_.span(0, elements), Reduction::kSum, tag);
  }
  const Real to_mean = Real{1} / static_cast<Real>(mesh_->shape().replica);
  Index sum = 0;
  for (std::size_t i = 0; i < from_means.size(); ++i) {
    if (from_means[i]) continue;
    const MatrixView<Real> h = h_.owned(static_cast<Index>(i));
    add<Real>(to_mean, sums_.matrix(sum, h.rows, h.cols), Real{0}, h);
    sum += h.elements();
  }
}

template <class Real>
void Galore<Real>::add_sum_of_squares(MatrixView<double> sum) const {
  double found = 0;
  for (const double squares : squares_) found += squares;
  Buffer<double> total(1);
  copy<double>(sum, total.line());
  total[0] += found;
  copy<double>(total.line(), sum);
}

template <class Real>
typename Galore<Real>::LaterOutcome Galore<Real>::update(std::span<const Piece> pieces,
                                                         const Scalar& update_scale, const StepInfo& info,
                                                         Diagnosis<Real>* /*diagnosis*/) {
  const Real c = on_host<Real>(update_scale);
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const MatrixView<Real> n = n_.owned(i);
    if (is_set(pieces[at(i)].skipped)) {
      fill<Real>(Real{0}, n);
      continue;
    }
    // N <- sqrt(1 - b2^t) / (1 - b1^t) m1 / (sqrt m2 + eps)
    matrix.t[0] += 1;
    const double t = static_cast<double>(matrix.t[0]);
    const double correction = std::sqrt(1 - std::pow(kBeta2, t)) / (1 - std::pow(kBeta1, t));
    const AdamDirection<Real> direction{.beta1 = static_cast<Real>(kBeta1),
                                        .new1 = static_cast<Real>(1 - kBeta1),
                                        .beta2 = static_cast<Real>(kBeta2),
                                        .new2 = static_cast<Real>(1 - kBeta2),
                                        .correction = static_cast<Real>(correction),
                                        .epsilon = static_cast<Real>(kEpsilon),
                                        .gradient_scale = c};
    lowband::update<Real>(direction, h_.owned(i).line(), matrix.m1.line(), matrix.m2.line(), n.line());
  }
  n_.all_gather();
  const double eta = info.learning_rate;
  const double decay = 1 - eta * options_.weight_decay;
  for (Index i = 0; i < size(); ++i) {
    if (is_set(pieces[at(i)].skipped)) continue;
    // W <- (1 - eta wd) (W - alpha eta N B^T)
    const Matrix& matrix = matrices_[at(i)];
    const MatrixView<const Real> n = n_.piece(i), basis = basis_.piece(i);
    add_product<Real>(static_cast<Real>(-decay * options_.galore_scale * eta),
                      matrix.tall ? FactorPair<Real>{n, basis} : FactorPair<Real>{basis, n},
                      static_cast<Real>(decay), pieces[at(i)].weight);
  }
  return [] { return Outcome{}; };
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
