#include "trainer/message_fields.h"

#include "runtime/error.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

using Fields = std::map<std::string, std::string>;

std::string value_text(const Message& message, const FieldDescriptor* field, int index) {
  std::string text;
  google::protobuf::TextFormat::PrintFieldValueToString(message, field, index, &text);
  return text;
}

// Adds a singular field (index -1) or one element of a repeated one.
void add(Fields& fields, const std::string& name, const Message& message, const FieldDescriptor* field,
         int index) {
  if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
    fields[name] = value_text(message, field, index);
    return;
  }
  const auto* reflection = message.GetReflection();
  const Message& inner = index < 0 ? reflection->GetMessage(message, field)
                                   : reflection->GetRepeatedMessage(message, field, index);
  fields.merge(message_fields(inner, name));
}

}  // namespace

Fields message_fields(const Message& message, const std::string& prefix) {
  Fields fields;
  const auto* reflection = message.GetReflection();
  const auto* descriptor = message.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    const std::string name = cat(prefix, prefix.empty() ? "" : ".", field->name());
    if (!field->is_repeated()) {
      // A default counts as the value it stands for, whether it was written out or not.
      if (!field->has_presence() || field->has_default_value() || reflection->HasField(message, field))
        add(fields, name, message, field, -1);
      continue;
    }
    for (int e = 0; e < reflection->FieldSize(message, field); ++e) {
      if (field->is_map()) {
        // Entries come in an order of their own, so the key stands for the index.
        const Message& entry = reflection->GetRepeatedMessage(message, field, e);
        const std::string key = value_text(entry, field->message_type()->map_key(), -1);
        add(fields, cat(name, "[", key, "]"), entry, field->message_type()->map_value(), -1);
      } else {
        add(fields, cat(name, "[", e, "]"), message, field, e);
      }
    }
  }
  return fields;
}

}  // namespace lowband
