#pragma once

#include "runtime/types.h"
#include "trainer/data/files.h"

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

namespace lowband {

/// Token files of llm.c and modded-nanogpt: 256 int32 (magic 20240520, version 1, token count, zeros), then
/// the tokens as uint16, all little-endian.
inline constexpr Index kShardHeaderBytes = 256 * 4;
inline constexpr std::int32_t kShardMagic = 20240520;
inline constexpr std::int32_t kShardVersion = 1;

/// Writes one shard; it appears under its name when `commit` returns.
class TokenShardWriter {
 public:
  explicit TokenShardWriter(const std::filesystem::path& path);
  /// Throws: InvalidArgument past 2^31 - 1 tokens, the most that the header can count.
  void append(std::span<const std::uint16_t> ids);
  /// Appends the ids of a byte vocabulary: id = byte.
  void append_bytes(std::string_view text);
  Index tokens() const { return tokens_; }
  void commit();

 private:
  std::filesystem::path path_;
  DurableFile file_;
  Index tokens_ = 0;
};

/// One shard, mapped into memory and checked as a whole.
class TokenShard {
 public:
  /// Throws: IoError when the file cannot be read; InvalidArgument naming file, field, value found and value
  /// expected for a wrong magic or version, a count that does not fit the file's size, an empty file, or a
  /// token id outside the vocabulary.
  TokenShard(const std::filesystem::path& path, Index vocabulary);

  std::span<const std::uint16_t> ids() const { return ids_; }
  Index tokens() const { return std::ssize(ids_); }

 private:
  MappedFile file_;
  std::span<const std::uint16_t> ids_;
};

/// The training or validation text: shards cut into non-overlapping blocks of `sequence` tokens, each with
/// the one token that follows it. What a shard has left over is not used.
class TokenSet {
 public:
  /// Throws: as TokenShard; InvalidArgument when no shard has a whole block.
  TokenSet(std::span<const std::filesystem::path> shards, Index vocabulary, Index sequence,
           std::uint64_t seed);

  Index tokens() const { return tokens_; }
  Index blocks() const { return first_blocks_.back(); }
  Index sequence() const { return sequence_; }

  /// Sample number `global_sample` of the run, counted over all steps and processes: sample i of step s is
  /// s * batch + i. Every epoch visits each block once, in an order that depends on (seed, epoch) alone.
  ///
  /// Shapes: tokens and targets have `sequence` elements; targets[t] = tokens[t + 1].
  void sample(Index global_sample, std::span<std::int32_t> tokens, std::span<std::int32_t> targets) const;

  /// Block `index` in the order of the files, for validation.
  void block(Index index, std::span<std::int32_t> tokens, std::span<std::int32_t> targets) const;

 private:
  Index sequence_;
  std::uint64_t seed_;
  Index tokens_ = 0;
  std::vector<TokenShard> shards_;
  std::vector<Index> first_blocks_;  // of each shard, then their total
};

/// Element `index` of a permutation of 0 .. extent-1 that is a pure function of (seed, epoch): a Feistel
/// network over the next power of four, repeated until the result falls inside the extent.
///
/// Reference: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (cycle walking).
Index permuted_index(Index index, Index extent, std::uint64_t seed, Index epoch);

}  // namespace lowband
