#pragma once

#include <string>
#include <string_view>

namespace google::protobuf {
class Message;
}

namespace lowband {

/// The message as one line of JSON: field names as in the .proto, 64-bit integers as numbers, enumerations by
/// name, non-finite numbers as null. Fields of proto3 messages without presence are always written.
std::string to_json(const google::protobuf::Message& message);

/// The text in quotes, with what JSON does not allow in them escaped.
std::string json_string(std::string_view text);

}  // namespace lowband
