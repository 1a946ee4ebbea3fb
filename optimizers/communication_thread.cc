#include "optimizers/communication_thread.h"

#include "runtime/cpu.h"

#include <utility>

namespace lowband {

CommunicationThread::CommunicationThread() : thread_([this] { run(); }) {}

CommunicationThread::~CommunicationThread() {
  {
    const std::lock_guard lock(mutex_);
    stops_ = true;
  }
  submitted_.notify_one();
  thread_.join();
}

Index CommunicationThread::submit(std::function<void()> task) {
  Index number = 0;
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    number = ++submitted_count_;
  }
  submitted_.notify_one();
  return number;
}

void CommunicationThread::wait(Index task) {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return failure_ != nullptr || finished_count_ >= task; });
  if (failure_) std::rethrow_exception(failure_);
}

bool CommunicationThread::idle() {
  const std::lock_guard lock(mutex_);
  return finished_count_ == submitted_count_;
}

void CommunicationThread::run() {
  set_compute_threads(1);
  std::unique_lock lock(mutex_);
  while (true) {
    submitted_.wait(lock, [&] { return stops_ || (!tasks_.empty() && failure_ == nullptr); });
    if (stops_) return;
    const std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    std::exception_ptr failure;
    try {
      task();
    } catch (...) {  // carried to the owner, who cannot go on without what the task was to do
      failure = std::current_exception();
    }
    lock.lock();
    failure_ = failure;
    ++finished_count_;
    finished_.notify_all();
  }
}

}  // namespace lowband
