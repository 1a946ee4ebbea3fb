#include "collectives/mpi/mpi_world.h"
#include "collectives/nccl/nccl_status.h"
#include "collectives/ucx/ucx_world.h"
#include "launcher/commands.h"
#include "launcher/info.pb.h"
#include "runtime/cpu.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "runtime/nvtx/ranges.h"
#include "runtime/version.h"

#include <iomanip>
#include <iostream>

#include <google/protobuf/stubs/common.h>

namespace lowband {
namespace {

void add_component(InfoReport& report, const std::string& name, bool built_in,
                   const std::string& component_version, const std::string& note = "") {
  auto* component = report.add_components();
  component->set_name(name);
  component->set_built_in(built_in);
  component->set_version(component_version);
  component->set_note(note);
}

InfoReport make_info() {
  const CpuInfo cpu = cpu_info();
  InfoReport report;
  report.set_version(std::string(version()));
  report.set_compiler(__VERSION__);
  report.set_cpu(cpu.model);
  report.set_cores(cpu.cores);
  report.set_vector_kernels(vector_kernel_name());
  report.set_blas_kernels(blas_core_name());
  report.set_gemm_library(gemm_library_name());

  const CudaStatus cuda = cuda_status();
  const NcclStatus nccl = nccl_status();
  add_component(report, "MPI", mpi_available(), mpi_version());
  add_component(report, "UCX", ucx_available(), ucx_version());
  add_component(report, "CUDA", cuda.built_in, cuda.toolkit_version, cuda.reason);
  add_component(report, "cuBLAS", cuda.built_in, cuda.cublas_version);
  add_component(report, "NCCL", nccl.built_in, nccl.version, nccl.reason);
  add_component(report, "NVTX", nvtx_built_in(), "");
  add_component(report, "protobuf", true, google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
  for (const CudaDevice& device : cuda.devices) {
    auto* entry = report.add_devices();
    entry->set_name(device.name);
    entry->set_compute_capability(device.compute_capability);
    entry->set_memory_gib(device.memory_gib);
  }
  report.set_devices_note(cuda.reason);
  return report;
}

}  // namespace

int info_command(Arguments arguments) {
  const bool json = arguments.flag("json");
  LB_EXPECTS(arguments.positional().empty(), "info: found arguments, expected none");
  const InfoReport report = make_info();
  if (json) {
    std::cout << to_json(report) << "\n";
    return 0;
  }
  std::cout << "lowband " << report.version() << ", compiler " << report.compiler() << "\n"
            << "processor       " << report.cpu() << ", " << report.cores() << " cores\n"
            << "vector kernels  " << report.vector_kernels() << "\n"
            << "GEMM            " << report.gemm_library() << "; BLAS kernels " << report.blas_kernels()
            << "\n";
  for (const auto& component : report.components()) {
    std::cout << std::left << std::setw(16) << component.name()
              << (component.built_in() ? "built in " + component.version() : "not built in")
              << (component.note().empty() ? "" : " (" + component.note() + ")") << "\n";
  }
  for (const auto& device : report.devices()) {
    std::cout << "device          " << device.name() << ", sm " << device.compute_capability() << ", "
              << device.memory_gib() << " GiB\n";
  }
  if (report.devices().empty()) std::cout << "devices         none: " << report.devices_note() << "\n";
  return 0;
}

}  // namespace lowband
