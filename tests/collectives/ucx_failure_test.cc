// What the others see when a process over UCX dies, hangs or gives up. Real processes, forked before any of
// them touches UCX.
#include "collectives/rendezvous/star.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "collectives/ucx/ucx_world.h"

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

namespace lowband {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;
using Clock = std::chrono::steady_clock;

// Processes whose every line comes to the test.
class Job {
 public:
  using Say = std::function<void(const std::string&)>;
  using Body = std::function<void(UcxWorld& ucx, Communicator& world, const Say& say)>;

  Job(int size, const char* transports, milliseconds deadline, const Body& body) {
    int port = 0;
    {
      Star star({.process = 0, .size = 1, .token = ""});
      port = star.listen(0);
    }
    for (int p = 0; p < size; ++p) {
      std::array<int, 2> ends{};
      EXPECT_EQ(pipe(ends.data()), 0);
      const pid_t pid = fork();
      if (pid == 0) {
        setenv("UCX_TLS", transports, 1);
        live({.process = p, .size = size, .address = "127.0.0.1", .port = port, .token = ""}, deadline,
             ends[1], body);
      }
      close(ends[1]);
      processes_.push_back({pid, ends[0], ""});
    }
  }

  ~Job() {
    for (const Process& process : processes_) {
      kill(process.pid, SIGKILL);
      waitpid(process.pid, nullptr, 0);
      close(process.output);
    }
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  void signal(int process, int number) { kill(processes_[static_cast<std::size_t>(process)].pid, number); }

  // The next line of a process; empty when none comes within 10 seconds.
  std::string line(int process) {
    Process& one = processes_[static_cast<std::size_t>(process)];
    const Clock::time_point give_up = Clock::now() + std::chrono::seconds(10);
    for (;;) {
      if (const auto end = one.heard.find('\n'); end != std::string::npos) {
        const std::string text = one.heard.substr(0, end);
        one.heard.erase(0, end + 1);
        return text;
      }
      pollfd descriptor{.fd = one.output, .events = POLLIN, .revents = 0};
      const auto left = std::chrono::duration_cast<milliseconds>(give_up - Clock::now()).count();
      if (left <= 0 || poll(&descriptor, 1, static_cast<int>(left)) <= 0) return "";
      std::array<char, 4096> bytes{};
      const ssize_t count = read(one.output, bytes.data(), bytes.size());
      if (count <= 0) return "";
      one.heard.append(bytes.data(), static_cast<std::size_t>(count));
    }
  }

 private:
  struct Process {
    pid_t pid;
    int output;
    std::string heard;
  };

  [[noreturn]] static void live(const TcpMeeting& meeting, milliseconds deadline, int output,
                                const Body& body) {
    const Say say = [output](const std::string& text) {
      const std::string text_line = text + "\n";
      if (write(output, text_line.data(), text_line.size()) < 0) std::_Exit(2);
    };
    try {
      TcpRendezvous rendezvous(meeting);
      UcxWorld ucx(rendezvous, deadline);
      const auto world = ucx.world();
      try {
        world->barrier();
        body(ucx, *world, say);
      } catch (const PeerFailed& error) {
        say(cat("PeerFailed: ", error.what()));
        ucx.abort(75, error.what());  // as the program does
      }
    } catch (const std::exception& error) {
      say(cat("another failure: ", error.what()));
    }
    std::_Exit(0);
  }

  std::vector<Process> processes_;
};

class UcxFailure : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Transports, UcxFailure, testing::Values("self,sm", "self,tcp"),
                         [](const auto& test) { return std::string(test.param).substr(5); });

void reduce_forever(Communicator& group, Index elements, const Job::Say& say) {
  std::vector<float> data(static_cast<std::size_t>(elements), 0.0F);
  for (int round = 0;; ++round) {
    group.all_reduce<float>(data, Reduction::kSum, {Purpose::kDense});
    if (round == 3) say("running");
  }
}

// Within a second, in the middle of short messages and of long ones, whichever process it is.
TEST_P(UcxFailure, AKilledProcessIsNamedWithinASecond) {
  for (const Index elements : {Index{10}, Index{2'000'000}}) {
    for (const int victim : {0, 1, 2}) {
      Job job(
          3, GetParam(), std::chrono::seconds(60),
          [&](UcxWorld&, Communicator& world, const Job::Say& say) { reduce_forever(world, elements, say); });
      for (int p = 0; p < 3; ++p) ASSERT_EQ(job.line(p), "running");
      const Clock::time_point killed = Clock::now();
      job.signal(victim, SIGKILL);
      for (int p = 0; p < 3; ++p) {
        if (p == victim) continue;
        const std::string text = job.line(p);
        EXPECT_THAT(text, HasSubstr("PeerFailed"));
        EXPECT_THAT(text, HasSubstr(cat("process ", victim, " ")));
      }
      EXPECT_LT(Clock::now() - killed, milliseconds(1000)) << "process " << victim << ", " << elements;
    }
  }
}

// The dead process belongs to the job, not to the group in which the others work.
TEST_P(UcxFailure, ALossReachesGroupsWithoutTheLost) {
  Job job(3, GetParam(), std::chrono::seconds(60), [](UcxWorld&, Communicator& world, const Job::Say& say) {
    const auto group = world.split(world.process() == 2, 0, "pair");
    reduce_forever(*group, 1000, say);
  });
  for (int p = 0; p < 3; ++p) ASSERT_EQ(job.line(p), "running");
  job.signal(2, SIGKILL);
  for (int p = 0; p < 2; ++p)
    EXPECT_THAT(job.line(p), HasSubstr("PeerFailed: process 2 of 3 of the job is gone"));
}

TEST_P(UcxFailure, AStoppedProcessIsNamedAtTheDeadline) {
  Job job(3, GetParam(), milliseconds(500), [](UcxWorld&, Communicator& world, const Job::Say& say) {
    if (world.process() == 1) raise(SIGSTOP);
    reduce_forever(world, 1000, say);
  });
  for (const int p : {0, 2}) {
    const std::string text = job.line(p);
    EXPECT_THAT(text, HasSubstr("PeerFailed"));
    EXPECT_THAT(text, HasSubstr("process 1 did not answer within 500 ms"));
  }
}

TEST_P(UcxFailure, AProcessThatGivesUpSaysWhyToAll) {
  Job job(3, GetParam(), std::chrono::seconds(60),
          [](UcxWorld& ucx, Communicator& world, const Job::Say& say) {
            if (world.process() == 1) ucx.abort(70, "corpus.bin: no such file");
            reduce_forever(world, 1000, say);
          });
  for (const int p : {0, 2})
    EXPECT_THAT(job.line(p), HasSubstr("process 1 failed: corpus.bin: no such file"));
}

}  // namespace
}  // namespace lowband
