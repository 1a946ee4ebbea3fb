#include "optimizers/block_views.h"

#include "runtime/copy.h"

#include <algorithm>

namespace lowband {

template <class Real>
BlockViews<Real>::BlockViews(const ParameterInfo& info, const CutMatrix& cut, const MeshPosition& position)
    : of_rows_(info.blocks.of_rows),
      rows_(cut.rows_of(position).size()),
      cols_(cut.cols_of(position).size()) {
  const Range held = of_rows_ ? cut.rows_of(position) : cut.cols_of(position);
  if (info.blocks.empty()) {
    runs_.push_back({{0, held.size()}});
    return;
  }
  Index next = 0, copied = 0;
  for (const std::vector<Range>& block : info.blocks.ranges) {
    std::vector<Range>& runs = runs_.emplace_back();
    for (const Range& range : block) {
      const Index begin = std::max(range.begin, held.begin), end = std::min(range.end, held.end);
      if (begin >= end) continue;
      runs.push_back({begin - held.begin, end - held.begin});
      in_order_ = in_order_ && runs.back().begin == next;
      next = runs.back().end;
    }
    if (runs.size() > 1) copied += lines_of(runs_.size() - 1) * (of_rows_ ? cols_ : rows_);
  }
  in_order_ = in_order_ && (of_rows_ || runs_.size() == 1);
  copies_ = Buffer<Real>(copied);
}

template <class Real>
Index BlockViews<Real>::lines_of(std::size_t j) const {
  Index lines = 0;
  for (const Range& run : runs_[j]) lines += run.size();
  return lines;
}

template <class Real>
template <class Visit>
void BlockViews<Real>::for_each_run(std::size_t j, MatrixView<Real> whole, MatrixView<Real> block,
                                    Visit visit) const {
  Index place = 0;
  for (const Range& run : runs_[j]) {
    visit(lines(whole, run.begin, run.size()), lines(block, place, run.size()));
    place += run.size();
  }
}

template <class Real>
void BlockViews<Real>::show_gradient(MatrixView<Real> gradient, Buffer<Real>& scratch,
                                     std::span<Piece> pieces) const {
  if (!in_order_ && scratch.size() < gradient.elements())
    scratch = Buffer<Real>(gradient.elements(), gradient.device);
  Index offset = 0;
  for (std::size_t j = 0; j < runs_.size(); ++j) {
    const Index rows = of_rows_ ? lines_of(j) : rows_, cols = of_rows_ ? cols_ : lines_of(j);
    pieces[j].gradient = gradient.elements_from(offset, rows, cols);
    if (!in_order_) for_each_run(j, gradient, scratch.matrix(offset, rows, cols), copy<Real>);
    offset += rows * cols;
  }
  if (!in_order_) copy<Real>(scratch.matrix(0, 1, gradient.elements()), gradient.line());
}

template <class Real>
void BlockViews<Real>::show_weight(MatrixView<Real> weight, std::span<Piece> pieces) {
  if (copies_.device() != weight.device) copies_ = Buffer<Real>(copies_.size(), weight.device);
  Index offset = 0;
  for (std::size_t j = 0; j < runs_.size(); ++j) {
    if (runs_[j].size() <= 1) {
      const Range run = runs_[j].empty() ? Range{} : runs_[j].front();
      pieces[j].weight = lines(weight, run.begin, run.size());
      continue;
    }
    const Index rows = of_rows_ ? lines_of(j) : rows_, cols = of_rows_ ? cols_ : lines_of(j);
    pieces[j].weight = copies_.matrix(offset, rows, cols);
    for_each_run(j, weight, pieces[j].weight, copy<Real>);
    offset += rows * cols;
  }
}

template <class Real>
void BlockViews<Real>::put_weight(MatrixView<Real> weight, std::span<const Piece> pieces) const {
  for (std::size_t j = 0; j < runs_.size(); ++j) {
    if (runs_[j].size() <= 1) continue;
    for_each_run(j, weight, pieces[j].weight, [](MatrixView<Real> in_weight, MatrixView<Real> in_copy) {
      copy<Real>(in_copy, in_weight);
    });
  }
}

template class BlockViews<float>;
template class BlockViews<double>;

}  // namespace lowband
