#!/usr/bin/env python3
"""Registers, shared memory and spills of the device's main kernels for sm_90, as `ptxas -v` tells them; needs nvcc, no GPU.

    perf/gpu/kernel_resources.py

Prints a table in Markdown. Blocks: how many of them the registers of a multiprocessor hold (65,536, given out by 8 a thread).
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
# File, options, and of its kernels: pattern of the mangled name, what the table says, threads of a block.
KERNELS = [
    ("model/cuda/half_attention.cu", [], [
        (r"half_attention_kernelILi128E", "attention, 128 columns", 128),
        (r"half_query_gradient_kernelILi128E", "attention, d_q", 128),
        (r"half_key_gradient_kernelILi128E", "attention, d_k and d_v", 128)]),
    ("model/cuda/layers.cu", [], [
        (r"rms_norm_backward_kernelINS_8BFloat16ELi4E", "rms_norm, gradient", 256)]),
    ("runtime/cuda/orthonormalise.cu", [], [(r"eliminate_kernel", "orthonormalise, eliminate", 512)]),
    ("runtime/cuda/kernels.cu", ["--fmad=false"], [(r"adamw_kernelIfE", "AdamW", 256)]),
]


def resources(source, options):
    """(stack, spilled bytes, registers, static shared memory) by mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["nvcc", "-std=c++20", "-O3", "-arch=sm_90", "--expt-relaxed-constexpr", "-I", ROOT, *options, "-Xptxas", "-v",
                               "-cubin", "-o", f"{folder}/kernels.cubin", ROOT / source], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source}: nvcc: code {done.returncode}: {done.stderr[-2000:]}")
    pattern = r"entry function '(\S+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    found = {}
    for name, stack, spilled, registers, rest in re.findall(pattern, done.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = int(stack), int(spilled), int(registers), int(shared.group(1)) if shared else 0
    return found


def main():
    print("| kernel | threads | registers | blocks by registers | static shared B | stack B | spilled B |\n|---|--:|--:|--:|--:|--:|--:|")
    for source, options, kernels in KERNELS:
        found = resources(source, options)
        for pattern, what, threads in kernels:
            matches = [numbers for name, numbers in found.items() if re.search(pattern, name)]
            if len(matches) != 1:
                sys.exit(f"{source}: found {len(matches)} kernels that match {pattern}, expected 1")
            stack, spilled, registers, shared = matches[0]
            blocks = min(65536 // ((registers + 7) // 8 * 8 * threads), 2048 // threads)
            print(f"| {what} | {threads} | {registers} | {blocks} | {shared} | {stack} | {spilled} |")


if __name__ == "__main__":
    main()
