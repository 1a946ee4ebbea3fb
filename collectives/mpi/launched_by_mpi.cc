#include "collectives/mpi/mpi_world.h"

#include <cstdlib>

namespace lowband {

bool launched_by_mpi() {
  // Open MPI; MPICH and Slurm's PMI; anything that speaks PMIx.
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    if (std::getenv(variable) != nullptr) return true;
  }
  return false;
}

}  // namespace lowband
