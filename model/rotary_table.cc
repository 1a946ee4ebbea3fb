#include "model/layers.h"

#include <cmath>

namespace lowband {

template <class Real>
RotaryTable<Real>::RotaryTable(Index sequence, Index head_dim, double base)
    : sequence_(sequence), half_(head_dim / 2), cosine_(sequence * half_), sine_(sequence * half_) {
  for (Index position = 0; position < sequence; ++position) {
    for (Index j = 0; j < half_; ++j) {
      const double frequency = std::pow(base, -static_cast<double>(j) / static_cast<double>(half_));
      const double angle = static_cast<double>(position) * frequency;
      cosine_[position * half_ + j] = static_cast<Real>(std::cos(angle));
      sine_[position * half_ + j] = static_cast<Real>(std::sin(angle));
    }
  }
}

template class RotaryTable<float>;
template class RotaryTable<double>;

}  // namespace lowband
