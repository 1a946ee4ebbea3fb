#include "collectives/factors/homes.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <tuple>

namespace lowband {
namespace {

struct Load {
  double elements = 0;
  double cost = 0;
  double larger() const { return std::max(elements, cost); }
};
Load operator+(const Load& x, const Load& y) { return {x.elements + y.elements, x.cost + y.cost}; }

template <class Key>
std::vector<std::size_t> order_by(std::size_t size, Key key) {
  std::vector<std::size_t> order(size);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, key);
  return order;
}

}  // namespace

std::vector<int> choose_homes(std::span<const LeftExtent> factors, int homes) {
  std::vector<Load> loads;
  Load total;
  for (const LeftExtent& factor : factors) {
    const auto elements = static_cast<double>(factor.rows * factor.factor_rank);
    loads.push_back({elements, elements * static_cast<double>(factor.factor_rank)});
    total = total + loads.back();
  }
  for (Load& load : loads)
    load = {total.elements > 0 ? load.elements * homes / total.elements : 0,
            total.cost > 0 ? load.cost * homes / total.cost : 0};

  std::vector<int> home(factors.size());
  std::vector<Load> homes_loads(static_cast<std::size_t>(homes));
  for (const std::size_t i : order_by(loads.size(), [&](std::size_t k) { return -loads[k].larger(); })) {
    const auto best = std::ranges::min_element(homes_loads, {}, [&](const Load& before) {
      const Load after = before + loads[i];
      return std::tuple(after.larger(), after.elements + after.cost);
    });
    *best = *best + loads[i];
    home[i] = static_cast<int>(best - homes_loads.begin());
  }
  return home;
}

// The k smallest parts rise to one level, which is the first that lies below the part after them.
std::vector<Index> fill_up(std::span<const Index> parts, Index filler) {
  std::vector<Index> fill(parts.size());
  const std::vector<std::size_t> order = order_by(parts.size(), [&](std::size_t p) { return parts[p]; });
  Index risen = 0;  // k
  Index total = filler;
  for (const std::size_t p : order) {
    if (risen > 0 && total <= risen * parts[p]) break;
    total += parts[p];
    ++risen;
  }
  for (Index k = 0; k < risen; ++k) {
    const std::size_t p = order[static_cast<std::size_t>(k)];
    fill[p] = total / risen + (k < total % risen ? 1 : 0) - parts[p];
  }
  return fill;
}

}  // namespace lowband
