#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over every library source of the build.
#
# Usage: tidy.sh REPOSITORY_ROOT BUILD_FOLDER
set -euo pipefail
cd "$1"
git ls-files 'runtime/*.cc' 'collectives/*.cc' 'sharding/*.cc' 'optimizers/*.cc' 'model/*.cc' 'trainer/*.cc' 'launcher/*.cc' |
  while IFS= read -r file; do
    grep -qF "$PWD/$file\"" "$2/compile_commands.json" && echo "$file"  # a twin that this build leaves out has no command
  done |
  xargs --max-procs=2 --max-args=4 clang-tidy --quiet -p "$2" --extra-arg=-Wno-unknown-warning-option 2>&1 |
  grep -vE '^[0-9]+ warnings? (generated|treated)|^Suppressed|^Use -header-filter' || true
exit "${PIPESTATUS[1]}"
