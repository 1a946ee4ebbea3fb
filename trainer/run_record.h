#pragma once

#include "collectives/ledger.h"
#include "trainer/data/files.h"
#include "trainer/run_record.pb.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace lowband {

/// Writes what happened in a run: "run.jsonl", a line of JSON per record, and "summary.json" at its end.
/// Lives on process 0 only.
class RunRecorder {
 public:
  /// Starts the record in `output_dir`, in place of an earlier run's. With `resumed_step` it continues the
  /// one that is there: records of later steps, and a last line cut short, are removed, so steps only ever
  /// grow.
  ///
  /// Throws: IoError naming the path when the directory or the files cannot be written, when another recorder
  /// is writing there, or when the record to continue cannot be read.
  explicit RunRecorder(std::filesystem::path output_dir, std::optional<Index> resumed_step = {});

  /// Each record is with the operating system when `write` returns. Throws: IoError naming the path.
  void write(const RunStart& start);
  void write(const StepRecord& step);
  void write(const ValidationRecord& validation);
  void write(const DiagnosticsRecord& diagnostics);
  void write(const RunSummary& summary);

 private:
  void append(const RunLine& line);

  std::filesystem::path output_dir_;
  std::optional<DirectoryLock> lock_;
  std::ofstream lines_;
};

/// All complete lines of a run's record. Throws: IoError naming path and line.
std::vector<RunLine> read_run_lines(const std::filesystem::path& run_dir);

/// Throws: IoError when there is none (the run has not ended) or it cannot be read.
RunSummary read_run_summary(const std::filesystem::path& run_dir);

/// The ledger's account (of a step, or in total) summed over operations: one entry per axis and purpose.
std::vector<TransferSum> transfer_sums(const std::map<Ledger::Key, TransferTotals>& account);

/// The sums of both, one entry per axis and purpose.
std::vector<TransferSum> merged(const std::vector<TransferSum>& a, const std::vector<TransferSum>& b);

/// Sums as named numbers, "transfers.replica.factor.payload_bytes", for a checkpoint. Exact below 2^53.
std::map<std::string, double> scalars_of(const std::vector<TransferSum>& sums);
/// The sums among named numbers; the others are skipped.
std::vector<TransferSum> transfer_sums_in(const std::map<std::string, double>& scalars);

}  // namespace lowband
