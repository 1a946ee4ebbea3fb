#include "collectives/agreement.h"
#include "collectives/mpi/mpi_world.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "launcher/commands.h"
#include "launcher/job_world.h"
#include "launcher/replay/replay_arguments.h"
#include "runtime/cpu.h"
#include "runtime/json.h"

#include <iostream>
#include <utility>

namespace lowband {
namespace {

/// The whole replay as one process sees it.
int replay_in(Communicator& world, Arguments& arguments) {
  const bool json = arguments.flag("json");
  ReplayRequest request;
  agree(world, [&] {
    request = replay_request(arguments);
    set_compute_threads(threads_per_process(request.config.threads(), world.size()));
  });
  const ReplaySummary summary = replay(request, world);
  if (world.process() == 0)
    std::cout << (json ? to_json(summary) + "\n" : replay_table(summary)) << std::flush;
  return 0;
}

/// Without a launcher, processes are threads, as many as the mesh of the recording has.
Arguments with_processes(Arguments arguments) {
  Arguments rest = arguments;
  rest.option("backend");
  rest.flag("json");
  if (!rest.option("threads-as-processes").empty()) return arguments;
  const ReplayPlan plan = plan_replay(replay_request(rest));
  arguments.add("threads-as-processes", std::to_string(mesh_shape(plan.config).processes()));
  return arguments;
}

}  // namespace

int replay_command(Arguments arguments) {
  const bool launched = launched_by_mpi() || tcp_meeting_in_environment();
  return run_job(launched ? std::move(arguments) : with_processes(std::move(arguments)), replay_in);
}

}  // namespace lowband
