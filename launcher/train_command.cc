#include "collectives/agreement.h"
#include "launcher/commands.h"
#include "launcher/job_world.h"
#include "launcher/run_config_arguments.h"
#include "runtime/cpu.h"
#include "trainer/trainer.h"

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <thread>
#include <utility>

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

/// The whole job as one process sees it.
int train_in(Communicator& world, Arguments& arguments) {
  const TrainingSession session{&stop_requested, world.process() == 0 ? &std::cout : nullptr};
  RunConfig config;
  agree(world, [&] {
    config = config_from(arguments);
    LB_EXPECTS(arguments.positional().empty(), "found more arguments than one configuration");
    set_compute_threads(threads_per_process(config.threads(), world.size()));
  });
  return train(config, world, session).interrupted ? kExitInterrupted : 0;
}

}  // namespace

int train_command(Arguments arguments) {
  await_stop_signals();
  return run_job(std::move(arguments), train_in);
}

}  // namespace lowband
