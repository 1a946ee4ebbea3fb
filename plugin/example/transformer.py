"""A small language model and its data, for the examples beside it."""

import math

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 64, 4, 2, 32, 8


class Block(nn.Module):

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.before_attention, self.before_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        h = self.before_attention(x)
        attention = F.scaled_dot_product_attention(heads(self.query(h)), heads(self.key(h)), heads(self.value(h)),
                                                   is_causal=True)
        x = x + self.output(attention.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(self.before_mlp(x))))


class Transformer(nn.Module):

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)  # equal on all processes
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        """Mean cross-entropy of every token after the first."""
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def groups(model):
    """Matrices of layers travel as factors; the embedding, the head and the gains are AdamW's, and travel as they are."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    gains = [(name, p) for name, p in model.named_parameters() if p.ndim == 1]
    ends = {role: [(name, p) for name, p in model.named_parameters() if f"{role}." in name] for role in ("embedding", "head")}
    return [{"params": matrices, "lr": 0.02}, {"params": gains},
            *({"params": named, "role": role} for role, named in ends.items())]


def batches(process):
    """Sequences in which every token but one in ten is 5 times the one before, plus 3; of this process's own."""
    draw = torch.Generator().manual_seed(process)
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=draw)
        follows = torch.rand(BATCH, LENGTH + 1, generator=draw) < 0.9
        for i in range(1, LENGTH + 1):
            tokens[:, i] = torch.where(follows[:, i], (5 * tokens[:, i - 1] + 3) % VOCABULARY, tokens[:, i])
        yield tokens


# What nobody can predict: that a token is drawn, and which one.
_follows = 0.9 + 0.1 / VOCABULARY
BEST_LOSS = -_follows * math.log(_follows) - (1 - _follows) * math.log(0.1 / VOCABULARY)
