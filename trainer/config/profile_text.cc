#include "trainer/config/run_config.h"

#include <charconv>

namespace lowband {

namespace {

/// What stands before and after the first `mark`; the second is empty without one.
std::pair<std::string_view, std::string_view> split_at(std::string_view text, char mark) {
  const std::size_t at = text.find(mark);
  if (at == std::string_view::npos) return {text, {}};
  return {text.substr(0, at), text.substr(at + 1)};
}

/// False unless all of `text` is a number.
template <class Number>
bool read_number(std::string_view text, Number& number) {
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  return status == std::errc() && end == text.data() + text.size();
}

/// Reads a profile without "@"; what it is matched to, if anything, stands in `profile` already. False when
/// the text is none.
bool read_rule(std::string_view text, RunConfig::Profile& profile) {
  using Profile = RunConfig::Profile;
  std::int64_t integer = 0;
  if (profile.has_match_to() && (text == "uniform" || text == "fraction")) {
    profile.set_kind(text == "uniform" ? Profile::UNIFORM : Profile::FRACTION);
    return true;
  }
  if (const auto [kind, factor_rank] = split_at(text, ':'); kind == "uniform") {
    profile.set_kind(Profile::UNIFORM);
    if (!read_number(factor_rank, integer)) return false;
    profile.set_rank(integer);
    return true;
  }
  if (const auto [kind, fraction] = split_at(text, ':'); kind == "fraction") {
    profile.set_kind(Profile::FRACTION);
    const auto [numerator, denominator] = split_at(fraction, '/');
    if (!read_number(numerator, integer)) return false;
    profile.set_numerator(integer);
    if (!read_number(denominator, integer)) return false;
    profile.set_denominator(integer);
    return true;
  }
  if (const auto [kind, scale] = split_at(text, '*'); kind == "structural" || kind == "inverted") {
    profile.set_kind(kind == "inverted" ? Profile::INVERTED : Profile::STRUCTURAL);
    if (kind.size() == text.size()) return true;
    double number = 0;
    if (!read_number(scale, number)) return false;
    profile.set_scale(number);
    return true;
  }
  return false;
}

}  // namespace

RunConfig::Profile parse_profile(std::string_view text) {
  RunConfig::Profile profile;
  const auto [rule, reference] = split_at(text, '@');
  if (rule.size() != text.size()) *profile.mutable_match_to() = parse_profile(reference);
  LB_EXPECTS(
      read_rule(rule, profile), "profile: found ", text.empty() ? "nothing" : text,
      ", expected uniform:RANK, fraction:N/D, structural, inverted, structural*SCALE or inverted*SCALE, "
      "with @PROFILE to match it to another");
  return profile;
}

}  // namespace lowband
