#pragma once

#include <string>
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
  /// Everything left over. Throws: InvalidArgument for a leftover that looks like an option.
  std::vector<std::string> positional();

 private:
  std::vector<std::string> words_;
};

}  // namespace lowband
