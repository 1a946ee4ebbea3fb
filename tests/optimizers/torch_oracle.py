"""lowband's optimizers against torch.optim, step by step, on the gradients that torch_oracle wrote.

usage: torch_oracle.py PROGRAM; exit code 77 (skipped) where torch cannot be imported.
"""

import subprocess
import sys

try:
    import torch
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)

RATE = 0.02
MUON = dict(lr=RATE, weight_decay=0.1, momentum=0.95, ns_coefficients=(3.4445, -4.7750, 2.0315), ns_steps=5, eps=1e-7)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.8),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.8, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon(p, nesterov=False, adjust_lr_fn="original", **MUON)
    OPTIMIZERS["muon_nesterov_rms"] = lambda p: torch.optim.Muon(
        p, nesterov=True, adjust_lr_fn="match_rms_adamw", **MUON)

# torch takes momentum as a mean, 0.05 times ours, so that eps = 1e-7 is added to a norm of at least 0.1: 1e-6 of
# small singular values, times a step of at most 0.02 x 2 and 20 steps. The others differ by rounding alone.
TOLERANCES = {"muon": 2e-6, "muon_nesterov_rms": 2e-6}


def replay(lines, case):
    """Largest difference of any weight after any step."""
    largest, weight, optimizer = 0.0, None, None
    for name, rows, cols, step, values in lines:
        arrays = torch.tensor(values, dtype=torch.float64).reshape(-1, rows, cols)
        if step < 0:
            weight = torch.nn.Parameter(arrays[0].clone())
            optimizer = OPTIMIZERS[case]([weight])
            continue
        weight.grad = arrays[0].clone()
        optimizer.step()
        difference = (weight.detach() - arrays[1]).abs().max().item()
        if not difference <= largest:
            largest = difference
    return largest


def main():
    # torch rounds Muon's iteration to bfloat16, in a copy; the mathematics is compared in double.
    torch.Tensor.bfloat16 = lambda tensor: tensor.clone()
    cases = {}
    for line in subprocess.run([sys.argv[1]], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines():
        case, name, rows, cols, step, *values = line.split()
        cases.setdefault(case, []).append((name, int(rows), int(cols), int(step), [float(x) for x in values]))
    failed = False
    for case, lines in cases.items():
        if case not in OPTIMIZERS:
            print(f"{case}: SKIPPED, torch {torch.__version__} has no such optimizer")
            continue
        largest, tolerance = replay(lines, case), TOLERANCES.get(case, 1e-12)
        failed |= not largest <= tolerance
        print(f"{case}: largest difference {largest:.3g}, tolerance {tolerance:.3g}")
    return 1 if failed else 0


sys.exit(main())
