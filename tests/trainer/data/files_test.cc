#include "trainer/data/files.h"

#include "tests/trainer/scratch_directory.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

namespace lowband {
namespace {

using testing::HasSubstr;

TEST(DurableFile, AppearsOnlyWhenCommitted) {
  const ScratchDirectory scratch;
  const auto path = scratch.path() / "a.bin";
  {
    DurableFile file(path);
    file.append("hello world");
    file.overwrite(6, std::as_bytes(std::span("W", 1)));
    EXPECT_FALSE(std::filesystem::exists(path));
    file.commit();
  }
  EXPECT_EQ(read_text(path), "hello World");
  { DurableFile(path).append("never committed"); }
  EXPECT_EQ(read_text(path), "hello World");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(scratch.path()), {}), 1);
}

TEST(DurableFile, NamesThePathItCannotCreate) {
  const ScratchDirectory scratch;
  const auto path = scratch.path() / "missing" / "a.bin";
  EXPECT_THAT(thrown_message<IoError>([&] { DurableFile file(path); }),
              HasSubstr(path.string() + ": cannot create: No such file"));
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
  const ScratchDirectory scratch;
  const auto pipe = scratch.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT(thrown_message<IoError>([&] { MappedFile file(pipe); }), HasSubstr("no regular file"));
  EXPECT_THAT(thrown_message<IoError>([&] { MappedFile file(scratch.path() / "absent"); }),
              HasSubstr("absent: cannot open"));
}

TEST(RequireWritableDirectory, CreatesParentsAndNamesAFileInTheWay) {
  const ScratchDirectory scratch;
  require_writable_directory(scratch.path() / "a" / "b");
  EXPECT_TRUE(std::filesystem::is_directory(scratch.path() / "a" / "b"));
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path() / "a" / "b"));
  const auto file = scratch.write("c", "text");
  EXPECT_THAT(thrown_message<IoError>([&] { require_writable_directory(file / "d"); }), HasSubstr("c/d"));
}

}  // namespace
}  // namespace lowband
