#include "collectives/local/local_world.h"

#include "collectives/exchange_communicator.h"
#include "runtime/cpu.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

namespace lowband {
namespace {

// What the threads of one world share. `mutex` guards it and the groups in it; only the copying of message
// bytes happens outside. A process waits on its own condition, so that a message wakes one thread.
struct LocalWorld {
  explicit LocalWorld(int processes) : wake(static_cast<std::size_t>(processes)) {}

  std::mutex mutex;
  std::vector<std::condition_variable> wake;  // by process of the world
  std::string failure;                        // why every group is broken
};

// A group of the world as its members see it, by process of the group.
struct LocalGroup {
  LocalGroup(std::shared_ptr<LocalWorld> world_, std::shared_ptr<LocalGroup> parent_,
             std::vector<int> members_)
      : world(std::move(world_)),
        parent(std::move(parent_)),
        members(std::move(members_)),
        mail(members.size(), std::vector<std::deque<std::span<const std::byte>>>(members.size())),
        unread(members.size(), 0),
        left(members.size(), false) {}

  /// Why this group or one that it was split from is broken; empty when it is not.
  const std::string& broken() const {
    return failure.empty() && parent != nullptr ? parent->broken() : failure;
  }

  std::shared_ptr<LocalWorld> world;
  std::shared_ptr<LocalGroup> parent;
  std::vector<int> members;  // as processes of the world
  /// mail[to][from]: sent and not yet taken, oldest first. The bytes stay with the sender; the receiver
  /// copies.
  std::vector<std::vector<std::deque<std::span<const std::byte>>>> mail;
  std::vector<int> unread;  // by sender: messages whose bytes are still needed
  std::vector<char> left;   // whose communicator is gone
  std::string failure;      // of this group alone

  // Groups being made from this one, until every member has taken it: by number of the split and first
  // member.
  struct Child {
    std::shared_ptr<LocalGroup> group;
    std::size_t taken = 0;
  };
  std::map<std::pair<Index, int>, Child> children;
};

class LocalCommunicator final : public ExchangeCommunicator {
 public:
  LocalCommunicator(std::shared_ptr<LocalGroup> group, int process, std::string axis,
                    std::shared_ptr<Ledger> ledger, std::chrono::milliseconds deadline)
      : ExchangeCommunicator(process, static_cast<int>(group->members.size()), std::move(axis),
                             std::move(ledger), deadline),
        group_(std::move(group)) {}

  ~LocalCommunicator() override {
    // A process that fails is reported by its failure, which breaks the world, and not as one that left.
    if (std::uncaught_exceptions() > 0) return;
    const std::lock_guard lock(group_->world->mutex);
    group_->left[own()] = true;
    wake_all();
  }

  std::string_view backend() const override { return "local"; }

 private:
  struct Receive {
    int from;
    std::span<std::byte> bytes;
  };

  void start_send(int to, std::span<const std::byte> bytes) override {
    const std::lock_guard lock(group_->world->mutex);
    group_->mail[static_cast<std::size_t>(to)][own()].push_back(bytes);
    ++group_->unread[own()];
    wake(to);
  }

  void start_receive(int from, std::span<std::byte> bytes) override { receives_.push_back({from, bytes}); }

  void await_receives_but(std::size_t last) override {
    for (; receives_.size() > last; receives_.pop_front()) {
      const Receive& receive = receives_.front();
      const auto from = static_cast<std::size_t>(receive.from);
      auto& inbox = group_->mail[own()][from];

      std::unique_lock lock(group_->world->mutex);
      wait(lock, receive.from, [&] { return !inbox.empty(); });
      const std::span<const std::byte> message = inbox.front();
      inbox.pop_front();
      if (message.size() == receive.bytes.size()) {
        lock.unlock();
        std::memcpy(receive.bytes.data(), message.data(), message.size());
        lock.lock();
      }
      --group_->unread[from];
      wake(receive.from);
      if (message.size() != receive.bytes.size()) {
        fail(receive.from, cat("sent ", message.size(), " bytes, expected ", receive.bytes.size()));
      }
    }
  }

  void await_sends() override {
    std::unique_lock lock(group_->world->mutex);
    for (int to = 0; to < size(); ++to) {
      const auto& outbox = group_->mail[static_cast<std::size_t>(to)][own()];
      wait(lock, to, [&] { return outbox.empty(); });
    }
    // What has been taken is being copied.
    group_->world->wake[world_process(process())].wait(lock, [&] { return group_->unread[own()] == 0; });
  }

  std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) override {
    const auto self = std::ranges::find(members, process());
    std::shared_ptr<LocalGroup> group;
    {
      const std::lock_guard lock(group_->world->mutex);
      const auto child = group_->children.try_emplace({splits_++, members.front()}).first;
      if (child->second.group == nullptr) {
        std::vector<int> world_members;
        for (const int member : members)
          world_members.push_back(group_->members[static_cast<std::size_t>(member)]);
        child->second.group = std::make_shared<LocalGroup>(group_->world, group_, std::move(world_members));
      }
      group = child->second.group;
      if (++child->second.taken == members.size()) group_->children.erase(child);
    }
    return std::make_unique<LocalCommunicator>(std::move(group), static_cast<int>(self - members.begin()),
                                               std::move(axis), shared_ledger(), deadline());
  }

  void do_abort(std::string_view reason) override {
    const std::lock_guard lock(group_->world->mutex);
    if (!group_->failure.empty()) return;
    group_->failure = cat("process ", process(), " of ", size(), " aborted axis ", axis(), ": ", reason);
    wake_all();
  }

  void do_let_go() override {
    receives_.clear();
    std::unique_lock lock(group_->world->mutex);
    for (auto& inboxes : group_->mail) {
      group_->unread[own()] -= static_cast<int>(inboxes[own()].size());
      inboxes[own()].clear();
    }
    wake_all();
    // A peer may be copying out of this process's buffers at this moment.
    group_->world->wake[world_process(process())].wait(lock, [&] { return group_->unread[own()] == 0; });
  }

  // Waits until `done`, which is up to `peer`; throws when it cannot come about any more. A call for which
  // everything is there ends well even when the group was aborted after it; in a failed world nothing does.
  template <class Done>
  void wait(std::unique_lock<std::mutex>& lock, int peer, Done done) {
    const std::string& world_failure = group_->world->failure;
    const auto& peer_left = group_->left[static_cast<std::size_t>(peer)];
    while (!done() && world_failure.empty()) {
      lock.unlock();
      const bool worked = work_while_waiting();
      lock.lock();
      if (!worked) break;
    }
    const bool woken = group_->world->wake[world_process(process())].wait_until(lock, give_up(), [&] {
      return !world_failure.empty() || done() || !group_->broken().empty() || peer_left;
    });
    if (!world_failure.empty()) throw PeerFailed(world_failure);
    if (done()) return;
    if (!group_->broken().empty()) throw PeerFailed(group_->broken());
    if (!woken) fail(peer, cat("did not answer within ", deadline().count(), " ms"));
    fail(peer, "has left the group");
  }

  void wake(int process_of_group) { group_->world->wake[world_process(process_of_group)].notify_all(); }
  void wake_all() {
    for (int p = 0; p < size(); ++p) wake(p);
  }
  std::size_t own() const { return static_cast<std::size_t>(process()); }
  std::size_t world_process(int process_of_group) const {
    return static_cast<std::size_t>(group_->members[static_cast<std::size_t>(process_of_group)]);
  }

  std::shared_ptr<LocalGroup> group_;
  std::deque<Receive> receives_;
  Index splits_ = 0;
};

// Throws `failure` again with `prefix` before its message, as the same lowband type.
[[noreturn]] void rethrow_with_prefix(const std::exception_ptr& failure, const std::string& prefix) {
  try {
    std::rethrow_exception(failure);
  } catch (const BudgetExceeded& error) {
    throw BudgetExceeded(prefix + error.what());
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(prefix + error.what());
  } catch (const CollectiveMismatch& error) {
    throw CollectiveMismatch(prefix + error.what());
  } catch (const PeerFailed& error) {
    throw PeerFailed(prefix + error.what());
  } catch (const IoError& error) {
    throw IoError(prefix + error.what());
  } catch (const CudaError& error) {
    throw CudaError(prefix + error.what());
  } catch (const std::exception& error) {
    throw Error(prefix + error.what());
  }
}

// How the processes of a run ended.
struct Outcome {
  explicit Outcome(int processes) : running(processes) {}

  std::mutex mutex;
  std::condition_variable ended;
  int running;
  std::exception_ptr first_failure;
  int failed_process = 0;
};

void break_world(LocalWorld& world, const std::string& reason) {
  const std::lock_guard lock(world.mutex);
  if (world.failure.empty()) world.failure = reason;
  for (std::condition_variable& condition : world.wake) condition.notify_all();
}

}  // namespace

void run_world(int processes, const std::function<void(Communicator&)>& body,
               const LocalWorldOptions& options) {
  LB_EXPECTS(processes >= 1, "run_world: ", processes, " processes, expected at least one");
  const auto world = std::make_shared<LocalWorld>(processes);
  std::vector<int> everyone(static_cast<std::size_t>(processes));
  std::iota(everyone.begin(), everyone.end(), 0);
  const auto group = std::make_shared<LocalGroup>(world, nullptr, everyone);

  Outcome outcome(processes);
  const auto live = [&](int process) {
    try {
      set_compute_threads(1);
      LocalCommunicator communicator(group, process, "world", std::make_shared<Ledger>(), options.deadline);
      body(communicator);
    } catch (const std::exception& failure) {
      {
        const std::lock_guard lock(outcome.mutex);
        if (!outcome.first_failure) {
          outcome.first_failure = std::current_exception();
          outcome.failed_process = process;
        }
      }
      break_world(*world, cat("process ", process, " of ", processes, " failed: ", failure.what()));
    }
    const std::lock_guard lock(outcome.mutex);
    --outcome.running;
    outcome.ended.notify_all();
  };

  {
    std::vector<std::jthread> threads;
    threads.reserve(static_cast<std::size_t>(processes));
    for (int p = 0; p < processes; ++p) threads.emplace_back(live, p);
    std::unique_lock lock(outcome.mutex);
    if (!outcome.ended.wait_for(lock, options.total_deadline, [&] { return outcome.running == 0; })) {
      break_world(*world, cat("the run did not end within ", options.total_deadline.count(), " ms"));
    }
  }
  if (outcome.first_failure) {
    rethrow_with_prefix(outcome.first_failure,
                        cat("[process ", outcome.failed_process, " of ", processes, "] "));
  }
}

}  // namespace lowband
