#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over every library source that this build compiles.
#
# Usage: tidy.sh REPOSITORY_ROOT BUILD_FOLDER
set -uo pipefail
cd "$1"
built() { # sources of twins that this build leaves out have no compile command
  git ls-files 'runtime/*.cc' 'collectives/*.cc' 'sharding/*.cc' 'optimizers/*.cc' 'model/*.cc' 'trainer/*.cc' 'launcher/*.cc' 'plugin/*.cc' |
    while IFS= read -r file; do
      grep -qF "\"$PWD/$file\"" "$2/compile_commands.json" && echo "$file"
    done
}
# -Wno-restrict is gcc's word; clang need not know it.
if ! findings=$(built "$@" | xargs --max-procs=2 --max-args=4 clang-tidy --quiet -p "$2" \
  --extra-arg=-Wno-unknown-warning-option 2>/dev/null); then
  echo "$findings"
  exit 1
fi
