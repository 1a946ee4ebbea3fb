#include "plugin/world.h"

#include "collectives/rendezvous/tcp_rendezvous.h"
#include "plugin/callback_rendezvous.h"

#include <chrono>
#include <cmath>

namespace lowband::plugin {
namespace {

std::chrono::milliseconds deadline_of(double seconds, std::string_view field) {
  LB_EXPECTS(seconds > 0 && std::isfinite(seconds), field, ": found ", seconds,
             ", expected a positive number");
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(seconds * 1000)));
}

lowband_world* world_over_ucx(Rendezvous& rendezvous) {
  auto world = std::make_unique<lowband_world>();
  world->ucx.emplace(rendezvous);
  world->communicator = world->ucx->world();
  return world.release();
}

TcpMeeting tcp_meeting(const lowband_meeting& meeting) {
  expect_pointer(meeting.address, "meeting.address");
  LB_EXPECTS(meeting.processes >= 1, "meeting.processes: found ", meeting.processes, ", expected at least 1");
  LB_EXPECTS(meeting.process >= 0 && meeting.process < meeting.processes, "meeting.process: found ",
             meeting.process, ", expected 0 .. ", meeting.processes - 1);
  LB_EXPECTS(meeting.port >= 1 && meeting.port <= 65535, "meeting.port: found ", meeting.port,
             ", expected 1 .. 65535");
  return {.process = meeting.process,
          .size = meeting.processes,
          .address = meeting.address,
          .port = meeting.port,
          .token = meeting.token != nullptr ? meeting.token : "",
          .deadline = deadline_of(meeting.deadline_seconds, "meeting.deadline_seconds")};
}

// The destructors of the transports take an exception in flight for a failure of this process: then they do
// not wait for the others, to whom it is gone.
void end_broken(std::unique_ptr<lowband_world> world) {
  struct Failed {};
  try {
    const std::unique_ptr<lowband_world> ends_here = std::move(world);
    throw Failed{};
  } catch (const Failed&) {
    return;
  }
}

}  // namespace
}  // namespace lowband::plugin

using namespace lowband::plugin;

void lowband_meeting_defaults(lowband_meeting* meeting) {
  clear(meeting);
  meeting->processes = 1;
  meeting->deadline_seconds = 120;
}

lowband_status lowband_world_from_mpi(lowband_world** world) {
  return guarded([&] {
    expect_pointer(world, "world");
    auto made = std::make_unique<lowband_world>();
    made->mpi.emplace();
    made->communicator = made->mpi->world();
    *world = made.release();
  });
}

lowband_status lowband_world_from_environment(lowband_world** world) {
  return guarded([&] {
    expect_pointer(world, "world");
    lowband::TcpRendezvous rendezvous(lowband::tcp_meeting_from_environment());
    *world = world_over_ucx(rendezvous);
  });
}

lowband_status lowband_world_from_tcp(const lowband_meeting* meeting, lowband_world** world) {
  return guarded([&] {
    expect_pointer(world, "world");
    expect_struct(meeting, "meeting");
    lowband::TcpRendezvous rendezvous(tcp_meeting(*meeting));
    *world = world_over_ucx(rendezvous);
  });
}

lowband_status lowband_world_from_all_gather(int process, int processes, lowband_all_gather all_gather,
                                             void* context, lowband_world** world) {
  return guarded([&] {
    expect_pointer(world, "world");
    CallbackRendezvous rendezvous(process, processes, all_gather, context);
    *world = world_over_ucx(rendezvous);
  });
}

int lowband_world_process(const lowband_world* world) {
  return world != nullptr ? world->communicator->process() : -1;
}

int lowband_world_processes(const lowband_world* world) {
  return world != nullptr ? world->communicator->size() : 0;
}

lowband_status lowband_world_set_deadline(lowband_world* world, double seconds) {
  return guarded([&] {
    expect_pointer(world, "world");
    world->communicator->set_deadline(deadline_of(seconds, "deadline"));
  });
}

lowband_status lowband_world_abort(lowband_world* world, const char* reason) {
  return guarded([&] {
    expect_pointer(world, "world");
    world->broken = true;
    const std::string_view told = reason != nullptr ? reason : "the program gave up";
    if (world->ucx) world->ucx->tell_failure(told);
    world->communicator->abort(told);
  });
}

void lowband_world_free(lowband_world* world) {
  if (world == nullptr) return;
  std::unique_ptr<lowband_world> owned(world);
  if (owned->broken) end_broken(std::move(owned));
}
