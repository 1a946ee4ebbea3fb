"""What `lowband.torch` promises, on the two processes of torchrun: with real torch, gloo and DDP."""

import contextlib
import copy
import dataclasses
import io
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch

BATCH, INPUTS, HIDDEN, OUTPUTS = 16, 12, 24, 24
RANK = 3
# r (m + n) of the two matrices; elements of the two biases.
FACTOR_BYTES = 4 * (RANK * (HIDDEN + INPUTS) + RANK * (OUTPUTS + HIDDEN))
DENSE_BYTES = 4 * (HIDDEN + OUTPUTS)


def network(dtype=torch.float32):
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)).to(dtype)


def batch(step, process=None):
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if process is None else process))
    x = torch.randn(BATCH, INPUTS, generator=generator)
    return x, x @ torch.linspace(-0.5, 0.5, INPUTS * OUTPUTS).view(INPUTS, OUTPUTS)


def loss_of(model, step, process=None):
    dtype = next(model.parameters()).dtype
    x, y = (value.to(dtype) for value in batch(step, process))
    return torch.nn.functional.mse_loss(model(x), y)


def train(model, optimizer, steps, begin=0, loss_scale=1.0):
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        (loss_scale * loss_of(model, step)).backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expect_equal_replicas(model):
    own = flat(model)
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, own)
    assert all(torch.equal(own, other) for other in everybody), "replicas differ"


def expect_close(found, expected, tolerance):
    distance = (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()
    assert distance <= tolerance, f"relative distance {distance:.2e}, tolerance {tolerance:.2e}"


def expect_same_trajectory(found, expected):
    """Of weights after up to 50 steps in float64, ours from weights that begin `off_by` of themselves away.

    A step rounds gradients by at most 32 eps of what they sum, the rows of two processes; 50 steps by 3.6e-13. What
    becomes of that in later steps shows a run that begins 5e-13 away.
    """
    weights = found(0.0)
    changed = (found(5e-13) - weights).norm() / weights.norm()
    assert changed < 1e-9, f"found a trajectory that amplifies 5e-13 to {changed:.2e}, expected a stable one"
    expect_close(weights, expected, changed.item())


def moved(model, off_by):
    """`model`, its weights multiplied by 1 + off_by or 1 - off_by."""
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + off_by * torch.randn(parameter.shape, generator=draw).sign().to(parameter.dtype))
    return model


def expect_refused(message, action):
    try:
        action()
    except lowband.InvalidArgument as error:
        for part in message:
            assert part in str(error), f"found {error}, expected it to say {part}"
    else:
        raise AssertionError(f"expected {message}, found no error")


def gloo_events(action):
    """Names of the collectives that torch runs meanwhile, DDP's own in C++ included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return [event.name for event in profile.events() if event.name.startswith("gloo:")]


# ---- Tests: every process runs all of them, in this order ----


def test_ddp_sends_nothing_but_factors():
    model = DistributedDataParallel(network())
    plain = DistributedDataParallel(network())
    optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(RANK))
    lowband.torch.attach_ddp(model, optimizer)
    assert optimizer.planned_bytes() == (FACTOR_BYTES, DENSE_BYTES), optimizer.planned_bytes()
    train(model, optimizer, 2)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.0), 2)  # DDP builds its buckets anew after a step
    assert gloo_events(lambda: train(plain, torch.optim.SGD(plain.parameters(), lr=0.0), 1)) == ["gloo:all_reduce"]
    assert gloo_events(lambda: train(model, optimizer, 1, begin=2)) == []
    before = loss_of(model.module, 999, process=0).item()
    for step in range(3, 50):
        train(model, optimizer, 1, begin=step)
        assert optimizer.step_bytes("factor", "replica").payload_bytes == FACTOR_BYTES
        assert optimizer.step_bytes("dense", "replica").payload_bytes == DENSE_BYTES
    after = loss_of(model.module, 999, process=0).item()  # of data that nobody has seen
    assert after < 0.7 * before, (before, after)
    expect_equal_replicas(model)
    optimizer.close()


def test_overlap_gives_the_same_weights():
    weights = []
    for overlap in (False, True):
        model = DistributedDataParallel(network(), bucket_cap_mb=0.001)
        optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, kind="power_sgd", overlap=overlap,
                                            bucket_elements=100, profile=lowband.uniform(RANK))
        lowband.torch.attach_ddp(model, optimizer)
        train(model, optimizer, 10)
        expect_equal_replicas(model)
        weights.append(flat(model))
        optimizer.close()
    # Without clipping the exchanges of buckets do not depend on each other; exact sums give the same bits.
    assert torch.equal(*weights)


def test_follows_the_power_sgd_hook_of_ddp():
    # The hook reduces densely before step 2, and keeps what the mean lost: lowband starts there, aggregated.
    hooked = DistributedDataParallel(network(torch.float64), bucket_cap_mb=25)
    state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=RANK, start_powerSGD_iter=2,
                                        min_compression_rate=1, orthogonalization_epsilon=0)
    hooked.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    sgd = torch.optim.SGD(hooked.parameters(), lr=0.1)
    train(hooked, sgd, 2)
    begin = copy.deepcopy(hooked.module.state_dict())

    # The hook orthogonalises its first Q, of each shape, before any P.
    drawn = {}
    original = powerSGD_hook._orthogonalize

    def spy(matrices, epsilon=0):
        original(matrices, epsilon)
        drawn.setdefault(matrices.shape[1], matrices[0].clone())

    powerSGD_hook._orthogonalize = spy
    try:
        train(hooked, sgd, 1, begin=2)
    finally:
        powerSGD_hook._orthogonalize = original
    train(hooked, sgd, 47, begin=3)

    def ours(off_by):
        model = network(torch.float64)
        model.load_state_dict(begin)
        moved(model, off_by)
        # W <- W - eta (D + U) with U = D where there is no momentum (PowerSGD, algorithm 2): half the rate is SGD's.
        optimizer = lowband.torch.Optimizer(
            [{"params": [model[0].weight, model[2].weight], "lr": 0.05},
             {"params": [model[0].bias, model[2].bias], "lr": 0.1}],
            kind="power_sgd", profile=lowband.uniform(RANK), power_sgd_momentum=0.0, scalar_kind="sgd", sgd_momentum=0.0,
            weight_decay=0.0, aggregated_residual=True)
        for weight in (model[0].weight, model[2].weight):
            optimizer.state[weight]["Q"].copy_(drawn[weight.shape[1]])
        train(model, optimizer, 48, begin=2)
        optimizer.close()
        return flat(model)

    expect_same_trajectory(ours, flat(hooked.module))


def test_adamw_is_that_of_torch_under_ddp():
    settings = dict(lr=0.01, weight_decay=0.1)
    reference = DistributedDataParallel(network(torch.float64))

    def groups(module):  # the first matrix as an embedding that does not decay
        biases = [p for p in module.parameters() if p.ndim == 1]
        return [{"params": [module[2].weight]},
                {"params": [module[0].weight], "role": "embedding", "weight_decay": 0.0},
                {"params": biases, "weight_decay": 0.0}]

    train(reference, torch.optim.AdamW(groups(reference.module), betas=(0.9, 0.95), **settings), 50)

    def ours(off_by):
        model = moved(network(torch.float64), off_by)
        optimizer = lowband.torch.Optimizer(groups(model), kind="adamw", **settings)
        train(model, optimizer, 50)
        assert optimizer.planned_bytes() == (0, 8 * flat(model).numel())
        optimizer.close()
        return flat(model)

    expect_same_trajectory(ours, flat(reference.module))


def test_muon_is_that_of_torch_under_ddp():
    # torch takes the momentum as a mean, which is 0.05 times lowband's sum; the sign of both is the same, whatever the
    # scale of the loss. With a large one the 1e-7 that lowband adds to a norm is less than rounding. torch rounds the
    # iteration to bfloat16, in a copy; the mathematics is compared in double.
    loss_scale = 2.0**24
    rounds = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda tensor: tensor.clone()
    try:
        for scale, adjusted, nesterov in (("shape", "original", False), ("adam_rms", "match_rms_adamw", True)):
            reference = DistributedDataParallel(network(torch.float64))
            matrices, biases = ([p for p in reference.parameters() if p.ndim == ndim] for ndim in (2, 1))
            muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov,
                                    adjust_lr_fn=adjusted)
            adamw = torch.optim.AdamW(biases, lr=0.005, betas=(0.9, 0.95), weight_decay=0.0)
            for step in range(50):
                reference.zero_grad()
                (loss_scale * loss_of(reference, step)).backward()
                muon.step()
                adamw.step()

            def ours(off_by):
                model = DistributedDataParallel(moved(network(torch.float64), off_by))
                matrices, biases = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
                optimizer = lowband.torch.Optimizer([{"params": matrices, "lr": 0.02}, {"params": biases, "lr": 0.005}],
                                                    kind="muon", weight_decay=0.1, mu=0.95, sign="newton_schulz_5",
                                                    update_scale=scale, nesterov=nesterov)
                lowband.torch.attach_ddp(model, optimizer)
                train(model, optimizer, 50, loss_scale=loss_scale)
                assert optimizer.planned_bytes() == (0, 8 * flat(model).numel())
                optimizer.close()
                return flat(model)

            expect_same_trajectory(ours, flat(reference.module))
    finally:
        torch.Tensor.bfloat16 = rounds


def test_every_mesh_takes_the_steps_of_one_process_with_all_data():
    processes = dist.get_world_size()
    settings = dict(lr=0.02, profile=lowband.uniform(RANK), aggregated_residual=True)
    alone = network()
    group = [dist.new_group([p]) for p in range(processes)][dist.get_rank()]
    optimizer = lowband.torch.Optimizer(alone.parameters(), process_group=group, **settings)
    for step in range(50):
        optimizer.zero_grad()
        sum(loss_of(alone, step, p) for p in range(processes)).div(processes).backward()
        optimizer.step()
    optimizer.close()

    for mesh in (lowband.Mesh(), lowband.Mesh(shard=2), lowband.Mesh(replica=1, shard=processes)):
        model = DistributedDataParallel(network())
        optimizer = lowband.torch.Optimizer(model.parameters(), mesh=mesh, **settings)
        lowband.torch.attach_ddp(model, optimizer)
        train(model, optimizer, 50)
        expect_close(flat(model), flat(alone), 1e-4)
        expect_equal_replicas(model)
        # Planned are the bytes of one replica, whose shards send one piece each.
        counted = torch.tensor([optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
        dist.all_reduce(counted)
        replicas = processes // mesh.shard
        assert counted.tolist() == [replicas * planned for planned in optimizer.planned_bytes()], (mesh, counted)
        optimizer.close()


def test_no_sync_accumulates():
    # Two micro-batches of half the loss are one batch of both.
    def accumulated(model, optimizer, sync):
        for step in range(0, 20, 2):
            optimizer.zero_grad()
            with sync():
                (loss_of(model, step) / 2).backward()
            (loss_of(model, step + 1) / 2).backward()
            optimizer.step()

    model = DistributedDataParallel(network())
    optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(RANK))
    lowband.torch.attach_ddp(model, optimizer)
    accumulated(model, optimizer, model.no_sync)
    bare = network()
    bare_optimizer = lowband.torch.Optimizer(bare.parameters(), lr=0.02, profile=lowband.uniform(RANK))
    accumulated(bare, bare_optimizer, contextlib.nullcontext)
    assert torch.equal(flat(model.module), flat(bare))
    expect_equal_replicas(model)
    optimizer.close()
    bare_optimizer.close()


def test_state_dict_goes_on_bit_by_bit_and_belongs_to_its_process():
    model = network()
    make = lambda module: lowband.torch.Optimizer(module.named_parameters(), lr=0.02, profile=lowband.uniform(RANK))
    optimizer = make(model)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, begin=5)
    optimizer.close()

    file.seek(0)
    saved = torch.load(file)  # weights_only: nothing but tensors and plain values is in it
    assert sorted(saved["optimizer"]["state"][0]) == ["M", "Q"]
    resumed = network()
    resumed.load_state_dict(saved["model"])
    optimizer = make(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 5, begin=5)
    assert torch.equal(flat(resumed), flat(model))
    assert optimizer.state_dict()["lowband"]["steps"] == 10

    before = flat(resumed).clone()
    other = copy.deepcopy(saved["optimizer"])
    other["lowband"]["process"] = 1 - other["lowband"]["process"]
    expect_refused(["state_dict, process: found", "expected"], lambda: optimizer.load_state_dict(other))
    other = copy.deepcopy(saved["optimizer"])
    other["state"][0]["M"] = other["state"][0]["M"][1:]
    expect_refused(["shape of 0.weight.M", f"expected ({HIDDEN}, {INPUTS})"], lambda: optimizer.load_state_dict(other))
    other = copy.deepcopy(saved["optimizer"])
    del other["state"][2]
    expect_refused(["state of 2.weight: found [], expected ['M', 'Q']"], lambda: optimizer.load_state_dict(other))
    other = copy.deepcopy(saved["optimizer"])
    other["lowband"]["names"].remove("0.bias")
    expect_refused(["state_dict, names: found 2.weight as parameter 1, expected 0.bias"],
                   lambda: optimizer.load_state_dict(other))
    other = copy.deepcopy(saved["optimizer"])
    other["lowband"]["names"].append("4.weight")
    expect_refused(["state_dict, names: found 4.weight as parameter 4, expected nothing"],
                   lambda: optimizer.load_state_dict(other))
    for field, value in dict(profile=dataclasses.asdict(lowband.uniform(RANK + 1)), kind="adamw", dtype="float64").items():
        other = copy.deepcopy(saved["optimizer"])
        other["lowband"]["options"][field] = value
        expect_refused([f"state_dict, {field}: found {value}, expected {saved['optimizer']['lowband']['options'][field]}"],
                       lambda: optimizer.load_state_dict(other))
    adam = torch.optim.AdamW(network().parameters())
    expect_refused(["found none of lowband's"], lambda: optimizer.load_state_dict(adam.state_dict()))
    assert torch.equal(flat(resumed), before)
    optimizer.close()


def test_blocks_are_parameters_of_their_own():
    heads, head_dim, ffn, width = 4, 3, 10, 12
    # What a fused parameter is called: its blocks, the dimension they cut, and the lines of each in turn.
    layouts = {
        "interleaved": ((2, [("query", 2 * head_dim), ("key", head_dim), ("value", head_dim)]), "rows"),
        "in_proj_weight": ((1, [("query", width), ("key", width), ("value", width)]), "rows"),
        "gate_up": ((1, [("gate", ffn), ("up", ffn)]), "rows"),
        "out_proj": ((1, [("output", head_dim)] * heads), "cols"),
    }

    def whole(name):
        (turns, blocks), of = layouts[name]
        lines = turns * sum(count for _, count in blocks)
        shape = (lines, width) if of == "rows" else (width, lines)
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))

    def parts(name, tensor):
        """Its blocks, each of all turns."""
        (turns, blocks), of = layouts[name]
        dimension = 0 if of == "rows" else 1
        of_turns = [turn.split([count for _, count in blocks], dimension) for turn in tensor.chunk(turns, dimension)]
        return [torch.cat(same, dimension) for same in zip(*of_turns)]

    def groups(fused):
        for name, ((_, blocks), of) in layouts.items():
            if fused:
                yield {"params": [(name, torch.nn.Parameter(whole(name)))], "blocks_of": of,
                       "blocks": [lowband.Block(*block) for block in blocks]}
            else:
                for i, ((role, _), part) in enumerate(zip(blocks, parts(name, whole(name)))):
                    yield {"params": [(f"{name}[{i}]", torch.nn.Parameter(part.clone()))], "role": role}

    def trained(fused, steps=3, loaded=None, **options):
        optimizer = lowband.torch.Optimizer(groups(fused), lr=0.02, **options)
        named = dict(zip(optimizer._names, optimizer._parameters))
        if loaded is not None:
            for name, parameter in named.items():
                parameter.data.copy_(loaded["weights"][name])
            optimizer.load_state_dict(loaded["optimizer"])
        for step in range(optimizer._steps, optimizer._steps + steps):
            for name in layouts:
                draw = torch.Generator().manual_seed(100 * len(name) + 10 * step + dist.get_rank())
                gradient = torch.randn(whole(name).shape, generator=draw)
                if fused:
                    named[name].grad = gradient
                else:
                    for i, part in enumerate(parts(name, gradient)):
                        named[f"{name}[{i}]"].grad = part
            optimizer.step()
        planned = optimizer.planned_bytes()
        saved = copy.deepcopy({"weights": {name: p.detach() for name, p in named.items()}, "optimizer": optimizer.state_dict()})
        optimizer.close()
        if fused:
            return {name: parts(name, p.detach()) for name, p in named.items()}, planned, saved
        return {name: [p.detach() for other, p in named.items() if other.startswith(name)] for name in layouts}, planned, saved

    head_ranks = lowband.structural(width=8, head_dim=1)  # 8 for gate and up, 4 for query, key and output, 1 for value
    for options in (dict(kind="dion", profile=head_ranks), dict(kind="power_sgd", profile=lowband.uniform(2)), dict(kind="muon")):
        (expected, bytes_of_parts, _), (found, planned, _) = (trained(fused, **options) for fused in (False, True))
        assert planned == bytes_of_parts, (options, planned, bytes_of_parts)
        for name in layouts:
            for i, (one, other) in enumerate(zip(found[name], expected[name], strict=True)):
                assert torch.equal(one, other), (options, name, i)

    # The state of a block is saved and goes on, under its letter and number.
    options = dict(kind="dion", profile=lowband.explicit(
        {f"{name}[{i}]": 2 + i % 2 for name, ((_, blocks), _) in layouts.items() for i in range(len(blocks))}))
    _, _, saved = trained(True, **options)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file)
    assert sorted(saved["optimizer"]["state"][2]) == ["M[0]", "M[1]", "Q[0]", "Q[1]"]
    assert saved["optimizer"]["state"][2]["Q[1]"].shape == (ffn, 3)
    resumed, straight = trained(True, loaded=saved, **options)[0], trained(True, steps=6, **options)[0]
    assert all(torch.equal(*pair) for name in layouts for pair in zip(resumed[name], straight[name]))

    # As they are, or an error that says what is wrong with them.
    matrix = lambda: [("w", torch.nn.Parameter(torch.ones(12, 4)))]
    rank1 = lowband.uniform(1)

    def refused(message, blocks, params=None, of="rows", **options):
        group = {"params": params or matrix(), "blocks": blocks, "blocks_of": of}
        expect_refused([message], lambda: lowband.torch.Optimizer([group], **dict(profile=rank1) | options))

    pair = [lowband.Block("gate", 6), lowband.Block("up", 6)]
    refused("blocks: found 3, expected a list of lowband.Block", 3)
    refused("blocks: found [('gate',)], expected a list of lowband.Block", [("gate",)])
    refused("blocks: found [('gate', 6.0)], expected a list of lowband.Block", [("gate", 6.0)])
    refused("role of w[1]: found 'upper', expected one of query", [lowband.Block("gate", 6), lowband.Block("upper", 6)])
    refused("blocks[0].role: found embedding, expected 0 (query) .. 7 (matrix)", [lowband.Block("embedding", 12)])
    refused("w.blocks[0].lines: found 0, expected at least 1", [lowband.Block("gate", 0)])
    refused("w.blocks: found 7 lines in all, expected 12 rows or a divisor of it", [lowband.Block("gate", 7)])
    refused("w.blocks: found 12 lines in all, expected 4 columns or a divisor of it", pair, of="cols")
    refused("blocks_of of w: found 'columns', expected one of rows, cols", pair, of="columns")
    refused("w.blocks: found 2 of a parameter that is no matrix, expected none", pair,
            params=[("w", torch.nn.Parameter(torch.ones(12)))])
    refused("blocks of w: found 2, expected none of what is updated element by element", pair, kind="adamw", profile=None)
    refused("profile.ranks: found w, expected names of matrices", pair, profile=lowband.explicit({"w": 1}))
    optimizer = lowband.torch.Optimizer([{"params": matrix(), "blocks": pair}], profile=rank1)
    other = copy.deepcopy(optimizer.state_dict())
    other["lowband"]["blocks"]["w"].reverse()
    expect_refused(["state_dict, blocks: found {'w': [('up', 6)"], lambda: optimizer.load_state_dict(other))
    optimizer.close()


def test_is_an_optimizer_of_torch():
    model = network()
    optimizer = lowband.torch.Optimizer(
        [{"params": [model[0].weight, model[2].weight], "lr": 0.02},
         {"params": [model[0].bias, model[2].bias], "lr": 0.005}], profile=lowband.uniform(RANK))
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("pre"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert isinstance(first, torch.Tensor) and hooks == ["pre", "post"]
    before = flat(model).clone()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0025]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure)
    assert torch.equal(flat(model), before), "the rate of a group is read at every step"
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()  # without any gradient: zeros, as on a process whose experts saw no token
    optimizer.zero_grad(set_to_none=False)
    expect_refused(["add_param_group", "expected all groups at its construction"],
                   lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}))
    optimizer.param_groups[1]["lr"] = torch.tensor(0.03)
    optimizer.step(closure)
    optimizer.close()


def test_grad_scaler_takes_the_scale_out_and_leaves_skipping_to_everybody():
    weights = []
    for scaled in (False, True):
        model = network()
        optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(RANK))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for step in range(10):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(flat(model))
        if scaled:  # one process alone finds an infinity
            optimizer.zero_grad()
            scaler.scale(loss_of(model, 10)).backward()
            if dist.get_rank() == 1:
                model[0].weight.grad[0, 0] = float("inf")
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(model[0].weight, before) and optimizer.last_report.skipped_matrices == 1
            expect_equal_replicas(model)
        optimizer.close()
    assert torch.equal(*weights)  # a power of two changes no digits


def test_autocast_keeps_float32_weights():
    # Rounding to bfloat16 is 2^-9 of activations and gradients; 50 steps go the same way as without it.
    losses = []
    for enabled in (False, True):
        model = DistributedDataParallel(network())
        optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(RANK))
        lowband.torch.attach_ddp(model, optimizer)
        for step in range(50):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                x, y = batch(step)
                output = model(x)
            assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
            torch.nn.functional.mse_loss(output.float(), y).backward()
            assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
            optimizer.step()
            assert optimizer.step_bytes("factor", "replica").payload_bytes == FACTOR_BYTES
        losses.append(loss_of(model.module, 999, process=0).item())
        expect_equal_replicas(model)
        optimizer.close()
    before = loss_of(network(), 999, process=0).item()
    assert max(losses) < 0.7 * before and abs(losses[1] / losses[0] - 1) < 50 * 2**-9, (before, losses)


def test_what_differs_between_processes_is_refused_by_all():
    model = network()
    optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(RANK))
    train(model, optimizer, 1)
    before = flat(model).clone()
    for rate, found in ((float("nan"), "found nan, expected 0 or more"), (0.01, "found 0.01; expected, as on process 0, 0.02")):
        optimizer.param_groups[0]["lr"] = rate if dist.get_rank() == 1 else 0.02
        expect_refused(["[process 1 of 2] info.learning_rate: " + found], lambda: train(model, optimizer, 1, begin=1))
    assert torch.equal(flat(model), before)
    optimizer.param_groups[0]["lr"] = 0.02
    train(model, optimizer, 1, begin=1)
    expect_equal_replicas(model)
    optimizer.close()


def test_clips_by_the_norm_of_the_mean_gradient():
    model = network()
    optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.0, kind="adamw", clip_norm=1e-3)
    loss_of(model, 0).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    dist.all_reduce(gradient)
    expected = (gradient / dist.get_world_size()).norm().item()
    optimizer.step()
    assert abs(optimizer.last_report.gradient_norm / expected - 1) < 1e-6
    assert abs(optimizer.last_report.clip_scale / (1e-3 / expected) - 1) < 1e-6
    optimizer.close()


def test_refuses_what_it_cannot_do():
    make = lowband.torch.Optimizer
    matrix = lambda dtype=torch.float32: [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype))]
    rank2 = lowband.uniform(2)
    expect_refused(["dtype of param0: found torch.bfloat16"], lambda: make(matrix(torch.bfloat16), profile=rank2))
    expect_refused(["dtype of param1: found torch.float64"], lambda: make(matrix() + matrix(torch.float64), profile=rank2))
    expect_refused(["device of param0: found meta", "expected cpu or a CUDA device"],
                   lambda: make([torch.nn.Parameter(torch.ones(4, 3, device="meta"))], profile=rank2))
    expect_refused(["strides of param0"], lambda: make([torch.nn.Parameter(torch.ones(3, 4).t())], profile=rank2))
    expect_refused(["mesh.tensor: found 2"], lambda: make(matrix(), profile=rank2, mesh=lowband.Mesh(tensor=2)))
    expect_refused(["momentum: found it as an argument"], lambda: make(matrix(), profile=rank2, momentum=0.9))
    expect_refused(["weight_decay: found [0.1, 0.2]"],
                   lambda: make([{"params": matrix(), "weight_decay": 0.1}, {"params": matrix(), "weight_decay": 0.2}],
                                profile=rank2))
    expect_refused(["role: found query"],
                   lambda: make([{"params": [torch.nn.Parameter(torch.ones(3))], "role": "query"}], profile=rank2))

    def on_everybody(message, **options):
        """Found by lowband, after processes have met; the next one works all the same."""
        expect_refused(message, lambda: make(matrix(), **options))

    on_everybody(["profile: found None with kind dion"])
    on_everybody(["found 4", "min(m, n) = 3 of param0"], profile=lowband.uniform(4))
    on_everybody(["kind: found 'adam', expected one of dion"], kind="adam", profile=rank2)
    on_everybody(["mesh: found", "2 processes"], profile=rank2, mesh=lowband.Mesh(replica=3))
    on_everybody(["profile.ranks: found nobody"], profile=lowband.explicit({"nobody": 1}))
    try:
        make(matrix(), profile=rank2, budget=55)
        raise AssertionError("expected a refusal")
    except lowband.BudgetExceeded as error:
        assert "found a plan of 56 bytes" in str(error) and "at most 55" in str(error), error

    unequal = [torch.nn.Parameter(torch.ones(4, 3 + dist.get_rank()))]
    expect_refused(["[process 1 of 2] found parameters[0] param0: matrix, 4 x 4", "as on process 0"],
                   lambda: make(unequal, profile=rank2))

    model = DistributedDataParallel(network())
    optimizer = make(model.module[0].parameters(), profile=rank2)
    expect_refused(["model: found 2.weight in no group"], lambda: lowband.torch.attach_ddp(model, optimizer))
    expect_refused(["model: found Sequential"], lambda: lowband.torch.attach_ddp(model.module, optimizer))
    rates = make([{"params": matrix(), "lr": 0.1}, {"params": matrix(), "lr": 0.2}], profile=rank2)
    expect_refused(["lr: found 0.1 and 0.2 in groups of matrices"], rates.step)
    optimizer.close()
    rates.close()


def main(tests):
    torch.set_num_threads(1)
    lowband.set_compute_threads(1)
    dist.init_process_group("gloo")
    chosen = sys.argv[1:] or [name for name in tests if name.startswith("test_")]
    for name in chosen:
        try:
            tests[name]()
        except BaseException:
            print(f"[process {dist.get_rank()}] {name} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise
        if dist.get_rank() == 0:
            print(f"{name}: ok", flush=True)
    dist.destroy_process_group()
