#include "optimizers/shard_exchange.h"

#include "runtime/copy.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

}  // namespace

template <class Real>
ShardExchange<Real>::ShardExchange(ProcessMesh& mesh, std::vector<Parameter<Real>> parameters,
                                   std::vector<bool> is_matrix)
    : mesh_(&mesh), parameters_(std::move(parameters)), is_matrix_(std::move(is_matrix)) {
  for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
    const Index rows = layout(i).tensor_rows(mesh.position().tensor).size();
    const Index cols = layout(i).tensor_cols(mesh.position().tensor).size();
    for (const MatrixView<Real>& view : {parameters_[at(i)].weight, parameters_[at(i)].gradient})
      LB_EXPECTS(view.rows == rows && view.cols == cols && view.contiguous(), "optimizer: piece of ",
                 parameters_[at(i)].info.name, ": found (", view.rows, ", ", view.cols, "), row stride ",
                 view.row_stride, ", expected a contiguous (", rows, ", ", cols, ")");
  }
  place_pieces();
}

template <class Real>
void ShardExchange<Real>::place_pieces() {
  const int shards = mesh_->shape().shard;
  counts_.assign(at(shards), 0);
  Index packed_elements = 0;
  for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
    const MatrixView<Real> whole = parameters_[at(i)].gradient;
    if (shards == 1) {
      gradients_.push_back(piece(i, whole, 0));
      continue;
    }
    shares_.push_back({parameters_[at(i)].info.name, whole.elements()});
    packed_elements += whole.elements();
    for (int shard = 0; shard < shards; ++shard) counts_[at(shard)] += piece(i, whole, shard).elements();
  }
  if (shards == 1) return;
  Device* const device = mesh_->world().device();
  packed_ = Buffer<Real>(packed_elements, device);
  owned_ = Buffer<Real>(counts_[at(mesh_->position().shard)], device);
  Index offset = 0;
  for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
    const MatrixView<Real> own = piece(i, parameters_[at(i)].gradient, mesh_->position().shard);
    gradients_.push_back(owned_.matrix(offset, own.rows, own.cols));
    offset += own.elements();
  }
}

template <class Real>
void ShardExchange<Real>::rebind(Index i, Real* weight, Real* gradient) {
  parameters_[at(i)].weight.data = weight;
  parameters_[at(i)].gradient.data = gradient;
  if (mesh_->shape().shard == 1) gradients_[at(i)] = piece(i, parameters_[at(i)].gradient, 0);
}

template <class Real>
MatrixLayout ShardExchange<Real>::layout(Index i) const {
  const ParameterInfo& info = parameters_[at(i)].info;
  return MatrixLayout(info.rows, info.cols, info.cut, mesh_->shape().tensor, mesh_->shape().shard);
}

template <class Real>
MatrixView<Real> ShardExchange<Real>::piece(Index i, MatrixView<Real> whole, int shard) const {
  if (!is_matrix_[at(i)]) {
    const Range range = split_range(whole.elements(), mesh_->shape().shard, shard);
    return whole.elements_from(range.begin, 1, range.size());
  }
  const Index tensor = mesh_->position().tensor;
  const Range rows = layout(i).owned_rows(shard, tensor);
  const Range cols = layout(i).owned_cols(shard, tensor);
  return whole.block(rows.begin - layout(i).tensor_rows(tensor).begin, rows.size(),
                     cols.begin - layout(i).tensor_cols(tensor).begin, cols.size());
}

template <class Real>
MatrixView<Real> ShardExchange<Real>::weight(Index i) const {
  return piece(i, parameters_[at(i)].weight, mesh_->position().shard);
}

template <class Real>
void ShardExchange<Real>::reduce_gradients() {
  Communicator& shard = mesh_->shard();
  if (shard.size() == 1) return;
  Index packed = 0;
  for (int process = 0; process < shard.size(); ++process) {
    for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
      const MatrixView<const Real> from = piece(i, parameters_[at(i)].gradient, process);
      copy<Real>(from, packed_.matrix(packed, from.rows, from.cols));
      packed += from.elements();
    }
  }
  shard.reduce_scatter(std::span<const Real>(packed_.span()), owned_.span(), std::span<const Index>(counts_),
                       Reduction::kSum, {Purpose::kGradient, shares_});
}

template <class Real>
void ShardExchange<Real>::gather_weights() {
  Communicator& shard = mesh_->shard();
  if (shard.size() == 1) return;
  const Index before = std::reduce(counts_.begin(), counts_.begin() + shard.process());
  const std::span<Real> own = packed_.span(before, counts_[at(shard.process())]);
  Index end = before;
  for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
    const MatrixView<const Real> from = weight(i);
    copy<Real>(from, packed_.matrix(end, from.rows, from.cols));
    end += from.elements();
  }
  shard.all_gather(std::span<const Real>(own), packed_.span(), std::span<const Index>(counts_),
                   {Purpose::kWeight, shares_});
  Index packed = 0;
  for (int process = 0; process < shard.size(); ++process) {
    for (Index i = 0; i < static_cast<Index>(parameters_.size()); ++i) {
      const MatrixView<Real> to = piece(i, parameters_[at(i)].weight, process);
      copy<Real>(packed_.matrix(packed, to.rows, to.cols), to);
      packed += to.elements();
    }
  }
}

template class ShardExchange<float>;
template class ShardExchange<double>;

}  // namespace lowband
