# Everything lowband stands on. Required: a C++20 compiler, protobuf, a BLAS with LAPACK. The rest can be switched
# off (OFF), demanded (ON: an error when it is missing) or taken when it is there (AUTO, the default).

include(CheckCXXSourceCompiles)
include(Decide)
set(LOWBAND_SWITCH_HELP "AUTO: use it when found; ON: error when missing; OFF: never")
foreach(switch MPI UCX ONEDNN OPENMP NVTX CUDA NCCL TESTS)
  set(LOWBAND_${switch} AUTO CACHE STRING "${LOWBAND_SWITCH_HELP}")
  set_property(CACHE LOWBAND_${switch} PROPERTY STRINGS AUTO ON OFF)
endforeach()
option(LOWBAND_PERF "Build the benchmarks" ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")

find_package(Threads REQUIRED)

find_package(Protobuf REQUIRED)
set(LOWBAND_PROTOC ${Protobuf_PROTOC_EXECUTABLE} CACHE FILEPATH "protoc")
if(NOT LOWBAND_PROTOC)
  message(FATAL_ERROR "protoc not found: install protobuf-compiler or set LOWBAND_PROTOC")
endif()

set(BLA_VENDOR OpenBLAS)
find_package(BLAS QUIET)
if(NOT BLAS_FOUND)
  unset(BLA_VENDOR)
  find_package(BLAS REQUIRED)
endif()
find_package(LAPACK REQUIRED)

find_package(OpenMP QUIET COMPONENTS CXX)
lowband_decide(OPENMP "${OpenMP_CXX_FOUND}" "Use a compiler with OpenMP.")

# Not find_package(dnnl): Debian's config file also demands OpenCL, which the CPU library does not use.
find_library(LOWBAND_DNNL_LIBRARY NAMES dnnl mkldnn)
find_path(LOWBAND_DNNL_INCLUDE oneapi/dnnl/dnnl.h)
if(LOWBAND_DNNL_LIBRARY AND LOWBAND_DNNL_INCLUDE)
  add_library(DNNL::dnnl UNKNOWN IMPORTED)
  set_target_properties(DNNL::dnnl PROPERTIES IMPORTED_LOCATION ${LOWBAND_DNNL_LIBRARY}
                                              INTERFACE_INCLUDE_DIRECTORIES ${LOWBAND_DNNL_INCLUDE})
endif()
if(TARGET DNNL::dnnl)
  set(dnnl_found TRUE)
endif()
lowband_decide(ONEDNN "${dnnl_found}" "Install libdnnl-dev.")

find_package(MPI QUIET COMPONENTS C)
lowband_decide(MPI "${MPI_C_FOUND}" "Install libopenmpi-dev and openmpi-bin.")

# UCX, and Boost.Asio's headers, with which its processes meet without MPI.
find_package(ucx QUIET CONFIG)
find_package(Boost 1.74 QUIET OPTIONAL_COMPONENTS context)
if(TARGET ucx::ucp AND TARGET Boost::headers)
  set(ucx_found TRUE)
endif()
lowband_decide(UCX "${ucx_found}" "Install libucx-dev and libboost-dev.")

include(CudaDependencies)

find_package(GTest QUIET)
lowband_decide(TESTS "${GTest_FOUND}" "Install libgtest-dev and libgmock-dev.")
if(LOWBAND_HAVE_TESTS)
  include(GoogleTest)
endif()
