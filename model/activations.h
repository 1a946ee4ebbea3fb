#pragma once

#include "runtime/buffer.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace lowband {

/// Memory of all activations: first every matrix is planned, then all are allocated at once.
template <class Real>
class Activations {
 public:
  struct Entry {
    std::string name;
    Index rows = 0;
    Index cols = 0;
    Index offset = 0;
  };
  using Id = std::size_t;

  Id plan(std::string name, Index rows, Index cols) {
    table_.push_back({std::move(name), rows, cols, elements_});
    // Each matrix starts on a cache line.
    constexpr Index kLine = static_cast<Index>(Buffer<Real>::kAlignmentBytes / sizeof(Real));
    elements_ += (rows * cols + kLine - 1) / kLine * kLine;
    return table_.size() - 1;
  }
  void allocate() { memory_ = Buffer<Real>(elements_); }

  const std::vector<Entry>& table() const { return table_; }
  Index bytes() const { return elements_ * static_cast<Index>(sizeof(Real)); }

  /// The first `rows` rows.
  MatrixView<Real> matrix(Id id, Index rows) {
    return memory_.matrix(table_[id].offset, rows, table_[id].cols);
  }
  MatrixView<Real> matrix(Id id) { return matrix(id, table_[id].rows); }
  /// The first `elements` elements, whatever the shape.
  std::span<Real> span(Id id, Index elements) { return memory_.span(table_[id].offset, elements); }

 private:
  std::vector<Entry> table_;
  Index elements_ = 0;
  Buffer<Real> memory_;
};

}  // namespace lowband
