#include "runtime/timeline.h"

#include "runtime/error.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Timeline, WritesEveryRangeAsValidJson) {
  const auto path = std::filesystem::path(testing::TempDir()) / "timeline.json";
  Timeline timeline(path.string(), 3);
  {
    const Timeline::Range outer(&timeline, "step", 0);
    const Timeline::Range inner(&timeline, "all_reduce", 4096);
  }
  timeline.write();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  google::protobuf::Struct parsed;
  ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(text.str(), &parsed).ok()) << text.str();
  const auto& events = parsed.fields().at("traceEvents").list_value();
  ASSERT_EQ(events.values_size(), 3);  // process name, then the inner range closes first
  const auto& inner = events.values(1).struct_value().fields();
  EXPECT_EQ(inner.at("name").string_value(), "all_reduce");
  EXPECT_EQ(inner.at("pid").number_value(), 3);
  EXPECT_EQ(inner.at("args").struct_value().fields().at("bytes").number_value(), 4096);
  const auto& outer = events.values(2).struct_value().fields();
  EXPECT_LE(outer.at("ts").number_value(), inner.at("ts").number_value());
  EXPECT_GE(outer.at("dur").number_value(), inner.at("dur").number_value());
}

TEST(Timeline, TellsThreadsApart) {
  const auto path = std::filesystem::path(testing::TempDir()) / "threads.json";
  Timeline timeline(path.string(), 0);
  const auto work = [&](std::string_view name) {
    for (int i = 0; i < 500; ++i) const Timeline::Range range(&timeline, name, 0);
  };
  work("first");
  std::thread other(work, "other");
  work("own");
  other.join();
  timeline.write();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  google::protobuf::Struct parsed;
  ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(text.str(), &parsed).ok());
  const auto& events = parsed.fields().at("traceEvents").list_value();
  ASSERT_EQ(events.values_size(), 1 + 3 * 500);
  for (int i = 1; i < events.values_size(); ++i) {
    const auto& event = events.values(i).struct_value().fields();
    EXPECT_EQ(event.at("tid").number_value(), event.at("name").string_value() == "other" ? 1 : 0);
  }
}

TEST(Timeline, DisabledRecordsNothingAndWritesNothing) {
  Timeline timeline;
  { const Timeline::Range range(&timeline, "step", 1); }
  { const Timeline::Range range(nullptr, "step", 1); }
  EXPECT_FALSE(timeline.enabled());
  EXPECT_NO_THROW(timeline.write());
}

TEST(Timeline, UnwritablePathIsAnError) {
  const Timeline timeline("/nonexistent-folder/timeline.json", 0);
  EXPECT_THROW(timeline.write(), IoError);
}

}  // namespace
}  // namespace lowband
