#include "trainer/progress.h"

#include "runtime/error.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ostream>
#include <vector>

#include <sys/ioctl.h>
#include <unistd.h>

namespace lowband {
namespace {

constexpr int kWidestBar = 30;
constexpr int kNarrowestBar = 5;
constexpr int kPlainColumns = 100;

template <class... Values>
std::string printed(const char* format, Values... values) {
  std::array<char, 96> text;
  std::snprintf(text.data(), text.size(), format, values...);
  return text.data();
}

std::string bar(Index step, Index total_steps, int cells) {
  const auto filled = static_cast<std::size_t>(total_steps > 0 ? cells * step / total_steps : 0);
  return std::string(filled, '#') + std::string(static_cast<std::size_t>(cells) - filled, '.');
}

}  // namespace

std::string format_quantity(double value, std::string_view unit) {
  constexpr std::array kPrefixes{"", "k", "M", "G", "T", "P"};
  std::size_t prefix = 0;
  // 999.5 and more would round to four digits.
  while (std::abs(value) >= 999.5 && prefix + 1 < kPrefixes.size()) {
    value /= 1000;
    ++prefix;
  }
  const double size = std::abs(value);
  const bool whole = prefix == 0 && std::abs(size - std::round(size)) < 1e-6;
  const int decimals = whole || size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return cat(printed("%.*f", decimals, value), unit.empty() ? "" : " ", kPrefixes[prefix], unit);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds)) return "-:--";
  const auto whole = static_cast<long long>(std::llround(std::max(0.0, seconds)));
  if (whole < 3600) return printed("%lld:%02lld", whole / 60, whole % 60);
  return printed("%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string format_progress(const ProgressState& state, int columns) {
  const std::string steps = printed("step %lld/%lld", static_cast<long long>(state.step),
                                    static_cast<long long>(state.total_steps));
  std::vector<std::string> fields{
      printed("loss %.3f", state.loss), format_quantity(state.tokens_per_second) + " tok/s",
      format_quantity(state.bytes_per_step, "B/step"), format_duration(state.seconds_left) + " left"};
  if (state.exposed_fraction) fields.push_back(printed("%.0f %% exposed", 100 * *state.exposed_fraction));
  std::string joined;
  for (const std::string& field : fields) {
    std::string longer = joined;
    longer.append(joined.empty() ? " " : " | ").append(field);
    if (std::ssize(steps) + std::ssize(longer) > columns) break;
    joined = longer;
  }
  const int cells = std::min<int>(kWidestBar, columns - static_cast<int>(steps.size() + joined.size()) - 3);
  if (cells < kNarrowestBar) return (steps + joined).substr(0, static_cast<std::size_t>(columns));
  return steps + " [" + bar(state.step, state.total_steps, cells) + "]" + joined;
}

int terminal_columns() {
  if (const char* told = std::getenv("LOWBAND_TERMINAL_COLUMNS")) return std::max(0, std::atoi(told));
  winsize size{};
  if (::isatty(STDOUT_FILENO) == 0 || ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0) return 0;
  return size.ws_col > 0 ? size.ws_col : 80;
}

Progress::Progress(std::ostream& out, int columns, Index completed_steps, Index total_steps,
                   std::chrono::seconds plain_interval, Clock::time_point now)
    : out_(&out),
      columns_(columns),
      first_step_(completed_steps),
      begin_(now),
      plain_interval_(plain_interval),
      last_shown_(now) {
  state_.step = completed_steps;
  state_.total_steps = total_steps;
}

void Progress::update(Index step, double loss, double tokens, double seconds, double bytes,
                      std::optional<double> exposed_seconds, Clock::time_point now) {
  constexpr double kKeep = 0.95;
  mean_seconds_ = kKeep * mean_seconds_ + (1 - kKeep) * seconds;
  mean_tokens_ = kKeep * mean_tokens_ + (1 - kKeep) * tokens;
  state_.step = step;
  state_.loss = loss;
  // Both means lack the same factor 1 - 0.95^n.
  state_.tokens_per_second = mean_seconds_ > 0 ? mean_tokens_ / mean_seconds_ : 0;
  state_.bytes_per_step = bytes;
  if (exposed_seconds) {
    mean_exposed_seconds_ = kKeep * mean_exposed_seconds_ + (1 - kKeep) * *exposed_seconds;
    state_.exposed_fraction = mean_seconds_ > 0 ? mean_exposed_seconds_ / mean_seconds_ : 0;
  }
  const double elapsed_seconds = std::chrono::duration<double>(now - begin_).count();
  state_.seconds_left = elapsed_seconds * static_cast<double>(state_.total_steps - step) /
                        static_cast<double>(std::max<Index>(1, step - first_step_));

  if (columns_ > 0) {
    // One column stays free: writing the last one makes some terminals wrap.
    std::string line = format_progress(state_, columns_ - 1);
    line.resize(static_cast<std::size_t>(columns_ - 1), ' ');
    *out_ << '\r' << line << std::flush;
    line_open_ = true;
  } else if (now - last_shown_ >= plain_interval_ || step == state_.total_steps || step == first_step_ + 1) {
    *out_ << format_progress(state_, kPlainColumns) << std::endl;
    last_shown_ = now;
  }
}

void Progress::say(std::string_view line) {
  if (line_open_) {
    *out_ << '\r' << std::string(static_cast<std::size_t>(columns_ - 1), ' ') << '\r';
    line_open_ = false;
  }
  *out_ << line << std::endl;
}

void Progress::finish() {
  if (line_open_) *out_ << std::endl;
  line_open_ = false;
}

}  // namespace lowband
