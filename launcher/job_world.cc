#include "launcher/job_world.h"

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "collectives/mpi/mpi_world.h"
#include "collectives/nccl/nccl_group.h"
#include "collectives/nccl/nccl_status.h"
#include "collectives/process_device.h"
#include "collectives/rendezvous/communicator_rendezvous.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "collectives/ucx/ucx_world.h"
#include "launcher/commands.h"
#include "runtime/cpu.h"
#include "runtime/device.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <thread>

namespace lowband {
namespace {

// A process that failed by itself has this long to say so before those say it who only noticed.
constexpr std::chrono::seconds kFirstWord{1};

// Failures that concern all processes are printed once.
int run_agreed(Communicator& world, Arguments& arguments, const JobBody& body) {
  try {
    return body(world, arguments);
  } catch (const AgreedFailure& failure) {
    if (world.process() == 0) std::cerr << "lowband: " << failure.what() << "\n";
    world.barrier();  // a launcher ends the job when the first process leaves; the line is out by then
    return kExitUsage;
  }
}

// What has to be known before processes can be joined.
std::string take_backend(Arguments& arguments, const std::string& fallback) {
  std::string backend = arguments.option("backend", fallback);
  LB_EXPECTS(backend == "mpi" || backend == "ucx" || backend == "nccl" || backend == "local",
             "--backend: found ", backend, ", expected mpi, ucx, nccl or local");
  if (backend == "nccl") {
    const NcclStatus nccl = nccl_status();
    LB_EXPECTS(nccl.built_in, "--backend: found nccl, expected mpi, ucx or local: ", nccl.reason);
    const CudaStatus cuda = cuda_status();
    LB_EXPECTS(!cuda.devices.empty(),
               "--backend: found nccl, expected mpi, ucx or local: no CUDA device: ", cuda.reason);
  }
  LB_EXPECTS(backend != "ucx" || ucx_available(),
             "--backend: found ucx, expected mpi or local: lowband was built without UCX (LOWBAND_UCX)");
  return backend;
}

// The same processes over NCCL, which share the devices of their hosts in turns.
std::unique_ptr<Communicator> on_devices(Communicator& world) {
  return make_nccl_group(world, device_index_of(world, static_cast<int>(cuda_status().devices.size())));
}

void print_failure(const Communicator& world, const std::exception& error) {
  std::cerr << cat("[process ", world.process(), " of ", world.size(), "] ", error.what(), "\n")
            << std::flush;
}

// Runs `body`; when it throws, prints what and calls `end_job` with the exit code, which does not return.
template <class EndJob>
int run_or_end_job(Communicator& world, Arguments& arguments, const JobBody& body, EndJob end_job) {
  try {
    return run_agreed(world, arguments, body);
  } catch (const PeerFailed& error) {
    // Where another process failed by itself, its own line says more; under MPI it is out and the job is over
    // before this.
    std::this_thread::sleep_for(kFirstWord);
    print_failure(world, error);
    end_job(error, kExitTemporary);
  } catch (const InvalidArgument& error) {
    print_failure(world, error);
    end_job(error, kExitUsage);
  } catch (const std::exception& error) {
    print_failure(world, error);
    end_job(error, kExitInternal);
  }
  return kExitInternal;  // end_job does not return
}

int run_under_mpi(Arguments& arguments, const JobBody& body) {
  MpiWorld mpi;
  const auto mpi_world = mpi.world();
  const auto end_job = [&](const std::exception&, int exit_code) { mpi.abort(exit_code); };
  const auto on_chosen_backend = [&](Communicator&, Arguments&) {
    std::string backend;
    agree(*mpi_world, [&] {
      backend = take_backend(arguments, "mpi");
      LB_EXPECTS(backend != "local",
                 "--backend: found local in a job of an MPI launcher, expected mpi, ucx or nccl");
    });
    if (backend == "mpi") return body(*mpi_world, arguments);
    if (backend == "nccl") return run_agreed(*on_devices(*mpi_world), arguments, body);
    CommunicatorRendezvous rendezvous(*mpi_world);
    const UcxWorld ucx(rendezvous);
    const auto world = ucx.world();
    return run_agreed(*world, arguments, body);
  };
  return run_or_end_job(*mpi_world, arguments, on_chosen_backend, end_job);
}

int run_over_tcp(Arguments& arguments, const std::string& backend, const JobBody& body) {
  const TcpMeeting meeting = tcp_meeting_from_environment();
  std::optional<UcxWorld> ucx;
  try {
    TcpRendezvous rendezvous(meeting);
    ucx.emplace(rendezvous);
  } catch (const PeerFailed& error) {
    std::cerr << cat("[process ", meeting.process, " of ", meeting.size, "] ", error.what(), "\n");
    return kExitTemporary;
  }
  const auto world = ucx->world();
  const auto on_chosen_backend = [&](Communicator& host, Arguments& own) {
    return backend == "nccl" ? run_agreed(*on_devices(host), own, body) : body(host, own);
  };
  return run_or_end_job(
      *world, arguments, on_chosen_backend,
      [&](const std::exception& error, int exit_code) { ucx->abort(exit_code, error.what()); });
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
  const bool meets_others = tcp_meeting_in_environment();
  const std::string backend = take_backend(arguments, meets_others ? "ucx" : "local");
  LB_EXPECTS(backend != "nccl" || meets_others,
             "--backend: found nccl, expected a start by lowband-run, or RANK and its companions in the "
             "environment");
  if (backend == "ucx" || backend == "nccl") return run_over_tcp(arguments, backend, body);
  LB_EXPECTS(backend == "local",
             "--backend: found mpi without an MPI launcher, expected a start by lowband-run or mpirun");
  LB_EXPECTS(!meets_others, "--backend: found local with WORLD_SIZE in the environment, expected ucx");
  return run_on_threads(arguments, body);
}

int threads_per_process(int configured, int processes) {
  if (configured > 0) return configured;
  const char* from_launcher = std::getenv("LOWBAND_THREADS");
  const int share = from_launcher != nullptr ? count_of("LOWBAND_THREADS", from_launcher)
                                             : std::max(1, cpu_info().cores / processes);
  return std::min(share, most_compute_threads());
}

}  // namespace lowband
