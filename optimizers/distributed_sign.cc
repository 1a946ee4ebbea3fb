#include "optimizers/distributed_sign.h"

#include "collectives/factors/homes.h"
#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// The extent that is not cut, of a matrix that is cut along one dimension.
Index uncut_extent(const CutMatrix& matrix) { return matrix.rows_cut ? matrix.cols() : matrix.rows(); }

}  // namespace

std::string_view assembly_name(Assembly assembly) {
  switch (assembly) {
    case Assembly::kLocal:
      return "local";
    case Assembly::kOwner:
      return "owner";
    case Assembly::kGram:
      return "gram";
  }
  return "?";
}

Assembly choose_assembly(const CutMatrix& matrix, Index steps) {
  if (!matrix.rows_cut && !matrix.cols_cut) return Assembly::kLocal;
  if (matrix.rows_cut && matrix.cols_cut) return Assembly::kOwner;
  const Index uncut = uncut_extent(matrix);
  return steps * matrix.processes() * uncut * uncut < matrix.elements() ? Assembly::kGram : Assembly::kOwner;
}

Index sign_bytes(const CutMatrix& matrix, SignPolynomial polynomial, Index element_bytes) {
  const auto steps = static_cast<Index>(sign_iteration(polynomial).steps.size());
  switch (choose_assembly(matrix, steps)) {
    case Assembly::kLocal:
      return 0;
    case Assembly::kOwner:
      return 2 * matrix.elements() * element_bytes;
    case Assembly::kGram: {
      const Index uncut = uncut_extent(matrix);
      return steps * uncut * uncut * element_bytes + dtype_bytes(DType::kF64);  // and the norm
    }
  }
  return 0;
}

template <class Real>
DistributedSign<Real>::DistributedSign(ProcessMesh& mesh, std::vector<CutMatrix> matrices,
                                       SignPolynomial polynomial, Index rotation)
    : mesh_(&mesh),
      group_(&mesh.within_replica()),
      polynomial_(polynomial),
      matrices_(std::move(matrices)),
      owners_(matrices_.size()),
      blocks_(matrices_.size()) {
  const auto steps = static_cast<Index>(sign_iteration(polynomial).steps.size());
  for (const CutMatrix& matrix : matrices_) assemblies_.push_back(choose_assembly(matrix, steps));
  choose_owners(rotation);
  by_gram_ = of(Assembly::kGram);
  for (const Index i : by_gram_) {
    norm_shares_.push_back({matrix(i).name, 1});
    gram_shares_.push_back({matrix(i).name, matrix(i).short_side() * matrix(i).short_side()});
  }
  Index gram_elements = 0;
  for (const PayloadShare& share : gram_shares_) gram_elements += share.elements;
  norms_ = Buffer<double>(static_cast<Index>(by_gram_.size()), mesh.world().device());
  grams_ = Buffer<Real>(gram_elements, mesh.world().device());
  arrange();
}

template <class Real>
void DistributedSign<Real>::set_row_pieces(Index i, std::vector<Range> pieces) {
  matrices_[at(i)].row_pieces = std::move(pieces);
}

template <class Real>
void DistributedSign<Real>::set_col_pieces(Index i, std::vector<Range> pieces) {
  matrices_[at(i)].col_pieces = std::move(pieces);
}

template <class Real>
void DistributedSign<Real>::arrange() {
  place_blocks();
  place_parts();
  reserve_workspace();
}

// A block that is signed by itself is no wider than the short side of its matrix.
template <class Real>
void DistributedSign<Real>::reserve_workspace() {
  Index side = sign_side_, elements = sign_elements_;
  for (Index i = 0; i < size(); ++i) {
    side = std::max(side, assembly(i) == Assembly::kGram ? matrix(i).short_side()
                                                         : std::min(block(i).rows, block(i).cols));
    elements = std::max(elements, block(i).elements());
  }
  for (const Owned& owned : owned_) {
    side = std::max(side, matrix(owned.matrix).short_side());
    elements = std::max(elements, matrix(owned.matrix).elements());
  }
  if (sign_ && side == sign_side_ && elements == sign_elements_) return;
  sign_.emplace(polynomial_, side, elements, mesh_->world().device());
  sign_side_ = side;
  sign_elements_ = elements;
}

template <class Real>
typename DistributedSign<Real>::Place DistributedSign<Real>::place(Index i, int process) const {
  const Index tensor = process % mesh_->shape().tensor, shard = process / mesh_->shape().tensor;
  const CutMatrix& cut = matrix(i);
  return cut.shard_cuts_rows ? Place{cut.row_pieces[at(shard)], cut.col_pieces[at(tensor)]}
                             : Place{cut.row_pieces[at(tensor)], cut.col_pieces[at(shard)]};
}

template <class Real>
std::vector<Index> DistributedSign<Real>::of(Assembly assembly) const {
  std::vector<Index> matrices;
  for (Index i = 0; i < size(); ++i) {
    if (assemblies_[at(i)] == assembly) matrices.push_back(i);
  }
  return matrices;
}

// The flops of a sign grow as short side^2 x long side, as those of orthonormalising P.
template <class Real>
void DistributedSign<Real>::choose_owners(Index rotation) {
  const std::vector<Index> assembled = of(Assembly::kOwner);
  std::vector<LeftExtent> extents;
  extents.reserve(assembled.size());
  for (const Index i : assembled)
    extents.push_back(
        {.rows = std::max(matrix(i).rows(), matrix(i).cols()), .factor_rank = matrix(i).short_side()});
  const std::vector<int> homes = choose_homes(extents, processes());
  for (std::size_t k = 0; k < homes.size(); ++k)
    owners_[at(assembled[k])] = static_cast<int>((homes[k] + rotation) % processes());
}

template <class Real>
void DistributedSign<Real>::place_blocks() {
  std::vector<Index> order = of(Assembly::kOwner);
  std::ranges::stable_sort(order, {}, [&](Index i) { return owners_[at(i)]; });
  shares_.clear();
  sent_elements_ = 0;
  for (const Index i : order) {
    shares_.push_back({matrix(i).name, matrix(i).elements()});
    sent_elements_ += place(i, group_->process()).elements();
  }
  for (const Assembly assembly : {Assembly::kGram, Assembly::kLocal}) {
    for (const Index i : of(assembly)) order.push_back(i);
  }
  Index elements = 0;
  for (const Index i : order) elements += place(i, group_->process()).elements();
  if (own_.size() < elements) own_ = Buffer<Real>(elements, mesh_->world().device());
  Index offset = 0;
  for (const Index i : order) {
    const Place own = place(i, group_->process());
    blocks_[at(i)] = own_.matrix(offset, own.rows.size(), own.cols.size());
    offset += own.elements();
  }
}

template <class Real>
void DistributedSign<Real>::place_parts() {
  const int n = processes(), self = group_->process();
  owned_.clear();
  counts_.assign(at(Index{n} * n), 0);
  counts_back_ = counts_;
  Index part_elements = 0, largest = 0;
  for (const Index i : of(Assembly::kOwner)) {
    const int owner = owners_[at(i)];
    for (int process = 0; process < n; ++process) {
      counts_[at(Index{process} * n + owner)] += place(i, process).elements();
      counts_back_[at(Index{owner} * n + process)] += place(i, process).elements();
    }
    if (owner != self) continue;
    owned_.push_back({.matrix = i, .parts = {}});
    part_elements += matrix(i).elements();
    largest = std::max(largest, matrix(i).elements());
  }
  if (parts_.size() < part_elements) parts_ = Buffer<Real>(part_elements, mesh_->world().device());
  if (whole_.size() < largest) whole_ = Buffer<Real>(largest, mesh_->world().device());
  Index offset = 0;
  for (int process = 0; process < n; ++process) {
    for (Owned& owned : owned_) {
      const Place held = place(owned.matrix, process);
      owned.parts.push_back(parts_.matrix(offset, held.rows.size(), held.cols.size()));
      offset += held.elements();
    }
  }
}

template <class Real>
void DistributedSign<Real>::compute() {
  if (!shares_.empty()) {
    const Tag tag{Purpose::kUpdate, shares_};
    const std::span<Real> sent = own_.span(0, sent_elements_);
    group_->all_to_all<Real>(sent, parts_.span(), counts_, tag);
    compute_owned();
    group_->all_to_all<Real>(parts_.span(), sent, counts_back_, tag);
  }
  if (!by_gram_.empty()) compute_by_gram();
  for (const Index i : of(Assembly::kLocal)) {
    if (block(i).elements() > 0) sign_->compute(block(i));
  }
}

template <class Real>
void DistributedSign<Real>::compute_owned() {
  for (const Owned& owned : owned_) {
    const MatrixView<Real> whole = whole_.matrix(0, matrix(owned.matrix).rows(), matrix(owned.matrix).cols());
    const auto held_by = [&](int process) {
      const auto& [rows, cols] = place(owned.matrix, process);
      return whole.block(rows.begin, rows.size(), cols.begin, cols.size());
    };
    for (int process = 0; process < processes(); ++process) copy(owned.parts[at(process)], held_by(process));
    sign_->compute(whole);
    for (int process = 0; process < processes(); ++process) copy(held_by(process), owned.parts[at(process)]);
  }
}

// Every step sums the Gram matrices of all matrices at once.
template <class Real>
void DistributedSign<Real>::compute_by_gram() {
  for (std::size_t k = 0; k < by_gram_.size(); ++k)
    sum_of_squares<Real>(block(by_gram_[k]), norms_.matrix(static_cast<Index>(k), 1, 1));
  group_->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kUpdate, norm_shares_});
  for (std::size_t k = 0; k < by_gram_.size(); ++k)
    sign_->start(block(by_gram_[k]), norms_.matrix(static_cast<Index>(k), 1, 1));

  const auto for_each_gram = [&](auto visit) {
    Index offset = 0;
    for (const Index i : by_gram_) {
      const Index side = matrix(i).short_side();
      visit(block(i), matrix(i).rows() == side, grams_.matrix(offset, side, side));
      offset += side * side;
    }
  };
  for (Index step = 0; step < sign_->steps(); ++step) {
    for_each_gram([&](auto x, bool wide, auto gram) {
      if (x.elements() > 0) {
        sign_->gram(x, wide, gram);
      } else {
        fill<Real>(Real{0}, gram);
      }
    });
    group_->all_reduce(grams_.span(), Reduction::kSum, {Purpose::kUpdate, gram_shares_});
    for_each_gram([&](auto x, bool wide, auto gram) {
      if (x.elements() > 0) sign_->advance(step, wide, gram, x);
    });
  }
}

template <class Real>
void DistributedSign<Real>::compute_blocks() {
  for (Index i = 0; i < size(); ++i) {
    if (block(i).elements() > 0) sign_->compute(block(i));
  }
}

template class DistributedSign<float>;
template class DistributedSign<double>;

}  // namespace lowband
