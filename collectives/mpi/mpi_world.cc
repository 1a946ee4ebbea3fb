#include "collectives/mpi/mpi_world.h"

#include "collectives/exchange_communicator.h"

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <mpi.h>
#include <sched.h>

namespace lowband {
namespace {

constexpr int kDataTag = 0;
constexpr int kAbortTag = 1;

// MPI counts are int; larger messages travel in pieces, which both sides cut alike.
constexpr std::size_t kPieceBytes = std::size_t{1} << 30;

// Open MPI's shared memory takes 4096 bytes with its header at once, and makes longer messages wait until the
// receiver looks and fetches them. Two such waits cost more than a few messages: 16 KiB summed by 4 processes
// on 2 cores took 265 us, and 103 us in pieces that leave at once.
constexpr std::size_t kPromptPieceBytes = 4000;
constexpr std::size_t kPromptBytes = 32 * 1024;

std::size_t piece_bytes(std::size_t message_bytes) {
  return message_bytes <= kPromptBytes ? kPromptPieceBytes : kPieceBytes;
}

// A reply of a process that is running comes within microseconds; after this many looks (some 20 us) a
// waiting process offers its core to the others. On fewer cores than processes it would otherwise keep the
// peer it waits for from running: 8 KiB between 4 processes on 2 cores took 16 to 54 ms instead of 32 us.
constexpr int kLooksBeforeYield = 100;
// The clock and the abort notes are looked at every so many yields.
constexpr int kYieldsPerCheck = 32;

void check(int code, std::string_view what) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  throw MpiError(cat(what, ": ", std::string_view(text.data(), static_cast<std::size_t>(length))));
}

using AbortNote = std::array<char, 1024>;

// A group as MPI knows it, with the groups it was split from: who waits in one looks for the abort notes of
// all, on whichever thread.
class MpiGroup {
 public:
  /// Owns `comm`.
  MpiGroup(MPI_Comm comm, std::shared_ptr<MpiGroup> parent) : comm_(comm), parent_(std::move(parent)) {
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  ~MpiGroup() {
    // A broken group may have messages under way, with which it must not be freed.
    if (failure_.empty()) MPI_Comm_free(&comm_);
  }
  MpiGroup(const MpiGroup&) = delete;
  MpiGroup& operator=(const MpiGroup&) = delete;

  MPI_Comm comm() const { return comm_; }

  /// Why this group or one that it was split from is broken; empty when it is not.
  std::string failure() {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = read_note();
    if (failure_.empty() && parent_ != nullptr) failure_ = parent_->failure();
    return failure_;
  }

  /// Tells the others, short enough to leave at once; whether it arrives is not waited for. Only the first
  /// failure counts.
  void break_up(const std::string& failure, int process, int size) {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) return;  // whoever broke it tells the others
    failure_ = failure;
    std::copy_n(failure.begin(), std::min(failure.size(), note_.size() - 1), note_.begin());
    for (int p = 0; p < size; ++p) {
      if (p == process) continue;
      MPI_Request request = MPI_REQUEST_NULL;
      MPI_Isend(note_.data(), static_cast<int>(note_.size()), MPI_CHAR, p, kAbortTag, comm_, &request);
      if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
    }
  }

 private:
  std::string read_note() {
    int found = 0;
    MPI_Status status;
    check(MPI_Iprobe(MPI_ANY_SOURCE, kAbortTag, comm_, &found, &status), "MPI_Iprobe");
    if (found == 0) return "";
    AbortNote note{};
    check(MPI_Recv(note.data(), static_cast<int>(note.size()), MPI_CHAR, status.MPI_SOURCE, kAbortTag, comm_,
                   MPI_STATUS_IGNORE),
          "MPI_Recv");
    return note.data();
  }

  MPI_Comm comm_;
  std::shared_ptr<MpiGroup> parent_;
  std::mutex mutex_;
  std::string failure_;
  AbortNote note_{};
};

class MpiCommunicator final : public ExchangeCommunicator {
 public:
  MpiCommunicator(std::shared_ptr<MpiGroup> group, int process, int size, std::string axis,
                  std::shared_ptr<Ledger> ledger, std::chrono::milliseconds deadline)
      : ExchangeCommunicator(process, size, std::move(axis), std::move(ledger), deadline),
        group_(std::move(group)),
        comm_(group_->comm()) {}

  std::string_view backend() const override { return "mpi"; }

 private:
  // Messages of one direction that have been started.
  struct Started {
    std::vector<MPI_Request> requests;
    std::vector<int> peers;         // of each request
    std::vector<std::size_t> ends;  // requests up to the end of each message
    void clear() { requests.clear(), peers.clear(), ends.clear(); }
  };

  void start_send(int to, std::span<const std::byte> bytes) override {
    const std::size_t step = piece_bytes(bytes.size());
    for (std::size_t begin = 0; begin < bytes.size(); begin += step) {
      const auto piece = bytes.subspan(begin, std::min(step, bytes.size() - begin));
      MPI_Request request = MPI_REQUEST_NULL;
      check(MPI_Isend(piece.data(), static_cast<int>(piece.size()), MPI_BYTE, to, kDataTag, comm_, &request),
            "MPI_Isend");
      sends_.requests.push_back(request);
      sends_.peers.push_back(to);
    }
    sends_.ends.push_back(sends_.requests.size());
  }

  void start_receive(int from, std::span<std::byte> bytes) override {
    const std::size_t step = piece_bytes(bytes.size());
    for (std::size_t begin = 0; begin < bytes.size(); begin += step) {
      const auto piece = bytes.subspan(begin, std::min(step, bytes.size() - begin));
      MPI_Request request = MPI_REQUEST_NULL;
      check(
          MPI_Irecv(piece.data(), static_cast<int>(piece.size()), MPI_BYTE, from, kDataTag, comm_, &request),
          "MPI_Irecv");
      receives_.requests.push_back(request);
      receives_.peers.push_back(from);
    }
    receives_.ends.push_back(receives_.requests.size());
  }

  void await_receives_but(std::size_t last) override { await(receives_, last); }
  void await_sends() override { await(sends_, 0); }

  void await(Started& started, std::size_t last) {
    if (last >= started.ends.size()) return;
    const std::size_t awaited = started.ends[started.ends.size() - 1 - last];
    for (int looks = 1;; ++looks) {
      int done = 0;
      check(MPI_Testall(static_cast<int>(awaited), started.requests.data(), &done, MPI_STATUSES_IGNORE),
            "MPI_Testall");
      if (done != 0) break;
      const bool worked = work_while_waiting();
      if (!worked && looks < kLooksBeforeYield) continue;
      if (!worked) sched_yield();
      if (looks % kYieldsPerCheck != 0) continue;
      throw_if_aborted();
      if (Clock::now() > give_up())
        fail(silent_peer(started), cat("did not answer within ", deadline().count(), " ms"));
    }
    const auto forget = static_cast<std::ptrdiff_t>(awaited);
    started.requests.erase(started.requests.begin(), started.requests.begin() + forget);
    started.peers.erase(started.peers.begin(), started.peers.begin() + forget);
    started.ends.erase(started.ends.begin(), started.ends.end() - static_cast<std::ptrdiff_t>(last));
    for (std::size_t& end : started.ends) end -= awaited;
  }

  static int silent_peer(Started& started) {
    for (std::size_t i = 0; i < started.requests.size(); ++i) {
      int done = 0;
      check(MPI_Test(&started.requests[i], &done, MPI_STATUS_IGNORE), "MPI_Test");
      if (done == 0) return started.peers[i];
    }
    return started.peers.back();  // it answered just now, too late
  }

  void throw_if_aborted() {
    const std::string failure = group_->failure();
    if (!failure.empty()) throw PeerFailed(failure);
  }

  std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) override {
    const auto position = static_cast<int>(std::ranges::find(members, process()) - members.begin());
    MPI_Comm group = MPI_COMM_NULL;
    // MPI knows no deadline here, but everybody has just come out of the all_gather of the colours.
    check(MPI_Comm_split(comm_, members.front(), position, &group), "MPI_Comm_split");
    return std::make_unique<MpiCommunicator>(std::make_shared<MpiGroup>(group, group_), position,
                                             static_cast<int>(members.size()), std::move(axis),
                                             shared_ledger(), deadline());
  }

  void do_abort(std::string_view reason) override {
    group_->break_up(cat("process ", process(), " of ", size(), " aborted axis ", axis(), ": ", reason),
                     process(), size());
  }

  void do_let_go() override {
    // MPI lets go of receives that nobody has answered. One that is arriving cannot be stopped.
    for (MPI_Request& request : receives_.requests) {
      if (request != MPI_REQUEST_NULL) MPI_Cancel(&request);
    }
    for (Started* started : {&receives_, &sends_}) {
      for (MPI_Request& request : started->requests) {
        if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
      }
      started->clear();
    }
  }

  std::shared_ptr<MpiGroup> group_;
  MPI_Comm comm_;
  Started sends_;
  Started receives_;
};

}  // namespace

bool mpi_available() { return true; }

std::string mpi_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  check(MPI_Get_library_version(text.data(), &length), "MPI_Get_library_version");
  const std::string_view description(text.data(), static_cast<std::size_t>(length));
  return std::string(description.substr(0, description.find_first_of(",\n")));
}

MpiWorld::MpiWorld(std::chrono::milliseconds deadline)
    : deadline_(deadline), exceptions_in_flight_(std::uncaught_exceptions()) {
  int provided = 0;
  int already = 0;
  check(MPI_Initialized(&already), "MPI_Initialized");
  initialised_here_ = already == 0;
  // Messages between two processes take as long as with MPI_THREAD_SERIALIZED (Open MPI 4.1.4, 8 bytes to
  // 64 KiB).
  if (initialised_here_) {
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  } else {
    check(MPI_Query_thread(&provided), "MPI_Query_thread");
  }
  if (provided < MPI_THREAD_MULTIPLE) {
    throw MpiError(cat("MPI_Init_thread: found thread level ", provided, ", expected MPI_THREAD_MULTIPLE, ",
                       MPI_THREAD_MULTIPLE));
  }
  check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
}

MpiWorld::~MpiWorld() {
  if (initialised_here_ && std::uncaught_exceptions() == exceptions_in_flight_) MPI_Finalize();
}

std::unique_ptr<Communicator> MpiWorld::world() const {
  int process = 0;
  int size = 0;
  check(MPI_Comm_rank(MPI_COMM_WORLD, &process), "MPI_Comm_rank");
  check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  MPI_Comm own = MPI_COMM_NULL;  // messages of others in this program cannot be taken for ours
  check(MPI_Comm_dup(MPI_COMM_WORLD, &own), "MPI_Comm_dup");
  return std::make_unique<MpiCommunicator>(std::make_shared<MpiGroup>(own, nullptr), process, size, "world",
                                           std::make_shared<Ledger>(), deadline_);
}

void MpiWorld::abort(int exit_code) const {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace lowband
