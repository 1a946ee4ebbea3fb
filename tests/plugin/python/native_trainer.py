"""`lowband train` as an oracle for a trainer of torch: what it began with, in which order it saw its data, what it lost.

The program is LOWBAND_PROGRAM.
"""

import dataclasses
import json
import os
import pathlib
import struct
import subprocess

import torch


@dataclasses.dataclass(frozen=True)
class Run:
    weights: dict[str, torch.Tensor]  # before the first step, float64, by name
    steps: list[dict]                 # of the run record


def write_tokens(path, tokens):
    """A shard of tokens as `lowband train` reads them. Shapes: tokens is (count), integers."""
    header = torch.zeros(256, dtype=torch.int32)
    header[:3] = torch.tensor([20240520, 1, len(tokens)])
    path.write_bytes(header.numpy().tobytes() + tokens.to(torch.uint16).numpy().tobytes())


def train(folder, config, processes):
    """Runs `config` in float64, its processes as threads of one, and records its first weights."""
    folder.mkdir()
    text = f"""{config} precision: F64 threads: 1 output_dir: "{folder}" name: "run"
               dump {{ folder: "{folder / 'recording'}" steps: 1 }}"""
    (folder / "run.txtpb").write_text(text)
    command = [os.environ["LOWBAND_PROGRAM"], "train", str(folder / "run.txtpb"), "--backend", "local",
               "--threads-as-processes", str(processes)]
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}  # torchrun's, not this job's
    done = subprocess.run(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (folder / "run" / "run.jsonl").read_text().splitlines()]
    return Run(read_float64(folder / "recording" / "weights.safetensors"), [line["step"] for line in lines if "step" in line])


def read_float64(path):
    """Tensors of a safetensors file: the length of a JSON header as 8 bytes, the header, the elements."""
    content = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", content[:8])
    tensors = {}
    for name, entry in json.loads(content[8:8 + length]).items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "F64", entry
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(bytearray(content[begin:end]), dtype=torch.float64).reshape(entry["shape"])
    return tensors


# ---- The order of the data: a permutation of blocks that is a pure function of (seed, epoch) ----

_WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011)."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(right >> 32) ^ counter[1] ^ key[0], right & _WORD, (left >> 32) ^ counter[3] ^ key[1], left & _WORD]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return counter


def permuted(index, extent, seed, epoch):
    """Eight rounds of a Feistel network over the next power of four, walked until the result is within `extent`."""
    name = 0xCBF29CE484222325  # FNV-1a of the stream's name and the seed's eight bytes
    for byte in b"data.order" + seed.to_bytes(8, "little"):
        name = ((name ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    half_bits = ((extent - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for counter in range(8):
            word = philox([(right << 3 | counter) & _WORD, 0, epoch, 0], [name & _WORD, name >> 32])
            left, right = right, left ^ (word[1] & mask)
        index = left << half_bits | right
        if index < extent:
            return index


def sample(tokens, sequence, seed, number):
    """Sample `number` of a run, (sequence + 1): the tokens, each beside its target."""
    blocks = (len(tokens) - 1) // sequence
    begin = sequence * permuted(number % blocks, blocks, seed, number // blocks)
    return tokens[begin:begin + sequence + 1]
