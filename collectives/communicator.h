#pragma once

#include "collectives/byte_budget.h"
#include "collectives/call.h"
#include "collectives/ledger.h"
#include "runtime/bfloat16.h"
#include "runtime/cuda/buffer.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/timeline.h"
#include "runtime/types.h"

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace lowband {

/// What the caller says about a transfer: why, and optionally which parameter owns which part of it. A share
/// may name another purpose, so that what moves for different reasons can ride in one transfer.
struct Tag {
  Purpose purpose;
  std::span<const PayloadShare> shares = {};
  /// The all-gather of a reduction in two calls, whose reduce-scatter has counted the same payload: recorded
  /// with its wire bytes, and payload zero. So both calls together are recorded as an all-reduce would be.
  bool second_half = false;
};

/// What is promised of the order in which processes' numbers are added, from least to most. On every level
/// all processes of a group receive the same bits.
enum class Determinism : std::uint8_t {
  kFast,    // whatever is fastest: bits may change from run to run
  kPinned,  // one algorithm and order: the same bits in every run on one backend
  kExact,   // a binary tree over process numbers: the same bits on every backend
};
std::string_view determinism_name(Determinism determinism);

/// What sums of T are formed in.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;

/// A group of processes and the only door through which bytes leave one of them.
///
/// Every public operation checks its arguments, makes sure that all processes of the group called the same
/// operation on the same dtype and size (a mismatch throws CollectiveMismatch naming both sides), moves the
/// bytes through the backend's private `do_...`, and writes the transfer to the ledger.
///
/// Collective: all processes of the group call the same operations in the same order. A group of one moves
/// nothing, but is recorded: payload counted, wire bytes zero.
/// Determinism: every process receives identical bits, and sums are formed in the order that `determinism()`
/// says. Exactly, unless less was asked for.
/// Deadline: no call waits longer than `deadline()`; then PeerFailed names the operation and the silent peer.
/// After the first failure the group is broken: its other processes throw PeerFailed with the reason, and
/// every later call of this one throws the same error at once. A refused argument (InvalidArgument) breaks
/// nothing.
/// Budget: what `budget()` does not allow is refused before anything is sent, with BudgetExceeded. All
/// processes of the group refuse together, and the group is as before, provided that they named equal shares
/// and have equal budgets and accounts for this axis. Whoever gives up then aborts the group that
/// all processes are in, so that those of other groups learn of it.
/// Threads: one at a time in each group, different groups of a process by different threads at once. `split`
/// with one colour gives a second thread a group of its own. `abort` is for any thread at any time.
class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int process() const { return process_; }  // of this group, 0 <= process < size
  int size() const { return size_; }
  const std::string& axis() const { return axis_; }
  virtual std::string_view backend() const = 0;

  std::chrono::milliseconds deadline() const { return deadline_; }
  void set_deadline(std::chrono::milliseconds deadline) { deadline_ = deadline; }
  /// Where transfers are recorded; shared with the groups split from this one.
  Ledger& ledger() const { return *ledger_; }
  /// What transfers may cost; shared likewise. Empty at first: nothing is limited.
  ByteBudget& budget() { return *budget_; }
  /// Asks for at least `asked`, equally on all processes and before the next call; inherited by groups split
  /// later. A backend that has nothing faster gives more. Throws: InvalidArgument, when it cannot give so
  /// much.
  void set_determinism(Determinism asked) { determinism_ = do_set_determinism(asked); }
  /// What is given.
  Determinism determinism() const { return determinism_; }

  /// Ranges of the operations go here from now on (may be null); inherited by groups split later.
  void set_timeline(Timeline* timeline) { timeline_ = timeline; }
  Timeline* timeline() const { return timeline_; }

  /// From now on spans may lie in the memory of `device` (null: only the host's) as well as in the host's. A
  /// call takes what the device's work so far leaves in them, and its later work finds the results; a backend
  /// that does not reach device memory sends and receives copies in pinned host memory. One that does returns
  /// from a call whose spans all lie there when it is enqueued. What goes wrong in it then breaks the group
  /// at its deadline at the latest, which runs from its turn on the device: the device goes on, with any
  /// numbers where results were expected, and the next call, or `throw_if_broken`, throws what happened.
  /// Inherited by groups split later. Ownership: borrows the device.
  void set_device(Device* device) { device_ = device; }
  Device* device() const { return device_; }

  /// Work for the time in which calls on this group wait for other processes: `piece` does a little of it,
  /// well under a millisecond, and returns whether it did anything. Null: none. It runs on the thread of the
  /// call, any number of times, also never, so that whoever sets it finishes the rest; it may not call this
  /// group.
  void set_wait_work(std::function<bool()> piece) { wait_work_ = std::move(piece); }

  /// data <- elementwise sum or maximum over processes. T: float, double, std::int64_t, std::uint8_t,
  /// BFloat16. Sums are formed in T, integers modulo 2^bits; a maximum with a NaN is NaN. Numbers of BFloat16
  /// are summed in float32 as they came and rounded once, at the end.
  template <class T>
  void all_reduce(std::span<T> data, Reduction reduction, const Tag& tag);

  /// `send` is the concatenation of `counts[p]` elements for each process p; `receive` gets the reduced part
  /// of this process. Counts are equal on all processes; zero is legal. `receive` may be this process's part
  /// of `send`, and may not overlap it otherwise. Sums of BFloat16 are formed in float32 and delivered
  /// unrounded.
  template <class T>
  void reduce_scatter(std::span<const T> send, std::span<SumOf<T>> receive, std::span<const Index> counts,
                      Reduction reduction, const Tag& tag);

  /// `receive` becomes the concatenation over processes p of the `counts[p]` elements that p sends. `send`
  /// may be this process's part of `receive`, and may not overlap it otherwise.
  template <class T>
  void all_gather(std::span<const T> send, std::span<T> receive, std::span<const Index> counts,
                  const Tag& tag);

  /// Every process sends a part to every process: `counts[p * size() + q]` elements go from p to q. `send` is
  /// the concatenation over q of what this process sends, `receive` over p of what it receives; they may not
  /// overlap. Counts are equal on all processes; zero is legal. The payload is what all send together, parts
  /// that stay included; wire bytes are those that this process sends to others.
  template <class T>
  void all_to_all(std::span<const T> send, std::span<T> receive, std::span<const Index> counts,
                  const Tag& tag);

  /// data <- data of process `root`.
  template <class T>
  void broadcast(std::span<T> data, int root, const Tag& tag);

  void barrier();

  /// Throws what broke the group, where something did. Who waited for a device whose work came from this
  /// group asks before he believes what he finds. Not collective, does not wait.
  void throw_if_broken();

  /// For a group whose data goes another way, and that has a host group at its side: waits until all
  /// processes made `call`, compares, and fails as the call itself would here. Not recorded.
  void meet(const Call& call);

  /// Groups of the processes with equal `colour`, ordered by `key`, then by process. Collective. Colours and
  /// keys are gathered by an ordinary all_gather on this group, recorded with Purpose::kControl.
  std::unique_ptr<Communicator> split(int colour, int key, std::string axis);

  /// Breaks the group for all its processes, and with it all groups that were split from it: everyone blocked
  /// in them, and every later call that has to wait, throws PeerFailed with this process and the reason: so
  /// does another thread of this process that is in a call. The group that this one was split from is as
  /// before. Not collective, never blocks; a split of which the transport has begun its part ends first.
  void abort(std::string_view reason);

 protected:
  Communicator(int process, int size, std::string axis, std::shared_ptr<Ledger> ledger,
               std::chrono::milliseconds deadline);
  const std::shared_ptr<Ledger>& shared_ledger() const { return ledger_; }
  /// For backends, when a call has to wait: does a piece of other work; false when there is none.
  bool work_while_waiting() { return wait_work_ && wait_work_(); }
  /// For backends, from any thread: what went wrong in a call that had returned. Afterwards they abort, as
  /// this side does for calls that throw.
  void break_late(const std::exception_ptr& failure);

 private:
  // Type-erased seams of the backends, called on groups of at least two with checked arguments. Those that
  // move data return the bytes they handed to the transport for sending.
  virtual Index do_all_reduce(const Call& call, void* data) = 0;
  /// `receive` is of `sum_dtype(call.dtype)`.
  virtual Index do_reduce_scatter(const Call& call, const void* send, void* receive,
                                  std::span<const Index> counts) = 0;
  virtual Index do_all_gather(const Call& call, const void* send, void* receive,
                              std::span<const Index> counts) = 0;
  virtual Index do_all_to_all(const Call& call, const void* send, void* receive,
                              std::span<const Index> counts) = 0;
  virtual Index do_broadcast(const Call& call, void* data) = 0;
  virtual void do_barrier(const Call& call) = 0;
  /// The group of `members`, process numbers of this group in the order of the new one; this process is one.
  virtual std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) = 0;
  /// The level given to a caller that asks for at least `asked`.
  virtual Determinism do_set_determinism(Determinism asked) = 0;
  /// Tells the other processes, and a thread of this one that is in a call. From any thread. Quiet.
  virtual void do_abort(std::string_view reason) = 0;
  /// Whether a group of one calls the `do_...` that move data too, because only the backend can copy it.
  virtual bool moves_alone() const { return false; }
  /// Whether the `do_...` take addresses of device memory.
  virtual bool reaches_devices() const { return false; }
  /// Lets go of every buffer of the call that failed, on the thread that made it, after do_abort. Quiet.
  virtual void do_let_go() {}

  /// Runs one collective: sequence number, timeline, ledger. `wire_bytes` where they do not follow from the
  /// size of the buffer.
  template <class Move>
  void perform(Call call, const Tag& tag, Move move, std::optional<Index> wire_bytes = std::nullopt);
  /// Runs `action`; when it throws, the group is broken from then on.
  template <class Action>
  auto break_on_failure(Action action);
  /// The span as a view that knows its place.
  template <class T>
  MatrixView<T> placed(std::span<T> span) const;
  class Reached;
  bool alone() const { return size_ == 1 && !moves_alone(); }
  /// Whether nothing has to be moved but by copies that this side makes: those of a Device need no backend.
  template <class T>
  bool alone(std::span<T> data) const {
    return alone() || (size_ == 1 && placed(data).device != nullptr);
  }

  int process_;
  int size_;
  std::string axis_;
  std::shared_ptr<Ledger> ledger_;
  std::shared_ptr<ByteBudget> budget_;
  std::chrono::milliseconds deadline_;
  Determinism determinism_ = Determinism::kExact;
  Timeline* timeline_ = nullptr;
  std::function<bool()> wait_work_;
  Device* device_ = nullptr;
  std::array<PinnedBuffer<std::byte>, 2> staging_;  // of what the call takes, of what it gives
  Index calls_ = 0;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;  // what broke the group first
};

/// Sets wait work for a scope.
class WaitWork {
 public:
  WaitWork(Communicator& group, std::function<bool()> piece) : group_(group) {
    group.set_wait_work(std::move(piece));
  }
  WaitWork(const WaitWork&) = delete;
  WaitWork& operator=(const WaitWork&) = delete;
  ~WaitWork() { group_.set_wait_work(nullptr); }

 private:
  Communicator& group_;
};

}  // namespace lowband
