#pragma once

#include "runtime/types.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// Events of one process for Chrome's trace viewer; each range is an NVTX range too where NVTX is built in.
/// A default-constructed timeline records nothing and costs a branch.
class Timeline {
 public:
  Timeline() = default;
  /// Records from now on; `write` puts the file to `path`.
  Timeline(std::string path, int process);

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
  };
  std::string path_;
  int process_ = 0;
  std::chrono::steady_clock::time_point origin_;
  std::vector<Event> events_;
};

}  // namespace lowband
