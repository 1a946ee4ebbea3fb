#include "collectives/nccl/nccl_group.h"

#include "collectives/cuda/device_tree_reduction.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/check.cuh"
#include "runtime/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include <nccl.h>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;

// A group that ends in peace waits this long for the processes of its own host to end it too.
constexpr std::chrono::seconds kFarewell{5};
// How often transfers are looked after that nobody waits for.
constexpr std::chrono::milliseconds kWatch{2};

ncclDataType_t nccl_dtype(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kU8:
      return ncclUint8;
    case DType::kI64:
      return ncclInt64;
    case DType::kBF16:
      return ncclBfloat16;
  }
  return ncclUint8;
}

std::size_t at(int process) { return static_cast<std::size_t>(process); }

class NcclCommunicator final : public Communicator {
 public:
  // `control` is of the same processes and has the same axis.
  NcclCommunicator(std::unique_ptr<Communicator> control, int device, std::shared_ptr<Ledger> ledger)
      : Communicator(control->process(), control->size(), control->axis(), std::move(ledger),
                     control->deadline()),
        control_(std::move(control)),
        stream_(device, CudaStream::Priority::kHigh) {
    control_->set_wait_work([this] { return work_while_waiting(); });
    connect();
    watch_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
  }

  ~NcclCommunicator() override {
    watch_.request_stop();
    watch_.join();
    if (comm_ == nullptr) return;
    const bool in_peace = !failed_ && !aborted_ && std::uncaught_exceptions() == exceptions_in_flight_;
    if (in_peace && ended_by_themselves() && ncclCommFinalize(comm_) != ncclInvalidUsage) {
      ncclResult_t state = ncclInProgress;
      const Clock::time_point give_up = Clock::now() + kFarewell;
      while (state == ncclInProgress && Clock::now() < give_up) {
        if (ncclCommGetAsyncError(comm_, &state) != ncclSuccess) break;
        std::this_thread::yield();
      }
      if (state == ncclSuccess) {
        ncclCommDestroy(comm_);
        return;
      }
    }
    ncclCommAbort(comm_);
  }

  std::string_view backend() const override { return "nccl"; }

 private:
  // ---- the seams of Communicator

  // Parts are cut evenly, the first elements % n one element longer.
  Index do_all_reduce(const Call& call, void* data) override {
    const Turn turn(*this, call);
    const Staged whole(*this, kFirst, data, call.elements * dtype_bytes(call.dtype), Staged::kReadWrite);
    cut_evenly(call.elements);
    Index sent = 0;
    if (left_to_nccl(call) && call.elements > 0) {
      settle(ncclAllReduce(whole.data(), whole.data(), static_cast<std::size_t>(call.elements),
                           nccl_dtype(call.dtype), ncclSum, comm_, stream_.handle()),
             "ncclAllReduce");
      // A ring: all parts but one's own in one half, all but that of ahead(1) in the other.
      sent = 2 * offsets_.back() - part_bytes(process()) - part_bytes(ahead(1));
    } else {
      sent = scatter_reduce(whole.data(), whole.data() + offsets_[at(process())], call.dtype);
      sent += gather(whole.data());
    }
    whole.deliver();
    turn.finish();
    return sent;
  }

  Index do_reduce_scatter(const Call& call, const void* send, void* receive,
                          std::span<const Index> counts) override {
    const Turn turn(*this, call);
    cut(counts);
    const Index own_elements = counts[at(process())];
    const DType out = sum_dtype(call.dtype);
    const Staged whole(*this, kFirst, const_cast<void*>(send), offsets_.back(), Staged::kRead);
    const Staged part(*this, kSecond, receive, own_elements * dtype_bytes(out), Staged::kWrite);
    Index sent = 0;
    if (left_to_nccl(call) && own_elements > 0 && all_equal(counts)) {
      settle(ncclReduceScatter(whole.data(), part.data(), static_cast<std::size_t>(own_elements),
                               nccl_dtype(call.dtype), ncclSum, comm_, stream_.handle()),
             "ncclReduceScatter");
      sent = offsets_.back() - part_bytes(process());
    } else {
      sent = scatter_reduce(whole.data(), part.data(), out);
    }
    part.deliver();
    turn.finish();
    return sent;
  }

  Index do_all_gather(const Call& call, const void* send, void* receive,
                      std::span<const Index> counts) override {
    const Turn turn(*this, call);
    cut(counts);
    // Staged, the whole need not be read: every part of it is written.
    const Staged whole(*this, kFirst, receive, offsets_.back(), Staged::kWrite);
    const Staged part(*this, kSecond, const_cast<void*>(send), part_bytes(process()), Staged::kRead);
    std::byte* const own = whole.data() + offsets_[at(process())];
    if (own != part.data() && part_bytes(process()) > 0)
      cuda_copy(own, part.data(), part_bytes(process()), stream_);
    Index sent = 0;
    if (counts.front() > 0 && all_equal(counts)) {
      settle(ncclAllGather(own, whole.data(), static_cast<std::size_t>(part_bytes(process())), ncclUint8,
                           comm_, stream_.handle()),
             "ncclAllGather");
      sent = offsets_.back() - part_bytes(ahead(1));
    } else {
      sent = gather(whole.data());
    }
    whole.deliver();
    turn.finish();
    return sent;
  }

  Index do_all_to_all(const Call& call, const void* send, void* receive,
                      std::span<const Index> counts) override {
    const Turn turn(*this, call);
    const Index bytes = dtype_bytes(call.dtype);
    std::vector<Index> out{0}, in{0};  // offsets in the two buffers
    for (int p = 0; p < size(); ++p) {
      out.push_back(out.back() + counts[at(process()) * at(size()) + at(p)] * bytes);
      in.push_back(in.back() + counts[at(p) * at(size()) + at(process())] * bytes);
    }
    const Staged from(*this, kFirst, const_cast<void*>(send), out.back(), Staged::kRead);
    const Staged to(*this, kSecond, receive, in.back(), Staged::kWrite);
    const auto size_of = [](const std::vector<Index>& offsets, int p) {
      return offsets[at(p) + 1] - offsets[at(p)];
    };
    if (size_of(out, process()) > 0) {
      cuda_copy(to.data() + in[at(process())], from.data() + out[at(process())], size_of(out, process()),
                stream_);
    }
    Group group(*this);
    for (int k = 1; k < size(); ++k) {
      group.send(ahead(k), from.data() + out[at(ahead(k))], size_of(out, ahead(k)));
      group.receive(behind(k), to.data() + in[at(behind(k))], size_of(in, behind(k)));
    }
    const Index sent = group.run();
    to.deliver();
    turn.finish();
    return sent;
  }

  Index do_broadcast(const Call& call, void* data) override {
    const Turn turn(*this, call);
    const Index bytes = call.elements * dtype_bytes(call.dtype);
    const Staged whole(*this, kFirst, data, bytes, call.root == process() ? Staged::kRead : Staged::kWrite);
    if (bytes > 0)
      settle(ncclBroadcast(whole.data(), whole.data(), static_cast<std::size_t>(bytes), ncclUint8, call.root,
                           comm_, stream_.handle()),
             "ncclBroadcast");
    whole.deliver();
    turn.finish();
    // A chain from the root: the last one passes nothing on.
    return process() == (call.root + size() - 1) % size() ? 0 : bytes;
  }

  void do_barrier(const Call& call) override { meet_on_host(call); }

  std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) override {
    // Colours and keys again, for the host group: its first member names a group.
    const auto place = static_cast<int>(std::ranges::find(members, process()) - members.begin());
    control_->set_deadline(deadline());
    auto control = control_->split(members.front(), place, std::move(axis));
    return std::make_unique<NcclCommunicator>(std::move(control), stream_.device(), shared_ledger());
  }

  Determinism do_set_determinism(Determinism asked) override {
    return asked == Determinism::kFast ? Determinism::kFast : Determinism::kExact;
  }

  bool moves_alone() const override { return true; }
  bool reaches_devices() const override { return true; }

  // Whoever is in NCCL sees the flag: the thread of the group's calls, or the one that watches.
  void do_abort(std::string_view reason) override {
    {
      const std::lock_guard lock(abort_mutex_);
      if (abort_reason_.empty()) abort_reason_ = reason;
    }
    aborted_ = true;
    control_->abort(reason);
  }

  void do_let_go() override {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    end_transfers();
    static_cast<void>(cudaStreamSynchronize(stream_.handle()));
  }

  // ---- NCCL's communicator

  // Process 0 draws the id, the host group hands it around.
  void connect() {
    what_ = "connecting";
    since_ = Clock::now();
    ncclUniqueId id{};
    if (process() == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    std::array<std::uint8_t, sizeof id> bytes{};
    std::memcpy(bytes.data(), &id, sizeof id);
    control_->broadcast<std::uint8_t>(bytes, 0, {Purpose::kControl});
    std::memcpy(&id, bytes.data(), sizeof id);

    stream_.make_current();
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    try {
      settle(ncclCommInitRankConfig(&comm_, size(), id, process(), &config), "ncclCommInitRankConfig");
    } catch (...) {
      // The destructor of a half-made object does not run.
      if (comm_ != nullptr) ncclCommAbort(comm_);
      throw;
    }
  }

  void check(ncclResult_t result, std::string_view call) { check(result, call, what_); }
  void check(ncclResult_t result, std::string_view call, std::string_view whose) {
    if (result == ncclSuccess) return;
    const char* const detail = ncclGetLastError(comm_);
    const std::string text = cat(whose, " on axis ", axis(), ", process ", process(), " of ", size(), ": ",
                                 call, ": code ", static_cast<int>(result), ", ", ncclGetErrorString(result),
                                 detail != nullptr && *detail != '\0' ? cat(": ", detail) : std::string());
    if (result == ncclRemoteError) throw PeerFailed(text);
    throw NcclError(text);
  }

  void throw_if_aborted() {
    if (!aborted_) return;
    const std::lock_guard lock(abort_mutex_);
    throw PeerFailed(
        cat("process ", process(), " of ", size(), " aborted axis ", axis(), ": ", abort_reason_));
  }
  // `what`, of the call or connection `whose`.
  void throw_if_late(Clock::time_point since, std::chrono::milliseconds deadline, std::string_view whose,
                     std::string_view what) {
    if (Clock::now() < since + deadline) return;
    throw PeerFailed(cat(whose, " on axis ", axis(), ", process ", process(), " of ", size(), ": ", what,
                         " did not end within ", deadline.count(), " ms, although every process had come"));
  }

  // A non-blocking communicator takes the next call, and its stream the next kernel, when it says Success.
  void settle(ncclResult_t result, std::string_view call) {
    while (result == ncclInProgress) {
      throw_if_aborted();
      throw_if_late(since_, deadline(), what_, call);
      check(ncclCommGetAsyncError(comm_, &result), "ncclCommGetAsyncError");
      if (result == ncclInProgress) std::this_thread::yield();
    }
    check(result, call);
  }

  // ---- a call: meet, enqueue, and wait where the host takes part

  // A transfer on the stream. Its deadline runs from the moment at which nothing is before it.
  struct Flight {
    explicit Flight(const CudaStream& stream) : begun(stream), over(stream) {}
    Call call;
    std::string what;
    CudaEvent begun, over;
    std::optional<Clock::time_point> since = std::nullopt;
    std::chrono::milliseconds deadline{};
  };

  void meet_on_host(const Call& call) {
    what_ = describe(call);
    control_->set_deadline(deadline());
    control_->meet(call);
    since_ = Clock::now();
  }

  // From the meeting to the end of the call, NCCL is the calling thread's alone.
  class Turn {
   public:
    Turn(NcclCommunicator& owner, const Call& call) : owner_(owner) {
      owner.meet_on_host(call);
      lock_ = std::unique_lock(owner.mutex_);
      owner.begin(call);
    }
    void finish() const { owner_.finish(); }

   private:
    NcclCommunicator& owner_;
    std::unique_lock<std::mutex> lock_;
  };

  void begin(const Call& call) {
    if (late_failure_) std::rethrow_exception(late_failure_);
    look_after_flights();
    call_ = call;
    landings_.clear();
    staged_ = false;
    stream_.make_current();
    // Groups of a device take their turns in its queue, so that their kernels come in one order everywhere.
    if (device() != nullptr) device()->precede(stream_.handle());
    flight_ = spare_flights_.empty() ? std::make_unique<Flight>(stream_) : std::move(spare_flights_.back());
    if (!spare_flights_.empty()) spare_flights_.pop_back();
    flight_->begun.record(stream_);
  }

  // Spans of the device's memory alone: its queue goes on behind the transfer, and the host with other
  // things.
  void finish() {
    flight_->over.record(stream_);
    flight_->call = call_;
    flight_->what = what_;
    flight_->since.reset();
    flight_->deadline = deadline();
    flights_.push_back(std::move(flight_));
    if (device() != nullptr) device()->follow(stream_.handle());
    if (device() != nullptr && !staged_) {
      watched_.notify_one();
      return;
    }
    wait_for_flights();
    for (const Landing& landing : landings_)
      std::memcpy(landing.to, landing.from, static_cast<std::size_t>(landing.bytes));
  }

  // Forgets what is over. Throws what went wrong with the others.
  void look_after_flights() {
    while (!flights_.empty()) {
      Flight& first = *flights_.front();
      if (!first.since && first.begun.over()) first.since = Clock::now();
      if (first.since && first.over.over()) {
        ledger().add_seconds(axis(), first.call.purpose, first.call.operation,
                             first.over.seconds_since(first.begun));
        spare_flights_.push_back(std::move(flights_.front()));
        flights_.pop_front();
        continue;
      }
      throw_if_aborted();
      ncclResult_t state = ncclSuccess;
      check(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError", first.what);
      if (state != ncclInProgress) check(state, "the transfer", first.what);
      if (first.since) throw_if_late(*first.since, first.deadline, first.what, "the transfer");
      return;
    }
  }

  void wait_for_flights() {
    for (look_after_flights(); !flights_.empty(); look_after_flights()) {
      if (!work_while_waiting()) std::this_thread::yield();
    }
  }

  bool ended_by_themselves() noexcept {
    try {
      wait_for_flights();
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  // Ends kernels that wait for a peer, so that the stream, and who waits for it, goes on.
  void end_transfers() {
    if (comm_ == nullptr || (flight_ == nullptr && flights_.empty())) return;
    ncclCommAbort(comm_);
    comm_ = nullptr;
    flight_.reset();
    flights_.clear();
  }

  // Of transfers that nobody waits for: the host may be waiting for the device, which waits for them. The
  // group is broken before its kernels end, so that whoever finds what they left finds out.
  void watch(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      if (!watched_.wait(lock, stop, [this] { return !flights_.empty(); })) return;
      try {
        stream_.make_current();
        look_after_flights();
      } catch (const std::exception& failure) {
        late_failure_ = std::current_exception();
        break_late(late_failure_);
        do_abort(failure.what());
        end_transfers();
        return;
      }
      watched_.wait_for(lock, stop, kWatch, [] { return false; });
    }
  }

  // What NCCL does as the contract asks when only equal bits on all processes are wanted.
  bool left_to_nccl(const Call& call) const {
    return determinism() == Determinism::kFast && call.reduction == Reduction::kSum &&
           call.dtype != DType::kBF16;
  }

  // Messages that NCCL moves in one launch. Empty ones are left out on both sides.
  class Group {
   public:
    explicit Group(NcclCommunicator& owner) : owner_(owner) {
      owner_.check(ncclGroupStart(), "ncclGroupStart");
    }
    void send(int to, const std::byte* bytes, Index count) {
      if (count == 0) return;
      note(ncclSend(bytes, static_cast<std::size_t>(count), ncclUint8, to, owner_.comm_,
                    owner_.stream_.handle()));
      sent_ += count;
    }
    void receive(int from, std::byte* bytes, Index count) {
      if (count == 0) return;
      note(ncclRecv(bytes, static_cast<std::size_t>(count), ncclUint8, from, owner_.comm_,
                    owner_.stream_.handle()));
    }
    /// Ends the group in any case; returns the bytes to send.
    Index run() {
      const ncclResult_t ended = ncclGroupEnd();
      owner_.check(failed_, "ncclSend or ncclRecv");
      owner_.settle(ended, "ncclGroupEnd");
      return sent_;
    }

   private:
    void note(ncclResult_t result) {
      if (failed_ == ncclSuccess && result != ncclInProgress) failed_ = result;
    }
    NcclCommunicator& owner_;
    ncclResult_t failed_ = ncclSuccess;
    Index sent_ = 0;
  };

  // ---- parts of a buffer, in bytes: part p is [offsets_[p], offsets_[p + 1])

  int ahead(int distance) const { return (process() + distance) % size(); }
  int behind(int distance) const { return (process() - distance + size()) % size(); }
  static bool all_equal(std::span<const Index> counts) {
    return std::ranges::count(counts, counts.front()) == std::ssize(counts);
  }
  Index part_bytes(int p) const { return offsets_[at(p) + 1] - offsets_[at(p)]; }

  void cut(std::span<const Index> counts) {
    offsets_.assign(1, 0);
    for (const Index count : counts) offsets_.push_back(offsets_.back() + count * dtype_bytes(call_.dtype));
  }

  void cut_evenly(Index elements) {
    std::vector<Index> counts(at(size()), elements / size());
    std::fill_n(counts.begin(), elements % size(), elements / size() + 1);
    cut(counts);
  }

  // own_result <- tree over p of process p's raw part for this process; returns the bytes sent.
  Index scatter_reduce(const std::byte* whole, std::byte* own_result, DType result_dtype) {
    const Index own_bytes = part_bytes(process());
    std::byte* const received = buffer(kReceived, own_bytes * (size() - 1));
    Group group(*this);
    for (int k = 1; k < size(); ++k) {
      group.send(ahead(k), whole + offsets_[at(ahead(k))], part_bytes(ahead(k)));
      group.receive(behind(k), received + own_bytes * (k - 1), own_bytes);
    }
    const Index sent = group.run();
    device_reduce_tree({whole + offsets_[at(process())], received, process(), size()}, own_result,
                       own_bytes / dtype_bytes(call_.dtype), call_.dtype, result_dtype, call_.reduction,
                       stream_);
    return sent;
  }

  // Every part comes straight from its owner; the own one is there.
  Index gather(std::byte* whole) {
    Group group(*this);
    for (int k = 1; k < size(); ++k) {
      group.send(ahead(k), whole + offsets_[at(process())], part_bytes(process()));
      group.receive(behind(k), whole + offsets_[at(behind(k))], part_bytes(behind(k)));
    }
    return group.run();
  }

  // ---- device memory

  enum Place : std::uint8_t { kFirst, kSecond, kReceived, kPlaces };

  // Grows, never shrinks.
  std::byte* buffer(Place place, Index bytes) {
    DeviceBuffer<std::byte>& own = buffers_[place];
    if (own.size() < bytes) own = DeviceBuffer<std::byte>(bytes, stream_);
    return own.data();
  }

  static bool on_device(const void* memory) {
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  }

  // A caller's buffer as the device sees it: itself, or for host memory a copy.
  class Staged {
   public:
    enum Use : std::uint8_t { kRead, kWrite, kReadWrite };
    Staged(NcclCommunicator& owner, Place place, void* memory, Index bytes, Use use)
        : owner_(owner), place_(place), memory_(memory), bytes_(bytes), use_(use) {
      if (bytes == 0 || on_device(memory)) {
        data_ = static_cast<std::byte*>(memory);
        return;
      }
      staged_ = owner.staged_ = true;
      data_ = owner.buffer(place, bytes);
      if (use != kWrite) cuda_copy(data_, memory, bytes, owner.stream_);
    }
    std::byte* data() const { return data_; }
    /// Enqueues the way back, where there is one, into pinned memory: a copy to other host memory would not
    /// return before the transfer is over, whatever the deadline. `finish` goes the rest of the way.
    void deliver() const {
      if (!staged_ || use_ == kRead) return;
      PinnedBuffer<std::byte>& pinned = owner_.pinned_[place_];
      if (pinned.size() < bytes_) pinned = PinnedBuffer<std::byte>(bytes_);
      cuda_copy(pinned.data(), data_, bytes_, owner_.stream_);
      owner_.landings_.push_back({memory_, pinned.data(), bytes_});
    }

   private:
    NcclCommunicator& owner_;
    Place place_;
    void* memory_;
    std::byte* data_ = nullptr;
    Index bytes_;
    Use use_;
    bool staged_ = false;
  };

  struct Landing {
    void* to;
    const std::byte* from;
    Index bytes;
  };

  std::unique_ptr<Communicator> control_;
  CudaStream stream_;
  std::array<DeviceBuffer<std::byte>, kPlaces> buffers_;
  std::array<PinnedBuffer<std::byte>, kPlaces> pinned_;
  ncclComm_t comm_ = nullptr;
  int exceptions_in_flight_ = std::uncaught_exceptions();
  bool failed_ = false;  // a call threw
  std::atomic<bool> aborted_ = false;
  std::mutex abort_mutex_;
  std::string abort_reason_;

  // Of the running call.
  Call call_;
  std::string what_;
  Clock::time_point since_;  // all have come
  std::vector<Index> offsets_;
  std::vector<Landing> landings_;  // copies to host memory that wait for the stream
  bool staged_ = false;            // a buffer of the call lies in host memory
  std::unique_ptr<Flight> flight_;

  std::mutex mutex_;  // of NCCL's communicator and all below
  std::condition_variable_any watched_;
  std::deque<std::unique_ptr<Flight>> flights_;  // in the order of the stream
  std::vector<std::unique_ptr<Flight>> spare_flights_;
  std::exception_ptr late_failure_;
  std::jthread watch_;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_group(Communicator& host_group, int device) {
  const CudaStatus status = cuda_status();
  const auto devices = static_cast<int>(status.devices.size());
  LB_EXPECTS(0 <= device && device < devices, "nccl: found ", devices, " CUDA devices",
             status.reason.empty() ? "" : cat(" (", status.reason, ")"), ", expected device ", device,
             " for process ", host_group.process(), " of ", host_group.size());
  auto control = host_group.split(0, host_group.process(), host_group.axis());
  return std::make_unique<NcclCommunicator>(std::move(control), device, std::make_shared<Ledger>());
}

}  // namespace lowband
