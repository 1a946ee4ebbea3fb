#include "collectives/local/local_world.h"
#include "tests/collectives/factors/exchange_cases.h"

#include <tuple>

#include <gtest/gtest.h>

namespace lowband {
namespace {

class LocalFactorExchange : public testing::TestWithParam<std::tuple<ExchangeCase, int>> {};

TEST_P(LocalFactorExchange, Conforms) {
  const auto& [conformance, processes] = GetParam();
  run_world(processes, conformance.body);
}

INSTANTIATE_TEST_SUITE_P(All, LocalFactorExchange,
                         testing::Combine(testing::ValuesIn(exchange_cases().begin(), exchange_cases().end()),
                                          testing::Values(1, 2, 3, 4, 5, 8)),
                         [](const auto& test) {
                           return cat(std::get<0>(test.param).name, "_on_", std::get<1>(test.param));
                         });

}  // namespace
}  // namespace lowband
