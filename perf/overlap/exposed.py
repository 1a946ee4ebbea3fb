#!/usr/bin/env python3
"""Communication of the optimizer, and the part of it that is exposed, from the timelines of a run.

Usage: perf/overlap/exposed.py RUN_FOLDER ...

A process communicates while it is in a collective of its communication thread, or of its main thread inside the
optimizer. All of the second is exposed; of the first what coincides with the main thread's wait for the communication
thread. Times are sums over the steps of process 0, in seconds.
"""
import json
import pathlib
import sys

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")
WAIT = "wait for the communication thread"


def ranges(events, thread, wanted):
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events
                  if e.get("ph") == "X" and e.get("tid") == thread and wanted(e["name"]))


def length(intervals):
    return sum(end - begin for begin, end in intervals) / 1e6


def common(a, b):
    """What two sorted lists of disjoint intervals share."""
    shared, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            shared.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return shared


def main(folders):
    if not folders:
        sys.exit(__doc__)
    print(f"{'run':16}{'communication s':>17}{'exposed s':>11}{'exposed':>9}   (from the trace)")
    for folder in folders:
        trace = json.loads((pathlib.Path(folder) / "timeline-0.json").read_text())
        events = trace["traceEvents"]
        is_collective = lambda name: name.startswith(COLLECTIVES)
        in_optimizer = common(ranges(events, 0, is_collective), ranges(events, 0, lambda name: name == "optimizer"))
        beside = ranges(events, 1, is_collective)
        waited = common(beside, ranges(events, 0, lambda name: name == WAIT))
        total, exposed = length(in_optimizer) + length(beside), length(in_optimizer) + length(waited)
        print(f"{pathlib.Path(folder).name:16}{total:17.3f}{exposed:11.3f}{100 * exposed / total:8.1f}%")


main(sys.argv[1:])
