#include "tests/collectives/communicator_cases.h"

#include "runtime/random.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

constexpr Tag kDense{Purpose::kDense};

// Around and below any process count, over one tile of the reduction, and over the megabyte beyond which a
// reduce-scatter sends in rounds.
constexpr Index kSizes[] = {0, 1, 2, 3, 5, 8, 1000, 100'003, 300'007};

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

// Element e of process p. All values and their sums over processes are exact in every dtype but u8, which
// counts modulo 256; no two neighbouring elements or processes have the same.
Index value(int process, Index e) { return (process + 1) * (e % 9973 + 1); }

Index sum_over_processes(int size, Index e) {
  Index sum = 0;
  for (int p = 0; p < size; ++p) sum += value(p, e);
  return sum;
}

template <class T>
T as(Index x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Of what the processes send, in what sums of T are formed in: numbers of bf16 are integers of 8 bits times a
// power of two, whose sums are exact in float32.
template <class T>
SumOf<T> exact_sum(int size, Index e) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    float sum = 0;
    for (int p = 0; p < size; ++p) sum += to_float(as<BFloat16>(value(p, e)));
    return sum;
  } else {
    return static_cast<T>(sum_over_processes(size, e));
  }
}

template <class T>
T rounded(SumOf<T> sum) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(sum);
  } else {
    return sum;
  }
}

template <class T>
std::vector<T> own_values(const Communicator& group, Index elements) {
  std::vector<T> data(at(elements));
  for (Index e = 0; e < elements; ++e) data[at(e)] = as<T>(value(group.process(), e));
  return data;
}

// Parts of very different sizes, some of them empty.
std::vector<Index> uneven_counts(int size) {
  constexpr Index kCounts[] = {3, 0, 1001, 1, 0, 40, 7};
  return {kCounts, kCounts + size};
}

Index offset_of(const std::vector<Index>& counts, int process) {
  return std::accumulate(counts.begin(), counts.begin() + process, Index{0});
}

template <class T>
void check_sums(Communicator& group) {
  for (const Index elements : kSizes) {
    std::vector<T> data = own_values<T>(group, elements);
    group.all_reduce<T>(data, Reduction::kSum, kDense);
    for (Index e = 0; e < elements; ++e) {
      ASSERT_EQ(data[at(e)], rounded<T>(exact_sum<T>(group.size(), e))) << "element " << e;
    }
  }
}

void all_reduce_sums(Communicator& group) {
  check_sums<float>(group);
  check_sums<double>(group);
  check_sums<std::int64_t>(group);
  check_sums<std::uint8_t>(group);
  check_sums<BFloat16>(group);
}

template <class T>
void check_maxima(Communicator& group) {
  // The maximum of element e is with process e mod n, and stands out by its value.
  std::vector<T> data(1000);
  for (Index e = 0; e < 1000; ++e)
    data[at(e)] = as<T>(e % group.size() == group.process() ? 50 + e % 97 : 49);
  group.all_reduce<T>(data, Reduction::kMax, kDense);
  for (Index e = 0; e < 1000; ++e) ASSERT_EQ(data[at(e)], as<T>(50 + e % 97)) << "element " << e;
}

void all_reduce_takes_maxima(Communicator& group) {
  check_maxima<float>(group);
  check_maxima<double>(group);
  check_maxima<std::int64_t>(group);
  check_maxima<std::uint8_t>(group);
  check_maxima<BFloat16>(group);
  std::vector<double> negative{-1.0 - group.process()};
  group.all_reduce<double>(negative, Reduction::kMax, kDense);
  EXPECT_EQ(negative[0], -1.0);
}

void a_maximum_with_a_nan_is_nan(Communicator& group) {
  for (int sick = 0; sick < group.size(); ++sick) {
    std::vector<float> data{group.process() == sick ? std::numeric_limits<float>::quiet_NaN() : 1.0F, 2.0F};
    group.all_reduce<float>(data, Reduction::kMax, kDense);
    EXPECT_TRUE(std::isnan(data[0])) << "NaN on process " << sick;
    EXPECT_EQ(data[1], 2.0F);
  }
}

template <class T>
void check_reduce_scatter(Communicator& group, const std::vector<Index>& counts) {
  const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
  const Index own = counts[at(group.process())];
  const Index offset = offset_of(counts, group.process());
  const std::vector<T> send = own_values<T>(group, total);
  std::vector<SumOf<T>> receive(at(own));
  group.reduce_scatter<T>(send, receive, counts, Reduction::kSum, kDense);
  for (Index e = 0; e < own; ++e) {
    ASSERT_EQ(receive[at(e)], exact_sum<T>(group.size(), offset + e)) << "element " << e;
  }
  EXPECT_EQ(send, own_values<T>(group, total)) << "the argument was changed";
}

void reduce_scatter_takes_uneven_counts(Communicator& group) {
  const std::vector<Index> few = uneven_counts(group.size());
  check_reduce_scatter<float>(group, few);
  check_reduce_scatter<double>(group, few);
  check_reduce_scatter<std::int64_t>(group, few);
  check_reduce_scatter<std::uint8_t>(group, few);
  check_reduce_scatter<BFloat16>(group, few);
  std::vector<Index> many = few;  // over a megabyte, in rounds, and empty parts among them
  many.back() = 300'007;
  check_reduce_scatter<float>(group, many);
}

template <class T>
void check_all_gather(Communicator& group, const std::vector<Index>& counts) {
  const std::vector<T> send = own_values<T>(group, counts[at(group.process())]);
  std::vector<T> expected;
  for (int p = 0; p < group.size(); ++p) {
    for (Index e = 0; e < counts[at(p)]; ++e) expected.push_back(as<T>(value(p, e)));
  }
  std::vector<T> receive(expected.size());
  group.all_gather<T>(send, receive, counts, kDense);
  EXPECT_EQ(receive, expected);
}

void all_gather_takes_uneven_counts(Communicator& group) {
  const std::vector<Index> few = uneven_counts(group.size());
  check_all_gather<float>(group, few);
  check_all_gather<double>(group, few);
  check_all_gather<std::int64_t>(group, few);
  check_all_gather<std::uint8_t>(group, few);
  check_all_gather<BFloat16>(group, few);
  std::vector<Index> many = few;  // parts that travel in halves, whole and not at all
  many.front() = 40'003;
  many.back() = 300'007;
  check_all_gather<float>(group, many);
}

/// Elements from p to q: uneven, some zero, the largest beyond what is sent at once.
std::vector<Index> counts_of_pairs(int processes, Index scale) {
  std::vector<Index> counts;
  for (int from = 0; from < processes; ++from) {
    for (int to = 0; to < processes; ++to) counts.push_back((from * 5 + to * 3) % 4 * scale);
  }
  return counts;
}

template <class T>
void check_all_to_all(Communicator& group, Index scale) {
  const int n = group.size();
  const std::vector<Index> counts = counts_of_pairs(n, scale);
  const auto count = [&](int from, int to) { return counts[at(Index{from} * n + to)]; };
  std::vector<T> send, expected;
  Index payload = 0;
  for (int p = 0; p < n; ++p) {
    for (Index e = 0; e < count(group.process(), p); ++e)
      send.push_back(as<T>(value(group.process(), 10 * p + e)));
    for (Index e = 0; e < count(p, group.process()); ++e)
      expected.push_back(as<T>(value(p, 10 * group.process() + e)));
    for (int q = 0; q < n; ++q) payload += count(p, q);
  }
  std::vector<T> receive(expected.size());
  group.ledger().begin_step();
  group.all_to_all<T>(send, receive, counts, kDense);
  EXPECT_EQ(receive, expected);
  const TransferTotals sent = group.ledger().step_sum(group.axis(), Purpose::kDense);
  const Index own = std::ssize(send) - count(group.process(), group.process());
  EXPECT_EQ(sent.payload_bytes, payload * dtype_bytes(dtype_of<T>));
  EXPECT_EQ(sent.transport_bytes, own * dtype_bytes(dtype_of<T>));
  EXPECT_EQ(sent.modelled_wire_bytes, static_cast<double>(sent.transport_bytes));
}

void all_to_all_takes_uneven_counts(Communicator& group) {
  for (const Index scale : {Index{1}, Index{17}, Index{40'000}}) {
    check_all_to_all<float>(group, scale);
    check_all_to_all<double>(group, scale);
    check_all_to_all<BFloat16>(group, scale);
  }
}

void parts_may_lie_in_place(Communicator& group) {
  const std::vector<Index> counts = uneven_counts(group.size());
  const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
  const std::size_t own = at(counts[at(group.process())]);
  std::vector<float> whole = own_values<float>(group, total);
  const std::span<float> part = std::span(whole).subspan(at(offset_of(counts, group.process())), own);
  group.reduce_scatter<float>(whole, part, counts, Reduction::kSum, kDense);
  group.all_gather<float>(part, whole, counts, kDense);
  for (Index e = 0; e < total; ++e) {
    ASSERT_EQ(whole[at(e)], static_cast<float>(sum_over_processes(group.size(), e))) << "element " << e;
  }
}

template <class T>
void check_broadcast(Communicator& group) {
  // The largest takes several pieces and ends in the middle of one.
  for (const Index elements : {Index{0}, Index{1}, Index{7}, Index{100'003}}) {
    for (int root = 0; root < group.size(); ++root) {
      std::vector<T> data = own_values<T>(group, elements);
      group.broadcast<T>(data, root, kDense);
      for (Index e = 0; e < elements; ++e) {
        ASSERT_EQ(data[at(e)], as<T>(value(root, e))) << "root " << root << ", element " << e;
      }
    }
  }
}

void broadcast_reaches_everyone_from_every_root(Communicator& group) {
  check_broadcast<double>(group);
  check_broadcast<BFloat16>(group);
}

void a_barrier_waits_for_the_last(Communicator& group) {
  using Clock = std::chrono::steady_clock;
  // Processes of one machine read the same clock.
  for (int last = 0; last < group.size(); ++last) {
    group.barrier();
    if (group.process() == last) std::this_thread::sleep_for(milliseconds(10));
    const Index entered_us =
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now().time_since_epoch()).count();
    group.barrier();
    const Index left_us =
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now().time_since_epoch()).count();
    std::vector<Index> latest{entered_us};
    group.all_reduce<Index>(latest, Reduction::kMax, {Purpose::kControl});
    EXPECT_GE(left_us, latest[0]);
  }
}

void split_orders_by_key_then_process(Communicator& group) {
  // Colours 7 and -2 in turn; within a colour the highest process comes first.
  const int colour = group.process() % 2 == 0 ? 7 : -2;
  const auto half = group.split(colour, -group.process(), "half");
  std::vector<Index> expected;
  for (int p = group.size() - 1; p >= 0; --p) {
    if (p % 2 == group.process() % 2) expected.push_back(p);
  }
  ASSERT_EQ(half->size(), static_cast<int>(expected.size()));
  EXPECT_EQ(half->axis(), "half");
  EXPECT_EQ(expected[at(half->process())], group.process());

  const std::vector<Index> own{group.process()};
  std::vector<Index> members(expected.size());
  half->all_gather<Index>(own, members, std::vector<Index>(expected.size(), 1), kDense);
  EXPECT_EQ(members, expected);

  // Equal keys keep the order of processes; a group can be split again, and used beside its parent.
  const auto same = half->split(0, 0, "same");
  EXPECT_EQ(same->process(), half->process());
  same->barrier();
  group.barrier();
  EXPECT_EQ(&same->ledger(), &group.ledger());
  EXPECT_EQ(same->deadline(), group.deadline());
}

// The documented order of a sum, written per element and from the bottom up: neighbours first, then pairs of
// neighbours, and so on; a number without a partner goes up as it is.
float tree_sum(std::vector<float> numbers) {
  while (numbers.size() > 1) {
    std::vector<float> sums;
    for (std::size_t i = 0; i + 1 < numbers.size(); i += 2) sums.push_back(numbers[i] + numbers[i + 1]);
    if (numbers.size() % 2 == 1) sums.push_back(numbers.back());
    numbers = sums;
  }
  return numbers[0];
}

float noise(int process, Index e) {
  return static_cast<float>(RandomStream(17, "noise", process).normal(e) * std::exp2(e % 30 - 15));
}

// Every process compares with numbers it draws itself, so this is also: the same bits on all processes, and
// on all backends that run it.
void sums_have_the_bits_of_the_documented_tree(Communicator& group) {
  for (const Index elements : {Index{5}, Index{20'011}}) {
    std::vector<float> data;
    std::vector<float> expected;
    for (Index e = 0; e < elements; ++e) {
      std::vector<float> all;
      for (int p = 0; p < group.size(); ++p) all.push_back(noise(p, e));
      data.push_back(all[at(group.process())]);
      expected.push_back(tree_sum(all));
    }
    group.all_reduce<float>(data, Reduction::kSum, kDense);
    for (Index e = 0; e < elements; ++e) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(data[at(e)]), std::bit_cast<std::uint32_t>(expected[at(e)]))
          << "element " << e << ": " << data[at(e)] << " instead of " << expected[at(e)];
    }
  }
}

// Numbers of bf16 travel as they are; what is added is float32, in the same order, and rounded once.
void sums_of_bf16_have_the_bits_of_the_documented_tree(Communicator& group) {
  for (const Index elements : {Index{5}, Index{20'011}, Index{100'003}}) {
    std::vector<BFloat16> data;
    std::vector<float> sums;
    for (Index e = 0; e < elements; ++e) {
      std::vector<float> all;
      for (int p = 0; p < group.size(); ++p) all.push_back(to_float(to_bfloat16(noise(p, e))));
      data.push_back(to_bfloat16(noise(group.process(), e)));
      sums.push_back(tree_sum(all));
    }
    // The last process gets nothing, where there is another.
    std::vector<Index> counts(at(group.size()), 0);
    counts[at(group.size() - 1) / 2] = elements;
    const bool owner = counts[at(group.process())] > 0;
    std::vector<float> part(owner ? at(elements) : 0);
    group.reduce_scatter<BFloat16>(data, part, counts, Reduction::kSum, kDense);
    group.all_reduce<BFloat16>(data, Reduction::kSum, kDense);
    for (Index e = 0; e < elements; ++e) {
      ASSERT_EQ(data[at(e)], to_bfloat16(sums[at(e)])) << "element " << e;
      if (owner) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(part[at(e)]), std::bit_cast<std::uint32_t>(sums[at(e)]))
            << "element " << e;
      }
    }
  }
}

std::uint64_t hash_of(std::span<const float> data) {
  std::uint64_t hash = 0;
  for (const float x : data) hash = hash * 0x100000001b3 ^ std::bit_cast<std::uint32_t>(x);
  return hash;
}

// What each level promises: fast, the same bits on all processes; pinned, in every run; exact, those of the
// tree. A level is not asserted by its name but by what the group says it gives.
void levels_of_determinism_keep_their_promise(Communicator& parent) {
  EXPECT_EQ(parent.determinism(), Determinism::kExact);
  for (const Determinism asked : {Determinism::kFast, Determinism::kPinned, Determinism::kExact}) {
    SCOPED_TRACE(determinism_name(asked));
    const auto group = parent.split(0, 0, "level");
    group->set_determinism(asked);
    const Determinism given = group->determinism();
    EXPECT_GE(given, asked);
    EXPECT_EQ(group->split(0, 0, "same")->determinism(), given);
    for (const Index elements : {Index{1}, Index{30}, Index{5'000}, Index{100'003}}) {
      std::vector<float> tree;
      std::vector<Index> hashes(at(group->size()));
      std::uint64_t first_hash = 0;
      for (int run = 0; run < 2; ++run) {
        std::vector<float> data;
        for (Index e = 0; e < elements; ++e) {
          if (run == 0) {
            std::vector<float> all;
            for (int p = 0; p < group->size(); ++p) all.push_back(noise(p, e));
            tree.push_back(tree_sum(all));
          }
          data.push_back(noise(group->process(), e));
        }
        group->all_reduce<float>(data, Reduction::kSum, kDense);
        const std::vector<Index> own{static_cast<Index>(hash_of(data))};
        group->all_gather<Index>(own, hashes, std::vector<Index>(at(group->size()), 1), kDense);
        for (const Index hash : hashes) EXPECT_EQ(hash, own[0]) << elements << " elements";
        if (run == 0) first_hash = hash_of(data);
        if (given >= Determinism::kPinned) {
          EXPECT_EQ(hash_of(data), first_hash) << elements << " elements";
        }
        if (given == Determinism::kExact) {
          EXPECT_EQ(hash_of(data), hash_of(tree)) << elements << " elements";
        }
      }
    }
  }
}

void equal_processes_act_as_one(Communicator& group) {
  if (!std::has_single_bit(static_cast<unsigned>(group.size()))) return;  // 3x, 7x are not exact
  std::vector<float> data;
  for (Index e = 0; e < 1000; ++e) data.push_back(noise(0, e));
  group.all_reduce<float>(data, Reduction::kSum, kDense);
  for (Index e = 0; e < 1000; ++e) {
    ASSERT_EQ(data[at(e)] / static_cast<float>(group.size()), noise(0, e)) << "element " << e;
  }
}

// ---- what is counted

// What all processes of the group together sent in this step, and should have.
struct WireBytes {
  Index transport;
  Index modelled;
};
WireBytes wire_bytes_of_all(Communicator& group, Purpose purpose) {
  const TransferTotals own = group.ledger().step_sum(group.axis(), purpose);
  std::vector<double> sum{static_cast<double>(own.transport_bytes), own.modelled_wire_bytes};
  group.all_reduce<double>(sum, Reduction::kSum, {Purpose::kControl});
  return {std::llround(sum[0]), std::llround(sum[1])};
}

void the_ledger_counts_every_operation(Communicator& group) {
  const Index n = group.size();
  const std::vector<Index> counts = uneven_counts(group.size());
  const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
  const Index whole_bytes = total * 4;
  std::vector<float> whole(at(total));
  std::vector<float> part(at(counts[at(group.process())]));

  struct Row {
    Operation operation;
    Index payload_bytes;
    Index bytes_of_all;  // sent by all processes together
  };
  const std::vector<Row> rows{{Operation::kAllReduce, whole_bytes, 2 * (n - 1) * whole_bytes},
                              {Operation::kReduceScatter, whole_bytes, (n - 1) * whole_bytes},
                              {Operation::kAllGather, whole_bytes, (n - 1) * whole_bytes},
                              {Operation::kBroadcast, whole_bytes, (n - 1) * whole_bytes}};
  for (const Row& row : rows) {
    SCOPED_TRACE(operation_name(row.operation));
    group.ledger().begin_step();
    switch (row.operation) {
      case Operation::kAllReduce:
        group.all_reduce<float>(whole, Reduction::kSum, kDense);
        break;
      case Operation::kReduceScatter:
        group.reduce_scatter<float>(whole, part, counts, Reduction::kSum, kDense);
        break;
      case Operation::kAllGather:
        group.all_gather<float>(part, whole, counts, kDense);
        break;
      default:
        group.broadcast<float>(whole, group.size() - 1, kDense);
    }
    const auto step = group.ledger().step();
    const auto entry = step.find({group.axis(), Purpose::kDense, row.operation});
    ASSERT_NE(entry, step.end());
    EXPECT_EQ(entry->second.calls, 1);
    EXPECT_EQ(entry->second.payload_bytes, row.payload_bytes);
    EXPECT_GT(entry->second.seconds, 0);
    const WireBytes sent = wire_bytes_of_all(group, Purpose::kDense);
    EXPECT_EQ(sent.transport, row.bytes_of_all);
    EXPECT_EQ(sent.modelled, row.bytes_of_all);
  }

  // Of two processes, little data and much take different ways.
  for (const Index elements : {Index{1}, Index{100'003}}) {
    std::vector<double> data(at(elements));
    group.ledger().begin_step();
    group.all_reduce<double>(data, Reduction::kSum, kDense);
    const WireBytes sent = wire_bytes_of_all(group, Purpose::kDense);
    EXPECT_EQ(sent.transport, 2 * (n - 1) * elements * 8);
    EXPECT_EQ(sent.modelled, sent.transport);
  }

  // What travels is counted, not what is delivered.
  std::vector<BFloat16> halves(at(total));
  group.ledger().begin_step();
  group.reduce_scatter<BFloat16>(halves, part, counts, Reduction::kSum, kDense);
  EXPECT_EQ(group.ledger().step_sum(group.axis(), Purpose::kDense).payload_bytes, total * 2);
  EXPECT_EQ(wire_bytes_of_all(group, Purpose::kDense).transport, (n - 1) * total * 2);

  group.ledger().begin_step();
  group.barrier();
  const auto step = group.ledger().step();
  const auto barrier = step.find({group.axis(), Purpose::kControl, Operation::kBarrier});
  ASSERT_NE(barrier, step.end());
  EXPECT_EQ(barrier->second.payload_bytes + barrier->second.transport_bytes, 0);
}

void a_reduction_in_two_calls_is_counted_as_one(Communicator& group) {
  const std::vector<Index> counts = uneven_counts(group.size());
  const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
  std::vector<float> whole(at(total));
  const std::span<float> part =
      std::span(whole).subspan(at(offset_of(counts, group.process())), at(counts[at(group.process())]));
  const std::vector<PayloadShare> shares{{"wq", total - 1}, {"norm", 1, Purpose::kDense}};
  Ledger& ledger = group.ledger();

  ledger.begin_step();
  group.all_reduce<float>(whole, Reduction::kSum, {Purpose::kFactor, shares});
  const auto all_transport_bytes = [&] {
    return wire_bytes_of_all(group, Purpose::kFactor).transport +
           wire_bytes_of_all(group, Purpose::kDense).transport;
  };
  const Index at_once = all_transport_bytes();
  const double factor_at_once = ledger.step_sum(group.axis(), Purpose::kFactor).modelled_wire_bytes;
  const double dense_at_once = ledger.step_sum(group.axis(), Purpose::kDense).modelled_wire_bytes;
  ledger.begin_step();
  group.reduce_scatter<float>(whole, part, counts, Reduction::kSum, {Purpose::kFactor, shares});
  group.all_gather<float>(part, whole, counts,
                          {.purpose = Purpose::kFactor, .shares = shares, .second_half = true});
  EXPECT_EQ(ledger.step_sum(group.axis(), Purpose::kFactor).payload_bytes, (total - 1) * 4);
  EXPECT_EQ(ledger.step_parameters().at({group.axis(), Purpose::kFactor, "wq"}), (total - 1) * 4);
  const TransferTotals dense = ledger.step_sum(group.axis(), Purpose::kDense);
  EXPECT_EQ(dense.payload_bytes, 4);
  EXPECT_EQ(dense.calls, 0);
  EXPECT_DOUBLE_EQ(dense.modelled_wire_bytes, dense_at_once);
  EXPECT_DOUBLE_EQ(ledger.step_sum(group.axis(), Purpose::kFactor).modelled_wire_bytes, factor_at_once);
  EXPECT_EQ(all_transport_bytes(), at_once);
}

void the_ledger_counts_steps_and_parameters(Communicator& group) {
  Ledger& ledger = group.ledger();
  std::vector<double> data(100);
  const std::vector<PayloadShare> shares{{"wq", 60}, {"wk", 30}};  // ten elements belong to nobody
  const Tag factor{Purpose::kFactor, shares};
  const std::string axis = group.axis();
  const TransferTotals before = ledger.total_sum(axis, Purpose::kFactor);  // a world may have run other cases
  ledger.begin_step();
  group.all_reduce<double>(data, Reduction::kSum, factor);
  group.broadcast<double>(data, 0, factor);
  EXPECT_EQ(ledger.step_parameters().at({axis, Purpose::kFactor, "wq"}), 2 * 60 * 8);
  EXPECT_EQ(ledger.step_parameters().at({axis, Purpose::kFactor, "wk"}), 2 * 30 * 8);
  EXPECT_EQ(ledger.step_sum(axis, Purpose::kFactor).payload_bytes, 2 * 800);
  EXPECT_EQ(ledger.step_sum("", Purpose::kFactor).payload_bytes, 2 * 800);
  EXPECT_EQ(ledger.step_sum("elsewhere", Purpose::kFactor).calls, 0);

  ledger.begin_step();
  EXPECT_TRUE(ledger.step().empty());
  EXPECT_TRUE(ledger.step_parameters().empty());
  group.all_reduce<double>(data, Reduction::kSum, factor);
  EXPECT_EQ(ledger.step_sum().payload_bytes, 800);
  TransferTotals since = ledger.total_sum(axis, Purpose::kFactor);
  since -= before;
  EXPECT_EQ(since.payload_bytes, 3 * 800);
  EXPECT_EQ(since.calls, 3);
}

// Sixty elements of a factor, thirty of a dense tensor and ten of neither in one transfer.
void shares_of_other_purposes_are_counted_apart(Communicator& group) {
  Ledger& ledger = group.ledger();
  const std::string axis = group.axis();
  const Index n = group.size();
  std::vector<float> data(100);
  const std::vector<PayloadShare> shares{{"wq", 60},
                                         {"norm", 20, Purpose::kDense},
                                         {"bias", 10, Purpose::kDense},
                                         {"empty", 0, Purpose::kWeight}};
  ledger.begin_step();
  group.all_reduce<float>(data, Reduction::kSum, {Purpose::kFactor, shares});
  const TransferTotals factor = ledger.step_sum(axis, Purpose::kFactor);
  const TransferTotals dense = ledger.step_sum(axis, Purpose::kDense);
  EXPECT_EQ(ledger.step().size(), 2U);
  EXPECT_EQ(factor.payload_bytes, 70 * 4);
  EXPECT_EQ(dense.payload_bytes, 30 * 4);
  EXPECT_EQ(factor.calls, 1);
  EXPECT_EQ(dense.calls, 0);
  EXPECT_EQ(ledger.step_parameters().at({axis, Purpose::kFactor, "wq"}), 60 * 4);
  EXPECT_EQ(ledger.step_parameters().at({axis, Purpose::kDense, "bias"}), 10 * 4);
  const double ring = 2.0 * static_cast<double>(n - 1) / static_cast<double>(n);
  EXPECT_NEAR(dense.modelled_wire_bytes, ring * 120, 1e-9);
  EXPECT_NEAR(factor.modelled_wire_bytes, ring * 280, 1e-9);
  const WireBytes sent_factor = wire_bytes_of_all(group, Purpose::kFactor);
  const WireBytes sent_dense = wire_bytes_of_all(group, Purpose::kDense);
  EXPECT_EQ(sent_factor.transport + sent_dense.transport, 2 * (n - 1) * 400);
  EXPECT_EQ(sent_factor.modelled + sent_dense.modelled, 2 * (n - 1) * 400);
  // The second half of a reduction in two calls adds its wire bytes to the same purposes, and no payload.
  std::vector<Index> counts(at(n), 0);
  counts[0] = 100;
  const std::span<const float> part(data.data(), group.process() == 0 ? 100U : 0U);
  ledger.begin_step();
  group.all_gather<float>(part, data, counts,
                          {.purpose = Purpose::kFactor, .shares = shares, .second_half = true});
  EXPECT_EQ(ledger.step_sum().payload_bytes, 0);
  EXPECT_TRUE(ledger.step_parameters().empty());
  EXPECT_NEAR(ledger.step_sum(axis, Purpose::kDense).modelled_wire_bytes, ring / 2 * 120, 1e-9);
  EXPECT_NEAR(ledger.step_sum(axis, Purpose::kFactor).modelled_wire_bytes, ring / 2 * 280, 1e-9);

  // Each process rounds to a byte.
  EXPECT_NEAR(static_cast<double>(sent_dense.transport), 2.0 * 120 * static_cast<double>(n - 1),
              static_cast<double>(n) / 2);
}

// ---- what goes wrong

// The message of the Failure that `action` must throw.
template <class Failure, class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Failure& failure) {
    return failure.what();
  } catch (const std::exception& other) {
    ADD_FAILURE() << "another failure: " << other.what();
    return "";
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

void refused_arguments_break_nothing(Communicator& group) {
  std::vector<float> data(4);
  const std::vector<Index> one_too_many(static_cast<std::size_t>(group.size()) + 1, 0);
  std::vector<Index> counts(static_cast<std::size_t>(group.size()), 4);
  const std::vector<PayloadShare> shares{{"wq", 3}, {"wk", 2}};
  EXPECT_THAT(message_of<InvalidArgument>([&] { group.broadcast<float>(data, group.size(), kDense); }),
              HasSubstr("root"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { group.all_gather<float>(data, data, one_too_many, kDense); }),
              HasSubstr(cat("expected one for each of ", group.size(), " processes")));
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                group.reduce_scatter<float>(std::span(data).first(3), data, counts, Reduction::kSum, kDense);
              }),
              HasSubstr(cat("has 3 elements, expected ", 4 * group.size())));
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                group.all_reduce<float>(data, Reduction::kSum, {Purpose::kFactor, shares});
              }),
              HasSubstr("5 elements, expected at most 4"));
  counts[0] = -1;
  EXPECT_THAT(message_of<InvalidArgument>([&] { group.all_gather<float>(data, data, counts, kDense); }),
              HasSubstr("count -1"));
  group.barrier();
}

// The plan passes to the byte; one column more in one matrix is refused on all processes, before anything is
// sent, and the group goes on.
void a_transfer_over_budget_is_refused_by_all(Communicator& parent) {
  const auto group = parent.split(0, 0, "budgeted");
  Ledger& ledger = group->ledger();
  constexpr Index kRows = 30;
  const Index rank = 4 + parent.size();  // another plan for every size, since budgets add up
  parent.budget().allow("budgeted", Purpose::kFactor, kRows * rank * 4, "wq");
  parent.budget().allow("budgeted", Purpose::kFactor, kRows * 2 * 4, "wk");
  const auto reduce = [&](Index columns) {
    std::vector<float> data(at(kRows * (columns + 2)), 1.0F);
    const std::vector<PayloadShare> shares{{"wq", kRows * columns}, {"wk", kRows * 2}};
    group->all_reduce<float>(data, Reduction::kSum, {Purpose::kFactor, shares});
    for (const float x : data) ASSERT_EQ(x, static_cast<float>(group->size()));
  };
  for (int step = 0; step < 2; ++step) {
    ledger.begin_step(40 + step);
    EXPECT_THAT(message_of<BudgetExceeded>([&] { reduce(rank + 1); }),
                HasSubstr(cat("step ", 40 + step, ", axis budgeted, purpose factor, parameter wq: found ",
                              kRows * (rank + 1) * 4, " bytes asked with 0 spent, expected at most ",
                              kRows * rank * 4)));
    EXPECT_TRUE(ledger.step().empty());
    group->barrier();
    reduce(rank);
    EXPECT_THAT(message_of<BudgetExceeded>([&] { reduce(rank); }),
                HasSubstr(cat("parameter wk: found 240 bytes asked with 240 spent")));
    EXPECT_EQ(ledger.step_sum("budgeted", Purpose::kFactor).payload_bytes, kRows * (rank + 2) * 4);
  }
}

// One process calls something else than the others. Whoever hears of it first throws and aborts, so at least
// one process must name both sides, all must fail, and nobody may wait for the deadline.
void check_mismatch(Communicator& parent, const std::function<void(Communicator&)>& usual,
                    const std::function<void(Communicator&)>& odd, const std::string& usual_text,
                    const std::string& odd_text) {
  SCOPED_TRACE(usual_text + " against " + odd_text);
  const int odd_process = parent.size() - 1;
  const auto group = parent.split(0, 0, "replica");
  const auto begin = std::chrono::steady_clock::now();
  Index named = 0;
  try {
    group->barrier();
    (group->process() == odd_process ? odd : usual)(*group);
    // A process may have got all it needed before the news came; then the next call tells.
    group->barrier();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CollectiveMismatch& mismatch) {
    named = 1;
    const std::string text = mismatch.what();
    EXPECT_THAT(text, HasSubstr(usual_text));
    EXPECT_THAT(text, HasSubstr(odd_text));
    EXPECT_THAT(text, HasSubstr(cat("process ", odd_process, " called")));
    EXPECT_THAT(text, HasSubstr("on axis replica as call 2"));
  } catch (const PeerFailed& failure) {
    EXPECT_THAT(failure.what(), HasSubstr("aborted axis replica"));
    EXPECT_THAT(failure.what(), HasSubstr(odd_text));
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, group->deadline() / 2);
  std::vector<Index> total{named};
  parent.all_reduce<Index>(total, Reduction::kSum, {Purpose::kControl});
  EXPECT_GE(total[0], 1);
}

void mismatches_name_both_sides(Communicator& group) {
  if (group.size() == 1) return;
  std::vector<float> floats(12);
  std::vector<float> more(13);
  std::vector<double> doubles(12);
  std::vector<BFloat16> halves(12);
  const std::size_t n = static_cast<std::size_t>(group.size());
  std::vector<float> whole(n * 12);
  std::vector<Index> even(n, 12);
  std::vector<Index> shifted = even;
  shifted[0] -= 1;
  shifted[n - 1] += 1;

  const auto sum = [&](Communicator& c) { c.all_reduce<float>(floats, Reduction::kSum, kDense); };
  const std::string sum_text = "all_reduce(sum, f32, 12 elements, dense)";
  check_mismatch(
      group, sum, [](Communicator& c) { c.barrier(); }, sum_text, "barrier()");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.all_reduce<float>(more, Reduction::kSum, kDense); }, sum_text,
      "all_reduce(sum, f32, 13 elements, dense)");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.all_reduce<double>(doubles, Reduction::kSum, kDense); }, sum_text,
      "all_reduce(sum, f64, 12 elements, dense)");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.all_reduce<BFloat16>(halves, Reduction::kSum, kDense); }, sum_text,
      "all_reduce(sum, bf16, 12 elements, dense)");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.all_reduce<float>(floats, Reduction::kMax, kDense); }, sum_text,
      "all_reduce(max, f32, 12 elements, dense)");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.all_reduce<float>(floats, Reduction::kSum, {Purpose::kFactor}); },
      sum_text, "all_reduce(sum, f32, 12 elements, factor)");
  check_mismatch(
      group, sum, [&](Communicator& c) { c.broadcast<float>(floats, 0, kDense); }, sum_text,
      "broadcast(f32, 12 elements, root 0, dense)");
  check_mismatch(
      group, [&](Communicator& c) { c.broadcast<float>(floats, 0, kDense); },
      [&](Communicator& c) { c.broadcast<float>(floats, 1, kDense); },
      "broadcast(f32, 12 elements, root 0, dense)", "broadcast(f32, 12 elements, root 1, dense)");
  // Equal totals, other counts: 13 is what the last process sends then.
  const auto gather_text = [&](std::span<const Index> counts) {
    return cat("all_gather(f32, ", 12 * group.size(), " elements, counts ", std::hex, hash_counts(counts),
               ", dense)");
  };
  check_mismatch(
      group, [&](Communicator& c) { c.all_gather<float>(floats, whole, even, kDense); },
      [&](Communicator& c) { c.all_gather<float>(more, whole, shifted, kDense); }, gather_text(even),
      gather_text(shifted));
}

// A group may speak for another whose data goes elsewhere: calls are compared and named as that group made
// them, and nothing is recorded.
void processes_meet_for_a_call_made_elsewhere(Communicator& parent) {
  const auto group = parent.split(0, 0, "replica");
  parent.ledger().begin_step();
  Call call{.sequence = 7,
            .elements = 12,
            .operation = Operation::kAllReduce,
            .dtype = DType::kF32,
            .purpose = Purpose::kDense};
  group->meet(call);
  group->meet(call);
  EXPECT_TRUE(parent.ledger().step().empty());
  parent.barrier();  // everybody has met twice
  if (parent.size() > 1) {
    if (group->process() == group->size() - 1) call.elements = 13;
    std::string text;
    try {
      // A process may have met all it had to before the news came.
      for (int again = 0; again < 100'000; ++again) group->meet(call);
    } catch (const Error& failure) {
      text = failure.what();
    }
    EXPECT_THAT(text, HasSubstr("all_reduce(sum, f32, 13 elements, dense)"));
    EXPECT_THAT(text, HasSubstr("on axis replica as call 7"));
    EXPECT_THROW(group->barrier(), Error);
  }
  parent.barrier();
}

void a_silent_process_is_named_at_the_deadline(Communicator& parent) {
  if (parent.size() == 1) return;
  const auto group = parent.split(0, 0, "replica");
  group->set_deadline(milliseconds(300));
  const int silent = parent.size() - 1;
  if (group->process() != silent) {
    std::vector<float> data(1000);
    const auto begin = std::chrono::steady_clock::now();
    const auto sum = [&] { group->all_reduce<float>(data, Reduction::kSum, kDense); };
    const std::string text = message_of<PeerFailed>(sum);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(3000));
    EXPECT_THAT(text, HasSubstr("all_reduce(sum, f32, 1000 elements, dense) on axis replica, call 1"));
    EXPECT_THAT(text, HasSubstr(cat("process ", silent, " did not answer within 300 ms")));
    EXPECT_EQ(message_of<PeerFailed>(sum), text) << "a broken group must stay broken";
    EXPECT_EQ(message_of<PeerFailed>([&] { group->barrier(); }), text);
  }
  parent.barrier();
}

void abort_wakes_those_who_wait(Communicator& parent) {
  const auto group = parent.split(0, 0, "replica");
  const int aborting = parent.size() / 2;
  const std::string expected =
      cat("process ", aborting, " of ", group->size(), " aborted axis replica: no more data");
  if (group->process() == aborting) {
    group->abort("no more data");
    group->abort("a second reason changes nothing");
  }
  const auto begin = std::chrono::steady_clock::now();
  const std::string text = message_of<PeerFailed>([&] { group->barrier(); });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, group->deadline() / 2);
  EXPECT_THAT(text, HasSubstr(expected));
  EXPECT_EQ(message_of<PeerFailed>([&] { group->split(0, 0, "none"); }), text);
  parent.barrier();
}

// Half of the processes are refused; the others wait in groups of their own for what never comes, until the
// refused ones give up the job.
void giving_up_reaches_the_groups_split_from_a_group(Communicator& parent) {
  if (parent.size() == 1) return;
  const auto job = parent.split(0, 0, "job");
  const int row = job->process() % 2;
  const auto replica = job->split(row, 0, "given_up");
  const auto same = replica->split(0, 0, "given_up_again");
  parent.barrier();  // everybody has left the splits
  parent.budget().allow("given_up", Purpose::kFactor, 0, "wq");
  std::vector<float> data(4);
  const std::vector<PayloadShare> shares{{"wq", row == 0 ? 4 : 0}};
  const auto begin = std::chrono::steady_clock::now();
  if (row == 0) {
    const auto sum = [&] { replica->all_reduce<float>(data, Reduction::kSum, {Purpose::kFactor, shares}); };
    job->abort(message_of<BudgetExceeded>(sum));
  }
  Communicator& waiting = job->process() % 4 < 2 ? *replica : *same;
  const std::string text = message_of<PeerFailed>([&] {
    // With nobody to wait for, or with peers that wait elsewhere, a group of its own learns nothing.
    if (row == 1 && waiting.size() > 1) {
      for (;;) waiting.barrier();
    }
    for (;;) job->barrier();
  });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, job->deadline() / 2);
  EXPECT_THAT(text, HasSubstr("aborted axis job: byte budget: step"));
  EXPECT_THAT(text, HasSubstr("parameter wq: found 16 bytes asked"));
  parent.barrier();
}

// Those who wait for the last do what they were given, in and between the messages of one call; the result is
// the same.
void waiting_calls_do_other_work(Communicator& group) {
  for (int last = 0; last < group.size(); ++last) {
    std::atomic<int> pieces = 0;
    const auto piece = [&] {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      return ++pieces < 50;
    };
    group.barrier();
    if (group.process() == last) std::this_thread::sleep_for(milliseconds(20));
    for (const Index elements : {Index{5}, Index{200'000}}) {
      std::vector<float> data = own_values<float>(group, elements);
      {
        const WaitWork work(group, piece);
        group.all_reduce<float>(data, Reduction::kSum, kDense);
      }
      for (Index e = 0; e < elements; ++e)
        ASSERT_EQ(data[at(e)], static_cast<float>(sum_over_processes(group.size(), e))) << "element " << e;
    }
    if (group.size() > 1 && group.process() != last) {
      EXPECT_GT(pieces, 0);
    }
    const int done = pieces;
    group.barrier();
    EXPECT_EQ(pieces, done) << "after its scope";
  }
}

// Two threads of each process, on groups with equal members: neither takes a message of the other.
void two_threads_use_two_groups_at_once(Communicator& parent) {
  const auto main_group = parent.split(0, 0, "main");
  const auto other_group = parent.split(0, -parent.process(), "other");  // in the opposite order
  const auto work = [](Communicator& group, Index elements) {
    for (int round = 0; round < 50; ++round) {
      std::vector<float> data = own_values<float>(group, elements + round);
      group.all_reduce<float>(data, Reduction::kSum, kDense);
      for (Index e = 0; e < elements + round; ++e) {
        ASSERT_EQ(data[at(e)], static_cast<float>(sum_over_processes(group.size(), e)))
            << group.axis() << ", round " << round << ", element " << e;
      }
      group.barrier();
    }
  };
  parent.ledger().begin_step();
  std::thread other([&] { work(*other_group, 30'000); });
  work(*main_group, 7);
  other.join();
  EXPECT_EQ(parent.ledger().step_sum("main", Purpose::kDense).calls, 50);
  EXPECT_EQ(parent.ledger().step_sum("other", Purpose::kDense).payload_bytes, (50 * 30'000 + 49 * 25) * 4);
}

// A thread waits for process 0, which never comes, in a group split from the one that another thread of the
// last process aborts. Returns the seconds that the call took after that, 0 where there was none.
double seconds_to_end_a_call_from_another_thread(Communicator& parent) {
  using Clock = std::chrono::steady_clock;
  const auto group = parent.split(0, 0, "group");
  const auto inner = group->split(0, 0, "inner");
  parent.barrier();  // everybody has left the splits
  const bool comes = group->process() > 0;
  std::string text;
  Clock::time_point ended;
  std::thread caller([&] {
    if (!comes) return;
    std::vector<float> data(7);
    text = message_of<PeerFailed>([&] { inner->all_reduce<float>(data, Reduction::kSum, kDense); });
    ended = Clock::now();
  });
  std::this_thread::sleep_for(milliseconds(100));
  const auto begin = Clock::now();
  if (group->process() == group->size() - 1) group->abort("no more data");
  caller.join();
  // Nobody has called anything on the group that process 0 learns of it by.
  Communicator& broken = comes ? *inner : *group;
  if (!comes) text = message_of<PeerFailed>([&] { broken.barrier(); });
  EXPECT_THAT(text, HasSubstr("aborted axis group: no more data"));
  EXPECT_EQ(message_of<PeerFailed>([&] { broken.barrier(); }), text);
  parent.barrier();
  return comes ? std::chrono::duration<double>(ended - begin).count() : 0;
}

// Within a second; the best of some, since a busy machine may keep any one waiting.
void an_abort_ends_the_call_of_another_thread(Communicator& parent) {
  if (parent.size() == 1) return;
  double fastest = seconds_to_end_a_call_from_another_thread(parent);
  for (int again = 0; again < 3; ++again)
    fastest = std::min(fastest, seconds_to_end_a_call_from_another_thread(parent));
  EXPECT_LT(fastest, 1);
}

// The same group, between calls and in them: whichever comes first breaks it, once.
void an_abort_beside_calls_of_another_thread(Communicator& parent) {
  for (int round = 0; round < 20; ++round) {
    const auto group = parent.split(0, 0, "group");
    std::string text;
    std::thread caller([&] {
      text = message_of<PeerFailed>([&] {
        for (;;) group->barrier();
      });
    });
    if (group->process() == round % group->size()) {
      std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
      group->abort("no more data");
    }
    caller.join();
    EXPECT_THAT(text, HasSubstr("aborted axis group: no more data"));
    EXPECT_EQ(message_of<PeerFailed>([&] { group->barrier(); }), text);
    parent.barrier();
  }
}

// The other thread's group breaks; this thread's goes on.
void a_failure_on_one_thread_leaves_the_groups_of_another(Communicator& parent) {
  const auto main_group = parent.split(0, 0, "main");
  const auto other_group = parent.split(0, 0, "other");
  std::string text;
  std::thread other([&] {
    if (other_group->process() == 0) other_group->abort("no more data");
    text = message_of<PeerFailed>([&] {
      for (;;) other_group->barrier();
    });
  });
  for (int round = 0; round < 100; ++round) main_group->barrier();
  other.join();
  EXPECT_THAT(text, HasSubstr("aborted axis other: no more data"));
  main_group->barrier();
}

constexpr CommunicatorCase kCases[] = {
    {"all_reduce_sums", all_reduce_sums},
    {"all_reduce_takes_maxima", all_reduce_takes_maxima},
    {"a_maximum_with_a_nan_is_nan", a_maximum_with_a_nan_is_nan},
    {"reduce_scatter_takes_uneven_counts", reduce_scatter_takes_uneven_counts},
    {"all_gather_takes_uneven_counts", all_gather_takes_uneven_counts},
    {"all_to_all_takes_uneven_counts", all_to_all_takes_uneven_counts},
    {"parts_may_lie_in_place", parts_may_lie_in_place},
    {"broadcast_reaches_everyone_from_every_root", broadcast_reaches_everyone_from_every_root},
    {"a_barrier_waits_for_the_last", a_barrier_waits_for_the_last},
    {"split_orders_by_key_then_process", split_orders_by_key_then_process},
    {"sums_have_the_bits_of_the_documented_tree", sums_have_the_bits_of_the_documented_tree},
    {"sums_of_bf16_have_the_bits_of_the_documented_tree", sums_of_bf16_have_the_bits_of_the_documented_tree},
    {"levels_of_determinism_keep_their_promise", levels_of_determinism_keep_their_promise},
    {"equal_processes_act_as_one", equal_processes_act_as_one},
    {"the_ledger_counts_every_operation", the_ledger_counts_every_operation},
    {"a_reduction_in_two_calls_is_counted_as_one", a_reduction_in_two_calls_is_counted_as_one},
    {"the_ledger_counts_steps_and_parameters", the_ledger_counts_steps_and_parameters},
    {"shares_of_other_purposes_are_counted_apart", shares_of_other_purposes_are_counted_apart},
    {"refused_arguments_break_nothing", refused_arguments_break_nothing},
    {"a_transfer_over_budget_is_refused_by_all", a_transfer_over_budget_is_refused_by_all},
    {"mismatches_name_both_sides", mismatches_name_both_sides},
    {"processes_meet_for_a_call_made_elsewhere", processes_meet_for_a_call_made_elsewhere},
    {"a_silent_process_is_named_at_the_deadline", a_silent_process_is_named_at_the_deadline},
    {"abort_wakes_those_who_wait", abort_wakes_those_who_wait},
    {"an_abort_ends_the_call_of_another_thread", an_abort_ends_the_call_of_another_thread},
    {"an_abort_beside_calls_of_another_thread", an_abort_beside_calls_of_another_thread},
    {"giving_up_reaches_the_groups_split_from_a_group", giving_up_reaches_the_groups_split_from_a_group},
    {"waiting_calls_do_other_work", waiting_calls_do_other_work},
    {"two_threads_use_two_groups_at_once", two_threads_use_two_groups_at_once},
    {"a_failure_on_one_thread_leaves_the_groups_of_another",
     a_failure_on_one_thread_leaves_the_groups_of_another},
};

}  // namespace

std::span<const CommunicatorCase> communicator_cases() { return kCases; }

}  // namespace lowband
