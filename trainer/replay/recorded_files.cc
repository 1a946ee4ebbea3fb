#include "trainer/replay/recorded_files.h"

#include "runtime/error.h"

#include <cstdio>
#include <map>
#include <regex>
#include <set>

namespace lowband {
namespace {

using Replica = std::optional<int>;  // nothing: not in the file's name

struct StepFile {
  Index step = 0;
  Replica replica;
};

StepFile parse_step_file(const std::filesystem::path& file) {
  static const std::regex pattern(R"(step-([0-9]{1,15})(\.replica-([0-9]{1,6}))?\.safetensors)");
  const std::string name = file.filename().string();
  std::smatch match;
  StepFile found;
  if (std::regex_match(name, match, pattern)) {
    found.step = std::stoll(match[1]);
    if (match[3].matched) found.replica = std::stoi(match[3]);
  }
  const std::string expected = step_file_name(found.step, found.replica);
  LB_EXPECTS(name == expected, file.string(), ": found a file of this name, expected ",
             match.empty() ? "step-000000.safetensors or step-000000.replica-0.safetensors" : expected);
  return found;
}

std::map<Index, std::set<Replica>> files_by_step(const std::filesystem::path& folder) {
  std::map<Index, std::set<Replica>> steps;
  std::error_code error;
  std::filesystem::directory_iterator entries(folder, error);
  if (error) throw IoError(cat(folder.string(), ": cannot read the folder: ", error.message()));
  for (const auto& entry : entries) {
    if (!entry.path().filename().string().starts_with("step")) continue;
    const StepFile file = parse_step_file(entry.path());
    steps[file.step].insert(file.replica);
  }
  return steps;
}

}  // namespace

std::string step_file_name(Index step, std::optional<int> replica) {
  char number[32];
  std::snprintf(number, sizeof number, "%06lld", static_cast<long long>(step));
  return cat("step-", number, replica ? cat(".replica-", *replica) : "", ".safetensors");
}

std::filesystem::path state_file_of(const std::filesystem::path& file, int replica, int replicas) {
  if (replicas == 1) return file;
  std::filesystem::path own = file;
  own.replace_extension();
  own += cat(".replica-", replica, file.extension().string());
  return own;
}

RecordedSteps find_recorded_steps(const std::filesystem::path& folder, std::optional<int> replicas) {
  const auto steps = files_by_step(folder);
  LB_EXPECTS(!steps.empty(), folder.string(),
             ": found no gradients, expected step-000000.safetensors or step-000000.replica-0.safetensors");
  RecordedSteps found{.folder = folder, .first = steps.begin()->first, .count = std::ssize(steps)};
  // Without a number of replicas, as many as the first step has.
  const std::set<Replica>& in_first = steps.begin()->second;
  found.numbered = replicas.value_or(1) > 1 || !in_first.contains(std::nullopt);
  found.replicas = replicas ? *replicas : found.numbered ? in_first.rbegin()->value() + 1 : 1;
  std::set<Replica> expected;
  for (int replica = 0; replica < found.replicas; ++replica)
    expected.insert(found.numbered ? Replica(replica) : std::nullopt);
  Index next = found.first;
  for (const auto& [step, files] : steps) {
    LB_EXPECTS(step == next, folder.string(), ": found step ", step, " after step ", next - 1, ", expected ",
               found.file(next, 0).filename().string());
    ++next;
    const std::string wanted = cat(", expected gradients of ", found.replicas, " replica(s)",
                                   found.numbered ? ", numbered from 0" : "");
    for (const Replica replica : expected)
      LB_EXPECTS(files.contains(replica), folder.string(), ": step ", step, ": found no ",
                 step_file_name(step, replica), wanted);
    for (const Replica replica : files)
      LB_EXPECTS(expected.contains(replica), folder.string(), ": step ", step, ": found ",
                 step_file_name(step, replica), wanted);
  }
  return found;
}

}  // namespace lowband
