#pragma once

#include "collectives/communicator.h"
#include "launcher/arguments.h"

#include <functional>

namespace lowband {

/// What a process of a job does; returns the exit code. The arguments are what `run_job` left over.
using JobBody = std::function<int(Communicator& world, Arguments& arguments)>;

/// Joins the processes of the job, runs `body` as this one of them, and returns the program's exit code.
///
/// Takes these arguments:
///   --backend mpi|ucx|nccl|local
///                              how bytes move between processes. Without it: mpi when an MPI launcher
///                              started this process, ucx when WORLD_SIZE is in the environment, else
///                              local. For ucx and nccl processes meet over MPI, or where RANK, WORLD_SIZE,
///                              MASTER_ADDR and MASTER_PORT say.
///   --threads-as-processes N   local: N processes as threads of this program (1)
///
/// What concerns all processes alike (AgreedFailure) is printed once and ends with kExitUsage. Another
/// exception on any process ends all of them: MPI jobs by an abort with one line naming the process; without
/// MPI every process says why it ends, with kExitTemporary where the failure was another's.
/// Throws: InvalidArgument for bad arguments; with threads as processes whatever `body` threw.
int run_job(Arguments arguments, const JobBody& body);

/// Compute threads of each process: `configured` unless that is 0, else what lowband-run worked out
/// (LOWBAND_THREADS), else a fair share of the cores; the last two as far as this build can.
/// Throws: InvalidArgument for a bad LOWBAND_THREADS.
int threads_per_process(int configured, int processes);

}  // namespace lowband
