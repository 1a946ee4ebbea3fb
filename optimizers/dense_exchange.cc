#include "optimizers/dense_exchange.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class Real>
Real* pack(MatrixView<Real> from, Real* to) {
  for (Index i = 0; i < from.rows; ++i) to = std::copy_n(from.row(i), from.cols, to);
  return to;
}

template <class Real>
const Real* unpack(const Real* from, MatrixView<Real> to) {
  for (Index i = 0; i < to.rows; ++i, from += to.cols) std::copy_n(from, to.cols, to.row(i));
  return from;
}

}  // namespace

template <class Real>
DenseExchange<Real>::DenseExchange(ProcessMesh& mesh, std::span<Parameter<Real>> parameters,
                                   std::vector<bool> is_matrix)
    : mesh_(&mesh), parameters_(parameters), is_matrix_(std::move(is_matrix)), gradients_(parameters.size()) {
  for (Index i = 0; i < static_cast<Index>(parameters.size()); ++i) {
    const Index rows = layout(i).tensor_rows(mesh.position().tensor).size();
    const Index cols = layout(i).tensor_cols(mesh.position().tensor).size();
    for (const MatrixView<Real>& view : {parameters[at(i)].weight, parameters[at(i)].gradient})
      LB_EXPECTS(view.rows == rows && view.cols == cols && view.contiguous(), "optimizer: piece of ",
                 parameters[at(i)].info.name, ": found (", view.rows, ", ", view.cols, "), row stride ",
                 view.row_stride, ", expected a contiguous (", rows, ", ", cols, ")");
  }
  for (const bool matrices : {false, true}) {
    for (Index i = 0; i < static_cast<Index>(parameters.size()); ++i) {
      if (is_matrix_[at(i)] == matrices) order_.push_back(i);
    }
  }
  place_pieces();
}

template <class Real>
void DenseExchange<Real>::place_pieces() {
  const int shards = mesh_->shape().shard;
  const int self = mesh_->position().shard;
  counts_.assign(at(shards), 0);
  Index packed_elements = 0;
  for (const Index i : order_) {
    const MatrixView<Real> whole = parameters_[at(i)].gradient;
    shares_.push_back({parameters_[at(i)].info.name, whole.elements()});
    packed_elements += whole.elements();
    for (int shard = 0; shard < shards; ++shard) counts_[at(shard)] += piece(i, whole, shard).elements();
    if (is_matrix_[at(i)]) continue;
    const Index elements = piece(i, whole, self).elements();
    dense_shares_.push_back({parameters_[at(i)].info.name, elements});
    owned_dense_elements_ += elements;
    dense_elements_ += parameters_[at(i)].info.elements() *
                       (parameters_[at(i)].info.cut == TensorCut::kNone ? mesh_->shape().tensor : 1);
  }

  // Gradients stay where the model put them as far as nobody sends them from one buffer.
  const bool dense_in_buffer = shards > 1 || mesh_->shape().replica > 1;
  const bool matrices_in_buffer = shards > 1;
  owned_ = Buffer<Real>(matrices_in_buffer ? counts_[at(self)] : dense_in_buffer ? owned_dense_elements_ : 0);
  if (shards > 1) packed_ = Buffer<Real>(packed_elements);
  Index offset = 0;
  for (const Index i : order_) {
    const MatrixView<Real> own = piece(i, parameters_[at(i)].gradient, self);
    if (is_matrix_[at(i)] ? matrices_in_buffer : dense_in_buffer) {
      gradients_[at(i)] = owned_.matrix(offset, own.rows, own.cols);
      offset += own.elements();
    } else {
      gradients_[at(i)] = own;
    }
  }
}

template <class Real>
MatrixLayout DenseExchange<Real>::layout(Index i) const {
  const ParameterInfo& info = parameters_[at(i)].info;
  return MatrixLayout(info.rows, info.cols, info.cut, mesh_->shape().tensor, mesh_->shape().shard);
}

template <class Real>
typename DenseExchange<Real>::Origin DenseExchange<Real>::matrix_origin(Index i) const {
  const MeshPosition& position = mesh_->position();
  return {layout(i).owned_rows(position.shard, position.tensor).begin,
          layout(i).owned_cols(position.shard, position.tensor).begin};
}

template <class Real>
MatrixView<Real> DenseExchange<Real>::piece(Index i, MatrixView<Real> whole, int shard) const {
  if (!is_matrix_[at(i)]) {
    const Range range = split_range(whole.elements(), mesh_->shape().shard, shard);
    return {whole.data + range.begin, 1, range.size()};
  }
  const Index tensor = mesh_->position().tensor;
  const Range rows = layout(i).owned_rows(shard, tensor);
  const Range cols = layout(i).owned_cols(shard, tensor);
  return whole.block(rows.begin - layout(i).tensor_rows(tensor).begin, rows.size(),
                     cols.begin - layout(i).tensor_cols(tensor).begin, cols.size());
}

template <class Real>
MatrixView<Real> DenseExchange<Real>::weight(Index i) const {
  return piece(i, parameters_[at(i)].weight, mesh_->position().shard);
}

template <class Real>
void DenseExchange<Real>::reduce_over_shards() {
  Communicator& shard = mesh_->shard();
  if (shard.size() == 1) {
    Real* owned = owned_.data();
    for (const Index i : order_) {
      if (gradients_[at(i)].data != parameters_[at(i)].gradient.data)
        owned = pack(parameters_[at(i)].gradient, owned);
    }
    return;
  }
  Real* packed = packed_.data();
  for (int process = 0; process < shard.size(); ++process) {
    for (const Index i : order_) packed = pack(piece(i, parameters_[at(i)].gradient, process), packed);
  }
  shard.reduce_scatter(std::span<const Real>(packed_.span()), owned_.span(), std::span<const Index>(counts_),
                       Reduction::kSum, {Purpose::kGradient, shares_});
}

template <class Real>
void DenseExchange<Real>::reduce_over_replicas() {
  Communicator& replica = mesh_->replica();
  if (replica.size() > 1 || mesh_->shape().shard > 1) {
    replica.all_reduce(owned_.span(0, owned_dense_elements_), Reduction::kSum,
                       {Purpose::kDense, dense_shares_});
    return;
  }
  // A single process per piece: nothing to sum and nothing to copy, but to be accounted for.
  for (std::size_t k = 0; k < dense_shares_.size(); ++k)
    replica.all_reduce(gradients_[at(order_[k])].flat(), Reduction::kSum,
                       {Purpose::kDense, std::span(dense_shares_).subspan(k, 1)});
}

template <class Real>
void DenseExchange<Real>::gather_weights() {
  Communicator& shard = mesh_->shard();
  if (shard.size() == 1) return;
  const Index before = std::reduce(counts_.begin(), counts_.begin() + shard.process());
  const std::span<Real> own = packed_.span(before, counts_[at(shard.process())]);
  Real* end = own.data();
  for (const Index i : order_) end = pack(weight(i), end);
  shard.all_gather(std::span<const Real>(own), packed_.span(), std::span<const Index>(counts_),
                   {Purpose::kWeight, shares_});
  const Real* packed = packed_.data();
  for (int process = 0; process < shard.size(); ++process) {
    for (const Index i : order_) packed = unpack(packed, piece(i, parameters_[at(i)].weight, process));
  }
}

template class DenseExchange<float>;
template class DenseExchange<double>;

}  // namespace lowband
