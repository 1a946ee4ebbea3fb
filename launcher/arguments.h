#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// The words after a subcommand, taken apart one kind at a time. What nobody took is an error.
///
/// Options are written "--name value" or "--name=value"; flags "--name"; the rest is positional.
class Arguments {
 public:
  explicit Arguments(std::vector<std::string> words) : words_(std::move(words)) {}

  /// True when the flag was given (any number of times).
  bool flag(const std::string& name);
  /// The value of an option, or `fallback`. Throws: InvalidArgument when given twice or without a value.
  std::string option(const std::string& name, const std::string& fallback = "");
  /// All values of an option that may be repeated.
  std::vector<std::string> options(const std::string& name);
  /// Takes the first word away; empty when there is none, or it looks like an option.
  std::string word();
  /// Adds "--name=value", as if it had been given.
  void add(const std::string& name, const std::string& value) { words_.push_back("--" + name + "=" + value); }
  /// Everything left over. Throws: InvalidArgument for a leftover that looks like an option.
  std::vector<std::string> positional();

 private:
  std::vector<std::string> words_;
};

/// `text` as the whole number that `name` stands for. Throws: InvalidArgument when it is none of 1 to 4096,
/// far above any machine's cores: a million threads would take its memory.
int count_of(std::string_view name, std::string_view text);

}  // namespace lowband
