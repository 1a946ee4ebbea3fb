#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// What the processes that meet must agree on. The names are the environment's, for messages.
struct StarMember {
  int process = 0;    // RANK
  int size = 1;       // WORLD_SIZE
  std::string token;  // LOWBAND_TOKEN: a secret of the job
};

/// A TCP connection of every process with process 0, which carries short messages (at most 16 MiB).
///
/// Process 0 opens a port (`listen`) and lets the others in; they `connect`. Only who knows the token and
/// agrees on the number of processes is let in, once for each number.
/// A lost host is noticed by TCP within some ten seconds; a process that ends, at once.
/// Threads: one, but for `send` and `wake`.
class Star {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Star(StarMember self);
  ~Star();
  Star(const Star&) = delete;
  Star& operator=(const Star&) = delete;

  /// Opens `port`, or any free one when it is 0, on all addresses of this host; returns its number. Process
  /// 0. Throws: InvalidArgument when it is in use.
  int listen(int port);
  /// Lets all other processes in. Process 0, after `listen`.
  /// Throws: InvalidArgument when two processes have the same number or not all the same size (all processes
  /// throw it); PeerFailed at `give_up`, naming who is missing and who was turned away.
  void let_in(Clock::time_point give_up);
  /// Meets process 0 at the first of `hosts` (names or addresses) where it lets this process in; tries again
  /// until `give_up`, because it may start later. All processes but 0.
  /// Throws: InvalidArgument when a name is unknown or this process is turned away; PeerFailed at `give_up`,
  /// or a second later when process 0 is there and has yet to say who is missing.
  void connect(const std::vector<std::string>& hosts, int port, Clock::time_point give_up);

  /// What came from process `from`: a message, or, once, the end of its connection with the reason.
  struct Event {
    int from;
    bool ended;
    std::string text;
  };
  /// The next event, in order of arrival; nothing at `give_up` or after `wake`.
  std::optional<Event> next(Clock::time_point give_up);
  /// Hands a message over; it leaves while this or another process is in `next` or `flush`. Any thread.
  void send(int to, std::string message);
  /// Lets messages leave until `give_up`; whether all did.
  bool flush(Clock::time_point give_up);
  /// Ends a running or the coming `next`. Any thread.
  void wake();

 private:
  struct Connections;
  std::unique_ptr<Connections> connections_;
};

/// The addresses under which others may reach this host, loopback last.
std::vector<std::string> own_addresses();

}  // namespace lowband
