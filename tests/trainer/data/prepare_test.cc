#include "trainer/data/prepare.h"

#include "tests/trainer/scratch_directory.h"
#include "trainer/data/token_shards.h"

#include <algorithm>

#include <gmock/gmock.h>
#include <sys/stat.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

std::string shard_text(const path& file) {
  const TokenShard shard(file, 256);
  std::string text;
  for (const std::uint16_t id : shard.ids()) text.push_back(static_cast<char>(id));
  return text;
}

std::vector<std::string> split_documents(const std::string& text) {
  std::vector<std::string> documents{""};
  for (const char c : text) {
    if (c == '\0') {
      documents.emplace_back();
    } else {
      documents.back().push_back(c);
    }
  }
  return documents;
}

// Twenty documents of different text and sizes 100, 101, ... bytes, and a folder with a link beside it.
struct Corpus {
  ScratchDirectory scratch;
  std::vector<std::string> texts;

  Corpus() {
    for (std::size_t i = 0; i < 20; ++i) {
      std::string text = cat("document ", i, " ");
      text.resize(100 + i, static_cast<char>('a' + i));
      texts.push_back(text);
      scratch.write(cat("perl-5.36.0/", i % 2 ? "Zoo" : "animal", "/doc", i, ".pod"), text);
    }
    scratch.write("perl-5.36.0/readme.txt", "not a pod file");
    std::filesystem::create_directory_symlink("perl-5.36.0", scratch.path() / "perl-5.36");
    std::filesystem::create_symlink("animal", scratch.path() / "perl-5.36.0" / "link");
    std::filesystem::create_symlink("doc0.pod", scratch.path() / "perl-5.36.0" / "animal" / "link.pod");
  }

  PrepareOptions options(const std::string& output = "out") const {
    return {{scratch.path() / "perl-5.36.0"}, ".pod", scratch.path() / output, 0.1};
  }
};

TEST(PrepareCorpus, HoldsOutWholeDocumentsAndLosesNothing) {
  const Corpus corpus;
  const PrepareReport report = prepare_corpus(corpus.options());
  const auto train = split_documents(shard_text(report.train_shard));
  const auto validation = split_documents(shard_text(report.validation_shard));
  EXPECT_EQ(std::ssize(train), report.train_documents);
  EXPECT_EQ(std::ssize(validation), report.validation_documents);
  EXPECT_FALSE(report.reused);
  EXPECT_EQ(report.duplicates, 0);
  std::vector<std::string> all = train;
  all.insert(all.end(), validation.begin(), validation.end());
  EXPECT_THAT(all, testing::UnorderedElementsAreArray(corpus.texts));
  // A tenth of 20 documents of about 110 bytes is 2 of them, or 1 if the sizes are unlucky.
  EXPECT_THAT(report.validation_documents, testing::AllOf(testing::Ge(1), testing::Le(2)));
}

TEST(PrepareCorpus, SortsByPathAsTheCLocaleDoes) {
  const Corpus corpus;
  const auto train = split_documents(shard_text(prepare_corpus(corpus.options()).train_shard));
  // "Zoo" (odd numbers) before "animal": capitals first. "doc10" before "doc2".
  std::vector<std::size_t> numbers;
  for (const std::string& text : train) numbers.push_back(std::stoul(text.substr(9)));
  const std::vector<std::size_t> order{1, 11, 13, 15, 17, 19, 3, 5, 7, 9, 0, 10, 12, 14, 16, 18, 2, 4, 6, 8};
  EXPECT_TRUE(std::ranges::is_sorted(numbers, {}, [&order](std::size_t number) {
    return std::ranges::find(order, number) - order.begin();
  }));
}

TEST(PrepareCorpus, LinksAndRepeatedPathsBringNothingTwice) {
  const Corpus corpus;
  const PrepareReport once = prepare_corpus(corpus.options("once"));
  PrepareOptions options = corpus.options("twice");
  options.corpus.push_back(corpus.scratch.path() / "perl-5.36");  // the same folder through a link
  options.corpus.push_back(corpus.scratch.path() / "perl-5.36" / "animal" / "doc0.pod");
  const PrepareReport twice = prepare_corpus(options);
  EXPECT_EQ(read_text(once.train_shard), read_text(twice.train_shard));
  EXPECT_EQ(read_text(once.validation_shard), read_text(twice.validation_shard));
}

TEST(PrepareCorpus, DuplicateContentIsTakenOnce) {
  const Corpus corpus;
  corpus.scratch.write("perl-5.36.0/zz-copy.pod", corpus.texts[4]);
  const PrepareReport report = prepare_corpus(corpus.options());
  EXPECT_EQ(report.duplicates, 1);
  EXPECT_EQ(report.train_documents + report.validation_documents, 20);
}

TEST(PrepareCorpus, ReusesItsOutputUntilAnInputChanges) {
  const Corpus corpus;
  const PrepareReport first = prepare_corpus(corpus.options());
  const auto written = std::filesystem::last_write_time(first.train_shard);
  const PrepareReport second = prepare_corpus(corpus.options());
  EXPECT_TRUE(second.reused);
  EXPECT_EQ(second.train_tokens, first.train_tokens);
  EXPECT_EQ(std::filesystem::last_write_time(first.train_shard), written);

  std::string changed = corpus.texts[3];
  changed.back() = '!';  // same size
  corpus.scratch.write("perl-5.36.0/Zoo/doc3.pod", changed);
  const PrepareReport third = prepare_corpus(corpus.options());
  EXPECT_FALSE(third.reused);
  EXPECT_THAT(shard_text(third.train_shard) + shard_text(third.validation_shard), HasSubstr(changed));
}

TEST(PrepareCorpus, DamagedOutputIsMadeAgain) {
  const Corpus corpus;
  const PrepareReport first = prepare_corpus(corpus.options());
  const std::string good = read_text(first.train_shard);
  std::string bad = good;
  bad[1500] = static_cast<char>(bad[1500] ^ 1);
  corpus.scratch.write("out/train.bin", bad);
  EXPECT_FALSE(prepare_corpus(corpus.options()).reused);
  EXPECT_EQ(read_text(first.train_shard), good);
}

TEST(PrepareCorpus, SingleDocumentIsCutBehindALine) {
  const ScratchDirectory scratch;
  std::string text;
  for (int line = 0; line < 100; ++line) text += cat("line number ", line, "\n");
  const path file = scratch.write("big.txt", text);
  const PrepareReport report = prepare_corpus({{file}, "", scratch.path() / "out", 0.05});
  const std::string train = shard_text(report.train_shard);
  const std::string validation = shard_text(report.validation_shard);
  EXPECT_EQ(train + validation, text);
  EXPECT_EQ(train.back(), '\n');
  EXPECT_NEAR(static_cast<double>(validation.size()) / static_cast<double>(text.size()), 0.05, 0.015);
}

TEST(PrepareCorpus, SingleLineIsCutInTheMiddleOfIt) {
  const ScratchDirectory scratch;
  const path file = scratch.write("big.txt", "title\n" + std::string(1000, 'x'));
  const PrepareReport report = prepare_corpus({{file}, "", scratch.path() / "out", 0.05});
  EXPECT_EQ(report.validation_tokens, 50);
  EXPECT_EQ(report.train_tokens, 956);
}

TEST(PrepareCorpus, TwoDocumentsAreOneEach) {
  const ScratchDirectory scratch;
  scratch.write("in/a", "a longer text");
  scratch.write("in/b", "short");
  const PrepareReport report = prepare_corpus({{scratch.path() / "in"}, "", scratch.path() / "out", 0.05});
  EXPECT_EQ(shard_text(report.validation_shard), "short");
  EXPECT_EQ(shard_text(report.train_shard), "a longer text");
}

TEST(PrepareCorpus, BadInputWritesNothing) {
  const ScratchDirectory scratch;
  std::filesystem::create_directory(scratch.path() / "void");
  const path empty = scratch.write("empty.txt", "");
  const path binary = scratch.write("binary.txt", std::string("ab\0c", 4));
  const path pipe = scratch.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const auto options = [&](std::vector<path> corpus, double fraction = 0.05) {
    return PrepareOptions{std::move(corpus), "", scratch.path() / "out", fraction};
  };
  const auto invalid = [](const PrepareOptions& bad) {
    return thrown_message<InvalidArgument>([&] { prepare_corpus(bad); });
  };
  const auto unreadable = [](const PrepareOptions& bad) {
    return thrown_message<IoError>([&] { prepare_corpus(bad); });
  };
  EXPECT_THAT(invalid(options({})), HasSubstr("corpus: found no path"));
  EXPECT_THAT(invalid(options({scratch.path() / "void"})), HasSubstr("corpus: found no text in 0 files"));
  EXPECT_THAT(invalid(options({empty})), HasSubstr("corpus: found no text in 1 files"));
  EXPECT_THAT(invalid(options({binary})), HasSubstr("binary.txt: found the byte 0x00 at offset 2"));
  EXPECT_THAT(invalid(options({scratch.write("one.txt", "x")})), HasSubstr("one.txt: found a single byte"));
  EXPECT_THAT(invalid(options({binary}, 0.6)), HasSubstr("validation_fraction: found 0.6"));
  EXPECT_THAT(unreadable(options({scratch.path() / "absent.txt"})), HasSubstr("absent.txt: cannot open"));
  EXPECT_THAT(unreadable(options({pipe})), HasSubstr("no regular file"));
  EXPECT_FALSE(std::filesystem::exists(scratch.path() / "out"));
}

TEST(PrepareCorpus, UnwritableOutputNamesThePath) {
  const ScratchDirectory scratch;
  const path text = scratch.write("text.txt", "some text\nmore text\n");
  const path blocked = scratch.write("file", "in the way");
  EXPECT_THAT(thrown_message<IoError>([&] {
                prepare_corpus({{text}, "", blocked / "out", 0.05});
              }),
              HasSubstr("file/out: cannot create"));
}

}  // namespace
}  // namespace lowband
