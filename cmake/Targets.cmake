# The three kinds of targets lowband consists of.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)

add_library(lowband_flags INTERFACE)
target_include_directories(lowband_flags INTERFACE ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR}/generated)
target_compile_options(
  lowband_flags
  INTERFACE "$<$<NOT:$<COMPILE_LANGUAGE:CUDA>>:-Wall;-Wextra;-Wconversion;-Wsign-conversion;-Wshadow;-Werror>"
            "$<$<NOT:$<COMPILE_LANGUAGE:CUDA>>:-fno-math-errno;-fno-trapping-math>"
            $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)  # gcc 12 warns about std::string's own operator+ (bug 105651)
# nvcc hands the list to the host compiler. Not -Wconversion: the host stubs that nvcc writes do not pass it, and it
# has its own warnings for device code. --expt-relaxed-constexpr: our constexpr functions run on the device too.
target_compile_options(
  lowband_flags
  INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-Wshadow,-Werror>")

# lowband_library(NAME folder SOURCES ... DEPENDS ...): one static library per folder. It may depend only on folders
# below it (ARCHITECTURE: arrows point down); tests/layering checks the includes.
function(lowband_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS;PRIVATE" ${ARGN})
  add_library(lowband_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(lowband_${name} PUBLIC lowband_flags ${ARG_DEPENDS} PRIVATE ${ARG_PRIVATE})
endfunction()

# lowband_proto(NAME file.proto): C++ of a message file of this folder, free of our warning flags.
function(lowband_proto target file)
  get_filename_component(stem ${file} NAME_WE)
  file(RELATIVE_PATH folder ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
  set(out ${PROJECT_BINARY_DIR}/generated/${folder}/${stem}.pb)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/generated)
  add_custom_command(
    OUTPUT ${out}.cc ${out}.h
    COMMAND ${LOWBAND_PROTOC} --proto_path=${PROJECT_SOURCE_DIR} --cpp_out=${PROJECT_BINARY_DIR}/generated
            ${folder}/${file}
    DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${file}
    VERBATIM)
  add_library(${target} STATIC ${out}.cc ${out}.h)
  target_include_directories(${target} SYSTEM PUBLIC ${PROJECT_BINARY_DIR}/generated)
  target_link_libraries(${target} PUBLIC protobuf::libprotobuf)
  if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=thread")
    # With this macro map_field.h gives every map two more members than the installed libprotobuf knows, and parsing
    # a map crashes. libstdc++ derives the second macro from the first.
    target_compile_options(${target} PUBLIC -U__SANITIZE_THREAD__ -D_GLIBCXX_TSAN=1)
  endif()
endfunction()

# lowband_test(NAME SOURCES ... DEPENDS ... [LABELS ...]): a GoogleTest program whose cases ctest runs one by one.
function(lowband_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPENDS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SOURCES} ${PROJECT_SOURCE_DIR}/tests/main.cc)
  target_link_libraries(${name} PRIVATE ${ARG_DEPENDS} lowband_runtime GTest::gtest GTest::gmock)
  gtest_discover_tests(
    ${name}
    TEST_PREFIX "${name}." NO_PRETTY_VALUES
    DISCOVERY_MODE PRE_TEST
    PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()
