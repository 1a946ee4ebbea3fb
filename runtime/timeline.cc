#include "runtime/timeline.h"

#include "runtime/error.h"
#include "runtime/nvtx/ranges.h"

#include <cstdio>
#include <fstream>

namespace lowband {

Timeline::Timeline(std::string path, int process)
    : path_(std::move(path)), process_(process), origin_(std::chrono::steady_clock::now()) {}

void Timeline::write() const {
  if (!enabled()) return;
  const std::string temporary = path_ + ".partial";
  std::ofstream file(temporary);
  file << "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  file << R"({"ph":"M","name":"process_name","pid":)" << process_ << R"(,"args":{"name":"process )"
       << process_ << "\"}}";
  for (const Event& event : events_) {
    file << ",\n{\"ph\":\"X\",\"name\":\"" << event.name << "\",\"pid\":" << process_
         << ",\"tid\":0,\"ts\":" << cat(event.begin_us) << ",\"dur\":" << cat(event.duration_us)
         << ",\"args\":{\"bytes\":" << event.bytes << "}}";
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
  using Microseconds = std::chrono::duration<double, std::micro>;
  const auto end = std::chrono::steady_clock::now();
  timeline_->events_.push_back({std::move(name_), Microseconds(begin_ - timeline_->origin_).count(),
                                Microseconds(end - begin_).count(), bytes_});
  nvtx_pop();
}

}  // namespace lowband
