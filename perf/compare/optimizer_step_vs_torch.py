#!/usr/bin/env python3
"""Steps of lowband's optimizers against the same mathematics written in torch, float32, one thread each.

Matrices of the 166M model (width 768, feed-forward 2,048): one layer's seven where arithmetic decides (Dion at rank
620, Muon), several layers' where memory does (Dion at rank 12, AdamW), so that no cache holds them. lowband's side is
its sharded optimizer on one process, everything included: the search for unusable gradients, their norm, the exchange
of a process with itself. torch's side is the update alone, as well as it can be written: in place, into memory that
exists; products in whichever form was fastest in this run, orthonormalisation by whichever of Householder QR and two
passes of Cholesky QR was; `torch.optim.AdamW(fused=True)`. Both sides read the same gradients and take turns, step by
step; medians are printed, and the median of the ratios.

AdamW is compared as trainers run it, with gradients clipped at norm 1: torch's norm, and whichever was faster of scaling
the gradients and handing the factor to the fused kernel. The line "unclipped" has torch's fused step alone against
lowband's step, which reads the gradients once more for their norm: an eighth pass over memory besides seven.

Muon stands against float32 Newton-Schulz with torch.mm (torch.optim.Muon computes in bfloat16, which a CPU without
such units emulates). `--products onednn` lets torch use oneDNN's products as well, by an operator that torch.compile
emits and that has no public name: on AMD's processors it is more than twice as fast as the MKL behind torch.mm.

Checked on the way: after three steps the weights moved alike. Difference of the weights over what they moved, in
Frobenius norms: float rounding, by the length of the sums, and by the conditioning of what is orthonormalised (Dion's
P) or by the slope at 0 of Muon's iteration (3.4445^5 = 485, which multiplies the rounding of the smallest singular
values).

"power iteration" is Spectra's cached power iteration at 12 columns as its step runs it: M <- mu M + G, M V and M^T (M V)
in one pass, then orthonormalisation and M^T U. Its byte floor: M and G read, M written, V read, both products written, at
the rate of "accumulate", a plain M <- M + a G. Its flop floor: both products, three flops for an element of M and two double
ones for |M|^2. The bound is over the larger of the two. "M by itself" is the same work with a pass of its own for
M <- mu M + G, over the same floor. "M V and M^T U" are the products of a further iteration, which
reads M once; their byte floor is that of two products, each of which reads M. They have no bound.

Floors: flops at the rate of independent fused multiply-adds, double ones (Gram matrices, Cholesky) at that of doubles;
a symmetric product counts half. Bytes at the bandwidth of plain loops with the same reads and writes. All measured in
this run.

    python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 numpy
    .venv/bin/python perf/compare/optimizer_step_vs_torch.py --program build/release/bin/optimizer_step
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

TILE_ELEMENTS = 4_000_037
LEARNING_RATE, WEIGHT_DECAY, MU, WEIGHT_SCALE = 0.01, 0.01, 0.95, np.float32(0.02)
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
COLUMN_NORM_EPSILON = 1e-8
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
NEWTON_SCHULZ_EPSILON = 1e-7
CHECKED_STEPS = 3


def stopwatch(body, repetitions=5):
    best = math.inf
    for _ in range(repetitions):
        begin = time.perf_counter()
        body()
        best = min(best, time.perf_counter() - begin)
    return best


class Fastest:
    """Runs one of several bodies that do the same, whichever was fastest at first for operands of these shapes."""

    def __init__(self, forms):
        self.forms, self.chosen = forms, {}

    def __call__(self, *operands):
        key = tuple((x.shape, x.stride()) for x in operands if isinstance(x, torch.Tensor))
        if key not in self.chosen:
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in operands]
            self.chosen[key] = min(self.forms, key=lambda form: stopwatch(lambda: form(*copies)))
        return self.chosen[key](*operands)


def householder(p):
    return torch.linalg.qr(p)[0]


def cholesky_twice(p):
    """As lowband: Gram matrix and Cholesky in double, solution in float. torch's has no test for dead columns."""
    for _ in range(2):
        wide = p.double()
        u = torch.linalg.cholesky_ex(wide.T @ wide, upper=True)[0]
        p = torch.linalg.solve_triangular(u.float(), p, upper=True, left=False)
    return p


class TorchSide:
    def __init__(self, shapes, tile, products):
        self.shapes, self.tile = shapes, torch.from_numpy(tile)
        elements = sum(rows * cols for rows, cols in shapes)
        self.flat_weights, self.flat_gradients = torch.zeros(elements), torch.zeros(elements)
        self.weights, self.gradients = self.split(self.flat_weights), self.split(self.flat_gradients)
        # out <- A B
        forms = [lambda a, b, out: torch.mm(a, b, out=out),
                 lambda a, b, out: torch.mm(b.T, a.T, out=out.T)]
        # C <- beta C + alpha A B^T
        updates = [lambda c, a, b, beta, alpha: c.addmm_(a, b.T, beta=beta, alpha=alpha),
                   lambda c, a, b, beta, alpha: c.mul_(beta).add_(torch.mm(a, b.T), alpha=alpha)]
        if products == "onednn":
            linear = torch.ops.mkldnn._linear_pointwise
            forms += [lambda a, b, out: out.copy_(linear(a, b.T.contiguous(), None, "none", [], "")),
                      lambda a, b, out: out.copy_(linear(b.T.contiguous(), a, None, "none", [], "").T)]
            updates += [lambda c, a, b, beta, alpha: c.mul_(beta).add_(linear(a, b, None, "none", [], ""), alpha=alpha)]
        self.product, self.update = Fastest(forms), Fastest(updates)
        self.orthonormalise = Fastest([householder, cholesky_twice])

    def split(self, flat):
        parts, offset = [], 0
        for rows, cols in self.shapes:
            parts.append(flat[offset:offset + rows * cols].view(rows, cols))
            offset += rows * cols
        return parts

    def fill(self, flat, turn):
        start, at = 104729 * turn % len(self.tile), 0
        while at < len(flat):
            count = min(len(self.tile) - start, len(flat) - at)
            flat[at:at + count] = self.tile[start:start + count]
            at, start = at + count, 0

    def start(self, kind, factor_rank, q):
        self.fill(self.flat_weights, 0)
        self.flat_weights.mul_(WEIGHT_SCALE)
        self.count, self.body = 0, getattr(self, kind)
        if kind.startswith("adamw"):
            for weight, gradient in zip(self.weights, self.gradients):
                weight.grad = gradient
            self.optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON,
                                               weight_decay=WEIGHT_DECAY, fused=True)
            if kind == "adamw_clipped":
                one, first = torch.ones(()), self.flat_weights.clone()
                self.clipped_step = min((self.clip_by_scaling, self.clip_in_kernel),
                                        key=lambda form: stopwatch(lambda: form(one)))
                self.flat_weights.copy_(first)
                self.optimizer.state.clear()
            return
        self.momenta = [torch.zeros(shape) for shape in self.shapes]
        self.signs = {shape: torch.zeros(shape) for shape in self.shapes}
        if kind == "muon":
            self.next = {shape: torch.zeros(shape) for shape in self.shapes}
            self.squares = {min(shape): [torch.zeros(min(shape), min(shape)) for _ in range(3)] for shape in self.shapes}
            return
        sides = [(max(shape), min(shape)) for shape in self.shapes]
        ends = list(itertools.accumulate((b * factor_rank for _, b in sides), initial=0))
        self.q = [torch.from_numpy(q[begin:end].copy()).view(b, factor_rank) for begin, end, (_, b) in zip(ends, ends[1:], sides)]
        self.p = {a: torch.zeros(a, factor_rank) for a, _ in sides}
        self.r = {b: torch.zeros(b, factor_rank) for _, b in sides}

    def step(self):
        self.count += 1
        self.fill(self.flat_gradients, self.count)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        with torch.no_grad():
            self.body()
        return time.perf_counter() - begin, time.process_time() - cpu_begin

    def adamw(self):
        self.optimizer.step()

    def adamw_clipped(self):
        norm = torch.nn.utils.get_total_norm(self.gradients)
        self.clipped_step(norm)

    def clip_by_scaling(self, norm):
        torch.nn.utils.clip_grads_with_norm_(self.weights, 1.0, norm)
        self.optimizer.step()

    def clip_in_kernel(self, norm):
        self.optimizer.grad_scale, self.optimizer.found_inf = norm.clamp(min=1.0), torch.zeros(())
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf

    def dion(self):
        for w, g, m, q in zip(self.weights, self.gradients, self.momenta, self.q):
            tall = w.shape[0] >= w.shape[1]
            m.add_(g)
            b = m if tall else m.T
            p, r = self.p[b.shape[0]], self.r[b.shape[1]]
            self.product(b, q, p)
            p = self.orthonormalise(p)
            self.product(b.T, p, r)
            left, right = (p, r) if tall else (r, p)
            self.update(m, left, right, 1.0, MU - 1)
            torch.div(r, torch.linalg.vector_norm(r, dim=0).add_(COLUMN_NORM_EPSILON), out=q)
            left, right = (p, q) if tall else (q, p)
            self.update(w, left, right, 1 - LEARNING_RATE * WEIGHT_DECAY,
                        -LEARNING_RATE * math.sqrt(w.shape[0] / w.shape[1]))

    def muon(self):
        for w, g, m in zip(self.weights, self.gradients, self.momenta):
            x, spare = self.signs[tuple(w.shape)], self.next[tuple(w.shape)]
            gram, square, p = self.squares[min(w.shape)]
            m.mul_(MU).add_(g)
            torch.div(m, torch.linalg.vector_norm(m) + NEWTON_SCHULZ_EPSILON, out=x)
            wide = w.shape[0] <= w.shape[1]
            for a, b, c in NEWTON_SCHULZ:
                self.product(*((x, x.T) if wide else (x.T, x)), gram)
                # p <- b A + c A^2 ; X <- a X + p X
                torch.addmm(gram, gram, gram, beta=b, alpha=c, out=p)
                p.diagonal().add_(a)
                self.product(*((p, x) if wide else (x, p)), spare)
                x, spare = spare, x
            w.mul_(1 - LEARNING_RATE * WEIGHT_DECAY).add_(x, alpha=-LEARNING_RATE * math.sqrt(w.shape[0] / w.shape[1]))


class LowbandSide:
    def __init__(self, program, folder, layers):
        self.folder = folder
        self.process = subprocess.Popen([program, folder, str(layers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{program} did not start")

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"lowband: no answer to \"{command}\"")
        return [float(x) for x in answer.split()]

    def read(self, name):
        return np.fromfile(os.path.join(self.folder, name), dtype=np.float32)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- Floors: seconds ----


def dion_flops(shapes, r):
    """(float, double): four products; twice a Gram matrix, a Cholesky factor and a triangular solution."""
    single = double = 0
    for rows, cols in shapes:
        a = max(rows, cols)
        single += 8 * rows * cols * r + 2 * a * r * r
        double += 2 * (a * r * r + r**3 / 3)
    return single, double


def muon_flops(shapes):
    total = 0
    for rows, cols in shapes:
        a, b = max(rows, cols), min(rows, cols)
        total += len(NEWTON_SCHULZ) * (a * b * b + b**3 + 2 * a * b * b)
    return total, 0


def floors(kind, factor_rank, shapes, machine):
    elements = sum(rows * cols for rows, cols in shapes)
    single, double = {"dion": lambda: dion_flops(shapes, factor_rank), "muon": lambda: muon_flops(shapes),
                      "adamw": lambda: (14 * elements, 0)}[kind.split("_")[0]]()
    # Dion: M <- M + G ; M^T P ; M <- M - P R^T ; W <- W - P Q^T.  Muon: M <- mu M + G ; W <- W - U.  AdamW: W, m, v
    # and G; clipped, G once before.
    seconds_of = lambda read, update, accumulate: 4 * elements * (
        read / machine["read"] + update / machine["update"] + accumulate / machine["accumulate"])
    passes = {"dion": (1, 4, 3), "muon": (0, 0, 3 + 3), "adamw": (0, 0, 7), "adamw_clipped": (1, 0, 7)}[kind]
    return single / machine["float_flops"] + double / machine["double_flops"], seconds_of(*passes)


# ---- The comparison ----

# Name, kind, factor rank, whether one layer is enough, most of torch's time, most of the flop floor, tolerance.
CASES = [
    ("Dion, rank 620", "dion", 620, True, 0.85, 1.35, 1e-3),
    ("Dion, rank 12", "dion", 12, False, 0.5, None, 1e-4),
    ("Muon", "muon", 0, True, 0.65, None, 1e-3),
    ("AdamW", "adamw_clipped", 0, False, 1.0, None, 1e-5),
    ("AdamW unclipped", "adamw", 0, False, None, None, 1e-5),
]
ITERATION_COLUMNS, ITERATION_LIMIT = 12, 1.1  # round(0.015 x 768)


def iteration_cases(shapes, machine):
    """Name, command, byte floor, flop floor, most of the larger floor."""
    r, elements = ITERATION_COLUMNS, sum(rows * cols for rows, cols in shapes)
    factors = sum(r * (rows + 2 * cols) for rows, cols in shapes)
    floor = (4 * (3 * elements + factors) / machine["accumulate"],
             (4 * r + 3) * elements / machine["float_flops"] + 2 * elements / machine["double_flops"])
    return [
        ("power iteration", f"iteration {r}", *floor, ITERATION_LIMIT),
        ("  M by itself", f"separate {r}", *floor, None),
        ("M V and M^T U", f"products {r}", 2 * 4 * elements / machine["read"], 4 * elements * r / machine["float_flops"],
         None),
    ]


def compare(arguments):
    results = []
    with tempfile.TemporaryDirectory(prefix="optimizer_step.") as folder:
        tile = np.random.default_rng(1).standard_normal(TILE_ELEMENTS).astype(np.float32)
        tile.tofile(f"{folder}/tile")
        machine = None
        for layers, small in ((1, True), (arguments.layers, False)):
            ours = LowbandSide(arguments.program, folder, layers)
            if machine is None:
                names = ("read", "update", "accumulate", "write", "float_flops", "double_flops")
                machine = dict(zip(names, ours.ask("machine")))
            shapes = [tuple(int(x) for x in row) for row in np.loadtxt(f"{folder}/shapes", dtype=int)]
            theirs = TorchSide(shapes, tile, arguments.products)
            for name, kind, factor_rank, one_layer, limit, floor_limit, tolerance in CASES:
                if one_layer != small or (arguments.only and arguments.only not in name.lower()):
                    continue
                results.append(compare_case(ours, theirs, arguments.rounds, machine, dict(
                    name=name, layers=layers, kind=kind, factor_rank=factor_rank, limit=limit, floor_limit=floor_limit,
                    tolerance=tolerance)))
            if not small and (not arguments.only or arguments.only in "products"):
                for name, command, byte_floor, flop_floor, limit in iteration_cases(shapes, machine):
                    taken = [ours.ask(command)[0] for _ in range(arguments.rounds)]
                    results.append(dict(name=name, layers=layers, ours=statistics.median(taken), byte_floor=byte_floor,
                                        flop_floor=flop_floor, floor_limit=limit))
            ours.close()
    return machine, results


def compare_case(ours, theirs, rounds, machine, case):
    ours.ask(f"start {case['kind']} {case['factor_rank']}")
    theirs.start(case["kind"], case["factor_rank"], ours.read("q"))
    first = theirs.flat_weights.numpy().copy()
    for _ in range(CHECKED_STEPS):
        ours.ask("step")
        theirs.step()
    ours.ask("weights")
    moved = theirs.flat_weights.numpy() - first
    deviation = float(np.linalg.norm(ours.read("weights") - theirs.flat_weights.numpy()) / np.linalg.norm(moved))
    taken = [(ours.ask("step"), theirs.step()) for _ in range(rounds)]
    flop_floor, byte_floor = floors(case["kind"], case["factor_rank"], theirs.shapes, machine)
    return dict(case, ours=statistics.median(a[0] for a, _ in taken), torch=statistics.median(b[0] for _, b in taken),
                ratio=statistics.median(a[0] / b[0] for a, b in taken), deviation=deviation,
                cpu_ratio=statistics.median(a[1] / b[1] for a, b in taken), flop_floor=flop_floor, byte_floor=byte_floor)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default="build/release/bin/optimizer_step")
    parser.add_argument("--layers", type=int, default=18, help="of the cases that memory decides, 1 to 18")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--products", choices=("mm", "onednn"), default="mm")
    parser.add_argument("--only", help="cases whose name contains this: dion, muon, adamw, products")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine, results = compare(arguments)
    if arguments.json:
        print(json.dumps(dict(torch=torch.__version__, machine=machine, results=results)))
    else:
        print(f"# torch {torch.__version__}, products by {arguments.products}; float32, one thread each; GB/s: read "
              f"{machine['read'] / 1e9:.1f}, update {machine['update'] / 1e9:.1f}, accumulate "
              f"{machine['accumulate'] / 1e9:.1f}; FMA Gflop/s: float {machine['float_flops'] / 1e9:.0f}, double "
              f"{machine['double_flops'] / 1e9:.0f}")
        print("case            layers  lowband s   torch s  ratio  (cpu)  flop floor s  x floor  byte floor s  x floor  difference")
    complaints = []
    for r in results:
        above = {name: r["ours"] / r[name] for name in ("flop_floor", "byte_floor")}
        if not arguments.json:
            torch_part = f"{r['torch']:8.4f}  {r['ratio']:5.2f}  {r['cpu_ratio']:5.2f}" if "torch" in r else " " * 22
            print(f"{r['name']:15s} {r['layers']:6d}  {r['ours']:9.4f}  {torch_part}  {r['flop_floor']:12.4f}  "
                  f"{above['flop_floor']:7.2f}  {r['byte_floor']:12.4f}  {above['byte_floor']:7.2f}  "
                  f"{r.get('deviation', math.nan):10.1e}")
        if "torch" not in r:
            if r["floor_limit"] and min(above.values()) > r["floor_limit"]:
                complaints.append((arguments.check, f"{r['name']}: {min(above.values()):.2f} of the larger floor, expected "
                                   f"at most {r['floor_limit']}"))
            continue
        if not r["deviation"] <= r["tolerance"]:
            complaints.append((True, f"{r['name']}: weights differ by {r['deviation']:.1e} of what they moved, expected at "
                               f"most {r['tolerance']:.0e}"))
        if r["limit"] and r["ratio"] > r["limit"]:
            complaints.append((arguments.check, f"{r['name']}: ratio {r['ratio']:.2f}, expected at most {r['limit']}"))
        if r["floor_limit"] and above["flop_floor"] > r["floor_limit"]:
            complaints.append((arguments.check, f"{r['name']}: {above['flop_floor']:.2f} of the flop floor, expected at "
                               f"most {r['floor_limit']}"))
    for _, text in complaints:
        print(text, file=sys.stderr)
    return 1 if any(fatal for fatal, _ in complaints) else 0


if __name__ == "__main__":
    sys.exit(main())
