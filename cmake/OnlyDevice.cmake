# What runs on one device, with its checks and benchmarks: for machines that have a compiler, nvcc and NVIDIA's wheels,
# and neither protobuf nor a BLAS nor GoogleTest. perf/gpu/run_all configures it.

set(LOWBAND_CUDA ON)
set(LOWBAND_NCCL OFF)
include(Decide)
find_package(Threads REQUIRED)
include(CudaDependencies)
include(Targets)
enable_testing()

# The part of the runtime that needs none of them; under its own name, so that checks and benchmarks link the same.
include(runtime/cuda/sources.cmake)
list(TRANSFORM cuda_sources PREPEND ${PROJECT_SOURCE_DIR}/runtime/)
add_library(lowband_runtime STATIC ${cuda_sources})
set_source_files_properties(${PROJECT_SOURCE_DIR}/runtime/cuda/kernels.cu ${PROJECT_SOURCE_DIR}/runtime/cuda/passes.cu
                            PROPERTIES COMPILE_OPTIONS --fmad=false)
target_link_libraries(lowband_runtime PUBLIC lowband_flags lowband_cudart lowband_cublas)
add_subdirectory(tests/runtime/cuda)
add_subdirectory(perf/gpu)
