#!/usr/bin/env bash
# One case of the tests of launcher/lowband-run.
#
# Usage: lowband_run_test.sh LOWBAND_RUN CASE
#
# Programs are stand-ins written here. Every case ends by looking for processes that are left: each stand-in marks
# itself by the variable LOWBAND_RUN_TEST in its environment.
set -uo pipefail

scratch=$(mktemp -d)
export TMPDIR=$scratch LOWBAND_RUN_TEST=$scratch
unset OMP_NUM_THREADS OPENBLAS_CORETYPE
# SIGINT is ignored in what a script starts with &; a person's shell does not do that.
lowband_run=(env --default-signal=INT "$1")
failures=0

check() { # WHAT FOUND EXPECTED
  [[ $2 == "$3" ]] && return
  printf 'FAILED %s:\n  found    %q\n  expected %q\n' "$1" "$2" "$3"
  failures=$((failures + 1))
}

check_matches() { # WHAT FOUND PATTERN
  [[ $2 =~ $3 ]] && return
  printf 'FAILED %s:\n  found    %q\n  expected %q\n' "$1" "$2" "$3"
  failures=$((failures + 1))
}

check_less() { # WHAT MILLISECONDS LIMIT
  (($2 < $3)) && return
  printf 'FAILED %s: took %s ms, expected less than %s ms\n' "$1" "$2" "$3"
  failures=$((failures + 1))
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }

stand_in() { # NAME, program on standard input
  cat >"$scratch/$1"
  chmod +x "$scratch/$1"
}

# Everything the test has started and that still runs. Not the test itself, which had not set the variable when it
# began, nor this grep.
survivors() { env -u LOWBAND_RUN_TEST grep -lsz "^LOWBAND_RUN_TEST=$scratch\$" /proc/[0-9]*/environ; }

# Waits until all processes of a stand-in that calls `ready` are running.
ready_line='touch "$LOWBAND_RUN_TEST/ready.$OMPI_COMM_WORLD_RANK"; echo $$ >"$LOWBAND_RUN_TEST/pid.$OMPI_COMM_WORLD_RANK"'
wait_until_ready() { # PROCESSES
  for _ in $(seq 400); do
    [[ $(compgen -G "$scratch/ready.*" | wc -l) == "$1" ]] && return
    sleep 0.025
  done
  echo "FAILED: the stand-ins did not start"
  exit 1
}

need_mpirun() {
  command -v mpirun >/dev/null && return
  echo "skipped: no mpirun"
  exit 77
}

# Starts four processes of a stand-in in the background; `job` is lowband-run.
start() { # NAME [OPTION ...]
  local name=$1
  shift
  "${lowband_run[@]}" -np 4 "$@" --binary "$scratch/$name" -- go >"$scratch/out" 2>"$scratch/err" &
  job=$!
  wait_until_ready 4
}

# Waits for `job` and leaves its exit code and the time since `begin`.
finish() {
  wait "$job"
  code=$?
  took=$(($(milliseconds) - begin))
}

check_clean() {
  check "processes left" "$(survivors)" ""
  check "files left" "$(compgen -G "$scratch/lowband-run.*")" ""
}

case_dry_run() {
  local root=() threads2
  ((EUID != 0)) || root=(--allow-run-as-root)
  threads2=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))
  check "one host" "$("${lowband_run[@]}" -np 2 --dry-run --binary /opt/lowband -- train 'my config' --set a=1)" \
    "$(echo mpirun -np 2 "${root[@]}" --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 --mca btl self,vader \
      --mca odls_base_sigkill_timeout 1 -x "LOWBAND_THREADS=$threads2" -x "OMP_NUM_THREADS=$threads2" \
      -x LOWBAND_TERMINAL_COLUMNS=0 /opt/lowband train 'my\ config' --set a=1)"
  check "two hosts" \
    "$(OMP_NUM_THREADS=3 OPENBLAS_CORETYPE=Haswell "${lowband_run[@]}" --hosts a:999,b:1 -np 1000 --dry-run \
      --binary /opt/lowband -- info)" \
    "$(echo mpirun -np 1000 "${root[@]}" --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 --host a:999,b:1 \
      --mca btl self,vader,tcp --mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 2 \
      --mca oob_tcp_keepalive_probes 3 --mca odls_base_sigkill_timeout 1 -x LOWBAND_THREADS=1 -x OMP_NUM_THREADS=3 \
      -x LOWBAND_TERMINAL_COLUMNS=0 -x OPENBLAS_CORETYPE=Haswell /opt/lowband info)"
  stand_in agent <<<'#!/bin/bash'
  check "agent and subnet" \
    "$(cd "$scratch" && "${lowband_run[@]}" -np 2 --hosts a,b --agent ./agent --subnet 10.77.0.0/24 --dry-run \
      --binary /opt/lowband -- info | grep -o -- '--host .* oob_tcp_keepalive_time')" \
    "--host a,b --mca btl self,vader,tcp --mca plm_rsh_agent $scratch/agent --mca pml ob1 --mca btl_tcp_if_include \
10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 --mca oob_tcp_keepalive_time"
  ln -s "$(realpath "${lowband_run[-1]}")" "$scratch/linked"
  check "binary beside a link's target" "$("$scratch/linked" -np 1 --dry-run -- info | grep -o '[^ ]*/build/release/bin/lowband info')" \
    "$(cd "$(dirname "$(realpath "${lowband_run[-1]}")")/.." && pwd)/build/release/bin/lowband info"
  check "cores are not what OMP_NUM_THREADS says" \
    "$(OMP_NUM_THREADS=640 "${lowband_run[@]}" -np 2 --dry-run -- info | grep -o 'LOWBAND_THREADS=[0-9]*')" "LOWBAND_THREADS=$threads2"
  check "default binary" "$("${lowband_run[@]}" -np 1 --dry-run -- info | grep -o '[^ ]*/build/release/bin/lowband info')" \
    "$(cd "$(dirname "${lowband_run[-1]}")/.." && pwd)/build/release/bin/lowband info"
}

case_bad_calls() {
  local words
  while IFS='|' read -r words message; do
    # shellcheck disable=SC2086
    check "$words" "$("${lowband_run[@]}" $words 2>&1; echo "code $?")" "lowband-run: $message"$'\ncode 64'
  done <<'END'
-- train|-np: found '', expected a number of processes
-np zero -- train|-np: found 'zero', expected a number of processes
-np 0 -- train|-np: found '0', expected a number of processes
-np|-np: found no value, expected one
-np 2|found no words after --, expected for example: -- train CONFIG
-np 2 --|found no words after --, expected for example: -- train CONFIG
-np 2 train|found 'train', expected -np, --hosts, --agent, --subnet, --binary, --timeout, --dry-run or --
-np 2 --timeout soon -- x|--timeout: found 'soon', expected a number of seconds
-np 9 --hosts a:4,b:4 -- x|--hosts: found places for 8 processes, expected -np = 9
-np 2 --hosts a:4,b:x -- x|--hosts: found 'b:x', expected HOST or HOST:PROCESSES
-np 2 --agent /bin/sh -- x|--agent: found no --hosts, expected the hosts that it reaches
-np 2 --subnet 10.0.0.0/8 -- x|--subnet: found no --hosts, expected the hosts that share it
-np 2 --hosts a,b --agent|--agent: found no value, expected one
-np 2 --hosts a,b --agent /dev/null -- x|--agent: found no program at /dev/null, expected one that starts a command on a host
-np 2 --hosts a,b --agent /etc -- x|--agent: found no program at /etc, expected one that starts a command on a host
-np 2 --hosts a,b --subnet eth0 -- x|--subnet: found 'eth0', expected an IPv4 network, for example 10.77.0.0/24
-np 2 --hosts a,b --subnet 10.77.0.0 -- x|--subnet: found '10.77.0.0', expected an IPv4 network, for example 10.77.0.0/24
-np 2 --hosts a,b --subnet 10.77.0.256/24 -- x|--subnet: found '10.77.0.256/24', expected an IPv4 network, for example 10.77.0.0/24
-np 2 --hosts a,b --subnet 10.77.0.0/33 -- x|--subnet: found '10.77.0.0/33', expected an IPv4 network, for example 10.77.0.0/24
END
  check "no value" "$("${lowband_run[@]}" -np 2 --hosts a,b --agent '' -- x 2>&1; echo "code $?")" \
    $'lowband-run: --agent: found no value, expected one\ncode 64'
  stand_in 'an agent' <<<'#!/bin/bash'
  check "space" "$("${lowband_run[@]}" -np 2 --hosts a,b --agent "$scratch/an agent" -- x 2>&1; echo "code $?")" \
    "lowband-run: --agent: found '$scratch/an agent', expected a path without spaces and colons"$'\ncode 64'
}

case_missing_programs() {
  stand_in program <<<'#!/bin/bash'
  mkdir "$scratch/bin"
  local tool
  for tool in bash env dirname realpath nproc mktemp sed stty; do ln -s "$(command -v "$tool")" "$scratch/bin/"; done
  check "mpirun" "$(PATH=$scratch/bin "${lowband_run[@]}" -np 2 --binary "$scratch/program" -- x 2>&1; echo "code $?")" \
    $'lowband-run: mpirun: not found, expected Open MPI (Debian: openmpi-bin)\ncode 69'
  printf '#!/bin/bash\necho "HYDRA build details:"\n' >"$scratch/bin/mpirun"
  chmod +x "$scratch/bin/mpirun"
  check "another MPI" "$(PATH=$scratch/bin "${lowband_run[@]}" -np 2 --binary "$scratch/program" -- x 2>&1; echo "code $?")" \
    $'lowband-run: mpirun: found HYDRA build details:, expected Open MPI\ncode 69'
  check_matches "program" "$("${lowband_run[@]}" -np 2 --binary "$scratch/absent" -- x 2>&1; echo "code $?")" \
    "^lowband-run: --binary: found no program at $scratch/absent, expected one .*code 69\$"
}

# What reaches the user of what mpirun prints, with an mpirun that prints it all.
case_messages() {
  local dashes
  dashes=$(printf -- '-%.0s' {1..74})
  cat >"$scratch/said" <<END
[process 1 of 4] model.heads: found 6, expected a multiple of 4
mpirun: Forwarding signal 10 to job
$dashes
MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
with errorcode 70.

[process 2 of 4] said in the middle of it
NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
$dashes
$dashes
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
$dashes
$dashes
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[1,1],1]
  Exit code:    64
$dashes
$dashes
There are not enough slots available in the system to satisfy the 9
slots that were requested by the application:
$dashes
[node:1] 3 more processes have sent help message help-mpi-api.txt / mpi-abort
[node:1] Set MCA parameter "orte_base_help_aggregate" to 0 to see all help / error messages
a line nobody knows
$dashes
mpirun noticed that process rank 3 with PID 0 on node nid001 exited on signal 9 (Killed).
$dashes
[node:1] plm:rsh: Warning: setpgid(14,15) failed in parent with errno=Permission denied(13)
[node:1] PMIX ERROR: UNREACHABLE in file ../../../src/server/pmix_server.c at line 2193
[node:1] pmix_ptl_base_msg_recv: readv failed: Connection reset by peer (104)
2 total processes killed (some possibly by mpirun during cleanup)
$dashes
An MPI communication peer process has unexpectedly disconnected.
$dashes
$dashes
ORTE has lost communication with a remote daemon.

  HNP daemon   : [[1807,0],0] on node nid000
  Remote daemon: [[1807,0],1] on node nid001

This is usually due to either a failure of the TCP network
$dashes
$dashes
a report that never ends
END
  printf 'no line break' >>"$scratch/said"
  cat >"$scratch/expected" <<END
[process 1 of 4] model.heads: found 6, expected a multiple of 4
[process 2 of 4] said in the middle of it
$dashes
There are not enough slots available in the system to satisfy the 9
slots that were requested by the application:
$dashes
a line nobody knows
lowband-run: process 3 of 4 on nid001 was killed by signal 9 (Killed); all processes ended
$dashes
a report that never ends
no line break
END
  mkdir "$scratch/bin"
  stand_in bin/mpirun <<END
#!/bin/bash
[[ \$1 == --version ]] && echo "mpirun (Open MPI) 4.1.4" && exit
cat "$scratch/said" >&2
exit 137
END
  stand_in program <<<'#!/bin/bash'
  PATH=$scratch/bin:$PATH "${lowband_run[@]}" -np 4 --binary "$scratch/program" -- x 2>"$scratch/err"
  check "exit code" $? 137
  check "messages" "$(<"$scratch/err")" "$(<"$scratch/expected")"
}

# Reports of what follows from a death are kept until something says what died, and shown if nothing does.
case_consequences() {
  local dashes report
  dashes=$(printf -- '-%.0s' {1..74})
  report=$dashes$'\nAn MPI communication peer process has unexpectedly disconnected.\n'$dashes
  report+=$'\n[node:1] PMIX ERROR: UNREACHABLE in file ../../../src/server/pmix_server.c at line 2193'
  report+=$'\n[node:1] [[1807,0],0] ORTE_ERROR_LOG: Unreachable in file rml_oob.c at line 9'
  mkdir "$scratch/bin"
  stand_in bin/mpirun <<END
#!/bin/bash
[[ \$1 == --version ]] && echo "mpirun (Open MPI) 4.1.4" && exit
echo "$report" >&2
exit 1
END
  stand_in program <<<'#!/bin/bash'
  PATH=$scratch/bin:$PATH "${lowband_run[@]}" -np 4 --binary "$scratch/program" -- x 2>"$scratch/err"
  check "exit code" $? 1
  check "messages" "$(<"$scratch/err")" "$report"
}

# The two reports of a daemon that is gone, in either order or alone: one line, and a code that says try again.
case_lost_host() {
  local dashes lost agent first
  dashes=$(printf -- '-%.0s' {1..74})
  lost="$dashes
ORTE has lost communication with a remote daemon.

  HNP daemon   : [[1807,0],0] on node nid000
  Remote daemon: [[1807,0],1] on node nid001

This is usually due to either a failure of the TCP network
$dashes"
  agent=$dashes$'\nORTE was unable to reliably start one or more daemons.\nThis usually is caused by:\n'$dashes
  mkdir "$scratch/bin"
  stand_in program <<<'#!/bin/bash'
  for first in "$lost" "$agent"; do
    stand_in bin/mpirun <<END
#!/bin/bash
[[ \$1 == --version ]] && echo "mpirun (Open MPI) 4.1.4" && exit
printf '%s\n' "$dashes" "An MPI communication peer process has unexpectedly disconnected." "$dashes" "$first" "$lost" >&2
exit 205
END
    PATH=$scratch/bin:$PATH "${lowband_run[@]}" -np 4 --binary "$scratch/program" -- x 2>>"$scratch/err"
    check "exit code" $? 75
  done
  check "messages" "$(<"$scratch/err")" "lowband-run: the connection to host nid001 is lost; all processes ended
lowband-run: a host is lost, or Open MPI's orted did not start there; all processes ended"
}

# An mpirun that an abort does not end, as happens while a host is cut off.
case_stuck_abort() {
  local dashes
  dashes=$(printf -- '-%.0s' {1..74})
  mkdir "$scratch/bin"
  stand_in bin/mpirun <<END
#!/bin/bash
[[ \$1 == --version ]] && echo "mpirun (Open MPI) 4.1.4" && exit
trap '' TERM USR1
printf '%s\n' $dashes 'MPI_ABORT was invoked on rank 1 in communicator X' 'with errorcode 70.' $dashes >&2
for _ in {1..600}; do sleep 0.1; done
END
  stand_in program <<<'#!/bin/bash'
  begin=$(milliseconds)
  PATH=$scratch/bin:$PATH "${lowband_run[@]}" -np 4 --binary "$scratch/program" -- x 2>"$scratch/err"
  check "exit code" $? 70
  check_less "end" $(($(milliseconds) - begin)) 20000
  check "messages" "$(<"$scratch/err")" \
    "lowband-run: mpirun did not end within 8 seconds of an abort, and was killed"
  check_clean
}

case_exit_code() {
  need_mpirun
  stand_in program <<'END'
#!/bin/bash
echo "threads $LOWBAND_THREADS columns $LOWBAND_TERMINAL_COLUMNS"
[[ $OMPI_COMM_WORLD_RANK != 0 ]] || echo "[process 0 of $OMPI_COMM_WORLD_SIZE] no such file" >&2
exit "$1"
END
  local code
  for code in 0 64 75; do
    "${lowband_run[@]}" -np 1 --binary "$scratch/program" -- "$code" >"$scratch/out" 2>"$scratch/err"
    check "exit code" $? "$code"
    check "error stream" "$(<"$scratch/err")" "[process 0 of 1] no such file"
    check "output" "$(<"$scratch/out")" "threads $(nproc) columns 0"
  done
  "${lowband_run[@]}" -np 3 --binary "$scratch/program" -- 64 >"$scratch/out" 2>"$scratch/err"
  check "exit code of three" $? 64
  check "error stream of three" "$(<"$scratch/err")" "[process 0 of 3] no such file"
  check_clean
}

case_killed_process() {
  need_mpirun
  stand_in sleeper <<END
#!/bin/bash
$ready_line
for _ in {1..300}; do sleep 0.1; done
END
  start sleeper
  begin=$(milliseconds)
  kill -KILL "$(<"$scratch/pid.2")"
  finish
  check "exit code" "$code" 137
  check_matches "error stream" "$(<"$scratch/err")" \
    '^lowband-run: process 2 of 4 on [^ ]+ was killed by signal 9 \(Killed\); all processes ended$'
  check_less "end" "$took" 10000
  check_clean
}

# Processes that stop when asked.
obedient='#!/bin/bash
exec 2>/dev/null # the shell remarks on a sleep that the signal ends as well
trap '\''echo stopped; exit 0'\'' USR1
'"$ready_line"'
for _ in {1..300}; do sleep 0.1; done'

case_interrupt() {
  need_mpirun
  stand_in obedient <<<"$obedient"
  local name signal expected
  for name in INT:130 TERM:143; do
    signal=${name%:*} expected=${name#*:}
    rm -f "$scratch"/ready.*
    start obedient
    begin=$(milliseconds)
    kill "-$signal" "$job"
    finish
    check "exit code" "$code" "$expected"
    check "error stream" "$(<"$scratch/err")" ""
    check "output" "$(<"$scratch/out")" $'stopped\nstopped\nstopped\nstopped'
    check_less "$signal" "$took" 3000
    check_clean
  done
}

case_unprepared_program() {
  need_mpirun
  stand_in unprepared <<END
#!/bin/bash
exec 2>/dev/null
$ready_line
for _ in {1..300}; do sleep 0.1; done
END
  start unprepared
  begin=$(milliseconds)
  kill -INT "$job"
  finish
  check "exit code" "$code" 130
  check "error stream" "$(<"$scratch/err")" ""
  check_less "end" "$took" 3000
  check_clean
}

stubborn='#!/bin/bash
trap "" USR1 TERM INT
'"$ready_line"'
for _ in {1..300}; do sleep 0.1; done'

case_stubborn_processes() {
  need_mpirun
  stand_in stubborn <<<"$stubborn"
  start stubborn
  begin=$(milliseconds)
  kill -INT "$job"
  finish
  check "exit code" "$code" 130
  check "error stream" "$(<"$scratch/err")" ""
  check_less "end" "$took" 3000
  check_clean
}

case_second_signal() {
  need_mpirun
  stand_in stubborn <<<"$stubborn"
  start stubborn
  begin=$(milliseconds)
  kill -TERM "$job"
  sleep 0.2
  kill -TERM "$job"
  finish
  check "exit code" "$code" 143
  check_less "end" "$took" 1500
  check_clean
}

case_time_limit() {
  need_mpirun
  stand_in obedient <<<"$obedient"
  begin=$(milliseconds)
  start obedient --timeout 2
  finish
  check "exit code" "$code" 124
  check "error stream" "$(<"$scratch/err")" "lowband-run: stopped after --timeout 2 seconds"
  check_less "end" "$took" 5000
  check_clean
}

case_lost_supervisor() {
  need_mpirun
  stand_in stubborn <<<"$stubborn"
  start stubborn
  kill -KILL "$job"
  wait "$job" 2>/dev/null
  local _
  for _ in {1..100}; do
    [[ -n $(survivors) ]] || break
    sleep 0.1
  done
  check "processes left" "$(survivors)" ""
}

"case_$2"
if ((failures > 0)); then
  echo "files are in $scratch"
  exit 1
fi
rm -rf "$scratch"
