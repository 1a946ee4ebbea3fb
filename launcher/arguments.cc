#include "launcher/arguments.h"

#include "runtime/error.h"

#include <algorithm>
#include <charconv>
#include <system_error>
#include <utility>

namespace lowband {

bool Arguments::flag(const std::string& name) {
  const auto removed = std::erase(words_, "--" + name);
  return removed > 0;
}

std::vector<std::string> Arguments::options(const std::string& name) {
  const std::string word = "--" + name;
  std::vector<std::string> values;
  for (auto it = words_.begin(); it != words_.end();) {
    if (it->starts_with(word + "=")) {
      values.push_back(it->substr(word.size() + 1));
      it = words_.erase(it);
    } else if (*it == word) {
      LB_EXPECTS(it + 1 != words_.end(), word, ": found nothing after it, expected a value");
      values.push_back(*(it + 1));
      it = words_.erase(it, it + 2);
    } else {
      ++it;
    }
  }
  return values;
}

std::string Arguments::option(const std::string& name, const std::string& fallback) {
  const auto values = options(name);
  LB_EXPECTS(values.size() <= 1, "--", name, ": found ", values.size(), " values, expected one");
  return values.empty() ? fallback : values.front();
}

std::string Arguments::word() {
  if (words_.empty() || words_.front().starts_with("--")) return "";
  std::string first = std::move(words_.front());
  words_.erase(words_.begin());
  return first;
}

std::vector<std::string> Arguments::positional() {
  for (const std::string& word : words_) {
    LB_EXPECTS(!word.starts_with("--"), "found the argument '", word,
               "', expected an option of this command (lowband --help lists them)");
  }
  return std::exchange(words_, {});
}

int count_of(std::string_view name, std::string_view text) {
  constexpr int kLargest = 4096;
  int count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  LB_EXPECTS(error == std::errc() && end == text.data() + text.size() && count >= 1 && count <= kLargest,
             name, ": found ", text.empty() ? "nothing" : text, ", expected a number from 1 to ", kLargest);
  return count;
}

}  // namespace lowband
