#pragma once

#include "runtime/types.h"

#include <chrono>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace lowband {

/// Events of one process for Chrome's trace viewer; each range is an NVTX range too where NVTX is built in.
/// A default-constructed timeline records nothing and costs a branch.
/// Threads: ranges may be opened and closed by several at once, each range by one; the trace numbers threads
/// in the order in which they first close one.
class Timeline {
 public:
  Timeline() = default;
  Timeline(std::string path, int process) { start(std::move(path), process); }

  /// Records from now on; `write` puts the file to `path`. Before the first range.
  void start(std::string path, int process);

  bool enabled() const { return !path_.empty(); }
  /// Writes all events so far as JSON, atomically (temporary file, then rename). Throws: IoError.
  void write() const;

  class Range {
   public:
    Range(Timeline* timeline, std::string_view name, Index bytes);
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
    ~Range();

   private:
    Timeline* timeline_;
    std::string name_;
    Index bytes_;
    std::chrono::steady_clock::time_point begin_;
  };

 private:
  struct Event {
    std::string name;
    double begin_us;
    double duration_us;
    Index bytes;
    int thread;
  };
  void add(std::string name, std::chrono::steady_clock::time_point begin, Index bytes);

  std::string path_;
  int process_ = 0;
  std::chrono::steady_clock::time_point origin_;
  mutable std::mutex mutex_;  // of what follows
  std::vector<std::thread::id> threads_;
  std::vector<Event> events_;
};

}  // namespace lowband
