// Apart from cpu.cc: the one thing there that needs a BLAS to link.
#include "runtime/cpu.h"
#include "runtime/cpu/gemm.h"
#include "runtime/error.h"

#include <dlfcn.h>

namespace lowband {

std::string gemm_library_name() {
  const auto config = reinterpret_cast<char* (*)()>(dlsym(RTLD_DEFAULT, "openblas_get_config"));
  std::string blas = config == nullptr ? "BLAS" : config();
  // "OpenBLAS 0.3.21 NO_AFFINITY ...": name and version are enough.
  if (const auto second_space = blas.find(' ', blas.find(' ') + 1); second_space != std::string::npos) {
    blas.resize(second_space);
  }
  const std::string single = float_gemm_library();
  return cat("f32 ", single == "BLAS" ? blas : single, ", f64 ", blas);
}

}  // namespace lowband
