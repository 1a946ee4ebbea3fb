"""Dion in torch over the matrices of the model of 166 million parameters: the other side of optimizer_bench.

Equal shapes are one batch, so that a step is a dozen launches for each of three shapes; float32 but for the Gram matrices,
as lowband's. Also the flops and bytes of a step, for its floor.
"""

import math

WIDTH, FFN, LAYERS = 768, 2048, 18
MU, ETA, DECAY, EPSILON = 0.95, 0.01, 0.01, 1e-8
# Of one layer, in optimizer_bench's order: q, k, v, o, gate, up, down.
SHAPES = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH)] * 2 + [(WIDTH, FFN)]


def input(torch, elements, which, device):
    """As optimizer_bench."""
    prime = 2_147_483_647
    k = (torch.arange(elements, device=device) + 1_000_003 * (which + 1)) % prime
    for _ in range(2):
        k = k * k % prime
    return (k.double() / prime - 0.5).float()


def orthonormal(torch, p):
    """Two passes of Cholesky QR; cholesky_ex, which does not wait for the device."""
    for _ in range(2):
        wide = p.double()
        factor = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)[0]
        p = torch.linalg.solve_triangular(factor.float(), p, upper=True, left=False)
    return p


class Dion:
    def __init__(self, torch, factor_rank, layers, device):
        self.torch, self.batches = torch, []
        numbers = {}
        for i, shape in enumerate(SHAPES * layers):
            numbers.setdefault(shape, []).append(i)
        for (rows, cols), members in numbers.items():
            stacked = lambda r, c, k: torch.stack([input(torch, r * c, 2 * i + k, device).reshape(r, c) for i in members])
            g = stacked(rows, cols, 0)
            b = g.mT if rows < cols else g
            self.batches.append({"w": torch.zeros_like(b), "g": b, "m": torch.zeros_like(b), "aspect": rows / cols,
                                 "q": stacked(min(rows, cols), factor_rank, 1)})

    def step(self):
        for x in self.batches:
            m = x["m"].add_(x["g"])
            p = orthonormal(self.torch, m @ x["q"])
            r = m.mT @ p
            self.torch.baddbmm(m, p, r.mT, alpha=MU - 1, out=m)
            x["q"] = r / (r.norm(dim=1, keepdim=True) + EPSILON)
            x["w"] = self.torch.baddbmm(x["w"], p, x["q"].mT, beta=1 - ETA * DECAY, alpha=-ETA * math.sqrt(x["aspect"]))

    def check(self):
        """After two steps, the sum of squares of all weights."""
        for _ in range(2):
            self.step()
        return sum(float(x["w"].double().square().sum()) for x in self.batches)


def costs(factor_rank, layers):
    """Flops in float and in double, and bytes of one step: four products with a factor, two passes of Gram matrix and
    triangular product; M read by two passes and written by two, G read, W read and written."""
    flops = wide_flops = nbytes = 0
    for rows, cols in SHAPES * layers:
        flops += 8 * rows * cols * factor_rank
        wide_flops += 8 * max(rows, cols) * factor_rank**2
        nbytes += 4 * 8 * rows * cols
    return {"flops": flops, "double_flops": wide_flops, "bytes": nbytes}
