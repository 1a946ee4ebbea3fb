#pragma once

#include "runtime/types.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace lowband {

/// A thread that runs tasks one after the other, with one compute thread, while its owner computes.
///
/// After the first task that throws no other runs, and every `wait` throws its exception again. Destruction
/// drops the tasks that have not begun and waits for the one that has: whoever cannot wait for the deadline
/// of a collective in it aborts the group first.
class CommunicationThread {
 public:
  CommunicationThread();
  ~CommunicationThread();
  CommunicationThread(const CommunicationThread&) = delete;
  CommunicationThread& operator=(const CommunicationThread&) = delete;

  /// Returns: the number of the task, 1 for the first.
  Index submit(std::function<void()> task);
  /// Until tasks 1 .. `task` have run. Throws: what the first task to fail threw.
  void wait(Index task);

  /// Whether every task submitted so far has run.
  bool idle();

  std::thread::id id() const { return thread_.get_id(); }

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable submitted_;
  std::condition_variable finished_;
  std::deque<std::function<void()>> tasks_;  // not begun
  Index submitted_count_ = 0;
  Index finished_count_ = 0;
  std::exception_ptr failure_;
  bool stops_ = false;
  std::thread thread_;
};

}  // namespace lowband
