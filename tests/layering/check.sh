#!/usr/bin/env bash
# Arrows point down: no file includes a header of a folder above its own. Prints each violation.
#
# Usage: check.sh REPOSITORY_ROOT
set -euo pipefail
cd "$1"

# Folders from bottom to top; model and optimizers stand side by side and do not see each other.
declare -A may_include=(
  [runtime]="runtime"
  [collectives]="runtime collectives"
  [sharding]="runtime collectives sharding"
  [optimizers]="runtime collectives sharding optimizers"
  [model]="runtime collectives sharding model"
  [plugin]="runtime collectives sharding optimizers plugin"
  [trainer]="runtime collectives sharding optimizers model trainer"
  [launcher]="runtime collectives sharding optimizers model trainer launcher"
)
# Libraries whose headers stay inside the folder named beside them.
declare -A only_inside=(
  ["mpi.h"]="/mpi/" ["nccl.h"]="/nccl/" ["ucp/api/ucp.h"]="/ucx/" ["cuda_runtime_api.h"]="/cuda/"
  ["cuda_runtime.h"]="/cuda/" ["cublas_v2.h"]="/cuda/"
)

failures=0
complain() {
  echo "$1"
  failures=$((failures + 1))
}

for folder in "${!may_include[@]}"; do
  while IFS=: read -r file line; do
    included=${line#*\"}
    included=${included%%/*}
    [[ -v may_include[$included] ]] || continue
    [[ " ${may_include[$folder]} " == *" $included "* ]] || complain "$file includes $included/, which is above $folder/: $line"
  done < <(grep -rHo --include='*.h' --include='*.cc' --include='*.cu' '#include "[^"]*"' "$folder" || true)
done

for header in "${!only_inside[@]}"; do
  while IFS= read -r file; do
    [[ $file == *"${only_inside[$header]}"* && $file != *.h ]] || complain "$file includes <$header>, which belongs into sources of ${only_inside[$header]}"
  done < <(grep -rlF --include='*.h' --include='*.cc' "<$header>" "${!may_include[@]}" || true)
done

# STYLE: words that name nothing.
while IFS= read -r file; do
  complain "$file: its name says nothing (STYLE, Names)"
done < <(git ls-files | grep -E '/(.*_)?(util|utils|helper|helpers|manager|common|misc|base|impl|wrapper|handler|new|v[0-9]+|legacy)(_.*)?\.[a-z]+$' || true)

# STYLE, rule 3: a process is no rank outside of MPI's and NCCL's own folders, and other ranks say of what.
while IFS= read -r line; do
  complain "$line: a bare rank (STYLE, rule 3)"
done < <(grep -rnE --include='*.h' --include='*.cc' --include='*.cu' '\b(int|Index|auto|std::(size_t|u?int[0-9]+_t))( const)?&? rank\b' "${!may_include[@]}" |
  grep -vE '^[^:]*/(mpi|nccl)/' || true)

if ((failures > 0)); then
  echo "$failures violations"
  exit 1
fi
echo "layering: every arrow points down"
