#include "launcher/bench/interface_counter.h"

#include "runtime/error.h"

#include <array>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

#include <unistd.h>

namespace lowband {
namespace {

// From /proc and not from /sys: a process that entered a network namespace sees its interfaces in /proc/self,
// and in /sys only when that was mounted again there.
constexpr const char* kCounters = "/proc/self/net/dev";

// Lines "  eth0: 1 2 3 4 5 6 7 8  9 ...": eight figures about receiving, then bytes sent.
std::map<std::string, Index> sent_bytes_by_interface() {
  std::ifstream file(kCounters);
  if (!file) throw IoError(cat(kCounters, ": cannot open"));
  std::map<std::string, Index> sent;
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos) continue;  // two lines of headings
    const auto begin = line.find_first_not_of(' ');
    std::istringstream figures(line.substr(colon + 1));
    Index figure = 0;
    for (int i = 0; i <= 8; ++i) figures >> figure;
    if (!figures) throw IoError(cat(kCounters, ": found '", line, "', expected sixteen numbers"));
    sent[line.substr(begin, colon - begin)] = figure;
  }
  return sent;
}

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

InterfaceCounter::InterfaceCounter(std::string name) : name_(std::move(name)) {
  const auto sent = sent_bytes_by_interface();
  std::string known;
  for (const auto& [interface, bytes] : sent) known += (known.empty() ? "" : ", ") + interface;
  LB_EXPECTS(sent.contains(name_), "--interface: found ", name_, ", expected one of ", known);
}

Index InterfaceCounter::sent_bytes() const {
  const auto sent = sent_bytes_by_interface();
  const auto interface = sent.find(name_);
  if (interface == sent.end()) throw IoError(cat("interface ", name_, " has gone"));
  return interface->second;
}

std::uint64_t InterfaceCounter::identity() const {
  std::array<char, 64> net_namespace{};  // "net:[4026531840]"
  if (::readlink("/proc/self/ns/net", net_namespace.data(), net_namespace.size() - 1) < 0)
    throw IoError("/proc/self/ns/net: cannot read");
  return std::hash<std::string>{}(
      cat(first_line("/proc/sys/kernel/random/boot_id"), " ", net_namespace.data(), " ", name_));
}

}  // namespace lowband
