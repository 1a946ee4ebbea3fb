#!/usr/bin/env bash
# lowband replay as a user meets it: a recording of a run gives its weights again, on threads and on processes alike, and
# bad input gets one line and exit code 64, with nothing written.
#
# Usage: replay.sh LOWBAND [LOWBAND_RUN]
set -uo pipefail
lowband=$1 run=${2:-}
# shellcheck source=tests/launcher/program/small_job.sh
source "$(dirname "$(realpath "$0")")/small_job.sh"

job=(run.txtpb --threads-as-processes 4 --set schedule.steps=7 --set threads=1)
"$lowband" train "${job[@]}" --set 'dump={folder: "recording" steps: 6}' >log 2>&1 || fail "recording: $(cat log)"
"$lowband" train "${job[@]}" --set name=later --set 'dump={folder: "later" first_step: 6 steps: 1}' >log 2>&1 ||
  fail "later: $(cat log)"

# replayed OUT WORD ...: the recorded run's weights and states come out, bit by bit.
replayed() {
  local out=$1 file
  shift
  "$@" --config recording/run.txtpb --out "$out" >"$out.log" 2>&1 || fail "$out: $(cat "$out.log")"
  for file in weights state.replica-0 state.replica-1; do
    cmp "$out/$file.safetensors" "later/$file.safetensors" || fail "$out: $file differs from the run's"
  done
}
replayed threads "$lowband" replay recording
grep -q 'as planned' threads.log && grep -q 'model.layers.1.mlp.down_proj.weight     32  48     4' threads.log ||
  fail "the table: $(cat threads.log)"
[[ $(grep -c '^{"step":' threads/replay.jsonl) == 6 ]] || fail "six steps in replay.jsonl"
[[ -z $run ]] || replayed processes "$run" -np 4 --binary "$lowband" -- replay recording

# Without a configuration, and as JSON.
rates=(--set optimizer.learning_rate=0.01 --scalar-parameters '*embed*')
for optimizer in dion powersgd; do
  "$lowband" replay recording "${rates[@]}" --optimizer $optimizer --profile uniform:4@uniform:4 --out x >log 2>&1 &&
    fail "a profile that is none was accepted"
  "$lowband" replay recording "${rates[@]}" --optimizer $optimizer --profile uniform:4 --json --out $optimizer >log 2>&1 ||
    fail "$optimizer: $(cat log)"
  grep -q '"optimizer":"'${optimizer^^}'","profile":"uniform:4","replicas":2' log || fail "$optimizer: $(cat log)"
done
"$lowband" replay recording "${rates[@]}" --optimizer adamw --out adamw >log 2>&1 || fail "adamw: $(cat log)"
"$lowband" replay later "${rates[@]}" --profile uniform:4 --state threads/state.safetensors --out continued >log 2>&1 ||
  fail "continued: $(cat log)"

# refused "PART|PART|..." WORD ...: one line with every part, and nothing written.
refused() {
  local parts=$1 message code part before after
  shift
  before=$(find . -type f ! -name output | sort | xargs sha256sum)
  message=$("$lowband" replay "$@" 2>&1 >output)
  code=$?
  after=$(find . -type f ! -name output | sort | xargs sha256sum)
  [[ $code == 64 ]] || fail "exit code $code, expected 64: replay $* ($message)"
  [[ $(wc -l <<<"$message") == 1 ]] || fail "more than one line: replay $*: $message"
  [[ $before == "$after" && ! -e nothing ]] || fail "something was written: replay $*"
  while IFS= read -r part; do
    [[ $message == *"$part"* ]] || fail "'$part' is missing: replay $*: $message"
  done < <(tr '|' '\n' <<<"$parts")
}
good=("${rates[@]}" --profile uniform:4)
refused "--out|nothing" recording "${good[@]}"
refused "--out|recording" recording "${good[@]}" --out recording
refused "replay|0 folders" "${good[@]}" --out nothing
refused "absent" absent "${good[@]}" --out nothing
refused "--replicas|three" recording "${good[@]}" --replicas three --out nothing
refused "step-000000.replica-2.safetensors|gradients of 3" recording "${good[@]}" --replicas 3 --out nothing
refused "mesh|found replica 2|3 processes" recording "${good[@]}" --threads-as-processes 3 --out nothing
refused "optimizer.kind|ADAM|one of" recording "${good[@]}" --optimizer adam --out nothing
refused "optimizer.learning_rate|nothing" recording --profile uniform:4 --out nothing
refused "--set data.train|no replay reads" recording "${good[@]}" --set data.train=x --out nothing
refused "--set model.width" recording --config run.txtpb --set model.width=3 --out nothing
refused "optimizer.mu|POWERSGD" recording "${good[@]}" --optimizer powersgd --set optimizer.mu=0.5 --out nothing
refused "profile|nothing" recording "${rates[@]}" --out nothing
refused "profile|width and head_dim" recording "${rates[@]}" --profile structural --out nothing
grep -v '^model' run.txtpb >part.txtpb && echo 'model { width: 32 }' >>part.txtpb
refused "model.layers|nothing" recording --config part.txtpb --out nothing
grep -v '^model' run.txtpb >part.txtpb
refused "model: found nothing in part.txtpb" recording --config part.txtpb --out nothing
refused "--scalar-parameters|embedding" recording --set optimizer.learning_rate=1 --profile uniform:4 \
  --scalar-parameters embedding --out nothing
refused "--scalar-parameters|configuration" recording --config run.txtpb --scalar-parameters x --out nothing
refused "--config|--preset" recording --config run.txtpb --preset smoke --out nothing
refused "absent.replica-0.safetensors" recording "${good[@]}" --state absent.safetensors --out nothing
refused "step-000006.replica-0.safetensors|.M" recording "${good[@]}" \
  --state later/step-000006.replica-0.safetensors --out nothing
refused "--colour" recording "${good[@]}" --colour blue --out nothing
cp -r recording broken && truncate --size=-3 broken/step-000004.replica-1.safetensors
refused "broken/step-000004.replica-1.safetensors|truncated" broken "${good[@]}" --out nothing
rm broken/step-000004.replica-1.safetensors
refused "step 4|no step-000004.replica-1.safetensors" broken "${good[@]}" --out nothing
rm broken/step-000004.*
refused "found step 5 after step 3" broken "${good[@]}" --out nothing

# Dumps of a run.
refused_run() {
  local parts=$1 message
  shift
  message=$("$lowband" train run.txtpb --threads-as-processes 4 --set name=none "$@" 2>&1) && fail "accepted: $*"
  while IFS= read -r part; do
    [[ $message == *"$part"* ]] || fail "'$part' is missing: train $*: $message"
  done < <(tr '|' '\n' <<<"$parts")
  [[ ! -e runs/none ]] || fail "a run folder was made: $*"
}
refused_run "dump.folder|nothing" --set 'dump={steps: 1}'
refused_run "dump.steps|nothing" --set 'dump={folder: "d"}'
refused_run "dump.steps|31|1 to 30" --set 'dump={folder: "d" steps: 31}'
refused_run "dump.steps|3|1 to 2" --set 'dump={folder: "d" first_step: 28 steps: 3}'
refused_run "dump.first_step|30|0 to 29" --set 'dump={folder: "d" first_step: 30 steps: 1}'
refused_run "dump.folder|recording|empty" --set 'dump={folder: "recording" steps: 1}'
finish
