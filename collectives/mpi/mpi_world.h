#pragma once

#include "collectives/communicator.h"

#include <chrono>
#include <memory>
#include <string>

namespace lowband {

/// Whether MPI is built into this binary.
bool mpi_available();

/// The MPI library's own description, one line; empty when it is not built in.
std::string mpi_version();

/// Whether this process was started by an MPI launcher (mpirun, or srun under it). Reads the environment
/// only.
bool launched_by_mpi();

/// MPI for the life of this object, at most one per program; made by every process of the job.
///
/// A program that has initialised MPI itself, with MPI_THREAD_MULTIPLE, also shuts it down itself. An MPI job
/// is a fail-stop unit: after a failure the program says why and calls `abort`. The destructor shuts MPI down
/// when no exception is in flight, and otherwise leaves it to the launcher to end the job. Threads: different
/// communicators may be used by different threads at once. Throws: MpiError, also when MPI is not built in.
class MpiWorld {
 public:
  explicit MpiWorld(std::chrono::milliseconds deadline = std::chrono::seconds(20));
  ~MpiWorld();
  MpiWorld(const MpiWorld&) = delete;
  MpiWorld& operator=(const MpiWorld&) = delete;

  /// A communicator of all processes with a ledger of its own. Collective. It and all groups split from it
  /// end before this object.
  std::unique_ptr<Communicator> world() const;

  /// Ends all processes of the job; mpirun returns `exit_code`.
  [[noreturn]] void abort(int exit_code) const;

 private:
  [[maybe_unused]] std::chrono::milliseconds deadline_;  // unused in a build without MPI
  [[maybe_unused]] int exceptions_in_flight_;
  [[maybe_unused]] bool initialised_here_ = false;
};

}  // namespace lowband
