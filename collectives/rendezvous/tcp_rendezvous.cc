#include "collectives/rendezvous/tcp_rendezvous.h"

#include "collectives/rendezvous/star.h"
#include "runtime/error.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

namespace lowband {
namespace {

std::size_t at(int process) { return static_cast<std::size_t>(process); }

// The texts one behind the other, each after its length.
std::string joined(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) {
    const std::uint64_t bytes = text.size();
    all.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    all += text;
  }
  return all;
}

std::vector<std::string> taken_apart(std::string_view all) {
  std::vector<std::string> texts;
  while (!all.empty()) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, all.data(), sizeof bytes);
    texts.emplace_back(all.substr(sizeof bytes, bytes));
    all.remove_prefix(sizeof bytes + bytes);
  }
  return texts;
}

}  // namespace

TcpRendezvous::TcpRendezvous(const TcpMeeting& meeting)
    : Rendezvous(meeting.process, meeting.size, meeting.deadline),
      star_(std::make_unique<Star>(
          StarMember{.process = meeting.process, .size = meeting.size, .token = meeting.token})) {
  const Star::Clock::time_point give_up = Star::Clock::now() + deadline();
  if (process() == 0) {
    star_->listen(meeting.port);
    star_->let_in(give_up);
  } else {
    star_->connect({meeting.address}, meeting.port, give_up);
  }
}

TcpRendezvous::~TcpRendezvous() = default;

std::vector<std::string> TcpRendezvous::all_gather(std::string_view own) {
  const Star::Clock::time_point give_up = Star::Clock::now() + deadline();
  if (process() != 0) {
    star_->send(0, std::string(own));
    const std::optional<Star::Event> all = star_->next(give_up);
    if (!all)
      throw PeerFailed(cat("rendezvous: process 0 did not answer within ", deadline().count(), " ms"));
    if (all->ended) throw PeerFailed(cat("rendezvous: process 0 is gone: ", all->text));
    return taken_apart(all->text);
  }

  std::vector<std::optional<std::string>> given(at(size()));
  given[0] = own;
  const auto missing = [&] {
    return std::ranges::find(given, false, &std::optional<std::string>::has_value) - given.begin();
  };
  while (missing() < size()) {
    std::optional<Star::Event> event = star_->next(give_up);
    if (!event) {
      throw PeerFailed(
          cat("rendezvous: process ", missing(), " did not answer within ", deadline().count(), " ms"));
    }
    if (event->ended) throw PeerFailed(cat("rendezvous: process ", event->from, " is gone: ", event->text));
    given[at(event->from)] = std::move(event->text);
  }
  std::vector<std::string> texts;
  texts.reserve(given.size());
  for (const auto& text : given) texts.push_back(*text);
  for (int p = 1; p < size(); ++p) star_->send(p, joined(texts));
  if (!star_->flush(give_up)) {
    throw PeerFailed(cat("rendezvous: the others did not listen within ", deadline().count(), " ms"));
  }
  return texts;
}

}  // namespace lowband
