"""A small language model of LLaMA's kind and its data, for the examples beside it.

The model is that of `lowband train`, with the same names of parameters after its `model.`: equal weights and equal data
give equal losses.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LAYERS, FFN_WIDTH, LENGTH, BATCH = 64, 64, 4, 2, 176, 32, 8
NORM_EPSILON, ROPE_BASE = 1e-5, 10000.0


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotated(x):
    """Rotary positions: at position p elements j and j + d/2 of a head turn by p base^(-2j/d).

    Shapes: x is (..., positions, d).
    """
    positions, half = x.shape[-2], x.shape[-1] // 2
    frequencies = ROPE_BASE**(-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):

    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.head_dim = width // heads
        self.q_proj, self.o_proj = linear(width, width), linear(width, width)
        self.k_proj, self.v_proj = (linear(width, kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = rotated(heads(self.q_proj(x))), rotated(heads(self.k_proj(x))), heads(self.v_proj(x))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):

    def __init__(self, width, ffn_width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, ffn_width), linear(width, ffn_width), linear(ffn_width, width)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):

    def __init__(self, width, heads, kv_heads, ffn_width):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(width, NORM_EPSILON), Attention(width, heads, kv_heads)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(width, NORM_EPSILON), FeedForward(width, ffn_width)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):

    def __init__(self, vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, ffn_width=FFN_WIDTH):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)  # the head too
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, ffn_width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, NORM_EPSILON)
        draw = torch.Generator().manual_seed(0)  # equal on all processes
        for name, parameter in self.named_parameters():
            into_residual = "o_proj" in name or "down_proj" in name
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02, generator=draw)

    def forward(self, tokens):
        """Mean cross-entropy of every token after the first."""
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def groups(model):
    """Matrices of layers travel as factors; the embedding and the gains are AdamW's, and travel as they are."""
    named = list(model.named_parameters())
    return [{"params": [(name, p) for name, p in named if p.ndim == 2 and "layers." in name], "lr": 0.02},
            {"params": [(name, p) for name, p in named if p.ndim == 2 and "layers." not in name], "role": "embedding"},
            {"params": [(name, p) for name, p in named if p.ndim == 1]}]


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
