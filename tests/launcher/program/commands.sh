#!/usr/bin/env bash
# What each command prints, in text and in JSON.
#
# Usage: commands.sh LOWBAND
set -uo pipefail
lowband=$1
# shellcheck source=tests/launcher/program/small_job.sh
source "$(dirname "$(realpath "$0")")/small_job.sh"

# prints "PART|PART" WORD ...: the command succeeds and its output has every part.
prints() {
  local parts=$1 text part
  shift
  text=$("$lowband" "$@" 2>&1) || fail "exit code $?: lowband $*: $text"
  while IFS= read -r part; do
    [[ $text == *"$part"* ]] || fail "'$part' is missing: lowband $*"
  done < <(tr '|' '\n' <<<"$parts")
}

prints "train|plan|compare" --help
prints "lowband 0." --version
prints "quickstart|rank166m|smoke" presets
prints '{"presets":["|"quickstart"|"smoke"' presets --json
prints "model {" presets rank166m
prints "vector kernels|MPI|CUDA|devices" info
prints '"vector_kernels":|"components":' info --json

# The published profiles of the 166M model.
prints "9,047,040|1.0003|exceed the dense gradient" plan --preset rank166m --profile uniform:620
prints "9,043,968|1.0000|exceed the dense gradient" plan --preset rank166m --profile structural
prints "8,257,536|0.9130|exceed the dense gradient" plan --preset rank166m --profile inverted
prints "optimizer MUON|owner|no factor ranks" plan --preset rank166m --set profile= --set mesh.tensor=2 --set "optimizer={kind: MUON learning_rate: 0.01}"
[[ $("$lowband" plan --preset rank166m --profile uniform:620,structural,inverted --json | wc -l) == 3 ]] ||
  fail "three profiles, three lines of JSON"

prints '"reused":true' data prepare --out data corpus.txt --json
prints '{"train":"tab\there/train.bin",' data prepare --out $'tab\there' corpus.txt --json
for name in first second; do
  prints "validation loss" train run.txtpb --threads-as-processes 4 --set name=$name --set schedule.steps=12
done
prints "first|second" compare runs/first runs/second
prints '"folder":"runs/first"' compare runs/first runs/second --json
prints "complete already" train run.txtpb --threads-as-processes 4 --set name=first --set schedule.steps=12 --set checkpoint.resume=auto
finish
