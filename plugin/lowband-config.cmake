# find_package(lowband) defines the target lowband::lowband: the C interface and its C++ face.
include(${CMAKE_CURRENT_LIST_DIR}/lowband-targets.cmake)
