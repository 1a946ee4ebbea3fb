"""Muon and Dion in plain torch: what Megatron's registry builds to compare with, on gradients that Megatron averaged.

Every process gathers its replica's pieces of a matrix, takes the whole step in float64 and keeps its own piece.
"""

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry


def register(name, rule):
    """`OptimizerConfig(optimizer=name)` steps matrices of layers by `rule`, and all else by Megatron's AdamW."""
    megatron.core.optimizer._EMERGING_OPTIMIZERS[name] = EmergingOptimizerEntry(
        Plain, config_to_kwargs=lambda config, model_chunks, processes: dict(
            rule=rule, lr=config.lr, weight_decay=config.weight_decay, team=processes.tp))


class Plain(torch.optim.Optimizer):
    """W <- (1 - eta wd) W - eta sqrt(m/n) U, where `rule(state, G)` gives U of an m x n matrix."""

    def __init__(self, params, rule, lr, weight_decay, team):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self._rule, self._team = rule, team

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                weights, gradients = (matrices(tensor, parameter) for tensor in (parameter, parameter.grad))
                for i, (weight, gradient) in enumerate(zip(weights, gradients)):
                    g = self._whole(gradient.flatten(0, -2), parameter.partition_dim)
                    u = self._rule(self.state[parameter].setdefault(i, {}), g)
                    u *= (g.shape[0] / g.shape[1])**0.5
                    own = u.chunk(self._team.size(), parameter.partition_dim)[self._team.rank()]
                    decay = 1 - group["lr"] * group["weight_decay"]
                    weight.copy_(decay * weight.double() - group["lr"] * own.view(weight.shape))

    def _whole(self, piece, dimension):
        pieces = [torch.empty_like(piece) for _ in range(self._team.size())]
        dist.all_gather(pieces, piece.contiguous(), group=self._team)
        return torch.cat(pieces, dimension).double()


def matrices(tensor, parameter):
    """Of gate and up, or of query, key and value, as Megatron's own Muon takes linear_qkv apart; else the one."""
    if getattr(parameter, "is_qkv", False):
        shapes = parameter.qkv_split_shapes
        return tensor.view(-1, sum(shapes), tensor.shape[-1]).split(shapes, dim=1)
    return tensor.chunk(parameter.partition_stride)


def muon(state, g, mu=0.95):
    """U = sign(M), M <- mu M + G, by Newton-Schulz; algorithms.md 2.4."""
    m = state["M"] = mu * state.get("M", torch.zeros_like(g)) + g
    x = m / (torch.linalg.norm(m) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def dion(first_q, mu=0.95):
    """P Q^T of Dion as one process with the mean gradient takes it, which replicas with momenta of their own follow
    exactly: all they exchange is linear in the momentum. algorithms.md 2.7. `first_q(cols)` is Q_0."""

    def rule(state, g):
        if g.shape[0] < g.shape[1]:
            return rule(state, g.T).T
        b = state.get("M", torch.zeros_like(g)) + g
        p, upper = torch.linalg.qr(b @ state.get("Q", first_q(g.shape[1])))
        p *= upper.diagonal().sign()
        r = b.T @ p
        state["M"] = b - (1 - mu) * p @ r.T
        state["Q"] = r / (torch.linalg.norm(r, dim=0) + 1e-8)
        return p @ state["Q"].T

    return rule
