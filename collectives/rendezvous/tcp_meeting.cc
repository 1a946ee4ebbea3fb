#include "collectives/rendezvous/tcp_rendezvous.h"
#include "runtime/error.h"

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <system_error>

namespace lowband {
namespace {

std::string_view variable(const char* name, std::string_view expected) {
  const char* const text = std::getenv(name);
  LB_EXPECTS(text != nullptr && *text != '\0', name, ": found nothing in the environment, expected ",
             expected);
  return text;
}

int number(const char* name, std::string_view expected, int least, int most) {
  const std::string_view text = variable(name, expected);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  LB_EXPECTS(error == std::errc() && end == text.data() + text.size() && least <= value && value <= most,
             name, ": found ", text, ", expected ", expected);
  return value;
}

}  // namespace

bool tcp_meeting_in_environment() { return std::getenv("WORLD_SIZE") != nullptr; }

TcpMeeting tcp_meeting_from_environment() {
  TcpMeeting meeting;
  meeting.size = number("WORLD_SIZE", "the number of processes, 1 to 32768", 1, 32768);
  meeting.process =
      number("RANK", cat("a process number, 0 to ", meeting.size - 1, " (WORLD_SIZE is ", meeting.size, ")"),
             0, meeting.size - 1);
  meeting.address = variable("MASTER_ADDR", "the host of process 0");
  meeting.port = number("MASTER_PORT", "a port of process 0, 1 to 65535", 1, 65535);
  if (const char* const token = std::getenv("LOWBAND_TOKEN")) meeting.token = token;
  if (std::getenv("LOWBAND_RENDEZVOUS_SECONDS") != nullptr) {
    meeting.deadline = std::chrono::seconds(
        number("LOWBAND_RENDEZVOUS_SECONDS", "a number of seconds, 1 to 86400", 1, 86400));
  }
  return meeting;
}

}  // namespace lowband
