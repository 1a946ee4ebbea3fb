#include "trainer/agreement.h"

#include "runtime/error.h"

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

namespace lowband {
namespace {

enum Outcome : std::int64_t { kFine, kInvalidArgument, kIoError };

}  // namespace

void run_agreed(Communicator& group, const std::function<void()>& action) {
  std::string message;
  std::int64_t outcome = kFine;
  try {
    action();
  } catch (const InvalidArgument& error) {
    outcome = kInvalidArgument;
    message = error.what();
  } catch (const IoError& error) {
    outcome = kIoError;
    message = error.what();
  } catch (const std::filesystem::filesystem_error& error) {
    outcome = kIoError;
    message = cat(error.path1().string(), ": ", error.code().message());
  }

  // (outcome, message length) of every process.
  const Tag tag{Purpose::kControl};
  const auto processes = static_cast<std::size_t>(group.size());
  const std::vector<std::int64_t> own{outcome, std::ssize(message)};
  std::vector<std::int64_t> all(2 * processes);
  group.all_gather<std::int64_t>(own, all, std::vector<Index>(processes, 2), tag);

  int failed = 0;
  int first = group.size();
  for (int p = group.size() - 1; p >= 0; --p) {
    if (all[2 * static_cast<std::size_t>(p)] == kFine) continue;
    ++failed;
    first = p;
  }
  if (failed == 0) return;

  std::vector<std::uint8_t> text(static_cast<std::size_t>(all[2 * static_cast<std::size_t>(first) + 1]));
  if (group.process() == first) std::ranges::copy(message, text.begin());
  group.broadcast<std::uint8_t>(text, first, tag);
  message.assign(text.begin(), text.end());
  if (failed < group.size()) message = cat("process ", first, ": ", message);
  if (all[2 * static_cast<std::size_t>(first)] == kInvalidArgument) throw InvalidArgument(message);
  throw IoError(message);
}

}  // namespace lowband
