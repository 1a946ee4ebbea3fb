#pragma once

#include "trainer/replay/replay.h"

#include <string>

namespace lowband {

/// What a replay did, step by step and in sum: the lines of replay.jsonl.
class ReplayAccount {
 public:
  ReplayAccount(const ReplayStart& start, const ReplayPlan& plan, const std::string& output);
  void add(const ReplayStep& step);
  void finish(const std::string& weight_hash, double seconds);

  const ReplaySummary& summary() const { return summary_; }
  /// Start, steps and, after `finish`, the summary: a line of JSON each.
  const std::string& lines() const { return lines_; }

 private:
  void add(const ReplayedMatrix& found, ReplaySummary::Matrix& sum) const;

  ReplaySummary summary_;
  std::string lines_;
};

}  // namespace lowband
