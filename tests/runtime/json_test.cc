#include "runtime/json.h"

#include "tests/runtime/test_message.pb.h"

#include <limits>

#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Json, WritesIntegersAsNumbersAndKeepsFieldNames) {
  test::TestMessage message;
  message.set_big(9007199254740993);  // 2^53 + 1: a double would lose it
  message.set_real(0.25);
  message.set_flag(true);
  message.set_text("a \"quoted\"\nline");
  message.set_colour(test::TestMessage::BLUE);
  message.add_list(3);
  message.add_list(-4);
  message.mutable_inner()->set_value(7);
  EXPECT_EQ(to_json(message),
            "{\"big\":9007199254740993,\"real\":0.25,\"flag\":true,\"text\":\"a \\\"quoted\\\"\\nline\","
            "\"colour\":\"BLUE\",\"list\":[3,-4],\"table\":{},\"inner\":{\"value\":7}}");
}

TEST(Json, NonFiniteNumbersAreNull) {
  test::TestMessage message;
  message.set_maybe(std::numeric_limits<double>::quiet_NaN());
  EXPECT_NE(to_json(message).find("\"maybe\":null"), std::string::npos);
}

TEST(Json, ProtobufReadsItBack) {
  test::TestMessage message;
  message.set_big(-5);
  message.set_text("\x01 tab\t");
  (*message.mutable_table())["x"] = 12;
  test::TestMessage back;
  ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(to_json(message), &back).ok());
  EXPECT_EQ(back.SerializeAsString(), message.SerializeAsString());
}

}  // namespace
}  // namespace lowband
