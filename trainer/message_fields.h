#pragma once

#include <map>
#include <string>

namespace google::protobuf {
class Message;
}

namespace lowband {

/// Every field of `message` that is set or has a default, by its dotted name: "model.width" -> "256".
/// Elements of lists are "ranks[0]", of maps "ranks[key]".
std::map<std::string, std::string> message_fields(const google::protobuf::Message& message,
                                                  const std::string& prefix);

}  // namespace lowband
