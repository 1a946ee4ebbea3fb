#include "launcher/job_world.h"

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "collectives/mpi/mpi_world.h"
#include "launcher/commands.h"

#include <atomic>
#include <chrono>
#include <iostream>
#include <string>
#include <thread>

namespace lowband {
namespace {

// Failures that concern all processes are printed once.
int run_agreed(Communicator& world, Arguments& arguments, const JobBody& body) {
  try {
    return body(world, arguments);
  } catch (const AgreedFailure& failure) {
    if (world.process() == 0) std::cerr << "lowband: " << failure.what() << "\n";
    world.barrier();  // mpirun ends the job when the first process leaves; the line is out by then
    return kExitUsage;
  }
}

void take_backend_mpi(Arguments& arguments) {
  const std::string backend = arguments.option("backend", "mpi");
  LB_EXPECTS(backend == "mpi", "--backend: found ", backend, ", expected mpi: an MPI launcher runs this job");
}

int run_under_mpi(Arguments& arguments, const JobBody& body) {
  MpiWorld mpi;
  const auto world = mpi.world();
  const auto end_job = [&](const std::exception& error, int exit_code) {
    std::cerr << cat("[process ", world->process(), " of ", world->size(), "] ", error.what(), "\n")
              << std::flush;
    mpi.abort(exit_code);
  };
  try {
    return run_agreed(*world, arguments, [&](Communicator&, Arguments&) {
      agree(*world, [&] { take_backend_mpi(arguments); });
      return body(*world, arguments);
    });
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

int run_on_threads(Arguments& arguments, const JobBody& body) {
  const int count = count_of("--threads-as-processes", arguments.option("threads-as-processes", "1"));
  std::atomic<int> exit_code = 0;
  LocalWorldOptions options;
  options.total_deadline = std::chrono::hours(24 * 365);
  run_world(
      count,
      [&](Communicator& world) {
        Arguments own = arguments;
        exit_code = run_agreed(world, own, body);
      },
      options);
  return exit_code;
}

}  // namespace

int run_job(Arguments arguments, const JobBody& body) {
  if (launched_by_mpi()) return run_under_mpi(arguments, body);
  const std::string backend = arguments.option("backend", "local");
  LB_EXPECTS(backend != "mpi",
             "--backend: found mpi without an MPI launcher, expected a start by lowband-run or mpirun");
  LB_EXPECTS(backend == "local", "--backend: found ", backend, ", expected mpi or local");
  return run_on_threads(arguments, body);
}

}  // namespace lowband
