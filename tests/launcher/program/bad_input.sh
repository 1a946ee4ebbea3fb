#!/usr/bin/env bash
# Every bad input gets one line that names field, value found and value expected, exit code 64, and writes nothing.
#
# Usage: bad_input.sh LOWBAND
set -uo pipefail
lowband=$1
# shellcheck source=tests/launcher/program/small_job.sh
source "$(dirname "$(realpath "$0")")/small_job.sh"
cases=0

# refused "PART|PART|..." WORD ...: the program refuses these words with a message that has every part.
refused() {
  local parts=$1 message code part before after
  shift
  before=$(find . -path ./output -prune -o -type f -print | sort | xargs sha256sum)
  message=$("$lowband" "$@" 2>&1 >output)
  code=$?
  after=$(find . -path ./output -prune -o -type f -print | sort | xargs sha256sum)
  cases=$((cases + 1))
  [[ $code == 64 ]] || fail "exit code $code, expected 64: lowband $* ($message)"
  [[ $(wc -l <<<"$message") == 1 ]] || fail "more than one line: lowband $*: $message"
  [[ $before == "$after" ]] || fail "something was written: lowband $*"
  [[ ! -e runs ]] || fail "a run folder was made: lowband $*"
  while IFS= read -r part; do
    [[ $message == *"$part"* ]] || fail "'$part' is missing: lowband $*: $message"
  done < <(tr '|' '\n' <<<"$parts")
}
# refused_run "PARTS" SETTING ...: a training run with these settings is refused.
refused_run() {
  local parts=$1 words=()
  shift
  for setting in "$@"; do words+=(--set "$setting"); done
  refused "$parts" train run.txtpb --threads-as-processes 4 "${words[@]}"
}
# refused_text "PARTS" TEXT: a configuration with this text appended is refused.
refused_text() {
  { cat run.txtpb && echo "$2"; } >bad.txtpb
  refused "$1" train bad.txtpb --threads-as-processes 4
  rm -f bad.txtpb
}

# Arguments
refused "trian|expected train" trian run.txtpb
refused "--colour|expected" train run.txtpb --colour blue
refused "--set|found nothing|expected" train run.txtpb --set
refused "--threads-as-processes|four|expected" train run.txtpb --threads-as-processes four
refused "--threads-as-processes|1000000|expected" train run.txtpb --threads-as-processes 1000000
refused "--backend|gloo|expected" train run.txtpb --backend gloo
refused "--backend|mpi|lowband-run" train run.txtpb --backend mpi
LOWBAND_THREADS=two refused "LOWBAND_THREADS|two|expected" train run.txtpb --threads-as-processes 4
refused_run "threads|100000|expected" threads=100000
refused "expected one file or --preset" train
refused "absent.txtpb" train absent.txtpb
refused "quickstrat|quickstart" train --preset quickstrat

# The configuration's text
refused_text "bad.txtpb:|modle" 'modle { width: 3 }'
refused_text "bad.txtpb:|seed" 'seed: "many"'
refused_text "bad.txtpb:|seed" 'seed: -1'
refused_text "bad.txtpb:" 'model {'
refused_run "optimizer.learning_rat|optimizer.learning_rate" optimizer.learning_rat=0.1
refused_run "optimizer.learning_rate|fast|number" optimizer.learning_rate=fast

# Values
refused_run "optimizer.learning_rate|-1|positive" optimizer.learning_rate=-1
refused_run "optimizer.mu|1.5|expected" optimizer.mu=1.5
refused_run "model.heads|3|expected" model.heads=3 model.head_dim=8
refused_run "model.head_dim|7|even" model.head_dim=7
refused_run "model.kv_heads|3|expected" model.kv_heads=3
refused_run "model.width|0|expected" model.width=0
refused_run "batch.sequences_per_step|7|expected" batch.sequences_per_step=7
refused_run "schedule.steps|0|expected" schedule.steps=0
refused_run "name|../x|expected" name=../x
refused_run "profile|ADAMW" optimizer.kind=ADAMW
refused_run "optimizer.clip_estimator|TRUE_NORM" optimizer.clip_estimator=TRUE_NORM

refused_run "precision|BF16|device CPU" precision=BF16
[[ -e /dev/nvidia0 ]] || refused_run "device: found CUDA, expected CPU: " device=CUDA model.heads=2

# Ranks and budgets
refused_run "rank|33|32" profile.rank=33
refused_run "rank|0|expected" profile.rank=0
refused_run "model.layers.0.self_attn.q_proj.weight" 'profile={kind: EXPLICIT ranks {key: "model.layers.0.mlp.up_proj.weight" value: 4}}'
refused "rank|40" plan run.txtpb --profile uniform:40
refused "structurall|expected" plan run.txtpb --profile structurall
refused "reference: profile|99|32" plan run.txtpb --reference uniform:99
refused "reference: found structural|expected none with optimizer.kind MUON" plan run.txtpb --reference structural --set profile= --set "optimizer={kind: MUON learning_rate: 0.01}"
refused_run "determinism|VERY|FAST, PINNED, EXACT" determinism=VERY
refused_run "optimizer.exchange|SOME|FACTORS" optimizer.exchange=SOME
refused_run "optimizer.powersgd_momentum|DION" optimizer.powersgd_momentum=0.5
refused_run "optimizer.mu|POWERSGD" optimizer.kind=POWERSGD optimizer.mu=0.5
refused_run "optimizer.wire|BF16|F64" optimizer.wire=BF16 precision=F64
refused_run "optimizer.wire|DENSE" optimizer.wire=BF16 optimizer.exchange=DENSE
refused_run "optimizer.bucket_mib|optimizer.overlap" optimizer.bucket_mib=4
refused_run "diagnostics.interval_steps|-1|expected" diagnostics.interval_steps=-1
refused_run "budget.reference|structurall|expected" budget.reference=structurall
refused_run "budget.reference|ratio 1.3333|nearest uniform rank 3: ratio 1" budget.reference=uniform:3
refused "budget.reference|ratio 1.3333|nearest uniform rank 3: ratio 1" plan run.txtpb --set budget.reference=uniform:3

# Mesh and processes
refused_run "mesh|replica 3|4" mesh.replica=3
refused "mesh|4|1" train run.txtpb

# Data
refused_run "data.train|nowhere|expected" 'data.train=nowhere/*.bin'
cp data/train.bin truncated.bin && truncate --size=5000 truncated.bin
refused_run "truncated.bin|found|expected" data.train=truncated.bin
cp data/train.bin magic.bin && printf 'XXXX' | dd of=magic.bin conv=notrunc status=none
refused_run "magic.bin|magic|found|20240520" data.train=magic.bin
head --bytes=1024 data/train.bin >empty.bin
refused_run "empty.bin|found|expected" data.train=empty.bin
refused_run "train.bin|vocabulary|100" model.vocabulary=100
refused_run "validation.sequences|100000|expected" validation.sequences=100000
: >nothing.txt
refused "corpus|no text|expected" data prepare --out other nothing.txt
refused "absent.txt" data prepare --out other absent.txt
refused "--out" data prepare corpus.txt
refused "validation_fraction|2|expected" data prepare --out other --validation-fraction 2 corpus.txt
[[ ! -e other ]] || fail "data prepare made a folder for bad input"

# Output and checkpoints
echo "in the way" >a_file
refused_run "a_file" output_dir=a_file
refused_run "checkpoint|nothing-here" checkpoint.resume=nothing-here
"$lowband" train run.txtpb --threads-as-processes 4 --set schedule.steps=2 --set output_dir=earlier >output || fail "the good run"
checkpoint=earlier/run/checkpoints/step-000002
refused_run "model.ffn_width|48|64" checkpoint.resume=$checkpoint model.ffn_width=64
refused_run "profile|rank" checkpoint.resume=$checkpoint profile.rank=5
refused_run "schedule.steps|1|2" checkpoint.resume=$checkpoint schedule.steps=1
printf 'X' | dd of=$checkpoint/process-0001.bin bs=1 seek=3000 conv=notrunc status=none
refused_run "process-0001.bin" checkpoint.resume=$checkpoint
refused "earlier/absent" compare earlier/absent

echo "$cases bad inputs"
finish
