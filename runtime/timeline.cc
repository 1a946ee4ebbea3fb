#include "runtime/timeline.h"

#include "runtime/error.h"
#include "runtime/nvtx/ranges.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

namespace lowband {

void Timeline::start(std::string path, int process) {
  path_ = std::move(path);
  process_ = process;
  origin_ = std::chrono::steady_clock::now();
}

void Timeline::write() const {
  if (!enabled()) return;
  const std::string temporary = path_ + ".partial";
  std::ofstream file(temporary);
  file << "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  file << R"({"ph":"M","name":"process_name","pid":)" << process_ << R"(,"args":{"name":"process )"
       << process_ << "\"}}";
  const std::lock_guard lock(mutex_);
  for (const Event& event : events_) {
    file << ",\n{\"ph\":\"X\",\"name\":\"" << event.name << "\",\"pid\":" << process_
         << ",\"tid\":" << event.thread << ",\"ts\":" << cat(event.begin_us)
         << ",\"dur\":" << cat(event.duration_us) << ",\"args\":{\"bytes\":" << event.bytes << "}}";
  }
  file << "\n]}\n";
  file.close();
  if (!file) throw IoError(cat("timeline ", temporary, ": cannot be written"));
  if (std::rename(temporary.c_str(), path_.c_str()) != 0)
    throw IoError(cat("timeline ", path_, ": cannot be renamed"));
}

Timeline::Range::Range(Timeline* timeline, std::string_view name, Index bytes)
    : timeline_(timeline != nullptr && timeline->enabled() ? timeline : nullptr), bytes_(bytes) {
  if (timeline_ == nullptr) return;
  name_ = name;
  nvtx_push(bytes > 0 ? cat(name, " ", bytes, " B") : name_);
  begin_ = std::chrono::steady_clock::now();
}

Timeline::Range::~Range() {
  if (timeline_ == nullptr) return;
  timeline_->add(std::move(name_), begin_, bytes_);
  nvtx_pop();
}

void Timeline::add(std::string name, std::chrono::steady_clock::time_point begin, Index bytes) {
  using Microseconds = std::chrono::duration<double, std::micro>;
  const auto end = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  auto thread = std::ranges::find(threads_, std::this_thread::get_id());
  if (thread == threads_.end()) thread = threads_.insert(thread, std::this_thread::get_id());
  events_.push_back({std::move(name), Microseconds(begin - origin_).count(),
                     Microseconds(end - begin).count(), bytes, static_cast<int>(thread - threads_.begin())});
}

}  // namespace lowband
