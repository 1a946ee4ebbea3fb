#!/usr/bin/env python3
"""Flops and least bytes of every kernel in a training step of the model of 166 million parameters (model_bench).

    perf/gpu/model_costs.py [--sequences 4] [--check FILE]

Prints a table in Markdown. --check: exit code 1 unless FILE holds it between its two marks, with the command to write it.

Bytes: what a kernel has to read and write once, had it unlimited caches. Least time: the larger of flops over the
tensor cores' rate (products) and bytes over the memory's, both from the data sheet of an H200 (SXM).
"""

import argparse
import pathlib
import sys

VOCABULARY, WIDTH, LAYERS, HEADS, HEAD_DIM, FFN, SEQUENCE = 50257, 768, 18, 6, 128, 2048, 1024
QKV, GATE_UP = 3 * WIDTH, 2 * FFN  # heads * head_dim = width
IN_PRODUCTS = LAYERS * (QKV * WIDTH + WIDTH * WIDTH + 3 * FFN * WIDTH) + VOCABULARY * WIDTH
PARAMETERS = IN_PRODUCTS + (2 * LAYERS + 1) * WIDTH  # the head is the embedding
HALF, FLOAT = 2, 4  # bytes
DENSE_HALF_FLOPS, MEMORY_BYTES = 989.4e12, 4.8e12  # a second, NVIDIA H200 data sheet
MARKS = "<!-- perf/gpu/model_costs.py -->", "<!-- end -->"


def pairs(sequences):
    """Scores of one layer's causal attention."""
    return sequences * HEADS * SEQUENCE * (SEQUENCE + 1) // 2


def model_flops(sequences):
    """What the loss and its gradient need at least: 6 for each weight in a product and token, 12 for each score and
    column of a head; nothing that is computed again."""
    return 6 * IN_PRODUCTS * sequences * SEQUENCE + 12 * LAYERS * pairs(sequences) * HEAD_DIM


def product(m, n, k, out_bytes, reads_out=False):
    """C (m, n) from A (m, k) and B (k, n) in bf16."""
    return 2 * m * n * k, HALF * (m * k + k * n) + out_bytes * m * n * (2 if reads_out else 1)


def kernels(sequences):
    """(name, launches in a step, flops of one, bytes of one)"""
    n, w, scores = sequences * SEQUENCE, WIDTH, pairs(sequences) * HEAD_DIM
    norms = 2 * LAYERS + 1
    statistics = 2 * FLOAT * n * HEADS
    rows = [("zero gradients", 1, 0, FLOAT * PARAMETERS), ("round weights", 1, 0, (FLOAT + HALF) * PARAMETERS)]
    rows.append(("embed", 1, 0, n * (4 + 2 * FLOAT * w)))
    rows.append(("rms_norm", norms, 4 * n * w, n * (FLOAT * w + HALF * w + FLOAT)))

    def linear(name, outputs, inputs, into_stream=False, times=LAYERS, out_bytes=HALF):
        """The three products of y = x W^T, the gradient of x in float where a norm takes it."""
        rows.append((name, times, *product(n, outputs, inputs, FLOAT if into_stream else out_bytes, into_stream)))
        rows.append((f"{name}, d_x", times, *product(n, inputs, outputs, HALF if into_stream else FLOAT)))
        rows.append((f"{name}, d_W", times, *product(outputs, inputs, n, FLOAT, True)))

    linear("q, k, v", QKV, w)
    rows.append(("rotate, both ways", 2 * LAYERS, 3 * n * 2 * w, 2 * HALF * n * 2 * w))
    rows.append(("attention", LAYERS, 4 * scores, HALF * n * (QKV + w) + statistics))
    rows.append(("attention, row products", LAYERS, 2 * n * w, HALF * n * 2 * w + statistics // 2))
    reads = HALF * n * (QKV + w) + statistics * 3 // 2
    rows.append(("attention, d_q", LAYERS, 6 * scores, reads + HALF * n * w))
    rows.append(("attention, d_k and d_v", LAYERS, 8 * scores, reads + HALF * n * 2 * w))
    linear("output", w, w, into_stream=True)
    linear("gate, up", GATE_UP, w)
    rows.append(("swiglu", LAYERS, 5 * n * FFN, HALF * n * 3 * FFN))
    rows.append(("swiglu, gradient", LAYERS, 12 * n * FFN, HALF * n * 5 * FFN))
    linear("down", w, FFN, into_stream=True)
    linear("head", VOCABULARY, w, times=1, out_bytes=FLOAT)
    rows.append(("softmax of logits", 1, 3 * n * VOCABULARY, FLOAT * n * VOCABULARY))
    rows.append(("loss and d_logits", 1, 3 * n * VOCABULARY, (FLOAT + HALF) * n * VOCABULARY))
    rows.append(("rms_norm, gradient", norms, 13 * n * w, n * (4 * FLOAT * w + HALF * w + FLOAT) + FLOAT * w * n // 16))
    rows.append(("rms_norm, gain", norms, w * n // 16, FLOAT * w * (n // 16 + 2)))
    rows.append(("embed, d_W", 1, n * w, n * (4 + 3 * FLOAT * w)))
    rows.append(("AdamW", 1, 12 * PARAMETERS, 7 * FLOAT * PARAMETERS))
    return rows


def is_product(name):
    return name.startswith(("q, k, v", "output", "gate, up", "down", "head")) or (
        name.startswith("attention") and "row" not in name)


def least_seconds(name, flops, size):
    return max(flops / DENSE_HALF_FLOPS if is_product(name) else 0, size / MEMORY_BYTES)


def least_step_seconds(sequences):
    return sum(times * least_seconds(name, flops, size) for name, times, flops, size in kernels(sequences))


def table(sequences):
    rows = kernels(sequences)
    # Products of weights: two flops for each of them and token forward, four backward.
    of_weights = sum(t * f for name, t, f, _ in rows if is_product(name) and not name.startswith("attention"))
    assert of_weights == 6 * IN_PRODUCTS * sequences * SEQUENCE, "the products of weights do not add up"
    out = [f"| {sequences} sequences of {SEQUENCE} tokens | launches | GFLOP | MB | flop/byte | least µs |", "|---|--:|--:|--:|--:|--:|"]
    total = [0, 0, 0, 0.0]
    for name, times, flops, size in rows:
        least = times * least_seconds(name, flops, size) * 1e6
        out.append(f"| {name} | {times} | {times * flops / 1e9:.1f} | {times * size / 1e6:.0f} | {flops / size:.1f} | {least:.0f} |")
        total = [a + b for a, b in zip(total, (times, times * flops, times * size, least))]
    out.append(f"| all | {total[0]} | {total[1] / 1e9:.1f} | {total[2] / 1e6:.0f} | {total[1] / total[2]:.1f} | {total[3]:.0f} |")
    tokens = sequences * SEQUENCE
    out += ["", f"Least: {tokens / total[3] * 1e6:,.0f} tokens/s, {model_flops(sequences) / DENSE_HALF_FLOPS / total[3] * 1e8:.0f} % MFU; the "
            f"loss and its gradient need {model_flops(sequences) / 1e9:.1f} GFLOP, without what backward computes again."]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    text = table(arguments.sequences)
    if arguments.check is None:
        print(text)
        return 0
    if f"{MARKS[0]}\n{text}\n{MARKS[1]}\n" in arguments.check.read_text():
        return 0
    print(f"{arguments.check}: between its marks there is not what {sys.argv[0]} --sequences {arguments.sequences} prints", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
