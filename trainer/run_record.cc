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
constexpr std::string_view kScalarPrefix = "transfers.";

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
    case RunLine::kDiagnostics:
      return line.diagnostics().step();
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

void RunRecorder::write(const DiagnosticsRecord& diagnostics) {
  RunLine line;
  *line.mutable_diagnostics() = diagnostics;
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

std::vector<TransferSum> merged(const std::vector<TransferSum>& a, const std::vector<TransferSum>& b) {
  std::map<std::pair<std::string, std::string>, TransferSum> by_axis_and_purpose;
  for (const auto* sums : {&a, &b}) {
    for (const TransferSum& term : *sums) {
      TransferSum& sum = by_axis_and_purpose[{term.axis(), term.purpose()}];
      sum.set_axis(term.axis());
      sum.set_purpose(term.purpose());
      sum.set_calls(sum.calls() + term.calls());
      sum.set_payload_bytes(sum.payload_bytes() + term.payload_bytes());
      sum.set_modelled_wire_bytes(sum.modelled_wire_bytes() + term.modelled_wire_bytes());
      sum.set_transport_bytes(sum.transport_bytes() + term.transport_bytes());
      sum.set_seconds(sum.seconds() + term.seconds());
    }
  }
  std::vector<TransferSum> sums;
  sums.reserve(by_axis_and_purpose.size());
  for (auto& [key, sum] : by_axis_and_purpose) sums.push_back(std::move(sum));
  return sums;
}

std::map<std::string, double> scalars_of(const std::vector<TransferSum>& sums) {
  std::map<std::string, double> scalars;
  for (const TransferSum& sum : sums) {
    const std::string name = cat(kScalarPrefix, sum.axis(), ".", sum.purpose(), ".");
    scalars[name + "calls"] = static_cast<double>(sum.calls());
    scalars[name + "payload_bytes"] = static_cast<double>(sum.payload_bytes());
    scalars[name + "modelled_wire_bytes"] = sum.modelled_wire_bytes();
    scalars[name + "transport_bytes"] = static_cast<double>(sum.transport_bytes());
    scalars[name + "seconds"] = sum.seconds();
  }
  return scalars;
}

std::vector<TransferSum> transfer_sums_in(const std::map<std::string, double>& scalars) {
  std::vector<TransferSum> sums;
  for (const auto& [name, value] : scalars) {
    if (!name.starts_with(kScalarPrefix)) continue;
    const std::size_t axis_end = name.find('.', kScalarPrefix.size());
    const std::size_t purpose_end = name.rfind('.');
    const std::string figure = name.substr(purpose_end + 1);
    TransferSum term;
    term.set_axis(name.substr(kScalarPrefix.size(), axis_end - kScalarPrefix.size()));
    term.set_purpose(name.substr(axis_end + 1, purpose_end - axis_end - 1));
    if (figure == "calls") term.set_calls(static_cast<Index>(value));
    if (figure == "payload_bytes") term.set_payload_bytes(static_cast<Index>(value));
    if (figure == "modelled_wire_bytes") term.set_modelled_wire_bytes(value);
    if (figure == "transport_bytes") term.set_transport_bytes(static_cast<Index>(value));
    if (figure == "seconds") term.set_seconds(value);
    sums = merged(sums, {term});
  }
  return sums;
}

}  // namespace lowband
