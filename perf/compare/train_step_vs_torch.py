#!/usr/bin/env python3
"""One training step of lowband against the same model written plainly in torch, float32, one thread.

Both sides start from the same weights (the C++ program writes them), see the same tokens and run the same AdamW.
They take turns: a block of steps here, a block there. The losses must agree; then tokens per second and their ratio
are printed for every shape. Rates and the ratio are by CPU time of the whole process, which other programs on the
machine disturb least; the ratio by wall time stands beside it.

    python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 numpy
    .venv/bin/python perf/compare/train_step_vs_torch.py --program build/release/bin/train_step
"""

import argparse
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
import torch.nn.functional as F

# width, heads, feed-forward width, sequence; 4 layers, head dimension 32, 256 bytes, tied head, 1,024 tokens per step
SHAPES = [(128, 4, 352, 128), (128, 4, 352, 256), (256, 8, 704, 128), (256, 8, 704, 256)]
TOKENS_PER_STEP = 1024
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1
LOSS_TOLERANCE = 1e-4  # float32, 10 AdamW steps: notes of lowband's numerics


class Decoder:
    """LLaMA-style decoder with fused QKV and gate+up matrices: the fastest plain form of each operation."""

    def __init__(self, shape, weights):
        self.shape = shape
        w = {name: torch.from_numpy(value) for name, value in weights.items()}
        self.embedding = w["model.embed_tokens.weight"]
        self.layers = []
        for i in range(shape["layers"]):
            p = f"model.layers.{i}."
            qkv = [w[p + f"self_attn.{x}_proj.weight"] for x in "qkv"]
            gate_up = [w[p + f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
            self.layers.append(
                dict(
                    norm1=w[p + "input_layernorm.weight"].reshape(-1),
                    qkv=torch.cat(qkv).contiguous(),
                    out=w[p + "self_attn.o_proj.weight"],
                    norm2=w[p + "post_attention_layernorm.weight"].reshape(-1),
                    gate_up=torch.cat(gate_up).contiguous(),
                    down=w[p + "mlp.down_proj.weight"],
                )
            )
        self.norm = w["model.norm.weight"].reshape(-1)
        half = shape["head_dim"] // 2
        frequency = shape["rope_base"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(shape["sequence"], dtype=torch.float64)[:, None] * frequency[None, :]
        self.cos = torch.cat([angle.cos()] * 2, dim=1).float()
        self.sin = torch.cat([angle.sin()] * 2, dim=1).float()
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self):
        return [self.embedding, self.norm] + [p for layer in self.layers for p in layer.values()]

    def rotate(self, x):
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def loss(self, tokens, targets):
        s = self.shape
        batch, length, heads, head_dim = tokens.shape[0], s["sequence"], s["heads"], s["head_dim"]
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            h = F.rms_norm(x, (s["width"],), layer["norm1"], s["norm_epsilon"])
            qkv = F.linear(h, layer["qkv"]).view(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            attended = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
            x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, heads * head_dim), layer["out"])
            h = F.rms_norm(x, (s["width"],), layer["norm2"], s["norm_epsilon"])
            gate, up = F.linear(h, layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        logits = F.linear(F.rms_norm(x, (s["width"],), self.norm, s["norm_epsilon"]), self.embedding)
        return F.cross_entropy(logits.view(-1, s["vocabulary"]), targets.reshape(-1))


class TorchSide:
    def __init__(self, shape, folder):
        weights = {}
        for entry in shape["parameters"]:
            data = np.fromfile(os.path.join(folder, entry["name"]), dtype=np.float32)
            weights[entry["name"]] = data.reshape(entry["rows"], entry["cols"])
        self.model = Decoder(shape, weights)
        tokens = np.fromfile(os.path.join(folder, "tokens"), dtype=np.int32).astype(np.int64)
        self.blocks = torch.from_numpy(tokens).reshape(shape["batches"], -1, shape["sequence"] + 1)
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=others, weight_decay=0.0)],
            lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON, fused=True)
        self.step = 0

    def run(self, steps):
        losses = []
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _ in range(steps):
            block = self.blocks[self.step % len(self.blocks)]
            loss = self.model.loss(block[:, :-1], block[:, 1:])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
        return time.perf_counter() - begin, time.process_time() - cpu_begin, losses


class LowbandSide:
    """The C++ program: writes weights, tokens and `shape.json` into a folder, then runs steps on request."""

    def __init__(self, program, shape, folder):
        width, heads, ffn, sequence = shape
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [program, folder, str(width), str(heads), str(ffn), str(sequence), str(TOKENS_PER_STEP)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{program} did not start")

    def run(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        numbers = [float(x) for x in self.process.stdout.readline().split()]
        return numbers[0], numbers[1], numbers[2:]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(program, shape, rounds, steps):
    with tempfile.TemporaryDirectory() as folder:
        lowband = LowbandSide(program, shape, folder)
        with open(os.path.join(folder, "shape.json")) as file:
            torch_side = TorchSide(json.load(file), folder)
        ours, theirs = lowband.run(10)[2], torch_side.run(10)[2]
        deviation, last_loss = max(abs(a / b - 1) for a, b in zip(ours, theirs)), ours[-1]
        rounds_taken = [(lowband.run(steps)[:2], torch_side.run(steps)[:2]) for _ in range(rounds)]
        lowband.close()

    def rate(side):
        return steps * TOKENS_PER_STEP / statistics.median(r[side][1] for r in rounds_taken)

    ratios = sorted(theirs[1] / ours[1] for ours, theirs in rounds_taken)
    return dict(width=shape[0], heads=shape[1], ffn_width=shape[2], sequence=shape[3],
                lowband_tokens_per_cpu_second=rate(0), torch_tokens_per_cpu_second=rate(1),
                ratio=statistics.median(ratios), ratio_min=ratios[0], ratio_max=ratios[-1],
                wall_ratio=statistics.median(theirs[0] / ours[0] for ours, theirs in rounds_taken),
                loss_deviation=deviation, last_loss=last_loss)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default="build/release/bin/train_step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("--minimum", type=float, default=1.0, help="fail below this ratio")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results = []
    if not arguments.json:
        print(f"torch {torch.__version__}, float32, one thread each, {TOKENS_PER_STEP} tokens per step")
        print("width  heads  ffn  sequence  lowband tok/s  torch tok/s  ratio (min-max)    wall ratio  loss deviation")
    for shape in SHAPES:
        r = compare(arguments.program, shape, arguments.rounds, arguments.steps)
        results.append(r)
        if not arguments.json:
            print(f"{r['width']:5d}  {r['heads']:5d}  {r['ffn_width']:3d}  {r['sequence']:8d}  "
                  f"{r['lowband_tokens_per_cpu_second']:13.0f}  {r['torch_tokens_per_cpu_second']:11.0f}  "
                  f"{r['ratio']:5.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f})  "
                  f"{r['wall_ratio']:10.2f}  {r['loss_deviation']:14.1e}", flush=True)
    if arguments.json:
        print(json.dumps(dict(torch=torch.__version__, results=results)))
    wrong = [r for r in results if not r["loss_deviation"] <= LOSS_TOLERANCE or not math.isfinite(r["last_loss"])]
    slow = [r for r in results if r["ratio"] < arguments.minimum]
    for r in wrong:
        print(f"width {r['width']}, sequence {r['sequence']}: losses differ by {r['loss_deviation']:.1e}, "
              f"expected at most {LOSS_TOLERANCE}", file=sys.stderr)
    for r in slow:
        print(f"width {r['width']}, sequence {r['sequence']}: ratio {r['ratio']:.2f}, "
              f"expected at least {arguments.minimum}", file=sys.stderr)
    return 1 if wrong or slow else 0


if __name__ == "__main__":
    sys.exit(main())
