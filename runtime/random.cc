#include "runtime/random.h"

namespace lowband {
namespace {

// FNV-1a: 64-bit offset basis and prime. The seed is mixed in as eight more bytes.
std::uint64_t hash_name(std::uint64_t seed, std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&hash](std::uint8_t byte) { hash = (hash ^ byte) * 0x100000001b3; };
  for (const char c : name) mix(static_cast<std::uint8_t>(c));
  for (int shift = 0; shift < 64; shift += 8) mix(static_cast<std::uint8_t>(seed >> shift));
  return hash;
}

}  // namespace

RandomStream::RandomStream(std::uint64_t seed, std::string_view name, Index step)
    : step_(static_cast<std::uint64_t>(step)) {
  const std::uint64_t hash = hash_name(seed, name);
  key_ = {static_cast<std::uint32_t>(hash), static_cast<std::uint32_t>(hash >> 32)};
}

double RandomStream::uniform(Index index) const {
  const auto w = words(index);
  return unit_interval(w[0], w[1]);
}

std::uint64_t RandomStream::bits(Index index) const {
  const auto w = words(index);
  return static_cast<std::uint64_t>(w[0]) << 32 | w[1];
}

}  // namespace lowband
