#include "trainer/config/run_config.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

namespace lowband {

namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::TextFormat;

// ---- Names of fields ----

/// Levenshtein distance.
Index edit_distance(std::string_view a, std::string_view b) {
  std::vector<Index> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<Index>(j);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    Index diagonal = row[0];
    row[0] = static_cast<Index>(i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const Index replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

bool is_section(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field.is_map();
}

void add_paths(const Descriptor& message, const std::string& prefix, std::vector<std::string>& paths) {
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    paths.push_back(prefix + field.name());
    // A profile holds a profile; its fields are listed once.
    if (is_section(field) && field.message_type() != &message)
      add_paths(*field.message_type(), paths.back() + ".", paths);
  }
}

std::string_view last_name(std::string_view path) { return path.substr(path.rfind('.') + 1); }

/// The field whose path is nearest to `path`, or whose own name is and which only stands elsewhere.
std::string nearest_field(std::string_view path) {
  constexpr Index kElsewhere = 2;  // edits: as much as two letters of the path
  std::vector<std::string> paths;
  add_paths(*RunConfig::descriptor(), "", paths);
  return std::ranges::min(paths, {}, [path](const std::string& candidate) {
    return std::min(edit_distance(path, candidate),
                    edit_distance(last_name(path), last_name(candidate)) + kElsewhere);
  });
}

[[noreturn]] void throw_unknown_field(std::string_view where, std::string_view path) {
  throw InvalidArgument(
      cat(where, path, ": found an unknown field, expected for example ", nearest_field(path)));
}

const FieldDescriptor* find_field(std::string_view path) {
  const Descriptor* message = RunConfig::descriptor();
  while (true) {
    const std::size_t dot = path.find('.');
    const FieldDescriptor* field =
        message != nullptr ? message->FindFieldByName(std::string(path.substr(0, dot))) : nullptr;
    if (field == nullptr || dot == std::string_view::npos) return field;
    message = field->message_type();
    path.remove_prefix(dot + 1);
  }
}

std::string expected_value(const FieldDescriptor& field) {
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64:
      return cat("an integer of ", field.cpp_type() == FieldDescriptor::CPPTYPE_INT32 ? 32 : 64, " bits");
    case FieldDescriptor::CPPTYPE_UINT32:
    case FieldDescriptor::CPPTYPE_UINT64:
      return "a non-negative integer of 64 bits";
    case FieldDescriptor::CPPTYPE_FLOAT:
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return "a number";
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true or false";
    case FieldDescriptor::CPPTYPE_ENUM: {
      std::string names;
      for (int i = 0; i < field.enum_type()->value_count(); ++i)
        names += (i == 0 ? "" : ", ") + field.enum_type()->value(i)->name();
      return "one of " + names;
    }
    case FieldDescriptor::CPPTYPE_STRING:
      return "a string in quotes";
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return "fields in braces";
  }
  return "";
}

// ---- Positions in text ----

/// Keeps the first error of a parse; zero-based line and column.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (message_.empty()) line_ = line, column_ = column, message_ = message;
  }
  int line() const { return line_; }
  int column() const { return column_; }
  const std::string& message() const { return message_; }

 private:
  int line_ = 0;
  int column_ = 0;
  std::string message_;
};

/// Index of a position that protobuf's tokenizer reports: tabs advance its columns to multiples of 8.
std::size_t offset_of(std::string_view text, int line, int column) {
  std::size_t i = 0;
  for (; line > 0 && i < text.size(); ++i)
    if (text[i] == '\n') --line;
  for (int at = 0; at < column && i < text.size(); ++i) at += text[i] == '\t' ? 8 - at % 8 : 1;
  return i;
}

/// The field that a reader of text format is at.
struct OpenField {
  std::string path;       // dotted
  std::size_t value = 0;  // where its value begins, after the colon
};

/// Reads `text` up to `end`: names before a colon or a brace, braces, strings and comments.
OpenField field_at(std::string_view text, std::size_t end) {
  std::vector<std::string> sections;
  std::string name;
  std::size_t value = 0;
  bool in_value = false;  // words are values until one ended, or the list that began has ended
  bool in_list = false;
  const auto is_word = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '.' || c == '-' || c == '+';
  };
  for (std::size_t i = 0; i < end; ++i) {
    const char c = text[i];
    if (c == '#') {
      i = std::min(text.find('\n', i), end);
    } else if (c == '"' || c == '\'') {
      for (++i; i < end && text[i] != c; ++i)
        if (text[i] == '\\') ++i;
      in_value = in_list;
    } else if (c == ':') {
      value = i + 1;
      in_value = true;
    } else if (c == '[' || c == ']') {
      in_list = in_value = c == '[';
    } else if (c == '{' || c == '<') {
      sections.push_back(std::exchange(name, ""));
      in_value = in_list = false;
    } else if (c == '}' || c == '>') {
      if (!sections.empty()) sections.pop_back();
      name.clear();
    } else if (is_word(c)) {
      const std::size_t begin = i;
      while (i + 1 < end && is_word(text[i + 1])) ++i;
      if (!in_value) name = text.substr(begin, i + 1 - begin), value = i + 1;
      in_value = in_list;
    }
  }
  std::string path;
  for (const std::string& section : sections) path += section + ".";
  return {path + name, value};
}

std::string_view first_word(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t\n:"), text.size()));
  return text.substr(0, text.find_first_of(" \t\n;,}#"));
}

/// Says of a failed parse where it stopped, at which field, what was found and what was expected. The last
/// two are protobuf's words when the text is not even well formed.
[[noreturn]] void throw_parse_error(std::string_view text, std::string_view source, const FirstError& error) {
  const std::string where = cat(source, ":", error.line() + 1, ":", error.column() + 1, ": ");
  const OpenField open = field_at(text, offset_of(text, error.line(), error.column()));
  const std::string& message = error.message();
  const auto says = [&message](std::string_view part) { return message.find(part) != std::string::npos; };
  if (says("has no field named")) throw_unknown_field(where, open.path);
  const FieldDescriptor* field = find_field(open.path);
  const bool wrong_value = says("Expected double") || says("Expected integer") || says("Expected string") ||
                           says("Invalid value for boolean") || says("Unknown enumeration value") ||
                           says("out of range") || says("Expected \"{\"");
  if (field != nullptr && wrong_value) {
    throw InvalidArgument(cat(where, open.path, ": found ", first_word(text.substr(open.value)),
                              ", expected ", expected_value(*field)));
  }
  throw InvalidArgument(cat(where, field != nullptr ? open.path + ": " : "", message));
}

// ---- One field ----

/// Parses `value` into `field` of `message`, which is left in an unspecified state on failure. An empty value
/// takes a section out.
bool assign(Message& message, const FieldDescriptor& field, std::string_view value) {
  const auto& reflection = *message.GetReflection();
  reflection.ClearField(&message, &field);
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && value.empty()) return true;
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_STRING && field.is_repeated()) {
    for (std::size_t begin = 0, end = 0; end != std::string_view::npos; begin = end + 1) {
      end = value.find(',', begin);
      reflection.AddString(&message, &field, std::string(value.substr(begin, end - begin)));
    }
    return true;
  }
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
    reflection.SetString(&message, &field, std::string(value));
    return true;
  }
  FirstError error;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  return parser.ParseFieldValueFromString(std::string(value), &field, &message);
}

}  // namespace

RunConfig load_run_config(const std::string& path) {
  errno = 0;
  std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  if (!file || !text) throw IoError(cat(path, ": cannot be read: ", std::strerror(errno)));
  return parse_run_config(text.str(), path);
}

RunConfig parse_run_config(std::string_view text, std::string_view source_name) {
  RunConfig config;
  FirstError error;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(std::string(text), &config)) throw_parse_error(text, source_name, error);
  return config;
}

void apply_override(RunConfig& config, std::string_view assignment) {
  const std::size_t equals = assignment.find('=');
  LB_EXPECTS(equals != std::string_view::npos && equals > 0, "override: found ", assignment,
             ", expected field=value, for example optimizer.learning_rate=0.02");
  const std::string_view path = assignment.substr(0, equals), value = assignment.substr(equals + 1);
  if (find_field(path) == nullptr) throw_unknown_field("", path);

  RunConfig changed = config;
  Message* message = &changed;
  std::string_view rest = path;
  for (std::size_t dot = rest.find('.'); dot != std::string_view::npos; dot = rest.find('.')) {
    const FieldDescriptor* section =
        message->GetDescriptor()->FindFieldByName(std::string(rest.substr(0, dot)));
    LB_EXPECTS(!section->is_repeated(), path,
               ": found an override, expected the table in the configuration file");
    message = message->GetReflection()->MutableMessage(message, section);
    rest.remove_prefix(dot + 1);
  }
  const FieldDescriptor& field = *message->GetDescriptor()->FindFieldByName(std::string(rest));
  LB_EXPECTS(!field.is_map(), path, ": found an override, expected the table in the configuration file");
  LB_EXPECTS(assign(*message, field, value), path, ": found ", value.empty() ? "nothing" : value,
             ", expected ", expected_value(field));
  config = std::move(changed);
}

}  // namespace lowband
