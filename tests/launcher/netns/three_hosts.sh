#!/usr/bin/env bash
# Jobs on three hosts: network namespaces that only a switch joins (perf/netns/links). Skipped, with exit code 77,
# where namespaces are not granted.
#
# Usage: three_hosts.sh LOWBAND LOWBAND_RUN bytes|bench|lost_link|lost_host|interrupt
set -uo pipefail
lowband=$1 run=$2 case=$3
tests=$(dirname "$(dirname "$(realpath "$0")")")
netns=$(realpath "$tests/../../perf/netns")

prefix=lb$$-
# Packets of 9000 bytes: headers are 66 bytes of each, and so is its acknowledgement, which together is at most 1.5 % of
# the 8948 bytes of data in it. With 1500 bytes it could be 9 %, where TCP does not hand large ones to the interface.
hosts=$("$netns/links" up $prefix 3 --mtu 9000)
code=$?
if ((code != 0)); then
  ((code != 77)) || echo "skipped: no network namespaces here"
  exit $code
fi
# shellcheck source=tests/launcher/program/small_job.sh
source "$tests/program/small_job.sh"
trap '"$netns/links" down $prefix; rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1

# About a million parameters, nearly all of them in layer matrices.
cat >run.txtpb <<'CONFIG'
model { width: 256 layers: 2 heads: 4 ffn_width: 512 sequence: 16 }
mesh { replica: 3 }
data { train: "data/train.bin" validation: "data/val.bin" }
batch { sequences_per_step: 3 }
validation { sequences: 3 }
threads: 1
output_dir: "runs"
CONFIG
factors='optimizer { learning_rate: 0.01 scalar_learning_rate: 0.005 } profile { kind: UNIFORM rank: 64 }'
dense='optimizer { kind: ADAMW learning_rate: 0.001 }'

# on_hosts NAME WORDS: a program on each of the three hosts; lowband-run is started on the first of them.
on_hosts() {
  local name=$1 words=$2
  "$netns/agent" "${prefix}0" "cd '$scratch' && echo \$\$ >$name.pid && exec env --default-signal=INT '$run' -np 3 \
    --hosts $hosts --agent '$netns/agent' --subnet 10.77.0.0/24 --timeout 60 --binary '$lowband' \
    -- $words" >"$name.log" 2>"$name.err"
}

job() { # NAME OPTIMIZER SETTING ...: trains
  local name=$1 words='' setting
  { cat run.txtpb && echo "$2"; } >"$name.txtpb"
  shift 2
  for setting in name="$name" "$@"; do words+=" --set $setting"; done
  on_hosts "$name" "train $name.txtpb$words"
}

# A job that has trained a few steps, in the background; `agent` is to be waited for.
start() { # NAME
  job "$1" "$factors" schedule.steps=1000000 &
  agent=$!
  local _
  for _ in $(seq 400); do
    [[ $(grep -c '"step":{' "runs/$1/run.jsonl" 2>/dev/null) -ge 3 ]] && return
    kill -0 "$agent" 2>/dev/null || break
    sleep 0.05
  done
  fail "$1: no 3 steps within 20 seconds: $(cat "$1.log" "$1.err")"
  exit 1
}

on_host() { ip netns pids "$prefix$1"; } # NUMBER: process ids
programs_on_host() {                     # NUMBER: those of lowband
  local pid
  for pid in $(on_host "$1"); do
    [[ $(readlink "/proc/$pid/exe") != "$(realpath "$lowband")" ]] || echo "$pid"
  done
}

# ended NAME CODE PATTERN SECONDS: the job ends with this code and one line on its error stream, and within so many
# seconds nothing runs on any host any more, though Open MPI's daemons are out of reach of lowband-run.
ended() {
  local begin=$SECONDS code left=''
  wait "$agent"
  code=$?
  [[ $code == "$2" ]] || fail "$1: exit code $code, expected $2"
  [[ $(cat "$1.err") =~ ^$3$ ]] || fail "$1: found the messages '$(cat "$1.err")', expected '$3'"
  while left=$(on_host 0 && on_host 1 && on_host 2) && [[ -n $left ]] && ((SECONDS - begin < $4)); do sleep 0.1; done
  [[ -z $left ]] || fail "$1: after $((SECONDS - begin)) seconds these run: $(xargs ps -o pid,args -p <<<"$left")"
  echo "$1: exit code $code, all gone within $((SECONDS - begin + 1)) s: $(cat "$1.err")"
}

# What each interface sent, beside what its process says it sent, and all of them beside the model: within 2 %.
# Interfaces count headers, acknowledgements and what mpirun says as well, so never less than the transport's bytes;
# and everything sent arrives.
compare_bytes() { # NAME: counters are in NAME.before and NAME.after, the account in the run's summary
  grep -o '"traffic":\[[^]]*\]' "runs/$1/summary.json" | grep -o '"\(modelled_wire\|transport\)_bytes":[0-9.e+]*' | cut -d : -f 2 |
    paste -d ' ' - - >"$1.account"
  [[ $(wc -l <"$1.account") == 3 ]] || fail "$1: no account of three processes in the summary"
  paste -d ' ' "$1.before" "$1.after" "$1.account" | awk -v name="$1" '
    function off(found, expected) { return found < expected || found > 1.02 * expected }
    { sent = $5 - $2; received = $6 - $3; modelled = $7; transport = $8
      printf "%s: %s sent %d bytes, transport %d (%+.2f %%), model %d (%+.2f %%)\n",
             name, $1, sent, transport, 100 * (sent / transport - 1), modelled, 100 * (sent / modelled - 1)
      if (off(sent, transport)) bad = 1
      all_sent += sent; all_received += received; all_modelled += modelled }
    END { printf "%s: all sent %d, received %d, model %d (%+.2f %%)\n",
                 name, all_sent, all_received, all_modelled, 100 * (all_sent / all_modelled - 1)
          if (off(all_sent, all_modelled) || off(all_received, all_modelled)) bad = 1
          if (all_modelled < 3 * 30e6) { print name ": too few bytes to compare"; bad = 1 }
          exit bad }' || fail "$1: interfaces and ledger differ by more than 2 %"
}

measured() { # NAME OPTIMIZER SETTING ...
  "$netns/links" counters $prefix >"$1.before"
  job "$@" || fail "$1: exit code $?: $(cat "$1.err")"
  "$netns/links" counters $prefix >"$1.after"
  compare_bytes "$1"
}

case $case in
  bytes)
    measured factors "$factors" schedule.steps=12
    measured factors_bf16 "$factors" schedule.steps=24 optimizer.wire=BF16
    measured dense "$dense" schedule.steps=6
    ;;
  bench)
    # It reads the counters itself, around each iteration of whatever it measures.
    { cat run.txtpb && echo "$factors schedule { steps: 1 }"; } >bench.txtpb
    "$netns/links" counters $prefix >bench.before
    on_hosts bench "bench comm bench.txtpb --interface eth0 --sizes 4M:8M --iterations 10 --warmup 2 --base-iterations 2 --json=report.json" ||
      fail "bench: exit code $?: $(cat bench.log bench.err)"
    "$netns/links" counters $prefix >bench.after
    # Factors and the plain all-reduce of as many bytes, the dense base lines, two sizes; each in f32 and bf16.
    grep -o '"\(iterations\|modelled_wire_bytes\|interface_bytes\|interface_deviation_percent\)":[0-9.e+-]*' report.json |
      tr -d '"' | tr : ' ' | awk '
      $1 == "iterations" { iterations = $2 }
      $1 == "modelled_wire_bytes" { modelled = $2 }
      $1 == "interface_bytes" { counted = $2; all += iterations * counted }
      $1 == "interface_deviation_percent" {
        lines++
        printf "bench: interfaces sent %d bytes an iteration, model %d (%+.2f %%)\n", counted, modelled, $2
        if (counted < modelled || counted > 1.02 * modelled) bad = 1 }
      END { printf "%d\n", all >"bench.counted"; exit bad || lines != 10 }' ||
      fail "bench: expected ten measurements within 2 %: $(cat bench.log report.json)"
    # All of it crossed the links: what the hosts received was sent by others.
    paste -d ' ' bench.before bench.after | awk -v counted="$(<bench.counted)" '
      { sent += $5 - $2; received += $6 - $3 }
      END { printf "bench: hosts sent %d, received %d, counted in iterations %d\n", sent, received, counted
            exit !(counted > 3 * 30e6 && sent >= counted && received >= counted) }' ||
      fail "bench: the bytes of the iterations did not cross the links"
    ;;
  lost_link)
    # Nobody closes a connection: Open MPI's keep-alive gives up after 5 + 3 x 2 seconds.
    start lost_link
    "$netns/links" cut $prefix "${prefix}2"
    ended lost_link 75 "lowband-run: the connection to host ${prefix}2 is lost; all processes ended" 25
    ;;
  lost_host)
    start lost_host
    on_host 1 | xargs kill -KILL
    # Open MPI notices the end of the connection, or that of the agent; only the one has a name.
    ended lost_host 75 "lowband-run: (the connection to host ${prefix}1 is lost|a host is lost, .*); all processes ended" 10
    start killed
    programs_on_host 2 | xargs kill -KILL
    ended killed 137 "lowband-run: process 2 of 3 on ${prefix}2 was killed by signal 9 \\(Killed\\); all processes ended" 10
    ;;
  interrupt)
    start interrupt
    kill -INT "$(<interrupt.pid)"
    ended interrupt 130 '' 10
    compgen -G 'runs/interrupt/checkpoints/step-*/manifest.txtpb' >/dev/null || fail "interrupt: no checkpoint"
    ;;
esac
finish
