#include "collectives/communicator.h"

#include "runtime/copy.h"
#include "runtime/passes.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace lowband {
namespace {

Index size_of(const auto& range) { return static_cast<Index>(range.size()); }

// Checks `counts` against the group and the two buffers; returns their sum. `whole` is the buffer that holds
// the parts of all processes, `part` the one that holds this process's.
Index check_counts(std::string_view operation, std::span<const Index> counts, int process, int size,
                   Index whole, Index part) {
  LB_EXPECTS(size_of(counts) == size, operation, ": ", counts.size(), " counts, expected one for each of ",
             size, " processes");
  for (const Index count : counts) {
    LB_EXPECTS(count >= 0, operation, ": count ", count, ", expected a non-negative number of elements");
  }
  const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
  LB_EXPECTS(whole == total, operation, ": the buffer of all processes has ", whole, " elements, expected ",
             total, ", the sum of the counts");
  const Index own = counts[static_cast<std::size_t>(process)];
  LB_EXPECTS(part == own, operation, ": the buffer of process ", process, " has ", part,
             " elements, expected ", own, ", its count");
  return total;
}

void check_shares(const Tag& tag, Index elements) {
  Index shared = 0;
  for (const PayloadShare& share : tag.shares) {
    LB_EXPECTS(share.elements >= 0, "share of ", share.parameter, ": ", share.elements,
               " elements, expected a non-negative number");
    shared += share.elements;
  }
  LB_EXPECTS(shared <= elements, "shares add up to ", shared, " elements, expected at most ", elements,
             ", the payload");
}

}  // namespace

std::string_view determinism_name(Determinism determinism) {
  switch (determinism) {
    case Determinism::kFast:
      return "fast";
    case Determinism::kPinned:
      return "pinned";
    case Determinism::kExact:
      return "exact";
  }
  return "?";
}

Communicator::Communicator(int process, int size, std::string axis, std::shared_ptr<Ledger> ledger,
                           std::chrono::milliseconds deadline)
    : process_(process),
      size_(size),
      axis_(std::move(axis)),
      ledger_(std::move(ledger)),
      budget_(std::make_shared<ByteBudget>()),
      deadline_(deadline) {
  LB_EXPECTS(0 <= process && process < size, "communicator: process ", process, " of ", size);
  LB_EXPECTS(ledger_ != nullptr, "communicator: no ledger");
}

void Communicator::break_late(const std::exception_ptr& failure) {
  const std::lock_guard lock(failure_mutex_);
  if (!failure_) failure_ = failure;
}

void Communicator::throw_if_broken() {
  const std::lock_guard lock(failure_mutex_);
  if (failure_) std::rethrow_exception(failure_);
}

template <class Action>
auto Communicator::break_on_failure(Action action) {
  throw_if_broken();
  try {
    return action();
  } catch (const std::exception& failure) {
    {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    do_abort(failure.what());
    do_let_go();
    throw;
  }
}

template <class T>
MatrixView<T> Communicator::placed(std::span<T> span) const {
  const bool there = device_ != nullptr && !span.empty() && device_->holds(span.data());
  return {span.data(), 1, size_of(span), size_of(span), there ? device_ : nullptr};
}

/// A buffer of a call where the backend reaches it: itself, or a copy in host memory.
class Communicator::Reached {
 public:
  enum Use : std::uint8_t { kRead = 1, kWrite = 2, kReadWrite = 3 };

  /// `slot`: of staging_; one for each buffer of a call.
  template <class T>
  Reached(Communicator& group, std::size_t slot, std::span<T> span, Use use)
      : reached_(bytes_of(span.data())) {
    const MatrixView<T> whole = group.placed(span);
    if (whole.device == nullptr || span.empty()) return;
    device_ = whole.device;
    if (group.reaches_devices()) return;
    there_ = bytes_of(span.data());
    bytes_ = static_cast<Index>(span.size_bytes());
    PinnedBuffer<std::byte>& staging = group.staging_[slot];
    if (staging.size() < bytes_) staging = PinnedBuffer<std::byte>(bytes_);
    reached_ = staging.data();
    if ((use & kRead) == 0) return;
    device_->copy(there_, 0, reached_, 0, bytes_, 1);
    device_->synchronize();
  }
  void* data() const { return reached_; }
  /// What the call wrote, to where it belongs.
  void deliver() const {
    if (there_ == nullptr) return;
    device_->copy(reached_, 0, there_, 0, bytes_, 1);
    device_->synchronize();  // before the next call writes to the same staging
  }

 private:
  template <class T>
  static std::byte* bytes_of(T* data) {
    return reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(data));
  }
  std::byte* reached_;
  std::byte* there_ = nullptr;
  Device* device_ = nullptr;
  Index bytes_ = 0;
};

template <class Move>
void Communicator::perform(Call call, const Tag& tag, Move move, std::optional<Index> wire_bytes) {
  throw_if_broken();
  check_shares(tag, call.elements);
  call.purpose = tag.purpose;
  const Index element_bytes = dtype_bytes(call.dtype);
  const Index buffer_bytes = call.elements * element_bytes;
  Transfer transfer{.axis = axis_,
                    .purpose = call.purpose,
                    .operation = call.operation,
                    .payload_bytes = buffer_bytes,
                    .modelled_wire_bytes = wire_bytes ? static_cast<double>(*wire_bytes)
                                                      : wire_bytes_model(call.operation, buffer_bytes, size_),
                    .second_half = tag.second_half};
  budget_->check(*ledger_, transfer, tag.shares, element_bytes);
  call.sequence = ++calls_;

  std::string range_name;
  if (timeline_ != nullptr && timeline_->enabled()) {
    range_name = cat(operation_name(call.operation), " ", axis_, " ", purpose_name(call.purpose));
  }
  const Timeline::Range range(timeline_, range_name, buffer_bytes);
  const Ledger::Presence presence(*ledger_);
  const auto begin = std::chrono::steady_clock::now();
  transfer.transport_bytes = break_on_failure([&] { return move(call); });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  transfer.seconds = elapsed.count();
  ledger_->record(transfer, tag.shares, element_bytes);
}

template <class T>
void Communicator::all_reduce(std::span<T> data, Reduction reduction, const Tag& tag) {
  const Call call{.elements = size_of(data),
                  .operation = Operation::kAllReduce,
                  .reduction = reduction,
                  .dtype = dtype_of<T>};
  perform(call, tag, [&](const Call& checked) -> Index {
    if (alone(data)) return 0;
    const Reached whole(*this, 0, data, Reached::kReadWrite);
    const Index sent = do_all_reduce(checked, whole.data());
    whole.deliver();
    return sent;
  });
}

template <class T>
void Communicator::reduce_scatter(std::span<const T> send, std::span<SumOf<T>> receive,
                                  std::span<const Index> counts, Reduction reduction, const Tag& tag) {
  const Index total =
      check_counts("reduce_scatter", counts, process_, size_, size_of(send), size_of(receive));
  const Call call{.elements = total,
                  .counts_hash = hash_counts(counts),
                  .operation = Operation::kReduceScatter,
                  .reduction = reduction,
                  .dtype = dtype_of<T>};
  perform(call, tag, [&](const Call& checked) -> Index {
    if (alone(send)) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        widen_bf16<float>(placed(send), placed(receive));
      } else if (receive.data() != send.data()) {
        copy<T>(placed(send), placed(receive));
      }
      return 0;
    }
    const Reached whole(*this, 0, send, Reached::kRead), part(*this, 1, receive, Reached::kWrite);
    const Index sent = do_reduce_scatter(checked, whole.data(), part.data(), counts);
    part.deliver();
    return sent;
  });
}

template <class T>
void Communicator::all_gather(std::span<const T> send, std::span<T> receive, std::span<const Index> counts,
                              const Tag& tag) {
  const Index total = check_counts("all_gather", counts, process_, size_, size_of(receive), size_of(send));
  const Call call{.elements = total,
                  .counts_hash = hash_counts(counts),
                  .operation = Operation::kAllGather,
                  .dtype = dtype_of<T>};
  perform(call, tag, [&](const Call& checked) -> Index {
    if (alone(send)) {
      if (receive.data() != send.data()) copy<T>(placed(send), placed(receive));
      return 0;
    }
    const Reached part(*this, 0, send, Reached::kRead), whole(*this, 1, receive, Reached::kWrite);
    const Index sent = do_all_gather(checked, part.data(), whole.data(), counts);
    whole.deliver();
    return sent;
  });
}

template <class T>
void Communicator::all_to_all(std::span<const T> send, std::span<T> receive, std::span<const Index> counts,
                              const Tag& tag) {
  LB_EXPECTS(size_of(counts) == Index{size_} * size_, "all_to_all: ", counts.size(),
             " counts, expected one for each pair of ", size_, " processes");
  const auto count_of = [&](int from, int to) {
    return counts[static_cast<std::size_t>(from) * static_cast<std::size_t>(size_) +
                  static_cast<std::size_t>(to)];
  };
  Index total = 0, sent = 0, received = 0;
  for (int from = 0; from < size_; ++from) {
    for (int to = 0; to < size_; ++to) {
      const Index count = count_of(from, to);
      LB_EXPECTS(count >= 0, "all_to_all: count ", count, ", expected a non-negative number of elements");
      total += count;
      if (from == process_) sent += count;
      if (to == process_) received += count;
    }
  }
  LB_EXPECTS(size_of(send) == sent, "all_to_all: process ", process_, " sends ", send.size(),
             " elements, expected ", sent, ", the sum of its counts");
  LB_EXPECTS(size_of(receive) == received, "all_to_all: process ", process_, " receives ", receive.size(),
             " elements, expected ", received, ", the sum of the counts for it");
  const Call call{.elements = total,
                  .counts_hash = hash_counts(counts),
                  .operation = Operation::kAllToAll,
                  .dtype = dtype_of<T>};
  const Index kept = count_of(process_, process_);
  perform(
      call, tag,
      [&](const Call& checked) -> Index {
        if (alone(send)) {
          copy<T>(placed(send), placed(receive));
          return 0;
        }
        const Reached from(*this, 0, send, Reached::kRead), to(*this, 1, receive, Reached::kWrite);
        const Index moved = do_all_to_all(checked, from.data(), to.data(), counts);
        to.deliver();
        return moved;
      },
      (sent - kept) * dtype_bytes(call.dtype));
}

template <class T>
void Communicator::broadcast(std::span<T> data, int root, const Tag& tag) {
  LB_EXPECTS(0 <= root && root < size_, "broadcast: root ", root, ", expected a process of 0 to ", size_ - 1);
  const Call call{
      .elements = size_of(data), .root = root, .operation = Operation::kBroadcast, .dtype = dtype_of<T>};
  perform(call, tag, [&](const Call& checked) -> Index {
    if (alone(data)) return 0;
    const Reached whole(*this, 0, data, root == process_ ? Reached::kRead : Reached::kReadWrite);
    const Index sent = do_broadcast(checked, whole.data());
    if (root != process_) whole.deliver();
    return sent;
  });
}

void Communicator::barrier() {
  const Call call{.operation = Operation::kBarrier};
  perform(call, {Purpose::kControl}, [&](const Call& checked) -> Index {
    if (!alone()) do_barrier(checked);
    return 0;
  });
}

void Communicator::meet(const Call& call) {
  break_on_failure([&] {
    if (!alone()) do_barrier(call);
  });
}

std::unique_ptr<Communicator> Communicator::split(int colour, int key, std::string axis) {
  // What every process asked for, as (colour, key) pairs in process order.
  const std::vector<Index> own{colour, key};
  const std::vector<Index> counts(static_cast<std::size_t>(size_), 2);
  std::vector<Index> asked(static_cast<std::size_t>(size_) * 2);
  all_gather<Index>(own, asked, counts, {Purpose::kControl});

  std::vector<int> members;
  for (int p = 0; p < size_; ++p) {
    if (asked[static_cast<std::size_t>(p) * 2] == colour) members.push_back(p);
  }
  std::ranges::stable_sort(members, {}, [&](int p) { return asked[static_cast<std::size_t>(p) * 2 + 1]; });

  std::unique_ptr<Communicator> group = break_on_failure([&] { return do_split(members, std::move(axis)); });
  group->set_timeline(timeline_);
  group->budget_ = budget_;
  group->set_determinism(determinism_);
  group->set_device(device_);
  return group;
}

void Communicator::abort(std::string_view reason) {
  {
    const std::lock_guard lock(failure_mutex_);
    if (failure_) return;
    failure_ = std::make_exception_ptr(
        PeerFailed(cat("process ", process_, " of ", size_, " aborted axis ", axis_, ": ", reason)));
  }
  do_abort(reason);
}

// NOLINTBEGIN(bugprone-macro-parentheses): T is a type
#define LB_INSTANTIATE(T)                                                                             \
  template void Communicator::all_reduce<T>(std::span<T>, Reduction, const Tag&);                     \
  template void Communicator::reduce_scatter<T>(std::span<const T>, std::span<SumOf<T>>,              \
                                                std::span<const Index>, Reduction, const Tag&);       \
  template void Communicator::all_gather<T>(std::span<const T>, std::span<T>, std::span<const Index>, \
                                            const Tag&);                                              \
  template void Communicator::all_to_all<T>(std::span<const T>, std::span<T>, std::span<const Index>, \
                                            const Tag&);                                              \
  template void Communicator::broadcast<T>(std::span<T>, int, const Tag&);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
LB_INSTANTIATE(std::int64_t)
LB_INSTANTIATE(std::uint8_t)
LB_INSTANTIATE(BFloat16)
#undef LB_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace lowband
