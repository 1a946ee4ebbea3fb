# The CUDA toolkit, NVTX, cuBLAS and NCCL, from the toolkit, the system or NVIDIA's Python wheels.
# Defines lowband_cudart, lowband_cublas and lowband_nccl where found. Never links libcuda: the program has to start
# on a machine without a driver.

if(NOT LOWBAND_CUDA STREQUAL "OFF")
  find_program(LOWBAND_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
endif()

# Folders nvidia/*/ of the Python that cmake sees first, where wheels put include/ and lib/.
set(wheel_roots "")
find_package(Python3 QUIET COMPONENTS Interpreter)
if(Python3_Interpreter_FOUND)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import sysconfig, site; print(';'.join({sysconfig.get_paths()['purelib'], site.getusersitepackages()}))"
    OUTPUT_VARIABLE site_folders
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  foreach(folder IN LISTS site_folders)
    file(GLOB found ${folder}/nvidia/*)
    list(APPEND wheel_roots ${found})
  endforeach()
endif()
file(GLOB venv_roots ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/*)
list(APPEND wheel_roots ${venv_roots})

if(LOWBAND_NVCC)
  get_filename_component(nvcc_real ${LOWBAND_NVCC} REALPATH)
  get_filename_component(toolkit ${nvcc_real} DIRECTORY)
  get_filename_component(toolkit ${toolkit} DIRECTORY)
  set(toolkit_roots ${toolkit} ${toolkit}/targets/x86_64-linux $ENV{CUDA_HOME} /usr/local/cuda)
endif()
find_path(LOWBAND_CUDA_INCLUDE cuda_runtime_api.h HINTS ${toolkit_roots} ${wheel_roots} PATH_SUFFIXES include)
find_library(LOWBAND_CUDART NAMES cudart cudart_static libcudart.so.13 libcudart.so.12 HINTS ${toolkit_roots} ${wheel_roots}
             PATH_SUFFIXES lib64 lib lib/x64)
find_path(LOWBAND_CUBLAS_INCLUDE cublas_v2.h HINTS ${toolkit_roots} ${wheel_roots} PATH_SUFFIXES include)
find_library(LOWBAND_CUBLAS NAMES cublas libcublas.so.13 libcublas.so.12 HINTS ${toolkit_roots} ${wheel_roots}
             PATH_SUFFIXES lib64 lib)
find_library(LOWBAND_CUBLASLT NAMES cublasLt libcublasLt.so.13 libcublasLt.so.12 HINTS ${toolkit_roots} ${wheel_roots}
             PATH_SUFFIXES lib64 lib)
find_path(LOWBAND_NCCL_INCLUDE nccl.h HINTS ${toolkit_roots} ${wheel_roots} PATH_SUFFIXES include)
find_library(LOWBAND_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${toolkit_roots} ${wheel_roots} PATH_SUFFIXES lib64 lib)

set(cuda_found FALSE)
if(LOWBAND_NVCC AND LOWBAND_CUDA_INCLUDE AND LOWBAND_CUDART AND LOWBAND_CUBLAS_INCLUDE AND LOWBAND_CUBLAS
   AND LOWBAND_CUBLASLT)
  set(cuda_found TRUE)
endif()
lowband_decide(CUDA ${cuda_found}
               "Needs nvcc, the CUDA runtime and cuBLAS (toolkit, or pip install nvidia-cublas).")
set(nccl_found FALSE)
if(LOWBAND_HAVE_CUDA AND LOWBAND_NCCL_INCLUDE AND LOWBAND_NCCL_LIBRARY)
  set(nccl_found TRUE)
endif()
lowband_decide(NCCL ${nccl_found} "Needs CUDA and NCCL (system package, or pip install nvidia-nccl-cu13).")
find_path(LOWBAND_NVTX_INCLUDE nvtx3/nvToolsExt.h HINTS ${LOWBAND_CUDA_INCLUDE})
lowband_decide(NVTX "${LOWBAND_NVTX_INCLUDE}" "Install the CUDA toolkit's NVTX headers.")

function(lowband_imported target library include)
  add_library(${target} UNKNOWN IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION ${library} INTERFACE_INCLUDE_DIRECTORIES ${include})
endfunction()
if(LOWBAND_HAVE_CUDA)
  set(CMAKE_CUDA_COMPILER ${LOWBAND_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES 90)
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # lowband_cudart, below
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  lowband_imported(lowband_cudart ${LOWBAND_CUDART} ${LOWBAND_CUDA_INCLUDE})
  if(LOWBAND_CUDART MATCHES "static")
    target_link_libraries(lowband_cudart INTERFACE Threads::Threads dl rt)
  endif()
  lowband_imported(lowband_cublas ${LOWBAND_CUBLAS} ${LOWBAND_CUBLAS_INCLUDE})
  target_link_libraries(lowband_cublas INTERFACE ${LOWBAND_CUBLASLT})
endif()
if(LOWBAND_HAVE_NCCL)
  lowband_imported(lowband_nccl ${LOWBAND_NCCL_LIBRARY} ${LOWBAND_NCCL_INCLUDE})
  target_link_libraries(lowband_nccl INTERFACE lowband_cudart)  # nccl.h includes cuda_runtime.h
endif()
