#include "runtime/error.h"
#include "tests/cuda_on_host/block.h"
#include "tests/cuda_on_host/nccl_faults.h"
#include "tests/cuda_on_host/waits.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nccl.h>

namespace lowband {
namespace {

using cuda_on_host::NcclFault;

constexpr int kPolls = 2;  // how often a call or a transfer is not over yet

thread_local NcclFault fault = NcclFault::kNone;
thread_local std::string thread_error;
std::atomic<int> living = 0;
std::atomic<long> destroyed = 0, aborted = 0, in_progress = 0, unfinished = 0;

enum class Kind : std::uint8_t { kSend, kReceive, kBroadcast, kAllReduce, kReduceScatter, kAllGather };

struct Transfer {
  Kind kind;
  const std::byte* send;
  std::byte* receive;
  std::size_t count;
  ncclDataType_t dtype;
  int peer;  // or root
};

std::size_t bytes_of(ncclDataType_t dtype) {
  switch (dtype) {
    case ncclUint8:
      return 1;
    case ncclBfloat16:
      return 2;
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclFloat64:
      return 8;
  }
  return 0;
}

std::size_t at(int process) { return static_cast<std::size_t>(process); }

struct Message {
  const std::byte* bytes;
  std::size_t count;
  std::shared_ptr<bool> taken;
};

// A collective that not all processes have come to, or that is over.
struct Round {
  std::vector<std::optional<Transfer>> posts;
  int arrived = 0;
  int left = 0;
  bool over = false;
  bool broken = false;  // somebody left it: it never ends
};

// The processes that share an id.
struct Clique {
  explicit Clique(int size) : members(at(size), Member::kAway), messages(at(size) * at(size)) {}
  enum class Member : std::uint8_t { kAway, kHere, kFinalized, kGone };

  int size() const { return static_cast<int>(members.size()); }
  std::deque<Message>& between(int from, int to) { return messages[at(from) * members.size() + at(to)]; }
  void fail(std::string why) {
    if (error.empty()) error = std::move(why);
  }

  std::mutex mutex;
  std::vector<Member> members;
  std::vector<std::deque<Message>> messages;  // by sender, then receiver
  std::map<long, Round> rounds;
  std::string error;  // of the usage, for all
};

std::mutex registry_mutex;
std::map<std::string, std::weak_ptr<Clique>> registry;

template <class T>
void add(std::byte* sum, const std::byte* term, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, sum + i, sizeof a);
    std::memcpy(&b, term + i, sizeof b);
    a = static_cast<T>(a + b);
    std::memcpy(sum + i, &a, sizeof a);
  }
}

}  // namespace
}  // namespace lowband

struct ncclComm {
  std::shared_ptr<lowband::Clique> clique;
  int process = 0;
  bool ended = false;  // destroyed or aborted; the memory stays, so that a use after it is seen
  bool finalizing = false;
  bool joining = false;
  ncclResult_t error = ncclSuccess;
  std::string why;
  long calls = 0;
  long next_round = 0;
  int polls_left = 0;                // of the last call
  std::function<void()> at_success;  // what that call launches
  std::atomic<int> in_flight = 0;
  std::atomic<bool> dead = false;  // for launches: they end without a result
  std::atomic<bool> remote_error = false;
};

namespace lowband {
namespace {

std::mutex handles_mutex;
std::vector<std::unique_ptr<ncclComm>> handles;

ncclResult_t refuse(ncclComm* comm, std::string why, ncclResult_t code = ncclInvalidUsage) {
  thread_error = why;
  if (comm != nullptr) comm->why = std::move(why);
  return code;
}

// Sums go from the last process to the first: not the order of lowband's tree.
void run_round(Clique& clique, Round& round) {
  const int n = clique.size();
  const Transfer& first = *round.posts[0];
  for (int p = 1; p < n; ++p) {
    const Transfer& other = *round.posts[at(p)];
    if (other.kind != first.kind || other.count != first.count || other.dtype != first.dtype ||
        other.peer != first.peer) {
      clique.fail(cat("processes 0 and ", p, " are in collectives of kinds ", static_cast<int>(first.kind),
                      " and ", static_cast<int>(other.kind), ", with ", first.count, " and ", other.count,
                      " elements of types ", static_cast<int>(first.dtype), " and ",
                      static_cast<int>(other.dtype), ", roots ", first.peer, " and ", other.peer));
      return;
    }
  }
  const std::size_t bytes = first.count * bytes_of(first.dtype);
  const std::size_t sent = first.kind == Kind::kReduceScatter ? bytes * at(n) : bytes;
  std::vector<std::vector<std::byte>> inputs;
  for (int p = 0; p < n; ++p) {
    const std::byte* const send = round.posts[at(p)]->send;
    const bool is_read = first.kind != Kind::kBroadcast || p == first.peer;
    inputs.emplace_back(send, send + (is_read ? sent : 0));
  }
  if (first.kind == Kind::kBroadcast) {
    for (const auto& post : round.posts) std::memcpy(post->receive, inputs[at(first.peer)].data(), bytes);
  } else if (first.kind == Kind::kAllGather) {
    for (const auto& post : round.posts) {
      for (int p = 0; p < n; ++p) std::memcpy(post->receive + at(p) * bytes, inputs[at(p)].data(), bytes);
    }
  } else {
    std::vector<std::byte> sum = inputs.back();
    for (int p = n - 2; p >= 0; --p) {
      if (first.dtype == ncclFloat32) add<float>(sum.data(), inputs[at(p)].data(), sent);
      if (first.dtype == ncclFloat64) add<double>(sum.data(), inputs[at(p)].data(), sent);
      if (first.dtype == ncclInt64) add<std::uint64_t>(sum.data(), inputs[at(p)].data(), sent);
      if (first.dtype == ncclUint8) add<std::uint8_t>(sum.data(), inputs[at(p)].data(), sent);
    }
    for (int p = 0; p < n; ++p) {
      const std::size_t offset = first.kind == Kind::kReduceScatter ? at(p) * bytes : 0;
      std::memcpy(round.posts[at(p)]->receive, sum.data() + offset, bytes);
    }
  }
  round.over = true;
}

// What one call, or one group of them, puts on a stream.
class Launch {
 public:
  Launch(ncclComm* comm, std::vector<Transfer> transfers) : comm_(comm), transfers_(std::move(transfers)) {
    stalled_ = fault == NcclFault::kNeverStarts || fault == NcclFault::kRemoteError;
    if (fault == NcclFault::kRemoteError) comm->remote_error = true;
    ++comm_->in_flight;
  }

  bool over() {
    if (comm_->dead) return end();
    Clique& clique = *comm_->clique;
    const std::lock_guard lock(clique.mutex);
    if (stalled_ || !clique.error.empty()) return wait();
    const cuda_on_host::DeviceAccess access;
    if (!posted_) {
      post(clique);
      return wait();
    }
    bool all = true;
    for (std::size_t i = 0; i < transfers_.size(); ++i) {
      if (!over_[i]) over_[i] = settle(clique, i);
      all = all && over_[i];
    }
    if (!all || --polls_left_ > 0) return wait();
    return end();
  }

 private:
  static bool wait() {
    ++unfinished;
    return false;
  }
  bool end() {
    --comm_->in_flight;
    return true;
  }

  void post(Clique& clique) {
    posted_ = true;
    over_.resize(transfers_.size());
    taken_.resize(transfers_.size());
    rounds_.resize(transfers_.size());
    for (std::size_t i = 0; i < transfers_.size(); ++i) {
      const Transfer& transfer = transfers_[i];
      if (transfer.kind == Kind::kReceive) continue;
      if (transfer.kind == Kind::kSend) {
        taken_[i] = std::make_shared<bool>(false);
        clique.between(comm_->process, transfer.peer)
            .push_back({transfer.send, transfer.count * bytes_of(transfer.dtype), taken_[i]});
        continue;
      }
      rounds_[i] = comm_->next_round++;
      Round& round = clique.rounds[rounds_[i]];
      round.posts.resize(at(clique.size()));
      round.posts[at(comm_->process)] = transfer;
      if (++round.arrived == clique.size() && !round.broken) run_round(clique, round);
    }
  }

  bool settle(Clique& clique, std::size_t i) {
    const Transfer& transfer = transfers_[i];
    if (transfer.kind == Kind::kSend) return *taken_[i];
    if (transfer.kind == Kind::kReceive) {
      std::deque<Message>& messages = clique.between(transfer.peer, comm_->process);
      if (messages.empty()) return false;
      const Message message = messages.front();
      const std::size_t expected = transfer.count * bytes_of(transfer.dtype);
      if (message.count != expected) {
        clique.fail(cat("process ", transfer.peer, " sends ", message.count, " bytes to process ",
                        comm_->process, ", which receives ", expected));
        return false;
      }
      std::memcpy(transfer.receive, message.bytes, expected);
      *message.taken = true;
      messages.pop_front();
      return true;
    }
    const auto round = clique.rounds.find(rounds_[i]);
    if (!round->second.over) return false;
    if (++round->second.left == clique.size()) clique.rounds.erase(round);
    return true;
  }

  ncclComm* comm_;
  std::vector<Transfer> transfers_;
  bool stalled_ = false;
  bool posted_ = false;
  int polls_left_ = kPolls;
  std::vector<bool> over_;
  std::vector<std::shared_ptr<bool>> taken_;
  std::vector<long> rounds_;
};

struct Group {
  int depth = 0;
  ncclComm* comm = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Transfer> transfers;
  ncclResult_t error = ncclSuccess;
};
thread_local Group group;

// Every second call of a communicator goes on after it has returned.
ncclResult_t answer(ncclComm* comm, std::function<void()> launch) {
  if (++comm->calls % 2 == 0) {
    launch();
    return ncclSuccess;
  }
  comm->polls_left = kPolls;
  comm->at_success = std::move(launch);
  ++in_progress;
  return ncclInProgress;
}

ncclResult_t launch_group() {
  Group own = std::exchange(group, {});
  if (own.error != ncclSuccess) return own.error;
  if (own.comm == nullptr) return ncclSuccess;
  const auto launch = std::make_shared<Launch>(own.comm, std::move(own.transfers));
  return answer(own.comm, [stream = own.stream, launch] {
    cuda_on_host::enqueue_until(stream, [launch] { return launch->over(); });
  });
}

bool overlap(const std::byte* a, std::size_t a_bytes, const std::byte* b, std::size_t b_bytes) {
  return std::less<>()(a, b + b_bytes) && std::less<>()(b, a + a_bytes);
}

std::string what_is_wrong(const ncclComm& comm, const Transfer& transfer) {
  const std::size_t bytes = transfer.count * bytes_of(transfer.dtype);
  const std::size_t n = comm.clique->members.size();
  const std::size_t send_bytes = transfer.kind == Kind::kReduceScatter ? bytes * n : bytes;
  const std::size_t receive_bytes = transfer.kind == Kind::kAllGather ? bytes * n : bytes;
  const bool sends =
      transfer.kind != Kind::kReceive && (transfer.kind != Kind::kBroadcast || transfer.peer == comm.process);
  if (bytes == 0) return "";
  if (sends && !cuda_on_host::in_device_memory(transfer.send, send_bytes))
    return cat("the ", send_bytes, " bytes to send do not lie in device memory");
  if (transfer.kind != Kind::kSend && !cuda_on_host::in_device_memory(transfer.receive, receive_bytes))
    return cat("the ", receive_bytes, " bytes to receive do not lie in device memory");
  if (transfer.kind == Kind::kAllReduce || transfer.kind == Kind::kReduceScatter) {
    if (transfer.dtype == ncclBfloat16) return "the stand-in adds no bf16";
  }
  if (transfer.kind == Kind::kSend || transfer.kind == Kind::kReceive || !sends) return "";
  // In place means: the own part of the larger buffer.
  const std::byte* send = transfer.send;
  const std::byte* receive = transfer.receive;
  if (transfer.kind == Kind::kAllGather) receive += at(comm.process) * bytes;
  if (transfer.kind == Kind::kReduceScatter) send += at(comm.process) * bytes;
  if (send != receive && overlap(transfer.send, send_bytes, transfer.receive, receive_bytes))
    return "send and receive overlap, and not in place";
  return "";
}

ncclResult_t enter(const Transfer& transfer, ncclComm* comm, cudaStream_t stream) {
  std::string why;
  if (comm == nullptr || comm->ended) {
    why = "a transfer on a communicator that has ended";
  } else if (comm->finalizing) {
    why = "a transfer on a finalized communicator";
  } else if (comm->joining || comm->at_success) {
    why = "a transfer before the last call was polled to its end";
  } else if (transfer.peer < 0 || transfer.peer >= comm->clique->size()) {
    why = cat("found process ", transfer.peer, ", expected one of ", comm->clique->size());
  } else if (group.comm != nullptr && (group.comm != comm || group.stream != stream)) {
    why = "a group of transfers on two communicators or streams, which the stand-in does not know";
  } else {
    why = what_is_wrong(*comm, transfer);
  }
  if (!why.empty()) {
    const ncclResult_t result = refuse(comm, why);
    if (group.depth > 0) group.error = result;
    return result;
  }
  group.comm = comm;
  group.stream = stream;
  group.transfers.push_back(transfer);
  return group.depth > 0 ? ncclSuccess : launch_group();
}

// A process leaves: nothing of it is touched any more.
void leave(ncclComm* comm, Clique::Member how) {
  Clique& clique = *comm->clique;
  const std::lock_guard lock(clique.mutex);
  comm->dead = true;
  comm->ended = true;
  clique.members[at(comm->process)] = how;
  for (int p = 0; p < clique.size(); ++p) clique.between(comm->process, p).clear();
  for (auto& [number, round] : clique.rounds) {
    if (!round.over && round.posts[at(comm->process)]) round.broken = true;
  }
  --living;
}

}  // namespace

namespace cuda_on_host {

void set_nccl_fault(NcclFault what) { fault = what; }
int living_nccl_communicators() { return living; }
NcclCounts nccl_counts() { return {destroyed, aborted, in_progress, unfinished}; }

}  // namespace cuda_on_host
}  // namespace lowband

using lowband::cat;
using lowband::Clique;
using lowband::Kind;
using lowband::refuse;

ncclResult_t ncclGetVersion(int* version) {
  *version = 22809;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  constexpr const char* kTexts[] = {"no error",
                                    "unhandled cuda error",
                                    "unhandled system error",
                                    "internal error",
                                    "invalid argument",
                                    "invalid usage",
                                    "remote process exited or there was a network error",
                                    "NCCL operation in progress"};
  return kTexts[result];
}
const char* ncclGetLastError(ncclComm_t comm) {
  return comm != nullptr && !comm->why.empty() ? comm->why.c_str() : lowband::thread_error.c_str();
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<long> drawn = 0;
  const std::string text = cat("clique ", ++drawn);
  *id = {};
  std::memcpy(id->internal, text.data(), text.size());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int processes, ncclUniqueId id, int process,
                                    ncclConfig_t* config) {
  if (config->blocking != 0)
    return refuse(nullptr, cat("found blocking = ", config->blocking, ", the stand-in knows 0 alone"));
  if (process < 0 || process >= processes)
    return refuse(nullptr, cat("process ", process, " of ", processes), ncclInvalidArgument);
  const std::string name(id.internal, strnlen(id.internal, sizeof id.internal));
  if (!name.starts_with("clique ")) return refuse(nullptr, "an id that nobody drew");
  auto own = std::make_unique<ncclComm>();
  {
    const std::lock_guard lock(lowband::registry_mutex);
    own->clique = lowband::registry[name].lock();
    if (own->clique == nullptr) {
      own->clique = std::make_shared<Clique>(processes);
      lowband::registry[name] = own->clique;
    }
  }
  own->process = process;
  own->joining = true;
  {
    const std::lock_guard lock(own->clique->mutex);
    if (own->clique->size() != processes)
      return refuse(nullptr, cat("found ", processes, " processes, others said ", own->clique->size()));
    Clique::Member& place = own->clique->members[lowband::at(process)];
    if (place != Clique::Member::kAway) return refuse(nullptr, cat("process ", process, " comes twice"));
    if (lowband::fault != lowband::NcclFault::kNeverJoins) place = Clique::Member::kHere;
  }
  own->polls_left = lowband::kPolls;
  own->at_success = [] {};
  ++lowband::living;
  ++lowband::in_progress;
  *comm = own.get();
  const std::lock_guard lock(lowband::handles_mutex);
  lowband::handles.push_back(std::move(own));
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  if (comm == nullptr || comm->ended) return refuse(comm, "a communicator that has ended was asked");
  Clique& clique = *comm->clique;
  std::unique_lock lock(clique.mutex);
  const auto count = [&](Clique::Member what) { return std::ranges::count(clique.members, what); };
  *state = ncclSuccess;
  if (!clique.error.empty()) {
    *state = refuse(comm, clique.error);
  } else if (comm->remote_error) {
    *state = refuse(comm, "connection closed by remote peer", ncclRemoteError);
  } else if (comm->joining && count(Clique::Member::kAway) > 0) {
    *state = ncclInProgress;
  } else if (comm->finalizing && comm->in_flight == 0 && count(Clique::Member::kGone) > 0) {
    *state = refuse(comm, "a peer has aborted", ncclRemoteError);
  } else if (comm->finalizing && (comm->in_flight > 0 || count(Clique::Member::kFinalized) < clique.size())) {
    *state = ncclInProgress;
  } else if (comm->at_success) {
    if (--comm->polls_left > 0) {
      *state = ncclInProgress;
    } else {
      comm->joining = false;
      lock.unlock();  // a stream that moves takes the two in the other order
      std::exchange(comm->at_success, nullptr)();
    }
  }
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm == nullptr || comm->ended || comm->finalizing) return refuse(comm, "finalized after its end");
  if (comm->joining || comm->at_success)
    return refuse(comm, "finalized before the last call was polled to its end");
  const std::lock_guard lock(comm->clique->mutex);
  for (int p = 0; p < comm->clique->size(); ++p) {
    if (comm->in_flight == 0 && !comm->clique->between(p, comm->process).empty())
      return refuse(comm, cat("finalized with a message of process ", p, " that nobody receives"));
  }
  comm->finalizing = true;
  comm->clique->members[lowband::at(comm->process)] = Clique::Member::kFinalized;
  ++lowband::in_progress;
  return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (comm == nullptr || comm->ended) return refuse(comm, "destroyed after its end");
  if (!comm->finalizing || comm->in_flight > 0)
    return refuse(comm, "a communicator that does not block is destroyed after it was finalized");
  lowband::leave(comm, Clique::Member::kFinalized);
  ++lowband::destroyed;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (comm == nullptr || comm->ended) return refuse(comm, "aborted after its end");
  lowband::leave(comm, Clique::Member::kGone);
  ++lowband::aborted;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++lowband::group.depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (lowband::group.depth == 0) return refuse(nullptr, "a group ends that was not begun");
  return --lowband::group.depth > 0 ? ncclSuccess : lowband::launch_group();
}

namespace {

ncclResult_t enter(Kind kind, const void* send, void* receive, std::size_t count, ncclDataType_t dtype,
                   int peer, ncclComm_t comm, cudaStream_t stream) {
  return lowband::enter(
      {kind, static_cast<const std::byte*>(send), static_cast<std::byte*>(receive), count, dtype, peer}, comm,
      stream);
}

}  // namespace

ncclResult_t ncclSend(const void* send, std::size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return enter(Kind::kSend, send, nullptr, count, dtype, peer, comm, stream);
}
ncclResult_t ncclRecv(void* receive, std::size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return enter(Kind::kReceive, nullptr, receive, count, dtype, peer, comm, stream);
}
ncclResult_t ncclBroadcast(const void* send, void* receive, std::size_t count, ncclDataType_t dtype, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  return enter(Kind::kBroadcast, send, receive, count, dtype, root, comm, stream);
}
ncclResult_t ncclAllReduce(const void* send, void* receive, std::size_t count, ncclDataType_t dtype,
                           ncclRedOp_t /*sum*/, ncclComm_t comm, cudaStream_t stream) {
  return enter(Kind::kAllReduce, send, receive, count, dtype, 0, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* send, void* receive, std::size_t receive_count,
                               ncclDataType_t dtype, ncclRedOp_t /*sum*/, ncclComm_t comm,
                               cudaStream_t stream) {
  return enter(Kind::kReduceScatter, send, receive, receive_count, dtype, 0, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* receive, std::size_t send_count, ncclDataType_t dtype,
                           ncclComm_t comm, cudaStream_t stream) {
  return enter(Kind::kAllGather, send, receive, send_count, dtype, 0, comm, stream);
}
