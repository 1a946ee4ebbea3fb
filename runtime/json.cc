#include "runtime/json.h"

#include <cmath>
#include <cstdio>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

namespace lowband {

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\r':
        out += "\\r";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          char escape[8];
          std::snprintf(escape, sizeof escape, "\\u%04x", c);
          out += escape;
        } else {
          out += c;
        }
    }
  }
  return out + '"';
}

namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

std::string number(double value, int digits) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

// The value of a singular field (index < 0) or of one element of a repeated one.
std::string value_text(const Message& message, const FieldDescriptor* field, int index) {
  const auto* reflection = message.GetReflection();
  const bool one = index < 0;
  switch (field->cpp_type()) {
#define LB_FIELD(TYPE) \
  (one ? reflection->Get##TYPE(message, field) : reflection->GetRepeated##TYPE(message, field, index))
    case FieldDescriptor::CPPTYPE_INT32:
      return std::to_string(LB_FIELD(Int32));
    case FieldDescriptor::CPPTYPE_INT64:
      return std::to_string(LB_FIELD(Int64));
    case FieldDescriptor::CPPTYPE_UINT32:
      return std::to_string(LB_FIELD(UInt32));
    case FieldDescriptor::CPPTYPE_UINT64:
      return std::to_string(LB_FIELD(UInt64));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return number(LB_FIELD(Double), 12);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return number(static_cast<double>(LB_FIELD(Float)), 8);
    case FieldDescriptor::CPPTYPE_BOOL:
      return LB_FIELD(Bool) ? "true" : "false";
    case FieldDescriptor::CPPTYPE_ENUM:
      return json_string(LB_FIELD(Enum)->name());
    case FieldDescriptor::CPPTYPE_STRING:
      return json_string(LB_FIELD(String));
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return to_json(LB_FIELD(Message));
#undef LB_FIELD
  }
  return "null";
}

std::string map_text(const Message& message, const FieldDescriptor* field) {
  const auto* reflection = message.GetReflection();
  const auto* key = field->message_type()->map_key();
  const auto* value = field->message_type()->map_value();
  std::string out = "{";
  for (int i = 0; i < reflection->FieldSize(message, field); ++i) {
    const Message& entry = reflection->GetRepeatedMessage(message, field, i);
    std::string name = value_text(entry, key, -1);
    if (name.front() != '"') name = json_string(name);
    out += (i == 0 ? "" : ",") + name + ":" + value_text(entry, value, -1);
  }
  return out + "}";
}

std::string list_text(const Message& message, const FieldDescriptor* field) {
  std::string out = "[";
  for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
    out += (i == 0 ? "" : ",") + value_text(message, field, i);
  }
  return out + "]";
}

}  // namespace

std::string to_json(const Message& message) {
  const auto* descriptor = message.GetDescriptor();
  std::string out = "{";
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    // A field with presence (optional, message) that was not set does not exist.
    if (field->has_presence() && !message.GetReflection()->HasField(message, field)) continue;
    if (out.size() > 1) out += ",";
    out += json_string(field->name()) + ":";
    out += field->is_map()        ? map_text(message, field)
           : field->is_repeated() ? list_text(message, field)
                                  : value_text(message, field, -1);
  }
  return out + "}";
}

}  // namespace lowband
