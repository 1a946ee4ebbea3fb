#include "trainer/data/token_shards.h"

#include "tests/trainer/scratch_directory.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <set>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

// Bytes of a shard put together by hand from the format's description.
std::string shard_bytes(std::int32_t magic, std::int32_t version, std::int32_t count,
                        const std::vector<std::uint16_t>& ids) {
  std::array<std::int32_t, 256> header{magic, version, count};
  std::string bytes(reinterpret_cast<const char*>(header.data()), 1024);
  return bytes.append(reinterpret_cast<const char*>(ids.data()), 2 * ids.size());
}

// Writes a shard whose ids count up from `first`.
path write_counting(const path& file, std::uint16_t first, Index tokens) {
  TokenShardWriter writer(file);
  std::vector<std::uint16_t> ids(static_cast<std::size_t>(tokens));
  std::iota(ids.begin(), ids.end(), first);
  writer.append(ids);
  writer.commit();
  return file;
}

struct Sample {
  std::vector<std::int32_t> tokens, targets;
  bool operator==(const Sample&) const = default;
};

Sample sample_of(const TokenSet& set, Index number) {
  Sample sample;
  sample.tokens.resize(static_cast<std::size_t>(set.sequence()));
  sample.targets = sample.tokens;
  set.sample(number, sample.tokens, sample.targets);
  return sample;
}

TEST(TokenShard, WriterProducesThePublishedLayout) {
  const ScratchDirectory scratch;
  const path file = scratch.path() / "a.bin";
  TokenShardWriter writer(file);
  writer.append(std::vector<std::uint16_t>{7, 300, 65535});
  writer.append_bytes(
      "\xff"
      "a");
  writer.commit();
  EXPECT_EQ(read_text(file), shard_bytes(20240520, 1, 5, {7, 300, 65535, 255, 97}));
  const TokenShard shard(file, 65536);
  EXPECT_THAT(shard.ids(), testing::ElementsAre(7, 300, 65535, 255, 97));
}

TEST(TokenShard, LongTextIsWrittenWhole) {
  const ScratchDirectory scratch;
  std::string text(10000, 'q');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i % 251);
  TokenShardWriter writer(scratch.path() / "a.bin");
  writer.append_bytes(text);
  writer.commit();
  const TokenShard shard(scratch.path() / "a.bin", 256);
  ASSERT_EQ(shard.tokens(), 10000);
  for (std::size_t i = 0; i < text.size(); ++i) ASSERT_EQ(shard.ids()[i], i % 251);
}

TEST(TokenShard, NamesFileFieldFoundAndExpected) {
  const ScratchDirectory scratch;
  const auto message = [&scratch](const std::string& bytes) {
    const path file = scratch.write("bad.bin", bytes);
    return thrown_message<InvalidArgument>([&] { TokenShard shard(file, 256); });
  };
  const std::string good = shard_bytes(20240520, 1, 2, {1, 2});
  EXPECT_THAT(message(shard_bytes(20240801, 1, 2, {1, 2})),
              HasSubstr("bad.bin: magic: found 20240801, expected 20240520"));
  EXPECT_THAT(message(shard_bytes(20240520, 7, 2, {1, 2})),
              HasSubstr("bad.bin: version: found 7, expected 1"));
  EXPECT_THAT(message(good.substr(0, 1026)), HasSubstr("file size: found 1026 bytes, expected 1028"));
  EXPECT_THAT(message(good + "x"), HasSubstr("file size: found 1029 bytes, expected 1028"));
  EXPECT_THAT(message(shard_bytes(20240520, 1, 0, {})),
              HasSubstr("token count: found 0, expected at least 1"));
  EXPECT_THAT(message(shard_bytes(20240520, 1, -3, {})), HasSubstr("token count: found -3"));
  EXPECT_THAT(message(""), HasSubstr("file size: found 0 bytes"));
  EXPECT_THAT(message(shard_bytes(20240520, 1, 3, {255, 256, 1})),
              HasSubstr("token 1: found id 256, expected less than the vocabulary of 256"));
}

TEST(TokenSet, BlocksDoNotOverlapAndTargetsAreShiftedByOne) {
  const ScratchDirectory scratch;
  // 3 blocks of 4 and one token left; 2 blocks and nothing left over (9 = 2 x 4 + 1).
  const std::vector<path> files{write_counting(scratch.path() / "a.bin", 0, 14),
                                write_counting(scratch.path() / "b.bin", 100, 9)};
  const TokenSet set(files, 256, 4, 1);
  ASSERT_EQ(set.blocks(), 5);
  EXPECT_EQ(set.tokens(), 23);
  const std::vector<std::int32_t> firsts{0, 4, 8, 100, 104};
  for (Index i = 0; i < 5; ++i) {
    std::vector<std::int32_t> tokens(4), targets(4);
    set.block(i, tokens, targets);
    for (std::int32_t t = 0; t < 4; ++t) {
      EXPECT_EQ(tokens[static_cast<std::size_t>(t)], firsts[static_cast<std::size_t>(i)] + t);
      EXPECT_EQ(targets[static_cast<std::size_t>(t)], firsts[static_cast<std::size_t>(i)] + t + 1);
    }
  }
}

TEST(TokenSet, EveryEpochVisitsEachBlockOnceInItsOwnOrder) {
  const ScratchDirectory scratch;
  const std::vector<path> files{write_counting(scratch.path() / "a.bin", 0, 401)};
  const TokenSet set(files, 65535, 4, 17);
  std::vector<std::vector<std::int32_t>> orders;
  for (Index epoch = 0; epoch < 3; ++epoch) {
    std::vector<std::int32_t> order;
    for (Index i = 0; i < 100; ++i) order.push_back(sample_of(set, 100 * epoch + i).tokens.front() / 4);
    EXPECT_EQ(std::set<std::int32_t>(order.begin(), order.end()).size(), 100u);
    orders.push_back(order);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
  EXPECT_FALSE(std::ranges::is_sorted(orders[0]));
  EXPECT_NE(sample_of(TokenSet(files, 65535, 4, 18), 0), sample_of(set, 0));
}

// A step of 12 samples read by 1, 2, 3 or 4 data-parallel processes is the same set of samples, because a
// sample has one number in the run and nothing else enters.
TEST(TokenSet, BatchIsIndependentOfTheNumberOfReaders) {
  const ScratchDirectory scratch;
  const std::vector<path> files{write_counting(scratch.path() / "a.bin", 0, 201)};
  constexpr Index kBatch = 12;
  for (const Index step : {0, 3, 41}) {
    std::vector<Sample> expected;
    const TokenSet reference(files, 65535, 4, 5);
    for (Index i = 0; i < kBatch; ++i) expected.push_back(sample_of(reference, step * kBatch + i));
    for (const Index readers : {2, 3, 4}) {
      std::vector<Sample> batch(kBatch);
      for (Index reader = readers - 1; reader >= 0; --reader) {
        const TokenSet own(files, 65535, 4, 5);  // as another process opens it
        for (Index i = reader; i < kBatch; i += readers) {
          batch[static_cast<std::size_t>(i)] = sample_of(own, step * kBatch + i);
        }
      }
      EXPECT_EQ(batch, expected) << readers << " readers, step " << step;
    }
  }
}

TEST(TokenSet, RefusesTextShorterThanOneBlock) {
  const ScratchDirectory scratch;
  const std::vector<path> files{write_counting(scratch.path() / "a.bin", 0, 8)};
  EXPECT_EQ(TokenSet(files, 256, 7, 1).blocks(), 1);
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { TokenSet(files, 256, 8, 1); }),
              HasSubstr("found 8 tokens, expected at least 9"));
}

TEST(PermutedIndex, IsAPermutationOfEveryExtent) {
  for (const Index extent : {1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4096, 4097}) {
    std::vector<bool> hit(static_cast<std::size_t>(extent), false);
    for (Index i = 0; i < extent; ++i) {
      const Index image = permuted_index(i, extent, 3, 2);
      ASSERT_GE(image, 0);
      ASSERT_LT(image, extent);
      ASSERT_FALSE(hit[static_cast<std::size_t>(image)]) << extent;
      hit[static_cast<std::size_t>(image)] = true;
    }
  }
}

// Position of block 0 over many epochs: uniform over 10 cells. Chi-square with 9 degrees of freedom
// exceeds 27.9 with probability 0.001; the draw is fixed by the seed.
TEST(PermutedIndex, SpreadsEvenly) {
  constexpr Index kEpochs = 2000;
  std::array<double, 10> counts{};
  for (Index epoch = 0; epoch < kEpochs; ++epoch) {
    counts[static_cast<std::size_t>(permuted_index(0, 10, 99, epoch))] += 1;
  }
  double chi_square = 0;
  for (const double count : counts) chi_square += (count - 200) * (count - 200) / 200;
  EXPECT_LT(chi_square, 27.9);
}

}  // namespace
}  // namespace lowband
