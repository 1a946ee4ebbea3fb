#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "collectives/mpi/mpi_world.h"
#include "launcher/commands.h"
#include "launcher/run_config_arguments.h"
#include "runtime/cpu.h"
#include "trainer/trainer.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <string_view>
#include <thread>

namespace lowband {
namespace {

std::atomic<bool> stop_requested = false;
static_assert(std::atomic<bool>::is_always_lock_free);

// From now on the first SIGINT, SIGTERM or SIGUSR1 asks for a checkpoint and an orderly end; a second one
// ends the process. SIGUSR1 is what lowband-run sends: mpirun passes it on at once, to every host.
//
// One thread waits for the signals and all others block them, because no handler may run on a thread that
// computes: a handler's frame on the stack of a thread inside oneDNN 2.6's AVX-512 sgemm corrupts the heap
// (within seconds under a timer of 0.5 ms; never without signals or with an alternate stack). The threads
// that OpenBLAS started before main cannot be told to block; should one of them be picked, its handler does
// no harm.
void await_stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    sigaddset(&signals, signal);
    std::signal(signal, [](int) { stop_requested = true; });
  }
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // inherited by every thread that starts later
  std::thread([signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    stop_requested = true;
    sigwait(&signals, &signal);
    std::_Exit(128 + signal);
  }).detach();
}

// Far above any machine's cores; a million threads would take its memory.
constexpr int kLargestCount = 4096;

int count_of(std::string_view name, std::string_view text) {
  int count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  LB_EXPECTS(error == std::errc() && end == text.data() + text.size() && count >= 1 && count <= kLargestCount,
             name, ": found ", text.empty() ? "nothing" : text, ", expected a number from 1 to ",
             kLargestCount);
  return count;
}

/// Compute threads per process: the configuration, else what lowband-run worked out, else a fair share of the
/// cores; the last two as far as this build can.
int threads_per_process(const RunConfig& config, int processes) {
  if (config.threads() > 0) return config.threads();
  const char* from_launcher = std::getenv("LOWBAND_THREADS");
  const int share = from_launcher != nullptr ? count_of("LOWBAND_THREADS", from_launcher)
                                             : std::max(1, cpu_info().cores / processes);
  return std::min(share, most_compute_threads());
}

/// The whole job as one process sees it. Failures that concern all processes are printed once.
int train_in(Communicator& world, Arguments arguments) {
  const TrainingSession session{&stop_requested, world.process() == 0 ? &std::cout : nullptr};
  try {
    RunConfig config;
    agree(world, [&] {
      config = config_from(arguments);
      LB_EXPECTS(arguments.positional().empty(), "found more arguments than one configuration");
      set_compute_threads(threads_per_process(config, world.size()));
    });
    return train(config, world, session).interrupted ? kExitInterrupted : 0;
  } catch (const AgreedFailure& failure) {
    if (world.process() == 0) std::cerr << "lowband: " << failure.what() << "\n";
    world.barrier();  // mpirun ends the job when the first process leaves; the line is out by then
    return kExitUsage;
  }
}

int train_under_mpi(const Arguments& arguments) {
  MpiWorld mpi;
  const auto world = mpi.world();
  const auto end_job = [&](const std::exception& error, int exit_code) {
    std::cerr << cat("[process ", world->process(), " of ", world->size(), "] ", error.what(), "\n")
              << std::flush;
    mpi.abort(exit_code);
  };
  try {
    return train_in(*world, arguments);
  } catch (const PeerFailed& error) {
    // Where another process failed by itself, its own line says more; it is out and the job is over before
    // this.
    std::this_thread::sleep_for(std::chrono::seconds(1));
    end_job(error, kExitTemporary);
  } catch (const InvalidArgument& error) {
    end_job(error, kExitUsage);
  } catch (const std::exception& error) {
    end_job(error, kExitInternal);
  }
  return kExitInternal;  // abort does not return
}

}  // namespace

int train_command(Arguments arguments) {
  await_stop_signals();
  if (launched_by_mpi()) return train_under_mpi(arguments);

  const int count = count_of("--threads-as-processes", arguments.option("threads-as-processes", "1"));
  std::atomic<int> exit_code = 0;
  LocalWorldOptions options;
  options.total_deadline = std::chrono::hours(24 * 365);
  run_world(
      count, [&](Communicator& world) { exit_code = train_in(world, arguments); }, options);
  return exit_code;
}

}  // namespace lowband
