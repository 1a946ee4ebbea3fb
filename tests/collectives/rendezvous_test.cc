// Processes that meet over TCP, here as threads of this one.
#include "collectives/local/local_world.h"
#include "collectives/rendezvous/communicator_rendezvous.h"
#include "collectives/rendezvous/peer_watch.h"
#include "collectives/rendezvous/star.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "runtime/error.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

// A port that was free a moment ago.
int free_port() {
  Star star({.process = 0, .size = 1, .token = ""});
  return star.listen(0);
}

TcpMeeting meeting_at(int port, int process, int size) {
  return {.process = process,
          .size = size,
          .address = "localhost",
          .port = port,
          .token = "secret",
          .deadline = milliseconds(10'000)};
}

// What each of these processes threw: "InvalidArgument: ...", "PeerFailed: ...", or "" when they met.
std::vector<std::string> outcomes(const std::vector<TcpMeeting>& meetings,
                                  const std::function<void(TcpRendezvous&)>& body = {}) {
  std::vector<std::string> texts(meetings.size());
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < meetings.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        TcpRendezvous rendezvous(meetings[i]);
        if (body) body(rendezvous);
      } catch (const InvalidArgument& error) {
        texts[i] = cat("InvalidArgument: ", error.what());
      } catch (const PeerFailed& error) {
        texts[i] = cat("PeerFailed: ", error.what());
      }
    });
  }
  threads.clear();
  return texts;
}

TEST(TcpRendezvous, GathersBytesOfAnyLength) {
  for (const int size : {1, 2, 3, 7}) {
    const int port = free_port();
    std::vector<TcpMeeting> meetings;
    for (int p = 0; p < size; ++p) meetings.push_back(meeting_at(port, p, size));
    const auto body = [&](TcpRendezvous& rendezvous) {
      for (int round = 0; round < 3; ++round) {
        // Process 0 gives nothing, the last one the most; all bytes occur, zero among them.
        const auto bytes_of = [&](int p) {
          std::string bytes(static_cast<std::size_t>(p * 10'007), '\0');
          for (std::size_t i = 0; i < bytes.size(); ++i)
            bytes[i] = static_cast<char>(i + static_cast<std::size_t>(round));
          return bytes;
        };
        const std::vector<std::string> all = rendezvous.all_gather(bytes_of(rendezvous.process()));
        ASSERT_EQ(static_cast<int>(all.size()), size);
        for (int p = 0; p < size; ++p) EXPECT_EQ(all[static_cast<std::size_t>(p)], bytes_of(p));
      }
    };
    EXPECT_THAT(outcomes(meetings, body), Each(""));
  }
}

TEST(TcpRendezvous, WaitsForAProcess0ThatComesLast) {
  const int port = free_port();
  std::jthread early([&] { EXPECT_THAT(outcomes({meeting_at(port, 1, 2)}), ElementsAre("")); });
  std::this_thread::sleep_for(milliseconds(200));
  EXPECT_THAT(outcomes({meeting_at(port, 0, 2)}), ElementsAre(""));
}

TEST(TcpRendezvous, RefusesAnotherToken) {
  const int port = free_port();
  TcpMeeting stranger = meeting_at(port, 1, 2);
  stranger.token = "guess";
  TcpMeeting host = meeting_at(port, 0, 2);
  host.deadline = milliseconds(500);
  const auto texts = outcomes({host, stranger});
  EXPECT_THAT(texts[1], AllOf(HasSubstr("InvalidArgument: LOWBAND_TOKEN"), HasSubstr("expected the same")));
  // A stranger does not end the job; the one that is missing does.
  EXPECT_THAT(texts[0],
              AllOf(HasSubstr("PeerFailed"), HasSubstr("process 1 of 2"), HasSubstr("LOWBAND_TOKEN")));
  for (const std::string& text : texts) {
    EXPECT_THAT(text, testing::Not(HasSubstr("guess")));
    EXPECT_THAT(text, testing::Not(HasSubstr("secret")));
  }
}

TEST(TcpRendezvous, RefusesANumberThatIsTakenTwice) {
  const int port = free_port();
  const auto texts = outcomes({meeting_at(port, 0, 3), meeting_at(port, 1, 3), meeting_at(port, 1, 3)});
  EXPECT_THAT(texts, Each(AllOf(HasSubstr("InvalidArgument: RANK: found 1"), HasSubstr("a second time"))));
}

TEST(TcpRendezvous, RefusesAnotherNumberOfProcesses) {
  const int port = free_port();
  const auto texts = outcomes({meeting_at(port, 0, 2), meeting_at(port, 1, 4)});
  EXPECT_THAT(texts, Each(AllOf(HasSubstr("InvalidArgument: WORLD_SIZE: found 4"), HasSubstr("expected 2"))));
}

TEST(TcpRendezvous, NamesWhoIsMissingAtTheDeadline) {
  const int port = free_port();
  std::vector<TcpMeeting> meetings{meeting_at(port, 0, 4), meeting_at(port, 2, 4)};
  for (TcpMeeting& meeting : meetings) meeting.deadline = milliseconds(400);
  const auto begin = std::chrono::steady_clock::now();
  const auto texts = outcomes(meetings);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(4000));
  EXPECT_THAT(texts, Each(AllOf(HasSubstr("PeerFailed"), HasSubstr("process 1 process 3 of 4"))));

  TcpMeeting alone = meeting_at(port, 1, 2);
  alone.deadline = milliseconds(300);
  EXPECT_THAT(outcomes({alone})[0], HasSubstr("PeerFailed: process 0 cannot be met within the deadline"));
}

TEST(TcpRendezvous, NamesAProcessThatIsGone) {
  const int port = free_port();
  const auto body = [](TcpRendezvous& rendezvous) {
    if (rendezvous.process() != 1) rendezvous.all_gather("x");
  };
  const auto texts = outcomes({meeting_at(port, 0, 3), meeting_at(port, 1, 3), meeting_at(port, 2, 3)}, body);
  EXPECT_THAT(texts[0], HasSubstr("PeerFailed: rendezvous: process 1 is gone"));
  EXPECT_THAT(texts[2], HasSubstr("PeerFailed: rendezvous: process 0 is gone"));
}

TEST(TcpRendezvous, RefusesAPortInUseAndAnUnknownHost) {
  Star other({.process = 0, .size = 1, .token = ""});
  const int port = other.listen(0);
  EXPECT_THAT(
      outcomes({meeting_at(port, 0, 2)})[0],
      AllOf(HasSubstr(cat("InvalidArgument: MASTER_PORT: found ", port)), HasSubstr("expected a free port")));
  TcpMeeting lost = meeting_at(port, 1, 2);
  lost.address = "no-such-host.invalid";
  EXPECT_THAT(outcomes({lost})[0], HasSubstr("InvalidArgument: MASTER_ADDR: found no-such-host.invalid"));
}

TEST(CommunicatorRendezvous, GathersBytesOfAnyLength) {
  run_world(3, [](Communicator& group) {
    CommunicatorRendezvous rendezvous(group);
    const std::vector<std::string> texts{"", std::string("a\0b", 3), "ccccc"};
    EXPECT_EQ(rendezvous.all_gather(texts[static_cast<std::size_t>(group.process())]), texts);
  });
}

// ---- the environment

class Environment : public testing::Test {
 protected:
  static constexpr const char* kNames[] = {"RANK",        "WORLD_SIZE",    "MASTER_ADDR",
                                           "MASTER_PORT", "LOWBAND_TOKEN", "LOWBAND_RENDEZVOUS_SECONDS"};
  Environment() {
    for (const char* name : kNames) unsetenv(name);
    set("RANK", "1");
    set("WORLD_SIZE", "4");
    set("MASTER_ADDR", "node0");
    set("MASTER_PORT", "29500");
  }
  ~Environment() override {
    for (const char* name : kNames) unsetenv(name);
  }
  static void set(const char* name, const char* value) { setenv(name, value, 1); }
  static void expect_refused(const char* name, const char* value, const std::string& found) {
    const char* const before = std::getenv(name);
    const std::string kept = before == nullptr ? "" : before;
    value == nullptr ? unsetenv(name) : setenv(name, value, 1);
    EXPECT_THAT([] { tcp_meeting_from_environment(); },
                ThrowsMessage<InvalidArgument>(
                    AllOf(testing::StartsWith(cat(name, ": found ", found)), HasSubstr("expected"))));
    before == nullptr ? unsetenv(name) : setenv(name, kept.c_str(), 1);
  }
};

TEST_F(Environment, SaysWhereToMeet) {
  EXPECT_TRUE(tcp_meeting_in_environment());
  set("LOWBAND_TOKEN", "abc");
  set("LOWBAND_RENDEZVOUS_SECONDS", "7");
  const TcpMeeting meeting = tcp_meeting_from_environment();
  EXPECT_EQ(meeting.process, 1);
  EXPECT_EQ(meeting.size, 4);
  EXPECT_EQ(meeting.address, "node0");
  EXPECT_EQ(meeting.port, 29500);
  EXPECT_EQ(meeting.token, "abc");
  EXPECT_EQ(meeting.deadline, milliseconds(7000));
}

TEST_F(Environment, IsCheckedVariableByVariable) {
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    expect_refused(name, nullptr, "nothing");
    expect_refused(name, "", "nothing");
  }
  expect_refused("RANK", "4", "4");
  expect_refused("RANK", "-1", "-1");
  expect_refused("RANK", "one", "one");
  expect_refused("WORLD_SIZE", "0", "0");
  expect_refused("WORLD_SIZE", "4x", "4x");
  expect_refused("MASTER_PORT", "65536", "65536");
  expect_refused("MASTER_PORT", "http", "http");
  expect_refused("LOWBAND_RENDEZVOUS_SECONDS", "0", "0");
}

// ---- the watch

struct Loss {
  int process;
  std::string what;
};

// Runs `body` in processes with a watch each; what every process heard.
std::vector<std::vector<Loss>> losses(int size, const std::function<void(PeerWatch&, int process)>& body) {
  std::mutex mutex;
  std::vector<std::vector<Loss>> heard(static_cast<std::size_t>(size));
  run_world(size, [&](Communicator& group) {
    CommunicatorRendezvous rendezvous(group);
    PeerWatch watch(rendezvous,
                    [&, own = static_cast<std::size_t>(group.process())](int who, const std::string& what) {
                      const std::lock_guard lock(mutex);
                      heard[own].push_back({who, what});
                    });
    body(watch, group.process());
  });
  return heard;
}

TEST(PeerWatch, HearsNothingWhenAllLeave) {
  for (const int size : {1, 2, 4}) {
    std::atomic<int> left = 0;
    const auto heard = losses(size, [&](PeerWatch& watch, int process) {
      std::this_thread::sleep_for(milliseconds(20 * process));
      left += watch.leave(milliseconds(5000));
    });
    EXPECT_EQ(left, size);
    for (const auto& own : heard) EXPECT_TRUE(own.empty());
  }
}

TEST(PeerWatch, TellsAllWhoIsGoneAndWhy) {
  for (const bool with_a_word : {false, true}) {
    for (const int gone : {0, 1, 2}) {
      const auto heard = losses(3, [&](PeerWatch& watch, int process) {
        if (process == gone) {
          if (with_a_word) watch.tell_failure("disk full");
          return;
        }
        EXPECT_FALSE(watch.leave(milliseconds(5000)));
        std::this_thread::sleep_for(milliseconds(100));  // until process 0 has told the other one
      });
      for (int p = 0; p < 3; ++p) {
        if (p == gone) continue;
        const auto& own = heard[static_cast<std::size_t>(p)];
        ASSERT_EQ(own.size(), 1U) << "process " << p << ", gone " << gone;
        EXPECT_EQ(own[0].process, gone);
        EXPECT_THAT(own[0].what, HasSubstr(with_a_word ? "failed: disk full" : "is gone"));
      }
    }
  }
}

}  // namespace
}  // namespace lowband
