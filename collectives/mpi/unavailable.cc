#include "collectives/mpi/mpi_world.h"

#include <cstdlib>

namespace lowband {
namespace {

[[noreturn]] void refuse() {
  throw MpiError("lowband was built without MPI (LOWBAND_MPI): processes cannot be joined by mpirun");
}

}  // namespace

bool mpi_available() { return false; }
std::string mpi_version() { return ""; }

MpiWorld::MpiWorld(std::chrono::milliseconds deadline) : deadline_(deadline), exceptions_in_flight_(0) {
  refuse();
}
MpiWorld::~MpiWorld() {}
std::unique_ptr<Communicator> MpiWorld::world() const { refuse(); }
void MpiWorld::abort(int exit_code) const { std::_Exit(exit_code); }

}  // namespace lowband
