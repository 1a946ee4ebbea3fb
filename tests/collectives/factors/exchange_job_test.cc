// One process of a job: exchange_job_test mpi|ucx. All run the same cases in the same order, and report their
// own failures. MPI's processes are started by mpirun, those of UCX by ucx_job.sh.
#include "collectives/mpi/mpi_world.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "collectives/ucx/ucx_world.h"
#include "runtime/cpu.h"
#include "tests/collectives/factors/exchange_cases.h"

#include <cstdio>
#include <functional>
#include <memory>
#include <string_view>

#include <gtest/gtest.h>

namespace lowband {
namespace {

Communicator* world = nullptr;

class JobFactorExchange : public testing::TestWithParam<ExchangeCase> {};

TEST_P(JobFactorExchange, Conforms) { GetParam().body(*world); }

INSTANTIATE_TEST_SUITE_P(All, JobFactorExchange,
                         testing::ValuesIn(exchange_cases().begin(), exchange_cases().end()),
                         [](const auto& test) { return test.param.name; });

// One line for each failure, with the process it happened on.
class ProcessReporter : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::printf("[process %d of %d] %s:%d: %s\n", world->process(), world->size(), result.file_name(),
                result.line_number(), result.message());
  }
};

int run_all(std::unique_ptr<Communicator> communicator, const std::function<void(int)>& end_job) {
  world = communicator.get();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (communicator->process() != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new ProcessReporter);
  // A failed case may leave its peers waiting for this process: end the whole job.
  const int result = RUN_ALL_TESTS();
  if (result != 0) end_job(result);
  return result;
}

int run_all(std::string_view backend) {
  if (backend == "mpi") {
    const MpiWorld mpi;
    return run_all(mpi.world(), [&](int result) { mpi.abort(result); });
  }
  if (backend == "ucx") {
    TcpRendezvous rendezvous(tcp_meeting_from_environment());
    const UcxWorld ucx(rendezvous);
    return run_all(ucx.world(), [&](int result) { ucx.abort(result, "a case failed"); });
  }
  std::fprintf(stderr, "exchange_job_test: expected mpi or ucx\n");
  return 2;
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  testing::InitGoogleTest(&argc, argv);
  lowband::set_compute_threads(1);
  return lowband::run_all(argc > 1 ? argv[1] : "");
}
