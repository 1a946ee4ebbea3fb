#include "collectives/agreement.h"

#include <algorithm>
#include <filesystem>
#include <vector>

namespace lowband {
namespace {

std::string failure_of(const std::function<void()>& local_work) {
  try {
    local_work();
    return "";
  } catch (const InvalidArgument& error) {
    return error.what();
  } catch (const IoError& error) {
    return error.what();
  } catch (const std::filesystem::filesystem_error& error) {
    return cat(error.path1().string(), ": ", error.code().message());
  }
}

}  // namespace

void agree(Communicator& world, const std::function<void()>& local_work) {
  std::string failure = failure_of(local_work);
  const Tag control{Purpose::kControl};
  const auto size = static_cast<std::size_t>(world.size());
  const auto length = static_cast<Index>(failure.size());
  std::vector<Index> lengths(size);
  const std::vector<Index> ones(size, 1);
  world.all_gather<Index>({&length, 1}, lengths, ones, control);
  const auto first = std::find_if(lengths.begin(), lengths.end(), [](Index n) { return n > 0; });
  if (first == lengths.end()) return;

  failure.resize(static_cast<std::size_t>(*first));
  const auto process = static_cast<int>(first - lengths.begin());
  world.broadcast<std::uint8_t>({reinterpret_cast<std::uint8_t*>(failure.data()), failure.size()}, process,
                                control);
  const bool everybody = std::find(lengths.begin(), lengths.end(), 0) == lengths.end();
  throw AgreedFailure(everybody ? failure : cat("[process ", process, " of ", world.size(), "] ", failure));
}

}  // namespace lowband
