#!/usr/bin/env bash
# `lowband bench comm` from the shell: as threads, under mpirun, and with bad input.
#
# Usage: bench.sh LOWBAND LOWBAND_RUN
set -uo pipefail
lowband=$1 run=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 1
failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}
small=(bench comm --preset smoke --ranks 2,8 --warmup 1 --iterations 2)

# A table, with the JSON in a file.
"$lowband" "${small[@]}" --sizes 8:1K:8 --threads-as-processes 3 --link "a label" --json=out.json >table 2>&1 ||
  fail "threads: $(cat table)"
for part in '# lowband 0.' '# backend: local' '# link: a label' 'uniform:8' 'dense all-reduce' \
  '# Out of bounds values : 0 OK'; do
  grep -qF "$part" table || fail "'$part' is missing: $(cat table)"
done
grep -q '"wrong":0,"average_busbw"' out.json || fail "out.json: $(cat out.json)"

# Two real processes; JSON alone on standard output, once.
if command -v mpirun >/dev/null && "$lowband" info --json | grep -q '"name":"MPI","built_in":true'; then
  timeout 60 "$run" -np 2 --binary "$lowband" -- "${small[@]}" --json >json 2>err || fail "mpirun: $(cat err)"
  [[ $(wc -l <json) == 1 && ! -s err ]] || fail "mpirun: expected one line, found: $(cat json err)"
  # B(r) of ranks 2 and 8 with 9,856 bytes for each rank in f32, and twice 2(n-1) = 2 of it on the wire.
  grep -q '"backend":"mpi"' json || fail "mpirun: $(cat json)"
  grep -q '"payload_bytes":19712,' json && grep -q '"payload_bytes":78848,' json || fail "payload: $(cat json)"
  [[ $(grep -o '"transport_deviation_percent":0,' json | wc -l) == 4 ]] || fail "wire bytes: $(cat json)"
  grep -q '"wrong":0,"average_busbw"' json || fail "mpirun: wrong values: $(cat json)"

  timeout 60 "$run" -np 2 --binary "$lowband" -- "${small[@]}" --wire f16 >output 2>err
  code=$?
  [[ $code == 64 && $(wc -l <err) == 1 ]] || fail "bad input under mpirun: exit code $code: $(cat err)"
fi

# refused "PART|PART" WORD ...
refused() {
  local parts=$1 message code part
  shift
  message=$("$lowband" "$@" 2>&1 >output)
  code=$?
  [[ $code == 64 && $(wc -l <<<"$message") == 1 ]] || fail "exit code $code, expected 64 and one line: lowband $*: $message"
  while IFS= read -r part; do
    [[ $message == *"$part"* ]] || fail "'$part' is missing: lowband $*: $message"
  done < <(tr '|' '\n' <<<"$parts")
}
refused "bench: found com, expected comm" bench com
refused "bench: found nothing, expected comm" bench
refused "found no model" bench comm
refused "--interface: found nowhere7|lo" "${small[@]}" --interface nowhere7
refused "--wire|f16" "${small[@]}" --wire f16 --threads-as-processes 2
: >in_the_way
refused "in_the_way" "${small[@]}" --json=in_the_way/out.json
refused "in_the_way" "${small[@]}" --picture in_the_way/picture
refused "--picture: found --sizes alone" bench comm --sizes 8:64 --picture picture

((failures == 0)) || exit 1
echo "$0: passed"
