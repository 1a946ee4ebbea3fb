#include "collectives/rendezvous/star.h"

#include "runtime/error.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <set>
#include <utility>

#include <arpa/inet.h>
#include <boost/asio.hpp>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

namespace lowband {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Precedes what a process says first, so that strangers are told apart. The number is that of the protocol.
constexpr std::string_view kMagic = "lowband star 1\n\n";
constexpr std::uint32_t kMostBytes = 16 << 20;

// A lost host is noticed after 5 + 3 x 2 seconds, as lowband-run's own connections do.
constexpr int kIdleSeconds = 5;
constexpr int kProbeSeconds = 2;
constexpr int kProbes = 3;

// An address that does not answer at all (a firewall, another network) must not cost the whole deadline, and
// a process 0 that is still starting must not wait long for those who came before it.
constexpr milliseconds kOneAttempt{2000};
constexpr milliseconds kBetweenAttempts{50};

// Process 0, which began to wait at about the same time, can say who is missing: its answer is worth this
// much more.
constexpr milliseconds kAnswerTime{1000};

// The first byte of process 0's answer.
constexpr char kWelcome = 'w';
constexpr char kTurnedAway = 'i';  // InvalidArgument, with the reason
constexpr char kGivenUp = 'p';     // PeerFailed, with the reason

struct Hello {
  std::uint64_t life;  // drawn by every process, so that one that comes again is known
  std::int32_t process;
  std::int32_t size;
};

std::string length_of(const std::string& message) {
  const auto bytes = static_cast<std::uint32_t>(message.size());
  std::string text(sizeof bytes, '\0');
  std::memcpy(text.data(), &bytes, sizeof bytes);
  return text;
}

// A socket whose messages are read and written one after the other.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using OnMessage = std::function<void(std::string)>;
  using OnEnd = std::function<void(const std::string& reason)>;

  explicit Connection(tcp::socket socket) : socket_(std::move(socket)) {}

  tcp::socket& socket() { return socket_; }
  bool idle() const { return leaving_.empty(); }
  // Nothing is heard from it any more.
  void close() {
    ended_ = true;
    error_code ignored;
    socket_.close(ignored);
  }

  void prepare() {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    socket_.set_option(asio::socket_base::keep_alive(true), ignored);
    set_tcp_option(TCP_KEEPIDLE, kIdleSeconds);
    set_tcp_option(TCP_KEEPINTVL, kProbeSeconds);
    set_tcp_option(TCP_KEEPCNT, kProbes);
    set_tcp_option(TCP_USER_TIMEOUT, 1000 * (kIdleSeconds + kProbeSeconds * kProbes));
  }

  void read(OnMessage on_message, OnEnd on_end) {
    on_message_ = std::move(on_message);
    on_end_ = std::move(on_end);
    read_length();
  }

  void write(const std::string& message) {
    leaving_.push_back(length_of(message) + message);
    if (leaving_.size() == 1) write_first();
  }

  // Bytes that precede all messages.
  void write_raw(std::string_view bytes) {
    leaving_.emplace_back(bytes);
    if (leaving_.size() == 1) write_first();
  }

 private:
  void set_tcp_option(int name, int value) {
    setsockopt(socket_.native_handle(), IPPROTO_TCP, name, &value, sizeof value);
  }

  void read_length() {
    asio::async_read(socket_, asio::buffer(&bytes_, sizeof bytes_),
                     [self = shared_from_this()](const error_code& error, std::size_t) {
                       if (error) return self->end(error.message());
                       if (self->bytes_ > kMostBytes) return self->end("it does not speak as lowband does");
                       self->message_.resize(self->bytes_);
                       self->read_message();
                     });
  }

  void read_message() {
    asio::async_read(socket_, asio::buffer(message_),
                     [self = shared_from_this()](const error_code& error, std::size_t) {
                       if (error) return self->end(error.message());
                       if (self->ended_) return;
                       self->on_message_(std::move(self->message_));
                       self->message_.clear();
                       self->read_length();
                     });
  }

  void write_first() {
    asio::async_write(socket_, asio::buffer(leaving_.front()),
                      [self = shared_from_this()](const error_code& error, std::size_t) {
                        self->leaving_.pop_front();
                        if (error) self->leaving_.clear();  // the reader says that the connection ended
                        if (!self->leaving_.empty()) self->write_first();
                      });
  }

  void end(const std::string& reason) {
    if (ended_) return;
    ended_ = true;
    on_end_(reason);
  }

  tcp::socket socket_;
  std::uint32_t bytes_ = 0;
  std::string message_;
  std::deque<std::string> leaving_;
  OnMessage on_message_;
  OnEnd on_end_;
  bool ended_ = false;
};

}  // namespace

struct Star::Connections {
  explicit Connections(StarMember member)
      : self(std::move(member)),
        peers(static_cast<std::size_t>(self.size)),
        lives(static_cast<std::size_t>(self.size)) {}

  StarMember self;
  asio::io_context io;
  asio::executor_work_guard<asio::io_context::executor_type> waiting_is_work{io.get_executor()};
  tcp::acceptor acceptor{io};
  const std::uint64_t life = std::random_device()();
  std::vector<std::shared_ptr<Connection>> peers;  // by process; none for this one
  std::deque<Event> events;
  bool woken = false;

  // Process 0, while it lets the others in.
  std::string refusal;                // why nobody is let in any more
  std::set<std::string> turned_away;  // reasons
  std::vector<std::uint64_t> lives;   // by process
  bool door_is_open = false;

  // Runs until `done` or `give_up`; whether it is done.
  template <class Done>
  bool run(Clock::time_point give_up, Done done) {
    while (!done()) {
      if (io.run_one_until(give_up) == 0) return done();
    }
    return true;
  }

  std::shared_ptr<Connection>& peer(int process) { return peers[static_cast<std::size_t>(process)]; }

  void hear(int process) {
    const std::shared_ptr<Connection>& connection = peer(process);
    connection->read(
        [this, process](std::string message) {
          events.push_back({process, false, std::move(message)});
        },
        [this, process](const std::string& reason) {
          events.push_back({process, true, reason});
        });
  }

  // ---- process 0

  void accept_next() {
    acceptor.async_accept([this](const error_code& error, tcp::socket socket) {
      if (error) return;  // the door was closed
      greet(std::make_shared<Connection>(std::move(socket)));
      accept_next();
    });
  }

  // Hears the magic and the hello of whoever came. A stranger, and who says nothing, is left alone.
  void greet(const std::shared_ptr<Connection>& guest) {
    guest->prepare();
    const auto magic = std::make_shared<std::array<char, kMagic.size()>>();
    asio::async_read(guest->socket(), asio::buffer(*magic),
                     [this, guest, magic](const error_code& error, std::size_t) {
                       if (error || std::string_view(magic->data(), magic->size()) != kMagic) return;
                       hear_hello(guest);
                     });
  }

  void hear_hello(const std::shared_ptr<Connection>& guest) {
    const auto known = std::make_shared<int>(-1);  // its number once it is let in
    const std::weak_ptr<Connection> weak = guest;
    guest->read(
        [this, known, weak](std::string message) {
          if (*known >= 0) {
            events.push_back({*known, false, std::move(message)});
          } else if (const auto connection = weak.lock()) {
            *known = admit(connection, message);
          }
        },
        [this, known](const std::string& reason) {
          if (*known < 0) return;
          if (door_is_open) {
            peer(*known).reset();  // it may come again
          } else {
            events.push_back({*known, true, reason});
          }
        });
  }

  int admit(const std::shared_ptr<Connection>& guest, const std::string& message) {
    Hello hello{};
    if (message.size() < sizeof hello) return -1;
    std::memcpy(&hello, message.data(), sizeof hello);
    error_code ignored;
    const std::string where = guest->socket().remote_endpoint(ignored).address().to_string(ignored);
    const std::string who = cat("process ", hello.process, " at ", where);

    guest->write_raw(kMagic);
    if (std::string_view(message).substr(sizeof hello) != self.token) {
      const std::string reason = cat("LOWBAND_TOKEN: found another token on ", who,
                                     " than on process 0, expected the same on all processes");
      turned_away.insert(reason);
      guest->write(kTurnedAway + reason);
      return -1;
    }
    if (hello.size != self.size) {
      refusal =
          cat("WORLD_SIZE: found ", hello.size, " on ", who, ", expected ", self.size, " as on process 0");
    } else if (hello.process <= 0 || hello.process >= self.size) {
      refusal = cat("RANK: found ", hello.process, " at ", where, ", expected 1 to ", self.size - 1,
                    " beside process 0");
    } else if (peer(hello.process) != nullptr && life_of(hello.process) != hello.life) {
      refusal =
          cat("RANK: found ", hello.process, " at ", where, " a second time, expected each number once");
    }
    if (!refusal.empty()) {
      guest->write(kTurnedAway + refusal);
      return -1;
    }
    if (peer(hello.process) != nullptr) peer(hello.process)->close();
    peer(hello.process) = guest;
    life_of(hello.process) = hello.life;
    return hello.process;
  }

  std::uint64_t& life_of(int process) { return lives[static_cast<std::size_t>(process)]; }

  bool complete() const {
    return std::all_of(peers.begin() + 1, peers.end(), [](const auto& p) { return p != nullptr; });
  }

  void tell_all(const std::string& answer) {
    for (const auto& connection : peers) {
      if (connection != nullptr) connection->write(answer);
    }
  }

  bool all_idle() const {
    return std::all_of(peers.begin(), peers.end(), [](const auto& p) { return p == nullptr || p->idle(); });
  }

  // ---- the others

  void leave_process_0() {
    peer(0)->close();
    peer(0).reset();
  }

  // One attempt at one address: empty when this process was let in, otherwise why not.
  std::string attempt(const tcp::endpoint& where, Clock::time_point give_up) {
    const Clock::time_point soon = std::min(give_up, Clock::now() + kOneAttempt);
    const auto connection = std::make_shared<Connection>(tcp::socket(io));
    std::optional<error_code> outcome;
    connection->socket().async_connect(where, [&](const error_code& error) { outcome = error; });
    if (!run(soon, [&] { return outcome.has_value(); })) {
      connection->close();
      run(Clock::now() + seconds(1), [&] { return outcome.has_value(); });
      return "it does not answer";
    }
    if (*outcome) return outcome->message();

    connection->prepare();
    const Hello hello{life, self.process, self.size};
    std::string text(sizeof hello, '\0');
    std::memcpy(text.data(), &hello, sizeof hello);
    connection->write_raw(kMagic);
    connection->write(text + self.token);
    std::array<char, kMagic.size()> magic{};
    outcome.reset();
    asio::async_read(connection->socket(), asio::buffer(magic),
                     [&](const error_code& error, std::size_t) { outcome = error; });
    if (!run(soon, [&] { return outcome.has_value(); })) {
      connection->close();
      run(Clock::now() + seconds(1), [&] { return outcome.has_value(); });
      return "it does not speak";
    }
    if (*outcome) return outcome->message();
    if (std::string_view(magic.data(), magic.size()) != kMagic) return "it does not speak as lowband does";

    // From here on it is process 0. It answers when all are there.
    peer(0) = connection;
    hear(0);
    if (!run(give_up + kAnswerTime, [&] { return !events.empty(); })) {
      leave_process_0();
      return "not all processes came";
    }
    const Event answer = std::move(events.front());
    events.pop_front();
    if (!answer.ended && !answer.text.empty()) {
      if (answer.text[0] == kWelcome) return "";
      if (answer.text[0] == kTurnedAway) throw InvalidArgument(answer.text.substr(1));
      if (answer.text[0] == kGivenUp) throw PeerFailed(answer.text.substr(1));
    }
    leave_process_0();
    return cat("its connection ended: ", answer.text);
  }
};

Star::Star(StarMember self) : connections_(std::make_unique<Connections>(std::move(self))) {}

Star::~Star() {
  for (const auto& connection : connections_->peers) {
    if (connection != nullptr) connection->close();
  }
}

int Star::listen(int port) {
  tcp::acceptor& acceptor = connections_->acceptor;
  error_code error;
  // One socket for both families; a system without IPv6 has only the other.
  acceptor.open(tcp::v6(), error);
  tcp::endpoint everywhere(tcp::v6(), static_cast<std::uint16_t>(port));
  if (error) {
    acceptor.open(tcp::v4(), error);
    everywhere = tcp::endpoint(tcp::v4(), static_cast<std::uint16_t>(port));
  } else {
    acceptor.set_option(asio::ip::v6_only(false), error);
  }
  acceptor.set_option(tcp::acceptor::reuse_address(true), error);  // of a job that has just ended
  acceptor.bind(everywhere, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  LB_EXPECTS(!error, "MASTER_PORT: found ", port, " (", error.message(),
             "), expected a free port on process 0");
  connections_->door_is_open = true;
  connections_->accept_next();
  return acceptor.local_endpoint().port();
}

void Star::let_in(Clock::time_point give_up) {
  Connections& star = *connections_;
  const auto settled = [&] { return star.complete() || !star.refusal.empty(); };
  const bool in_time = star.run(give_up, settled);
  error_code ignored;
  star.acceptor.close(ignored);
  star.door_is_open = false;
  if (in_time && star.refusal.empty()) {
    star.tell_all(std::string(1, kWelcome));
    if (!flush(give_up)) throw PeerFailed("rendezvous: the others did not listen within the deadline");
    return;
  }

  std::string reason = star.refusal;
  if (!in_time) {
    reason = "did not come within the deadline:";
    for (int p = 1; p < star.self.size; ++p) {
      if (star.peer(p) == nullptr) reason += cat(" process ", p);
    }
    reason += cat(" of ", star.self.size);
    for (const std::string& turned_away : star.turned_away) reason += "; turned away: " + turned_away;
  }
  star.tell_all((in_time ? kTurnedAway : kGivenUp) + reason);
  flush(Clock::now() + seconds(1));
  if (in_time) throw InvalidArgument(reason);
  throw PeerFailed(reason);
}

void Star::connect(const std::vector<std::string>& hosts, int port, Clock::time_point give_up) {
  Connections& star = *connections_;
  std::vector<tcp::endpoint> endpoints;
  for (const std::string& host : hosts) {
    error_code error;
    const auto found = tcp::resolver(star.io).resolve(host, std::to_string(port), error);
    LB_EXPECTS(!error, "MASTER_ADDR: found ", host, " (", error.message(),
               "), expected the host of process 0");
    for (const auto& entry : found) endpoints.push_back(entry.endpoint());
  }
  for (;;) {
    std::string reasons;
    for (const tcp::endpoint& endpoint : endpoints) {
      const std::string reason = star.attempt(endpoint, give_up);
      if (reason.empty()) return;
      reasons += cat(reasons.empty() ? "" : "; ", endpoint, ": ", reason);
    }
    if (Clock::now() + kBetweenAttempts >= give_up) {
      throw PeerFailed(cat("process 0 cannot be met within the deadline: ", reasons));
    }
    star.run(Clock::now() + kBetweenAttempts, [] { return false; });
  }
}

std::optional<Star::Event> Star::next(Clock::time_point give_up) {
  Connections& star = *connections_;
  star.run(give_up, [&] { return !star.events.empty() || star.woken; });
  star.woken = false;
  if (star.events.empty()) return std::nullopt;
  Event event = std::move(star.events.front());
  star.events.pop_front();
  return event;
}

void Star::send(int to, std::string message) {
  asio::post(connections_->io, [star = connections_.get(), to, text = std::move(message)] {
    if (star->peer(to) != nullptr) star->peer(to)->write(text);
  });
}

bool Star::flush(Clock::time_point give_up) {
  Connections& star = *connections_;
  const auto posted = std::make_shared<bool>(false);  // after everything that was handed over before
  asio::post(star.io, [posted] { *posted = true; });
  return star.run(give_up, [&] { return *posted && star.all_idle(); });
}

void Star::wake() {
  asio::post(connections_->io, [star = connections_.get()] { star->woken = true; });
}

std::vector<std::string> own_addresses() {
  std::vector<std::string> outside;
  std::vector<std::string> loopback;
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) != 0) return {"localhost"};
  for (const ifaddrs* entry = first; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (entry->ifa_addr->sa_family == AF_INET) {
      inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(entry->ifa_addr)->sin_addr, text.data(),
                text.size());
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      const auto& address = reinterpret_cast<const sockaddr_in6*>(entry->ifa_addr)->sin6_addr;
      if (IN6_IS_ADDR_LINKLOCAL(&address)) continue;  // means nothing without the name of an interface
      inet_ntop(AF_INET6, &address, text.data(), text.size());
    } else {
      continue;
    }
    ((entry->ifa_flags & IFF_LOOPBACK) != 0 ? loopback : outside).emplace_back(text.data());
  }
  freeifaddrs(first);
  outside.insert(outside.end(), loopback.begin(), loopback.end());
  return outside;
}

}  // namespace lowband
