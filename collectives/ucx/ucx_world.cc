#include "collectives/ucx/ucx_world.h"

#include "collectives/exchange_communicator.h"
#include "collectives/rendezvous/peer_watch.h"

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include <poll.h>
#include <sched.h>
#include <ucp/api/ucp.h>
#include <ucs/config/global_opts.h>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// A reply of a process that is running comes within microseconds. After kLookTime a waiting thread offers its
// core to others between two looks, and after kYieldTime it sleeps until the progress thread has news, so
// that whoever computes on the same core is not held up.
constexpr microseconds kLookTime{20};
constexpr microseconds kYieldTime{200};
// While threads wait and look for themselves, the progress thread looks this often whether they still do. It
// also bounds how late a sleeper sees its deadline.
constexpr milliseconds kNap{1};
// UCX says when something comes in, but not when the memory of a peer that was full has room again: as long
// as threads wait, the progress thread looks at least every kNap.
constexpr milliseconds kLongestSleep{100};

// The watch hears of a process that died within milliseconds.
constexpr milliseconds kVerdict{500};

// A broken call waits this long for what is under way.
constexpr milliseconds kGrace{100};

// Unless the environment says otherwise. InfiniBand where there is any, shared memory on one host, else TCP;
// UCX picks the best of these for a pair of processes. TCP segments of 64 instead of 8 KiB let messages up to
// that size leave without asking first: all_reduce of 8 to 32 KiB took 80 instead of 210 us (2 processes on
// one core, loopback). UCX 1.13.1 takes the options of transports from the environment alone: in a ucp_config
// they change nothing.
struct Choice {
  const char* variable;
  const char* value;
};
constexpr Choice kChoices[] = {
    {"UCX_TLS", "self,sm,ib,tcp"}, {"UCX_TCP_TX_SEG_SIZE", "64k"}, {"UCX_TCP_RX_SEG_SIZE", "64k"}};

void check(ucs_status_t status, std::string_view what) {
  if (status != UCS_OK) throw UcxError(cat(what, ": ", ucs_status_string(status)));
}

// A 64-bit tag: 1 bit says what it is, 15 bits the sender (process of the job), 48 bits the group. A group
// has a number that no other group of the job ever gets, so that nothing of a broken group can be taken for a
// message of another.
constexpr std::uint64_t kAbort = std::uint64_t{1} << 63;
constexpr int kGroupBits = 48;
constexpr std::uint64_t kGroupMask = (std::uint64_t{1} << kGroupBits) - 1;
constexpr std::uint64_t kWholeTag = ~std::uint64_t{0};
constexpr int kMostProcesses = 1 << 15;
// Of a group's number: 15 bits say which process gave it, so 33 are left to count.
constexpr int kCountBits = 33;
constexpr std::uint64_t kWorldGroup = 0;

std::uint64_t tag_of(int sender, std::uint64_t group) {
  return static_cast<std::uint64_t>(sender) << kGroupBits | group;
}

// Of a reason that is passed on.
constexpr std::size_t kMostNoteBytes = 1024;

}  // namespace

// One worker with a connection to every process. `mutex` guards all of it: a worker takes one thread at a
// time.
struct UcxTransport {
  // UCX's own lines go to standard output. What fails while it starts is worth one; afterwards every failure
  // comes back as a status, and what is left of a broken group is none.
  static void log_at(ucs_log_level_t level) {
    if (std::getenv("UCX_LOG_LEVEL") == nullptr) ucs_global_opts.log_component.log_level = level;
  }

  // Once, before this or any other thread looks for a variable on behalf of a world: what setenv moves, a
  // getenv beside it may still be reading.
  static void choose_transports() {
    static std::once_flag chosen;
    std::call_once(chosen, [] {
      for (const auto& [variable, value] : kChoices) setenv(variable, value, 0);  // 0: what is there stays
    });
  }

  explicit UcxTransport(Rendezvous& rendezvous) : process(rendezvous.process()), size(rendezvous.size()) {
    choose_transports();
    log_at(UCS_LOG_LEVEL_ERROR);
    open_context();
    connect(rendezvous);
    log_at(UCS_LOG_LEVEL_FATAL);
    watch.emplace(rendezvous, [this](int who, const std::string& what) { lose(who, what); });
    progress_thread = std::jthread([this] { progress_forever(); });
  }

  ~UcxTransport() {
    {
      const std::lock_guard lock(mutex);
      ending = true;
      progress_wanted.notify_all();
      ucp_worker_signal(worker);
    }
    if (progress_thread.joinable()) progress_thread.join();
    watch.reset();
    if (worker != nullptr) ucp_worker_destroy(worker);  // with all its connections
    if (context != nullptr) ucp_cleanup(context);
  }

  void open_context() {
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
    const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> owner(config, ucp_config_release);
    ucp_params_t parameters{};
    parameters.field_mask =
        UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
    parameters.features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP;
    parameters.estimated_num_eps = static_cast<std::size_t>(size);
    parameters.mt_workers_shared = 0;
    check(ucp_init(&parameters, config, &context), "ucp_init");

    ucp_worker_params_t worker_parameters{};
    worker_parameters.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker_parameters.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    check(ucp_worker_create(context, &worker_parameters, &worker), "ucp_worker_create");
    check(ucp_worker_get_efd(worker, &event_descriptor), "ucp_worker_get_efd");
  }

  void connect(Rendezvous& rendezvous) {
    ucp_address_t* own = nullptr;
    std::size_t own_bytes = 0;
    check(ucp_worker_get_address(worker, &own, &own_bytes), "ucp_worker_get_address");
    const std::string own_address(reinterpret_cast<const char*>(own), own_bytes);
    ucp_worker_release_address(worker, own);
    const std::vector<std::string> addresses = rendezvous.all_gather(own_address);

    endpoints.resize(addresses.size(), nullptr);
    for (std::size_t p = 0; p < addresses.size(); ++p) {
      if (static_cast<int>(p) == process) continue;
      ucp_ep_params_t parameters{};
      parameters.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                              UCP_EP_PARAM_FIELD_ERR_HANDLER;
      parameters.address = reinterpret_cast<const ucp_address_t*>(addresses[p].data());
      // Mode PEER would take shared memory away (UCX 1.13.1); the watch sees who dies.
      parameters.err_mode = UCP_ERR_HANDLING_MODE_NONE;
      parameters.err_handler.cb = [](void*, ucp_ep_h, ucs_status_t) {};  // its requests end with the error
      check(ucp_ep_create(worker, &parameters, &endpoints[p]), cat("ucp_ep_create, process ", p));
    }
  }

  // ---- called with the mutex held

  // Nothing moves any more after a loss: the calls that it breaks let go of their buffers, which UCX cannot
  // be made to forget.
  void progress() {
    while (lost_process < 0 && ucp_worker_progress(worker) != 0) {
    }
  }

  // ---- the progress thread

  // Lets messages come in while no thread waits for any, and wakes those that sleep. As long as some thread
  // looks for itself there is nothing to do.
  void progress_forever() {
    std::unique_lock lock(mutex);
    while (!ending) {
      if (looking > 0) {
        progress_wanted.wait_for(lock, kNap);
        continue;
      }
      if (lost_process >= 0) {
        progress_wanted.wait(lock, [&] { return ending; });
        return;
      }
      progress();
      news.notify_all();
      if (ucp_worker_arm(worker) != UCS_OK) continue;  // something has come since
      const milliseconds patience = sleeping > 0 ? kNap : kLongestSleep;
      lock.unlock();
      pollfd descriptor{.fd = event_descriptor, .events = POLLIN, .revents = 0};
      poll(&descriptor, 1, static_cast<int>(patience.count()));
      lock.lock();
    }
  }

  // ---- losses

  void lose(int who, const std::string& what) {
    const std::lock_guard lock(mutex);
    lose_locked(who, what);
  }
  void lose_locked(int who, const std::string& what) {
    if (lost_process >= 0) return;
    lost_process = who;
    loss = what;
    news.notify_all();
    ucp_worker_signal(worker);
  }

  int process;
  int size;
  std::mutex mutex;
  ucp_context_h context = nullptr;
  ucp_worker_h worker = nullptr;
  int event_descriptor = -1;
  std::vector<ucp_ep_h> endpoints;              // by process; none for this one
  std::uint64_t groups_made = 0;                // by this process
  std::deque<std::string> notes;                // that leave or have left
  std::map<std::uint64_t, std::string> broken;  // why, by group; empty where it is not

  int lost_process = -1;  // the first
  std::string loss;       // what happened to it

  int looking = 0;   // threads that wait and progress the worker themselves
  int sleeping = 0;  // threads that wait for news
  bool ending = false;
  std::condition_variable news;             // for sleeping threads
  std::condition_variable progress_wanted;  // for the progress thread

  std::optional<PeerWatch> watch;
  std::jthread progress_thread;
};

namespace {

class UcxCommunicator final : public ExchangeCommunicator {
 public:
  /// `members`: processes of the job, by process of this group.
  /// `lineage`: the numbers of this group, of the one it was split from, and so on.
  UcxCommunicator(std::shared_ptr<UcxTransport> transport, std::vector<std::uint64_t> lineage,
                  std::vector<int> members, int process, std::string axis, std::shared_ptr<Ledger> ledger,
                  std::chrono::milliseconds deadline)
      : ExchangeCommunicator(process, static_cast<int>(members.size()), std::move(axis), std::move(ledger),
                             deadline),
        transport_(std::move(transport)),
        lineage_(std::move(lineage)),
        group_(lineage_.front()),
        members_(std::move(members)) {}

  std::string_view backend() const override { return "ucx"; }

 private:
  // A message that has been started. Without a request it was over at once.
  struct Message {
    void* request;
    int peer;
  };
  // Messages of one direction; those before `first` are over, those before `awaited` are waited for.
  struct Started {
    std::vector<Message> messages;
    std::size_t first = 0;
    std::size_t awaited = 0;
  };

  void start_send(int to, std::span<const std::byte> bytes) override {
    const std::lock_guard lock(transport_->mutex);
    const ucp_request_param_t parameters{};
    start(sends_, to,
          ucp_tag_send_nbx(transport_->endpoints[world_process(to)], bytes.data(), bytes.size(),
                           tag_of(transport_->process, group_), &parameters));
  }

  void start_receive(int from, std::span<std::byte> bytes) override {
    const std::lock_guard lock(transport_->mutex);
    const ucp_request_param_t parameters{};
    start(receives_, from,
          ucp_tag_recv_nbx(transport_->worker, bytes.data(), bytes.size(), tag_of(members_[at(from)], group_),
                           kWholeTag, &parameters));
  }

  void start(Started& started, int peer, ucs_status_ptr_t request) {
    if (UCS_PTR_IS_ERR(request)) fail_message(peer, UCS_PTR_STATUS(request));
    started.messages.push_back({request, peer});
  }

  // The mutex is held. UCX says that a peer cannot be reached, also when it only ended because of another;
  // the watch knows who was first.
  [[noreturn]] void fail_message(int peer, ucs_status_t status) const {
    std::unique_lock lock(transport_->mutex, std::adopt_lock);
    const bool known =
        transport_->news.wait_for(lock, kVerdict, [&] { return transport_->lost_process >= 0; });
    lock.release();
    if (known) throw_lost();
    fail(peer, cat("cannot be reached: ", ucs_status_string(status)));
  }

  void await_receives_but(std::size_t last) override { await(receives_, last); }
  void await_sends() override { await(sends_, 0); }

  void await(Started& started, std::size_t last) {
    std::unique_lock lock(transport_->mutex);
    if (transport_->lost_process >= 0) throw_lost();
    started.awaited = started.messages.size() - std::min(last, started.messages.size());
    if (!over(started) && !look(started, lock)) sleep(started, lock);
    started.messages.erase(started.messages.begin(),
                           started.messages.begin() + static_cast<std::ptrdiff_t>(started.first));
    started.first = 0;
  }

  // Counts a waiting thread.
  class Counted {
   public:
    explicit Counted(int& threads) : threads_(threads) { ++threads_; }
    ~Counted() { --threads_; }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;

   private:
    int& threads_;
  };

  // Waits by looking, then by yielding; false when that took long enough.
  bool look(Started& started, std::unique_lock<std::mutex>& lock) {
    const Counted counted(transport_->looking);
    const Clock::time_point begin = Clock::now();
    for (;;) {
      transport_->progress();
      if (over(started)) return true;
      lock.unlock();
      const bool worked = work_while_waiting();
      lock.lock();
      const Clock::duration waited = Clock::now() - begin;
      if (waited < kLookTime) continue;
      throw_if_broken();
      if (worked) continue;
      if (waited >= kYieldTime) return false;
      lock.unlock();
      sched_yield();
      lock.lock();
    }
  }

  void sleep(Started& started, std::unique_lock<std::mutex>& lock) {
    const Counted counted(transport_->sleeping);
    transport_->progress_wanted.notify_all();
    const bool in_time = transport_->news.wait_until(lock, give_up(), [&] {
      if (over(started)) return true;
      throw_if_broken();
      return false;
    });
    if (!in_time) {
      fail(started.messages[started.first].peer, cat("did not answer within ", deadline().count(), " ms"));
    }
  }

  // Whether all messages are over.
  bool over(Started& started) const {
    for (; started.first < started.awaited; ++started.first) {
      const auto [request, peer] = started.messages[started.first];
      if (request == nullptr) continue;
      const ucs_status_t status = ucp_request_check_status(request);
      if (status == UCS_INPROGRESS) return false;
      if (status != UCS_OK) fail_message(peer, status);
      ucp_request_free(request);
    }
    return true;
  }

  void throw_if_broken() {
    if (transport_->lost_process >= 0) throw_lost();
    for (const std::uint64_t group : lineage_) {
      std::string& failure = transport_->broken[group];
      if (failure.empty()) failure = take_note(group);
      if (failure.empty()) continue;
      told_ = true;  // whoever broke it tells the others
      throw PeerFailed(failure);
    }
  }

  [[noreturn]] void throw_lost() const {
    const auto member = std::ranges::find(members_, transport_->lost_process);
    if (member == members_.end()) {
      throw PeerFailed(cat("process ", transport_->lost_process, " of ", transport_->size, " of the job ",
                           transport_->loss));
    }
    fail(static_cast<int>(member - members_.begin()), transport_->loss);
  }

  // Why another process broke `group`, if one did.
  std::string take_note(std::uint64_t group) {
    ucp_tag_recv_info_t info{};
    if (ucp_tag_probe_nb(transport_->worker, kAbort | group, kAbort | kGroupMask, 0, &info) == nullptr)
      return "";
    std::string note(info.length, '\0');
    const ucp_request_param_t parameters{};
    void* const request = ucp_tag_recv_nbx(transport_->worker, note.data(), note.size(), info.sender_tag,
                                           kWholeTag, &parameters);
    if (UCS_PTR_IS_ERR(request)) return cat("a process aborted axis ", axis());
    if (request == nullptr) return note;
    while (transport_->lost_process < 0 && ucp_request_check_status(request) == UCS_INPROGRESS) {
      transport_->progress();  // it is here already
    }
    ucp_request_free(request);
    return note;
  }

  // The first member numbers the new group and tells the others.
  std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) override {
    std::uint64_t group = 0;
    const std::span<std::byte> bytes = std::as_writable_bytes(std::span(&group, 1));
    if (process() == members.front()) {
      group = next_group();
      for (const int member : members.subspan(1)) start_send(member, bytes);
      await_sends();
    } else {
      start_receive(members.front(), bytes);
      await_receives_but(0);
    }
    std::vector<int> world_members;
    for (const int member : members) world_members.push_back(members_[at(member)]);
    const auto position = static_cast<int>(std::ranges::find(members, process()) - members.begin());
    std::vector<std::uint64_t> lineage{group};
    lineage.insert(lineage.end(), lineage_.begin(), lineage_.end());
    return std::make_unique<UcxCommunicator>(transport_, std::move(lineage), std::move(world_members),
                                             position, std::move(axis), shared_ledger(), deadline());
  }

  std::uint64_t next_group() {
    const std::lock_guard lock(transport_->mutex);
    return static_cast<std::uint64_t>(transport_->process) << kCountBits | ++transport_->groups_made;
  }

  void do_abort(std::string_view reason) override {
    const std::lock_guard lock(transport_->mutex);
    // Of a loss everybody hears by the watch.
    const std::string failure =
        cat("process ", process(), " of ", size(), " aborted axis ", axis(), ": ", reason)
            .substr(0, kMostNoteBytes);
    if (!told_ && transport_->lost_process < 0) send_abort_notes(failure);
    told_ = true;
    if (transport_->broken[group_].empty()) transport_->broken[group_] = failure;
    transport_->news.notify_all();
  }

  // UCX gives up receives that nobody has answered, and nothing else. What is under way with a peer that runs
  // is over soon. After that the buffers may go, so should UCX still hold one, it must not move any more.
  void do_let_go() override {
    const std::lock_guard lock(transport_->mutex);
    for (std::size_t i = receives_.first; i < receives_.messages.size(); ++i) {
      void* const request = receives_.messages[i].request;
      if (request != nullptr) ucp_request_cancel(transport_->worker, request);
    }
    const Clock::time_point stop = Clock::now() + kGrace;
    const auto settle = [&](Started& started) {
      for (; started.first < started.messages.size(); ++started.first) {
        const auto [request, peer] = started.messages[started.first];
        if (request == nullptr) continue;
        while (ucp_request_check_status(request) == UCS_INPROGRESS) {
          transport_->progress();
          if (transport_->lost_process < 0 && Clock::now() > stop) {
            transport_->lose_locked(members_[at(peer)],
                                    cat("left a message half way when axis ", axis(), " broke"));
          }
          if (transport_->lost_process >= 0) break;
        }
        ucp_request_free(request);
      }
      started.messages.clear();
      started.first = 0;
    };
    settle(receives_);
    settle(sends_);
  }

  // Whether they arrive is not waited for.
  void send_abort_notes(const std::string& failure) {
    const std::string& note = transport_->notes.emplace_back(failure);
    const ucp_request_param_t parameters{};
    for (int p = 0; p < size(); ++p) {
      if (p == process()) continue;
      void* const request =
          ucp_tag_send_nbx(transport_->endpoints[world_process(p)], note.data(), note.size(),
                           kAbort | tag_of(transport_->process, group_), &parameters);
      if (request != nullptr && !UCS_PTR_IS_ERR(request)) ucp_request_free(request);
    }
  }

  std::size_t world_process(int process_of_group) const { return at(members_[at(process_of_group)]); }
  static std::size_t at(int process) { return static_cast<std::size_t>(process); }

  std::shared_ptr<UcxTransport> transport_;
  std::vector<std::uint64_t> lineage_;
  std::uint64_t group_;
  std::vector<int> members_;
  Started sends_;
  Started receives_;
  bool told_ = false;  // the others know that this group is broken
};

}  // namespace

bool ucx_available() { return true; }

std::string ucx_version() { return cat("UCX ", ucp_get_version_string()); }

UcxWorld::UcxWorld(Rendezvous& rendezvous, std::chrono::milliseconds deadline)
    : deadline_(deadline), exceptions_in_flight_(std::uncaught_exceptions()) {
  LB_EXPECTS(rendezvous.size() <= kMostProcesses, "UCX: found ", rendezvous.size(),
             " processes, expected at most ", kMostProcesses);
  transport_ = std::make_shared<UcxTransport>(rendezvous);
}

UcxWorld::~UcxWorld() {
  if (std::uncaught_exceptions() == exceptions_in_flight_) transport_->watch->leave(deadline_);
}

std::unique_ptr<Communicator> UcxWorld::world() const {
  std::vector<int> everyone(static_cast<std::size_t>(transport_->size));
  std::iota(everyone.begin(), everyone.end(), 0);
  return std::make_unique<UcxCommunicator>(transport_, std::vector{kWorldGroup}, std::move(everyone),
                                           transport_->process, "world", std::make_shared<Ledger>(),
                                           deadline_);
}

void UcxWorld::tell_failure(std::string_view reason) const { transport_->watch->tell_failure(reason); }

void UcxWorld::abort(int exit_code, std::string_view reason) const {
  tell_failure(reason);
  std::_Exit(exit_code);
}

}  // namespace lowband
