#include "collectives/factors/factor_rows.h"

#include <algorithm>

namespace lowband {
namespace {

/// First row owned by process `process`: consecutive shares whose sizes differ by at most one, some empty.
Index share_begin(Index rows, Index processes, Index process) { return rows * process / processes; }

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

}  // namespace

template <class Real>
FactorRows<Real>::FactorRows(std::vector<Shape> shapes)
    : shapes_(std::move(shapes)), placements_(shapes_.size()) {
  const Index matrices = static_cast<Index>(shapes_.size());
  Index piece_elements = 0;
  for (Index i = 0; i < matrices; ++i) {
    const Shape& shape = shapes_[at(i)];
    const int processes = shape.axis->size();
    Placement& placement = placements_[at(i)];
    placement.split = processes > 1;
    const int self = shape.axis->process();
    placement.owned_rows =
        share_begin(shape.rows, processes, self + 1) - share_begin(shape.rows, processes, self);
    owned_shares_.push_back({shape.name, placement.owned_rows * shape.factor_rank});
    if (!placement.split) continue;

    placement.piece_offset = piece_elements;
    piece_elements += shape.rows * shape.factor_rank;
    auto group =
        std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.axis == shape.axis; });
    if (group == groups_.end()) {
      groups_.push_back({.axis = shape.axis,
                         .members = {},
                         .counts = std::vector<Index>(at(processes)),
                         .packed = {},
                         .shares = {}});
      group = groups_.end() - 1;
    }
    group->members.push_back(i);
    group->shares.push_back({shape.name, shape.rows * shape.factor_rank});
    for (int p = 0; p < processes; ++p)
      group->counts[at(p)] +=
          (share_begin(shape.rows, processes, p + 1) - share_begin(shape.rows, processes, p)) *
          shape.factor_rank;
  }
  pieces_ = Buffer<Real>(piece_elements);

  // Owned rows: group after group, so that a group receives straight into its range; then the rest.
  Index owned_elements = 0;
  const auto place = [&](Index i) {
    placements_[at(i)].owned_offset = owned_elements;
    owned_elements += placements_[at(i)].owned_rows * shapes_[at(i)].factor_rank;
  };
  for (Group& group : groups_) {
    group.owned_offset = owned_elements;
    for (const Index i : group.members) place(i);
    Index packed_elements = 0;
    for (const Index count : group.counts) packed_elements += count;
    group.packed = Buffer<Real>(packed_elements);
  }
  for (Index i = 0; i < matrices; ++i) {
    if (!placements_[at(i)].split) place(i);
  }
  owned_ = Buffer<Real>(owned_elements);
}

template <class Real>
MatrixView<Real> FactorRows<Real>::piece(Index i) {
  const Placement& placement = placements_[at(i)];
  if (!placement.split) return owned(i);
  return pieces_.matrix(placement.piece_offset, shapes_[at(i)].rows, shapes_[at(i)].factor_rank);
}

template <class Real>
MatrixView<Real> FactorRows<Real>::owned(Index i) {
  const Placement& placement = placements_[at(i)];
  return owned_.matrix(placement.owned_offset, placement.owned_rows, shapes_[at(i)].factor_rank);
}

template <class Real>
template <class Visit>
void FactorRows<Real>::for_each_packed(Group& group, Visit visit) {
  Real* packed = group.packed.data();
  const int processes = group.axis->size();
  for (int p = 0; p < processes; ++p) {
    for (const Index i : group.members) {
      const Index begin = share_begin(shapes_[at(i)].rows, processes, p);
      const Index end = share_begin(shapes_[at(i)].rows, processes, p + 1);
      const MatrixView<Real> rows = piece(i).row_block(begin, end - begin);
      visit(rows, packed);
      packed += rows.elements();
    }
  }
}

template <class Real>
void FactorRows<Real>::reduce_scatter() {
  for (Group& group : groups_) {
    for_each_packed(
        group, [](MatrixView<Real> rows, Real* packed) { std::copy_n(rows.data, rows.elements(), packed); });
    group.axis->reduce_scatter(std::span<const Real>(group.packed.span()),
                               owned_.span(group.owned_offset, group.counts[at(group.axis->process())]),
                               std::span<const Index>(group.counts), Reduction::kSum,
                               {Purpose::kFactor, group.shares});
  }
}

template <class Real>
void FactorRows<Real>::all_gather() {
  for (Group& group : groups_) {
    group.axis->all_gather(
        std::span<const Real>(owned_.span(group.owned_offset, group.counts[at(group.axis->process())])),
        group.packed.span(), std::span<const Index>(group.counts), {Purpose::kFactor, group.shares});
    for_each_packed(group, [](MatrixView<Real> rows, const Real* packed) {
      std::copy_n(packed, rows.elements(), rows.data);
    });
  }
}

template class FactorRows<float>;
template class FactorRows<double>;

}  // namespace lowband
