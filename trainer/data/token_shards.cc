#include "trainer/data/token_shards.h"

#include "runtime/error.h"
#include "runtime/random.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

namespace lowband {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are little-endian");

using Header = std::array<std::int32_t, 256>;
static_assert(sizeof(Header) == kShardHeaderBytes);

constexpr Index kMostTokens = std::numeric_limits<std::int32_t>::max();

// The ids of a mapped shard after its header has been found right.
std::span<const std::uint16_t> checked_ids(const std::filesystem::path& path,
                                           std::span<const std::byte> bytes) {
  const std::string name = path.string();
  const Index size_bytes = std::ssize(bytes);
  LB_EXPECTS(size_bytes >= kShardHeaderBytes, name, ": file size: found ", size_bytes,
             " bytes, expected a header of ", kShardHeaderBytes, " bytes and tokens");
  Header header;
  std::memcpy(header.data(), bytes.data(), sizeof(Header));
  LB_EXPECTS(header[0] == kShardMagic, name, ": magic: found ", header[0], ", expected ", kShardMagic);
  LB_EXPECTS(header[1] == kShardVersion, name, ": version: found ", header[1], ", expected ", kShardVersion);
  const Index tokens = header[2];
  LB_EXPECTS(tokens > 0, name, ": token count: found ", tokens, ", expected at least 1");
  LB_EXPECTS(size_bytes == kShardHeaderBytes + 2 * tokens, name, ": file size: found ", size_bytes,
             " bytes, expected ", kShardHeaderBytes + 2 * tokens, " for the ", tokens,
             " tokens of its header");
  return {reinterpret_cast<const std::uint16_t*>(bytes.data() + kShardHeaderBytes),
          static_cast<std::size_t>(tokens)};
}

}  // namespace

TokenShardWriter::TokenShardWriter(const std::filesystem::path& path) : path_(path), file_(path) {
  const Header zeros{};  // `commit` knows the count and writes over it
  file_.append(std::as_bytes(std::span(zeros)));
}

void TokenShardWriter::append(std::span<const std::uint16_t> ids) {
  LB_EXPECTS(tokens_ + std::ssize(ids) <= kMostTokens, path_.string(), ": token count: found ",
             tokens_ + std::ssize(ids), ", expected at most ", kMostTokens, " in one shard");
  file_.append(std::as_bytes(ids));
  tokens_ += std::ssize(ids);
}

void TokenShardWriter::append_bytes(std::string_view text) {
  std::array<std::uint16_t, 4096> ids;
  while (!text.empty()) {
    const std::string_view piece = text.substr(0, ids.size());
    std::ranges::transform(piece, ids.begin(), [](char c) { return static_cast<std::uint8_t>(c); });
    append(std::span<const std::uint16_t>(ids).first(piece.size()));
    text.remove_prefix(piece.size());
  }
}

void TokenShardWriter::commit() {
  Header header{};
  header[0] = kShardMagic;
  header[1] = kShardVersion;
  header[2] = static_cast<std::int32_t>(tokens_);
  file_.overwrite(0, std::as_bytes(std::span(header)));
  file_.commit();
}

TokenShard::TokenShard(const std::filesystem::path& path, Index vocabulary)
    : file_(path), ids_(checked_ids(path, file_.bytes())) {
  const auto outside =
      std::ranges::find_if(ids_, [vocabulary](std::uint16_t id) { return id >= vocabulary; });
  LB_EXPECTS(outside == ids_.end(), path.string(), ": token ", outside - ids_.begin(), ": found id ",
             *outside, ", expected less than the vocabulary of ", vocabulary);
}

TokenSet::TokenSet(std::span<const std::filesystem::path> shards, Index vocabulary, Index sequence,
                   std::uint64_t seed)
    : sequence_(sequence), seed_(seed), first_blocks_{0} {
  LB_EXPECTS(sequence > 0, "sequence: found ", sequence, ", expected at least 1");
  LB_EXPECTS(!shards.empty(), "token shards: found none, expected at least one file");
  for (const std::filesystem::path& path : shards) {
    const TokenShard& shard = shards_.emplace_back(path, vocabulary);
    tokens_ += shard.tokens();
    first_blocks_.push_back(first_blocks_.back() + (shard.tokens() - 1) / sequence);
  }
  LB_EXPECTS(blocks() > 0, shards.front().string(), ": found ", shards_.front().tokens(),
             " tokens, expected at least ", sequence + 1, " in one shard (sequence + 1)");
}

void TokenSet::sample(Index global_sample, std::span<std::int32_t> tokens,
                      std::span<std::int32_t> targets) const {
  LB_EXPECTS(global_sample >= 0, "sample: found ", global_sample, ", expected a non-negative number");
  const Index epoch = global_sample / blocks();
  block(permuted_index(global_sample % blocks(), blocks(), seed_, epoch), tokens, targets);
}

void TokenSet::block(Index index, std::span<std::int32_t> tokens, std::span<std::int32_t> targets) const {
  LB_EXPECTS(index >= 0 && index < blocks(), "block: found ", index, ", expected 0 .. ", blocks() - 1);
  LB_EXPECTS(std::ssize(tokens) == sequence_ && std::ssize(targets) == sequence_, "tokens, targets: found ",
             tokens.size(), " and ", targets.size(), " elements, expected ", sequence_);
  const auto next = std::ranges::upper_bound(first_blocks_, index);  // the first shard that begins after it
  const Index shard = next - first_blocks_.begin() - 1;
  const Index begin = (index - first_blocks_[static_cast<std::size_t>(shard)]) * sequence_;
  const std::uint16_t* ids = shards_[static_cast<std::size_t>(shard)].ids().data() + begin;
  std::copy_n(ids, sequence_, tokens.begin());
  std::copy_n(ids + 1, sequence_, targets.begin());
}

Index permuted_index(Index index, Index extent, std::uint64_t seed, Index epoch) {
  LB_EXPECTS(index >= 0 && index < extent, "permuted index: found ", index, ", expected 0 .. ", extent - 1);
  // Two halves of `half_bits` each, so the network permutes 0 .. 4^half_bits - 1, less than four times the
  // extent: four rounds of walking on average at the worst.
  const auto half_bits = (std::bit_width(static_cast<std::uint64_t>(extent - 1)) + 1) / 2;
  const std::uint64_t half_mask = (std::uint64_t{1} << half_bits) - 1;
  const RandomStream stream(seed, "data.order", epoch);
  // Four rounds make a pseudo-random permutation of large domains (Luby and Rackoff); small ones need more.
  constexpr int kRounds = 8;
  auto value = static_cast<std::uint64_t>(index);
  do {
    std::uint64_t left = value >> half_bits;
    std::uint64_t right = value & half_mask;
    for (int round = 0; round < kRounds; ++round) {
      const Index counter = static_cast<Index>(right << 3) | round;
      left ^= stream.bits(counter) & half_mask;
      std::swap(left, right);
    }
    value = left << half_bits | right;
  } while (value >= static_cast<std::uint64_t>(extent));
  return static_cast<Index>(value);
}

}  // namespace lowband
