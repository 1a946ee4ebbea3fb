#include "trainer/run_record.h"

#include "runtime/error.h"
#include "runtime/json.h"

#include <string>
#include <string_view>
#include <utility>

#include <google/protobuf/util/json_util.h>

namespace lowband {
namespace {

using std::filesystem::path;

constexpr std::string_view kLinesName = "run.jsonl";
constexpr std::string_view kSummaryName = "summary.json";

template <class Message>
Message parse(std::string_view json, const std::string& where) {
  Message message;
  const auto status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(json.data(), json.size()), &message);
  if (!status.ok()) throw IoError(cat(where, ": cannot be read: ", std::string(status.message())));
  return message;
}

// Calls `visit(line, text)` for every line that ends; text has no line break.
template <class Visit>
void for_each_line(const path& file_path, Visit&& visit) {
  const MappedFile file(file_path);
  std::string_view rest = file.text();
  for (Index number = 1;; ++number) {
    const std::size_t end = rest.find('\n');
    if (end == std::string_view::npos) return;  // what follows was cut short
    const std::string_view text = rest.substr(0, end);
    visit(parse<RunLine>(text, cat(file_path.string(), ": line ", number)), text);
    rest.remove_prefix(end + 1);
  }
}

// Number of steps completed when the line was written.
Index completed_steps(const RunLine& line) {
  switch (line.line_case()) {
    case RunLine::kStart:
      return line.start().completed_steps();
    case RunLine::kStep:
      return line.step().step();
    case RunLine::kValidation:
      return line.validation().step();
    case RunLine::LINE_NOT_SET:
      break;
  }
  return 0;
}

}  // namespace

RunRecorder::RunRecorder(path output_dir, std::optional<Index> resumed_step)
    : output_dir_(std::move(output_dir)) {
  require_writable_directory(output_dir_);
  lock_.emplace(output_dir_);
  const path name = output_dir_ / kLinesName;
  std::string kept;
  if (resumed_step && std::filesystem::exists(name)) {
    for_each_line(name, [&](const RunLine& line, std::string_view text) {
      if (completed_steps(line) <= *resumed_step) kept.append(text) += '\n';
    });
  }
  DurableFile file(name);
  file.append(kept);
  file.commit();
  std::error_code error;
  std::filesystem::remove(output_dir_ / kSummaryName, error);
  if (error) throw IoError(cat((output_dir_ / kSummaryName).string(), ": cannot remove: ", error.message()));
  lines_.open(name, std::ios::binary | std::ios::app);
  if (!lines_) throw IoError(cat(name.string(), ": cannot open for writing"));
}

void RunRecorder::append(const RunLine& line) {
  lines_ << to_json(line) << '\n' << std::flush;
  if (!lines_) throw IoError(cat((output_dir_ / kLinesName).string(), ": cannot write"));
}

void RunRecorder::write(const RunStart& start) {
  RunLine line;
  *line.mutable_start() = start;
  append(line);
}

void RunRecorder::write(const StepRecord& step) {
  RunLine line;
  *line.mutable_step() = step;
  append(line);
}

void RunRecorder::write(const ValidationRecord& validation) {
  RunLine line;
  *line.mutable_validation() = validation;
  append(line);
}

void RunRecorder::write(const RunSummary& summary) {
  DurableFile file(output_dir_ / kSummaryName);
  file.append(to_json(summary) + "\n");
  file.commit();
}

std::vector<RunLine> read_run_lines(const path& run_dir) {
  std::vector<RunLine> lines;
  for_each_line(run_dir / kLinesName,
                [&lines](const RunLine& line, std::string_view) { lines.push_back(line); });
  return lines;
}

RunSummary read_run_summary(const path& run_dir) {
  const path name = run_dir / kSummaryName;
  return parse<RunSummary>(MappedFile(name).text(), name.string());
}

std::vector<TransferSum> transfer_sums(const std::map<Ledger::Key, TransferTotals>& account) {
  std::map<std::pair<std::string, Purpose>, TransferTotals> by_axis_and_purpose;
  for (const auto& [key, totals] : account) by_axis_and_purpose[{key.axis, key.purpose}] += totals;
  std::vector<TransferSum> sums;
  for (const auto& [key, totals] : by_axis_and_purpose) {
    TransferSum& sum = sums.emplace_back();
    sum.set_axis(key.first);
    sum.set_purpose(std::string(purpose_name(key.second)));
    sum.set_calls(totals.calls);
    sum.set_payload_bytes(totals.payload_bytes);
    sum.set_modelled_wire_bytes(totals.modelled_wire_bytes);
    sum.set_transport_bytes(totals.transport_bytes);
    sum.set_seconds(totals.seconds);
  }
  return sums;
}

}  // namespace lowband
