#include "launcher/bench/surroundings.h"

#include "collectives/mpi/mpi_world.h"
#include "collectives/ucx/ucx_world.h"
#include "launcher/bench/source_revision.h"
#include "runtime/cpu.h"
#include "runtime/version.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <utility>
#include <vector>

#include <unistd.h>

namespace lowband {
namespace {

// What decides how a transport behaves. No whole families that may hold addresses and tokens of a job.
constexpr std::array<std::string_view, 9> kPins{"LOWBAND_THREADS=",
                                                "NCCL_",
                                                "OMPI_MCA_btl",
                                                "OMPI_MCA_coll",
                                                "OMPI_MCA_mpi_yield_when_idle=",
                                                "OMPI_MCA_pml",
                                                "OMP_NUM_THREADS=",
                                                "OPENBLAS_",
                                                "UCX_"};

std::vector<std::string> pinned_environment() {
  std::vector<std::string> pinned;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    if (std::ranges::any_of(kPins, [&](std::string_view pin) { return text.starts_with(pin); }))
      pinned.emplace_back(text);
  }
  std::ranges::sort(pinned);
  return pinned;
}

void gather_processes(Communicator& world, BenchReport& report) {
  constexpr Index kHostBytes = 64;
  std::vector<std::uint8_t> host(kHostBytes);
  ::gethostname(reinterpret_cast<char*>(host.data()), kHostBytes - 1);
  const auto processes = static_cast<std::size_t>(world.size());
  std::vector<std::uint8_t> hosts(processes * kHostBytes);
  const std::vector<Index> host_counts(processes, kHostBytes);
  world.all_gather<std::uint8_t>(host, hosts, host_counts, {Purpose::kControl});
  const std::vector<Index> pid{static_cast<Index>(::getpid())};
  std::vector<Index> pids(processes);
  const std::vector<Index> pid_counts(processes, 1);
  world.all_gather<Index>(pid, pids, pid_counts, {Purpose::kControl});
  for (std::size_t p = 0; p < processes; ++p) {
    BenchReport::Process& process = *report.add_processes();
    process.set_host(reinterpret_cast<const char*>(hosts.data() + p * kHostBytes));
    process.set_pid(pids[p]);
  }
}

}  // namespace

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text.data();
}

void describe_surroundings(Communicator& world, const CommBenchOptions& options, BenchReport& report) {
  const CpuInfo cpu = cpu_info();
  report.set_version(std::string(version()));
  report.set_revision(kSourceRevision);
  report.set_started(utc_now());
  gather_processes(world, report);
  report.set_backend(std::string(world.backend()));
  if (world.backend() == "mpi") report.set_backend_version(mpi_version());
  if (world.backend() == "ucx") report.set_backend_version(ucx_version());
  report.set_algorithm(
      "reduce-scatter to owners, who sum in the order of a binary tree over processes; ring all-gather");
  for (std::string& entry : pinned_environment()) report.add_environment(std::move(entry));
  report.set_cpu(cpu.model);
  report.set_cores(cpu.cores);
  report.set_threads_per_process(compute_threads());
  report.set_link(options.link);
  report.set_interface(options.interface);
  report.set_model(options.model);
  if (!options.profiles.empty())
    report.set_matrices(static_cast<std::int64_t>(options.profiles.front().matrices.size()));
  report.set_with_products(options.with_products);
  report.set_warmup(options.warmup);
  report.set_iterations(options.iterations);
  report.set_min_time_seconds(options.min_time_seconds);
  report.set_checks(options.checks);
}

}  // namespace lowband
