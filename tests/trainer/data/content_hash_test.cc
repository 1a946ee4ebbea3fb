#include "trainer/data/content_hash.h"

#include <gtest/gtest.h>

namespace lowband {
namespace {

// Values of the xxhsum program: every length class of the algorithm (empty, tail bytes, 4, 8, stripes of 32).
TEST(ContentHash, EqualsPublishedValues) {
  EXPECT_EQ(content_hash(""), 0xEF46DB3751D8E999u);
  EXPECT_EQ(content_hash("a"), 0xD24EC4F1A98C6E5Bu);
  EXPECT_EQ(content_hash("abc"), 0x44BC2CF5AD770999u);
  EXPECT_EQ(content_hash("The quick brown fox jumps over the lazy dog"), 0x0B242D361FDA71BCu);
}

TEST(ContentHash, SeesEveryBit) {
  std::string text(77, 'x');
  const std::uint64_t clean = content_hash(text);
  for (char& c : text) {
    for (int bit = 0; bit < 8; ++bit) {
      c = static_cast<char>(c ^ (1 << bit));
      EXPECT_NE(content_hash(text), clean);
      c = static_cast<char>(c ^ (1 << bit));
    }
  }
}

TEST(ContentHash, PrintsSixteenDigits) { EXPECT_EQ(hash_text(0x00ab00000000001f), "00ab00000000001f"); }

}  // namespace
}  // namespace lowband
