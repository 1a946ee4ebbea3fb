#!/usr/bin/env bash
# Every header compiles alone, as STYLE asks.
#
# Usage: headers_alone.sh REPOSITORY_ROOT GENERATED_HEADERS COMPILER
set -euo pipefail
cd "$1"
git ls-files 'runtime/*.h' 'collectives/*.h' 'sharding/*.h' 'optimizers/*.h' 'model/*.h' 'trainer/*.h' 'launcher/*.h' 'plugin/*.h' |
  while IFS= read -r header; do
    echo "#include \"$header\"" | "$3" -std=c++20 -fsyntax-only -I. -I"$2" -x c++ - || {
      echo "$header does not compile alone"
      exit 1
    }
  done
