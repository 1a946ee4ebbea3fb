#include "collectives/rendezvous/peer_watch.h"

#include "collectives/rendezvous/star.h"
#include "runtime/error.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

namespace lowband {
namespace {

// Messages between process 0 and the others: a letter, then for a loss its process, a space and what
// happened.
constexpr char kLeaving = 'l';
constexpr char kAllLeave = 'a';
constexpr char kFailed = 'f';  // to process 0: the reason
constexpr char kLost = 'x';

std::string random_token() {
  std::random_device random;
  return cat(std::hex, random(), random(), random(), random());
}

// The thread looks this often whether it shall end, should a wake-up get lost in the closing of its star.
constexpr std::chrono::seconds kLongestNap{1};

}  // namespace

struct PeerWatch::Watch {
  Watch(int process_, int size_, std::string token, OnLoss on_loss_)
      : process(process_),
        size(size_),
        on_loss(std::move(on_loss_)),
        star(StarMember{.process = process_, .size = size_, .token = std::move(token)}),
        leaving(static_cast<std::size_t>(size_), false) {}

  int process;
  int size;
  OnLoss on_loss;
  Star star;

  std::vector<bool> leaving;  // of process 0; this thread's alone
  std::mutex mutex;
  std::condition_variable changed;
  bool self_leaves = false;
  bool all_leave = false;
  bool lost = false;
  std::atomic<bool> ending = false;
  std::jthread thread;  // last: ends first

  void run() {
    while (!ending) {
      if (const std::optional<Star::Event> event = star.next(Star::Clock::now() + kLongestNap)) take(*event);
      if (process == 0) note_leaving(0, self_left());
    }
  }

  bool self_left() {
    const std::lock_guard lock(mutex);
    return self_leaves;
  }

  void take(const Star::Event& event) {
    if (event.ended) {
      if (!everyone_leaves()) lose(event.from, cat("is gone (", event.text, ")"));
      return;
    }
    const std::string text = event.text.substr(1);
    switch (event.text[0]) {
      case kLeaving:
        note_leaving(event.from, true);
        break;
      case kAllLeave:
        note_all_leave();
        break;
      case kFailed:
        lose(event.from, cat("failed: ", text));
        break;
      case kLost: {
        std::istringstream parts(text);
        int who = 0;
        std::string what;
        parts >> who;
        std::getline(parts >> std::ws, what);
        lose(who, what);
        break;
      }
      default:
        break;
    }
  }

  bool everyone_leaves() {
    const std::lock_guard lock(mutex);
    return all_leave;
  }

  void note_leaving(int who, bool leaves) {
    if (!leaves || leaving[static_cast<std::size_t>(who)]) return;
    leaving[static_cast<std::size_t>(who)] = true;
    for (const bool one : leaving) {
      if (!one) return;
    }
    for (int p = 1; p < size; ++p) star.send(p, std::string(1, kAllLeave));
    star.flush(Star::Clock::now() + kLongestNap);
    note_all_leave();
  }

  void note_all_leave() {
    const std::lock_guard lock(mutex);
    all_leave = true;
    changed.notify_all();
  }

  // Process 0 passes the first loss on to all others.
  void lose(int who, const std::string& what) {
    {
      const std::lock_guard lock(mutex);
      if (lost) return;
      lost = true;
      changed.notify_all();
    }
    if (process == 0) {
      for (int p = 1; p < size; ++p) {
        if (p != who) star.send(p, cat(kLost, who, " ", what));
      }
      star.flush(Star::Clock::now() + kLongestNap);
    }
    on_loss(who, what);
  }

  void end() {
    ending = true;
    star.wake();
    if (thread.joinable()) thread.join();
  }
};

PeerWatch::PeerWatch(Rendezvous& rendezvous, OnLoss on_loss) {
  const Star::Clock::time_point give_up = Star::Clock::now() + rendezvous.deadline();
  const int process = rendezvous.process();
  const int size = rendezvous.size();
  // Process 0 says where: a token, a port, and the addresses of its host.
  const std::string own_token = process == 0 ? random_token() : "";
  if (process == 0) {
    watch_ = std::make_unique<Watch>(process, size, own_token, std::move(on_loss));
    std::string where = cat(own_token, " ", watch_->star.listen(0));
    for (const std::string& address : own_addresses()) where += " " + address;
    rendezvous.all_gather(where);
    watch_->star.let_in(give_up);
  } else {
    std::istringstream where(rendezvous.all_gather("").front());
    std::string token;
    int port = 0;
    where >> token >> port;
    std::vector<std::string> hosts;
    for (std::string host; where >> host;) hosts.push_back(host);
    watch_ = std::make_unique<Watch>(process, size, token, std::move(on_loss));
    watch_->star.connect(hosts, port, give_up);
  }
  watch_->thread = std::jthread([watch = watch_.get()] { watch->run(); });
}

PeerWatch::~PeerWatch() { watch_->end(); }

void PeerWatch::tell_failure(std::string_view reason) {
  watch_->end();  // this thread has the connections from here on
  if (watch_->process == 0) {
    for (int p = 1; p < watch_->size; ++p) watch_->star.send(p, cat(kLost, 0, " failed: ", reason));
  } else {
    watch_->star.send(0, cat(kFailed, reason));
  }
  watch_->star.flush(Star::Clock::now() + std::chrono::seconds(1));
}

bool PeerWatch::leave(std::chrono::milliseconds patience) {
  std::unique_lock lock(watch_->mutex);
  watch_->self_leaves = true;
  lock.unlock();
  if (watch_->process == 0) {
    watch_->star.wake();
  } else {
    watch_->star.send(0, std::string(1, kLeaving));
  }
  lock.lock();
  watch_->changed.wait_for(lock, patience, [&] { return watch_->all_leave || watch_->lost; });
  return watch_->all_leave;
}

}  // namespace lowband
