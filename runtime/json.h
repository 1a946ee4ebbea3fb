#pragma once

#include <string>

namespace google::protobuf {
class Message;
}

namespace lowband {

/// The message as one line of JSON: field names as in the .proto, 64-bit integers as numbers, enumerations by
/// name, non-finite numbers as null. Fields of proto3 messages without presence are always written.
std::string to_json(const google::protobuf::Message& message);

}  // namespace lowband
