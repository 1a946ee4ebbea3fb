#include "collectives/factors/factor_rows.h"

#include "runtime/copy.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

}  // namespace

Index first_owned_row(Index rows, Index processes, Index process) { return rows * process / processes; }

Index owned_row_count(Index rows, Index processes, Index process) {
  return first_owned_row(rows, processes, process + 1) - first_owned_row(rows, processes, process);
}

template <class Real>
Index FactorRows<Real>::Shape::owned_rows() const {
  return owned_row_count(rows, axis->size(), axis->process());
}

template <class Real>
FactorRows<Real>::FactorRows(std::vector<Shape> shapes, const std::vector<Index>& guest_elements,
                             Device* device)
    : shapes_(std::move(shapes)), placements_(shapes_.size()), guest_elements_(guest_elements) {
  const Index matrices = static_cast<Index>(shapes_.size());
  Index piece_elements = 0;
  for (Index i = 0; i < matrices; ++i) {
    const Shape& shape = shapes_[at(i)];
    const int processes = shape.axis->size();
    Placement& placement = placements_[at(i)];
    placement.split = processes > 1;
    placement.owned_rows = shape.owned_rows();
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
      group->counts[at(p)] += owned_row_count(shape.rows, processes, p) * shape.factor_rank;
  }
  pieces_ = Buffer<Real>(piece_elements, device);
  for (Group& group : groups_) {
    group.own_offset =
        std::accumulate(group.counts.begin(), group.counts.begin() + group.axis->process(), Index{0});
    group.packed = Buffer<Real>(std::accumulate(group.counts.begin(), group.counts.end(), Index{0}), device);
  }

  Index owned_elements = 0;
  for (std::size_t part = 0; part < guest_elements_.size(); ++part) {
    const Index begin = owned_elements;
    for (Index i = 0; i < matrices; ++i) {
      if (at(shapes_[at(i)].part) != part) continue;
      placements_[at(i)].owned_offset = owned_elements;
      owned_elements += owned_shares_[at(i)].elements;
    }
    owned_elements += guest_elements_[part];
    part_elements_.push_back(owned_elements - begin);
  }
  owned_ = Buffer<Real>(owned_elements, device);
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
  Index packed = 0;
  const int processes = group.axis->size();
  for (int p = 0; p < processes; ++p) {
    for (const Index i : group.members) {
      const Index begin = first_owned_row(shapes_[at(i)].rows, processes, p);
      const Index end = first_owned_row(shapes_[at(i)].rows, processes, p + 1);
      const MatrixView<Real> rows = piece(i).row_block(begin, end - begin);
      visit(rows, group.packed.matrix(packed, rows.rows, rows.cols));
      packed += rows.elements();
    }
  }
}

template <class Real>
std::span<Real> FactorRows<Real>::part(int part) {
  const Index begin = std::accumulate(part_elements_.begin(), part_elements_.begin() + part, Index{0});
  return owned_.span(begin, part_elements_[at(part)]);
}

template <class Real>
std::span<Real> FactorRows<Real>::guest(int part) {
  return this->part(part).last(at(guest_elements_[at(part)]));
}

template <class Real>
std::span<Real> FactorRows<Real>::own_packed(Group& group) {
  return group.packed.span(group.own_offset, group.counts[at(group.axis->process())]);
}

// The rows that this process owns lie together in the packed buffer, and apart, by part, among the owned
// rows.
template <class Real>
void FactorRows<Real>::reduce_scatter() {
  for (Group& group : groups_) {
    for_each_packed(group, [](MatrixView<Real> rows, MatrixView<Real> packed) { copy<Real>(rows, packed); });
    const std::span<Real> own = own_packed(group);
    group.axis->reduce_scatter(std::span<const Real>(group.packed.span()), own,
                               std::span<const Index>(group.counts), Reduction::kSum,
                               {Purpose::kFactor, group.shares});
    Index summed = group.own_offset;
    for (const Index i : group.members) {
      const MatrixView<Real> rows = owned(i);
      copy<Real>(group.packed.matrix(summed, rows.rows, rows.cols), rows);
      summed += rows.elements();
    }
  }
}

template <class Real>
void FactorRows<Real>::all_gather() {
  for (Group& group : groups_) {
    const std::span<Real> own = own_packed(group);
    Index gathered = group.own_offset;
    for (const Index i : group.members) {
      const MatrixView<Real> rows = owned(i);
      copy<Real>(rows, group.packed.matrix(gathered, rows.rows, rows.cols));
      gathered += rows.elements();
    }
    group.axis->all_gather(std::span<const Real>(own), group.packed.span(),
                           std::span<const Index>(group.counts), {Purpose::kFactor, group.shares});
    for_each_packed(group, [](MatrixView<Real> rows, MatrixView<Real> packed) { copy<Real>(packed, rows); });
  }
}

template class FactorRows<float>;
template class FactorRows<double>;

}  // namespace lowband
