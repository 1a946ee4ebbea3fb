#!/usr/bin/env bash
# Every source file is formatted as .clang-format says.
#
# Usage: format.sh REPOSITORY_ROOT
set -euo pipefail
cd "$1"
git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror
