"""`lowband.torch` under DDP and FSDP2 against `lowband train`: one model, one optimizer, two programs.

The program is LOWBAND_PROGRAM. Everything is float64, so that what differs by more than rounding is a mistake.
"""

import functools
import math
import pathlib
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch
import native_trainer
from fsdp_job import expect_planned_bytes
from torch_job import gloo_events

sys.path.append(str(pathlib.Path(__file__).parents[3] / "plugin" / "example"))
import transformer

STEPS, WARMUP, FINAL_FRACTION, SEQUENCES, LENGTH, SEED, FACTOR_RANK = 50, 5, 0.1, 8, 16, 3, 4
SHAPE = dict(vocabulary=64, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48)
RATE, SCALAR_RATE, WEIGHT_DECAY, CLIP_NORM = 0.02, 0.005, 0.1, 0.8


def config(mesh, tokens):
    fields = lambda values: " ".join(f"{name}: {value}" for name, value in values.items())
    return f"""
        model {{ {fields(SHAPE)} sequence: {LENGTH} }}
        mesh {{ {fields(mesh)} }}
        data {{ train: "{tokens}" }}
        batch {{ sequences_per_step: {SEQUENCES} }}
        optimizer {{ kind: DION learning_rate: {RATE} scalar_learning_rate: {SCALAR_RATE} weight_decay: {WEIGHT_DECAY}
                     clip_norm: {CLIP_NORM} }}
        profile {{ rank: {FACTOR_RANK} }}
        schedule {{ steps: {STEPS} warmup_steps: {WARMUP} final_fraction: {FINAL_FRACTION} }}
        seed: {SEED}"""


def rate_factor(completed):
    if completed < WARMUP:
        return (completed + 1) / WARMUP
    turned = math.cos(math.pi * (completed - WARMUP) / (STEPS - WARMUP))
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + turned) / 2


@functools.cache
def token_file():
    """120 blocks, so that 50 steps of 8 are three epochs and a part."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(SHAPE["vocabulary"], (120 * LENGTH + 1,), generator=draw)
    for i in range(1, len(tokens)):
        if i % 3:
            tokens[i] = (5 * tokens[i - 1] + 3) % SHAPE["vocabulary"]
    return tokens


@functools.cache
def samples():
    """All of the run, (steps, sequences, LENGTH + 1), in the order in which `lowband train` sees them."""
    numbers = range(STEPS * SEQUENCES)
    ordered = torch.stack([native_trainer.sample(token_file(), LENGTH, SEED, number) for number in numbers])
    return ordered.view(STEPS, SEQUENCES, LENGTH + 1)


def by_process_0(compute):
    """What it returns, on all processes."""
    found = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


@functools.cache
def native(**mesh):
    """The run of `lowband train`."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            tokens = pathlib.Path(folder) / "tokens.bin"
            native_trainer.write_tokens(tokens, token_file())
            return native_trainer.train(pathlib.Path(folder) / "job", config(mesh, tokens),
                                        processes=math.prod(mesh.values()))

    return by_process_0(run)


def model_of(weights):
    model = transformer.Transformer(**SHAPE).double()
    missing = model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    assert not missing.missing_keys and not missing.unexpected_keys
    return model


def optimizer_of(model, **options):
    """Names, too, are those of `lowband train`: the first Q of a matrix is drawn by its name."""
    groups = [{**group, "params": [("model." + name.removeprefix("module."), p) for name, p in group["params"]]}
              for group in transformer.groups(model)]
    optimizer = lowband.torch.Optimizer(groups, lr=SCALAR_RATE, profile=lowband.uniform(FACTOR_RANK), seed=SEED,
                                        weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)


def step(model, optimizer, tokens):
    optimizer.zero_grad()
    loss = model(tokens)
    loss.backward()
    optimizer.step()
    return loss


def trained(model, optimizer, scheduler, process, processes):
    """Of every step: the loss of this process's part of the batch, the norm of the gradient, what clipped it."""
    part = SEQUENCES // processes
    found = []
    for tokens in samples():
        loss = step(model, optimizer, tokens[process * part:(process + 1) * part])
        scheduler.step()
        report = optimizer.last_report
        found.append((loss.item(), report.gradient_norm, report.clip_scale))
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def alone(off_by=0.0):
    """One process with all data, its first weights multiplied by 1 + off_by or 1 - off_by."""
    group = dist.new_group([0])
    weights = native(replica=1).weights
    draw = torch.Generator().manual_seed(2)

    def run():
        signs = {name: torch.randn(value.shape, generator=draw).sign().double() for name, value in weights.items()}
        model = model_of({name: value * (1 + off_by * signs[name]) for name, value in weights.items()})
        optimizer, scheduler = optimizer_of(model, process_group=group)
        found = trained(model, optimizer, scheduler, process=0, processes=1)
        optimizer.close()
        return found

    return by_process_0(run)


@functools.cache
def tolerances():
    """How far rounding may carry losses, norms and clip factors in 50 steps.

    A step rounds gradients by at most 128 eps of what they sum, the tokens of a batch; 50 steps by 1.4e-12. What becomes
    of that in later steps, whose orthonormal factors amplify it, shows a run that begins with weights off by 2e-12 of
    themselves. Records have twelve digits, of numbers below 10.
    """
    off = (alone(2e-12) - alone()).abs().amax(dim=0)
    assert off.max() < 1e-9, f"found a trajectory that amplifies 2e-12 to {off.tolist()}, expected a stable one"
    return off + 5e-12


def expect_run(found, run):
    columns = ("loss", "gradient_norm", "clip_scale")
    expected = torch.tensor([[line[column] for column in columns] for line in run.steps], dtype=torch.float64)
    expect_trajectory(found, expected)
    clipped = expected[:, 2] < 1
    assert clipped.any() and not clipped.all(), "expected steps with and without clipping"


def expect_trajectory(found, expected):
    differences = (found - expected).abs().amax(dim=0)
    assert (differences <= tolerances()).all(), (differences, tolerances(), found - expected)


def mean_loss(found):
    """Losses are this process's; the rest is equal everywhere."""
    losses = found[:, 0].clone()
    dist.all_reduce(losses)
    return torch.cat([losses[:, None] / dist.get_world_size(), found[:, 1:]], dim=1)


# ---- Tests: every process runs all of them, in this order ----


def test_one_process_loses_what_the_native_trainer_loses():
    run = native(replica=1)
    assert run.steps[-1]["loss"] < 0.75 * run.steps[0]["loss"], "expected a run that learns"
    expect_run(alone(), run)


def test_ddp_loses_what_the_native_trainer_loses():
    processes = dist.get_world_size()
    run = native(replica=processes)
    model = DistributedDataParallel(model_of(run.weights))
    optimizer, scheduler = optimizer_of(model)
    lowband.torch.attach_ddp(model, optimizer)
    found = mean_loss(trained(model, optimizer, scheduler, dist.get_rank(), processes))
    last = run.steps[-1]
    counted = tuple(optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense"))
    assert counted == optimizer.planned_bytes() == (int(last["counted_factor_bytes"]), int(last["counted_dense_bytes"]))
    expect_run(found, run)
    expect_trajectory(found, alone())
    assert gloo_events(lambda: step(model, optimizer, samples()[0])) == [], "expected DDP to send nothing"
    optimizer.close()


def test_fsdp2_loses_what_the_native_trainer_loses():
    run = native(replica=2, shard=2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))["shard"]
    model = model_of(run.weights)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, scheduler = optimizer_of(model)
    found = mean_loss(trained(model, optimizer, scheduler, dist.get_rank(), processes=4))
    expect_planned_bytes(optimizer, replicas=2)
    assert optimizer.planned_bytes()[0] == int(run.steps[-1]["counted_factor_bytes"])
    expect_run(found, run)
    expect_trajectory(found, alone())
    optimizer.close()
