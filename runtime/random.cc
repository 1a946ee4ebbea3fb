#include "runtime/random.h"

#include <cmath>
#include <numbers>

namespace lowband {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  // Multipliers and Weyl increments of the paper's Philox4x32.
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

namespace {

// FNV-1a: 64-bit offset basis and prime. The seed is mixed in as eight more bytes.
std::uint64_t hash_name(std::uint64_t seed, std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&hash](std::uint8_t byte) { hash = (hash ^ byte) * 0x100000001b3; };
  for (const char c : name) mix(static_cast<std::uint8_t>(c));
  for (int shift = 0; shift < 64; shift += 8) mix(static_cast<std::uint8_t>(seed >> shift));
  return hash;
}

double unit_interval(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = (static_cast<std::uint64_t>(high) << 32 | low) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace

RandomStream::RandomStream(std::uint64_t seed, std::string_view name, Index step)
    : step_(static_cast<std::uint64_t>(step)) {
  const std::uint64_t hash = hash_name(seed, name);
  key_ = {static_cast<std::uint32_t>(hash), static_cast<std::uint32_t>(hash >> 32)};
}

std::array<std::uint32_t, 4> RandomStream::words(Index index) const {
  const auto i = static_cast<std::uint64_t>(index);
  return philox4x32({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32),
                     static_cast<std::uint32_t>(step_), static_cast<std::uint32_t>(step_ >> 32)},
                    key_);
}

double RandomStream::uniform(Index index) const {
  const auto w = words(index);
  return unit_interval(w[0], w[1]);
}

double RandomStream::normal(Index index) const {
  const auto w = words(index);
  // 1 - u lies in (0, 1], so the logarithm is finite.
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit_interval(w[0], w[1])));
  return radius * std::cos(2.0 * std::numbers::pi * unit_interval(w[2], w[3]));
}

std::uint64_t RandomStream::bits(Index index) const {
  const auto w = words(index);
  return static_cast<std::uint64_t>(w[0]) << 32 | w[1];
}

}  // namespace lowband
