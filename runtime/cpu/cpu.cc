#include "runtime/cpu.h"

#include "runtime/error.h"

#include <cstdlib>
#include <fstream>
#include <string_view>

#include <dlfcn.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lowband {
namespace {

// OpenBLAS exports these names; any other BLAS does not, hence the look-up at run time.
template <class Function>
Function blas_symbol(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

std::string processor_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

bool is_sse_core(std::string_view core) {
  // Core names of OpenBLAS whose kernels use no AVX.
  for (const std::string_view name :
       {"Prescott", "Core2", "Nehalem", "Penryn", "Dunnington", "Katmai", "Coppermine", "Northwood", "Banias",
        "Atom", "Athlon", "Opteron", "Barcelona", "Bobcat", "generic"}) {
    if (core.starts_with(name)) return true;
  }
  return false;
}

}  // namespace

CpuInfo cpu_info() {
  CpuInfo info;
  info.model = processor_model();
  info.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  info.avx512 = info.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) info.cores = CPU_COUNT(&set);
  return info;
}

std::string blas_core_name() {
  const auto corename = blas_symbol<char* (*)()>("openblas_get_corename");
  return corename == nullptr ? "unknown" : corename();
}

std::string vector_kernel_name() {
  const CpuInfo info = cpu_info();
  return info.avx512 ? "avx512" : info.avx2 ? "avx2" : "baseline";
}

void ensure_fast_blas_kernels(char** argv) {
  const CpuInfo info = cpu_info();
  constexpr const char* kGuard = "LOWBAND_BLAS_EXECUTED_AGAIN";
  const bool slow = info.avx2 && is_sse_core(blas_core_name());
  if (!slow || std::getenv("OPENBLAS_CORETYPE") != nullptr || std::getenv(kGuard) != nullptr) return;
  // SkylakeX kernels on Intel's AVX-512 machines; Haswell's (AVX2) elsewhere, which every AVX2 processor
  // runs.
  const bool intel = info.model.find("Intel") != std::string::npos;
  setenv("OPENBLAS_CORETYPE", info.avx512 && intel ? "SkylakeX" : "Haswell", 1);
  setenv(kGuard, "1", 1);
  execv("/proc/self/exe", argv);
  // Reached only when the program cannot execute itself: it then runs with the slow kernels, which `info`
  // shows.
}

Index peak_memory_bytes() {
  rusage usage{};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? Index{usage.ru_maxrss} * 1024 : 0;
}

void set_compute_threads(int threads) {
  const int most = most_compute_threads();
  LB_EXPECTS(threads >= 1 && threads <= most, "threads: found ", threads, ", expected ",
             most == 1 ? "1: this build has no OpenMP, or OMP_THREAD_LIMIT is 1" : cat("1 to ", most));
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
  if (const auto set_threads = blas_symbol<void (*)(int)>("openblas_set_num_threads")) set_threads(threads);
}

int compute_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int most_compute_threads() {
#ifdef _OPENMP
  return omp_get_thread_limit();
#else
  return 1;
#endif
}

}  // namespace lowband
