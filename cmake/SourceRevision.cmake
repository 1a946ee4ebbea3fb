# Writes HEADER with the git revision of SOURCE, "-dirty" when files differ from it, "unknown" without git.
# Usage: cmake -DSOURCE=folder -DHEADER=file -P SourceRevision.cmake
execute_process(
  COMMAND git -C ${SOURCE} describe --always --dirty --abbrev=12 --exclude=*
  OUTPUT_VARIABLE revision
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
  RESULT_VARIABLE failed)
if(failed)
  set(revision "unknown")
endif()
set(text "#pragma once\nnamespace lowband {\ninline constexpr const char* kSourceRevision = \"${revision}\";\n}  // namespace lowband\n")
if(EXISTS ${HEADER})
  file(READ ${HEADER} written)
endif()
if(NOT "${written}" STREQUAL "${text}")
  file(WRITE ${HEADER} "${text}")
endif()
