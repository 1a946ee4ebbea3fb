# What runs on one device, with its checks and benchmarks: for machines that have a compiler, nvcc and NVIDIA's wheels,
# and neither protobuf nor a BLAS nor GoogleTest. perf/gpu/run_all configures it.

set(LOWBAND_CUDA ON)
set(LOWBAND_NCCL OFF)
include(Decide)
find_package(Threads REQUIRED)
include(CudaDependencies)
include(Targets)
enable_testing()

# The part of each folder that needs none of them; under its own name, so that checks and benchmarks link the same.
function(only_device_library name)
  list(TRANSFORM ARGN PREPEND ${PROJECT_SOURCE_DIR}/${name}/)
  add_library(lowband_${name} STATIC ${ARGN})
  target_link_libraries(lowband_${name} PUBLIC lowband_flags lowband_cudart)
endfunction()
target_compile_options(lowband_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)  # of OpenMP
# A borrowed machine's compiler is another one: its new warnings do not cost the hour.
target_compile_options(lowband_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-error>
                                               $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wno-error>)
include(runtime/cuda/sources.cmake)
set(nvtx_source nvtx/unavailable.cc)
if(LOWBAND_HAVE_NVTX)
  set(nvtx_source nvtx/ranges.cc)
endif()
only_device_library(runtime ${cuda_sources} ${nvtx_source} cpu/cpu.cc cpu/vector_kernels.cc numbers.cc passes.cc random.cc timeline.cc)
if(LOWBAND_HAVE_NVTX)
  target_include_directories(lowband_runtime SYSTEM PRIVATE ${LOWBAND_NVTX_INCLUDE})
endif()
add_subdirectory(runtime/cpu/kernels)
set_source_files_properties(${PROJECT_SOURCE_DIR}/runtime/cuda/kernels.cu ${PROJECT_SOURCE_DIR}/runtime/cuda/numbers.cu
                            ${PROJECT_SOURCE_DIR}/runtime/cuda/passes.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
target_link_libraries(lowband_runtime PUBLIC lowband_cublas Threads::Threads dl)

only_device_library(
  collectives agreement.cc byte_budget.cc call.cc communicator.cc exchange_communicator.cc ledger.cc local/local_world.cc
  tree_reduction.cc)
target_link_libraries(lowband_collectives PUBLIC lowband_runtime)
only_device_library(sharding layout.cc parameter.cc)
target_link_libraries(lowband_sharding PUBLIC lowband_collectives)
include(model/cuda/sources.cmake)
only_device_library(
  model ${cuda_sources} attention.cc cross_entropy.cc cuda/device_memory.cc initial_values.cc layers.cc make_model.cc parameter_table.cc rotary_table.cc
  transformer.cc)
target_link_libraries(lowband_model PUBLIC lowband_sharding)

# torch brings a BLAS with LAPACK, whose functions its library exports: with it the optimizers are here too.
set(torch_folders ${site_folders})
file(GLOB venv_folders ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages)
list(APPEND torch_folders ${venv_folders})
list(TRANSFORM torch_folders APPEND /torch/lib)
find_library(LOWBAND_TORCH_BLAS torch_cpu HINTS ${torch_folders} NO_DEFAULT_PATH)
if(LOWBAND_TORCH_BLAS)
  get_filename_component(torch_lib ${LOWBAND_TORCH_BLAS} DIRECTORY)
  # What torch's library needs itself is found when a program starts, by paths of its own.
  set(torch_link_options -Wl,-rpath-link,${torch_lib} -Wl,-rpath,${torch_lib} -Wl,--allow-shlib-undefined)
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_LIBRARIES ${LOWBAND_TORCH_BLAS})
  set(CMAKE_REQUIRED_LINK_OPTIONS ${torch_link_options})
  check_cxx_source_compiles(
    "extern \"C\" { void sgemm_(); void dgemm_(); void strsm_(); void dtrsm_(); void dgesdd_(); }
     int main() { sgemm_(); dgemm_(); strsm_(); dtrsm_(); dgesdd_(); }" LOWBAND_TORCH_HAS_BLAS)
  unset(CMAKE_REQUIRED_LIBRARIES)
  unset(CMAKE_REQUIRED_LINK_OPTIONS)
endif()
if(NOT LOWBAND_TORCH_HAS_BLAS)
  message(STATUS "lowband: optimizers left out: no torch whose library exports a BLAS")
else()
  message(STATUS "lowband: BLAS for the optimizers: ${LOWBAND_TORCH_BLAS}")
  add_library(lowband_linalg STATIC runtime/cpu/gemm_blas.cc runtime/cpu/linalg.cc runtime/low_rank.cc)
  target_link_libraries(lowband_linalg PUBLIC lowband_runtime PRIVATE ${LOWBAND_TORCH_BLAS})
  target_link_options(lowband_linalg INTERFACE ${torch_link_options})
  target_sources(lowband_sharding PRIVATE sharding/process_mesh.cc sharding/rank_profile.cc)
  file(GLOB factor_sources CONFIGURE_DEPENDS collectives/factors/*.cc)
  file(GLOB optimizer_sources CONFIGURE_DEPENDS optimizers/*.cc)
  add_library(lowband_optimizers STATIC ${factor_sources} ${optimizer_sources})
  target_link_libraries(lowband_optimizers PUBLIC lowband_sharding lowband_linalg)
endif()
add_subdirectory(tests/runtime/cuda)
add_subdirectory(tests/model/cuda)
add_subdirectory(perf/gpu)
