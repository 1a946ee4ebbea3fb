"""`lowband.torch` with DTensors, on the four processes of torchrun: FSDP2 within a replica, lowband between replicas."""

import contextlib
import random
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lowband
import lowband.checkpoint
import lowband.torch
from lowband.optimizer import StatePiece, StatePlace
from torch_job import (DENSE_BYTES, FACTOR_BYTES, HIDDEN, INPUTS, OUTPUTS, RANK, expect_close, expect_refused, loss_of, network,
                       train)


def meshes(replicas=2):
    return init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replica", "shard"))


def sharded(mesh, module=None):
    module = module if module is not None else network()
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def flat(model):  # of DTensors too
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()])


def expect_equal_everywhere(model):
    own = flat(model)
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, own)
    assert all(torch.equal(own, other) for other in everybody), "replicas differ"


def calls_of_torch(action):
    """Names of the collectives of process groups, FSDP2's included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return {event.name for event in profile.events() if event.name.startswith("c10d::")}


def alone_with_all_data(settings, steps, micro_batches=1):
    """Weights and losses of one process that computes what all compute."""
    processes = dist.get_world_size()
    group = [dist.new_group([p]) for p in range(processes)][dist.get_rank()]
    model = network()
    optimizer = lowband.torch.Optimizer(model.parameters(), process_group=group, **settings)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        parts = [loss_of(model, step * micro_batches + k, p) for k in range(micro_batches) for p in range(processes)]
        loss = sum(parts) / len(parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    return flat(model), torch.tensor(losses)


def expect_planned_bytes(optimizer, replicas):
    counted = torch.tensor([optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
    dist.all_reduce(counted)
    assert counted.tolist() == [replicas * planned for planned in optimizer.planned_bytes()], counted
    assert optimizer.step_bytes("gradient").payload_bytes == 0, "FSDP2 has summed them within the replica"


# ---- Tests: every process runs all of them, in this order ----


def test_two_replicas_of_two_shards_take_the_steps_of_one_process():
    settings = dict(lr=0.02, profile=lowband.uniform(RANK), aggregated_residual=True)
    weights, losses = alone_with_all_data(settings, 50)

    model = sharded(meshes()["shard"])
    optimizer = lowband.torch.Optimizer(model.parameters(), **settings)
    assert (optimizer.exchange.options.mesh.tensor, optimizer.planned_bytes()) == (2, (FACTOR_BYTES, DENSE_BYTES))
    found = []
    for step in range(50):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        expect_planned_bytes(optimizer, replicas=2)
        dist.all_reduce(loss.detach_())
        found.append(loss.item() / dist.get_world_size())
    assert losses[-1] < 0.7 * losses[0], losses
    expect_close(torch.tensor(found), losses, 1e-5)
    expect_close(flat(model), weights, 1e-4)
    expect_equal_everywhere(model)

    # Between replicas torch moves nothing, neither in the backward pass nor in the step; a mesh of two dimensions would.
    within_a_replica = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}
    assert calls_of_torch(lambda: train(model, optimizer, 1, begin=50)) == within_a_replica
    hybrid = sharded(meshes())
    assert calls_of_torch(lambda: loss_of(hybrid, 0).backward()) == within_a_replica | {"c10d::allreduce_"}
    optimizer.close()


def test_every_way_to_divide_four_processes():
    settings = dict(lr=0.02, profile=lowband.uniform(RANK), aggregated_residual=True)
    weights, _ = alone_with_all_data(settings, 20)
    # Replicas of FSDP2, and among them those that lowband's shard axis joins.
    for replicas, shard in ((1, 1), (2, 2), (4, 1)):
        model = sharded(meshes(replicas)["shard"])
        optimizer = lowband.torch.Optimizer(model.parameters(), mesh=lowband.Mesh(shard=shard), **settings)
        train(model, optimizer, 20)
        expect_close(flat(model), weights, 1e-4)
        optimizer.close()


def test_replicas_may_be_any_processes():
    # Shards 0 2 and 1 3: lowband numbers processes by their pieces, not as torch does.
    settings = dict(lr=0.02, kind="power_sgd", profile=lowband.uniform(RANK))
    weights = []
    for dimensions in (("replica", "shard"), ("shard", "replica")):
        model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=dimensions)["shard"])
        optimizer = lowband.torch.Optimizer(model.parameters(), **settings)
        shard = model[0].weight.device_mesh.get_local_rank()
        replica = dist.get_rank() % 2 if dimensions[0] == "shard" else dist.get_rank() // 2
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step, process=2 * replica + shard).backward()
            optimizer.step()
        assert optimizer.world.process == 2 * replica + shard
        weights.append(flat(model))
        optimizer.close()
    assert torch.equal(*weights)


def test_accumulates_without_synchronisation_and_overlaps():
    settings = dict(lr=0.02, profile=lowband.uniform(RANK), aggregated_residual=True, kind="power_sgd")
    weights, _ = alone_with_all_data(settings, 10, micro_batches=2)
    found = []
    for overlap in (False, True):
        model = sharded(meshes()["shard"])
        optimizer = lowband.torch.Optimizer(model.parameters(), overlap=overlap, bucket_elements=100, **settings)
        for step in range(10):
            optimizer.zero_grad()
            for k in range(2):
                model.set_requires_gradient_sync(k == 1)
                (loss_of(model, 2 * step + k) / 2).backward()
                assert len(optimizer._announced) == (4 if overlap and k == 1 else 0)
            optimizer.step()
        expect_close(flat(model), weights, 1e-4)
        found.append(flat(model))
        optimizer.close()
        loss_of(model, 0).backward()  # nobody is told any more
    assert torch.equal(*found)


def test_clips_by_the_norm_of_the_whole_mean_gradient():
    settings = dict(lr=0.02, kind="adamw", clip_norm=1e-2)
    plain = network()
    sum(loss_of(plain, 0, p) for p in range(dist.get_world_size())).div(dist.get_world_size()).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()]).double().norm().item()
    model = sharded(meshes()["shard"])
    optimizer = lowband.torch.Optimizer(model.parameters(), **settings)
    train(model, optimizer, 1)
    assert abs(optimizer.last_report.gradient_norm / expected - 1) < 1e-6, (optimizer.last_report, expected)
    assert abs(optimizer.last_report.clip_scale / (1e-2 / expected) - 1) < 1e-6
    expect_equal_everywhere(model)
    optimizer.close()


def test_columns_and_whole_vectors_as_tensor_parallelism_places_them():
    mesh = meshes()["shard"]
    settings = dict(lr=0.02, profile=lowband.uniform(RANK))
    whole = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(OUTPUTS, generator=torch.Generator().manual_seed(4))
    gradient = lambda like, seed: torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))

    def trained(parameters):
        optimizer = lowband.torch.Optimizer(parameters, **settings)
        replica = optimizer.world.process // optimizer.exchange.options.mesh.tensor
        if not isinstance(parameters[0], DTensor):
            replica = dist.get_rank() // 2
        for step in range(5):
            for i, p in enumerate(parameters):
                full = gradient(p, 10 * step + 2 * replica + i)
                p.grad = distribute_tensor(full, mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else full
            optimizer.step()
        optimizer.close()
        return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters]

    def cut(placement):
        place = lambda value, how: torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [how], src_data_rank=None))
        return [place(whole, placement), place(bias, Replicate())]

    expected = trained([torch.nn.Parameter(whole.clone()), torch.nn.Parameter(bias.clone())])
    for placement in (Shard(0), Shard(1)):
        for found, reference in zip(trained(cut(placement)), expected):
            expect_close(found, reference, 1e-5)


def test_blocks_of_pieces_are_those_of_the_whole():
    mesh = meshes()["shard"]
    blocks = [lowband.Block("query", 4), lowband.Block("key", 2), lowband.Block("value", 3)]  # two turns; halves cut the first
    shape = {"rows": (18, INPUTS), "cols": (INPUTS, 18)}

    def trained(of, placement, kind, **options):
        whole = torch.randn(shape[of], generator=torch.Generator().manual_seed(3))
        value = whole if placement is None else distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        parameter = torch.nn.Parameter(value.clone())
        group = {"params": [("w", parameter)], "blocks": blocks, "blocks_of": of}
        optimizer = lowband.torch.Optimizer([group], lr=0.02, kind=kind, **options)
        for step in range(5):
            full = torch.randn(shape[of], generator=torch.Generator().manual_seed(10 * step + dist.get_rank() // 2))
            parameter.grad = full if placement is None else distribute_tensor(full, mesh, [placement], src_data_rank=None)
            optimizer.step()
        optimizer.close()
        return parameter.detach() if placement is None else parameter.full_tensor().detach()

    for kind, options in {"dion": dict(profile=lowband.structural(width=4, head_dim=1)), "muon": {}}.items():
        for of in shape:
            expected = trained(of, None, kind, **options)
            for placement in (Shard(0), Shard(1)):
                expect_close(trained(of, placement, kind, **options), expected, 1e-5)


@contextlib.contextmanager
def shared_folder():
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        yield folder[0]
        dist.barrier()


def save(folder, model, optimizer):
    dcp.save({"model": get_model_state_dict(model), "optimizer": lowband.checkpoint.State(optimizer)}, checkpoint_id=folder)


def load(folder, model, optimizer, **options):
    state = {"model": get_model_state_dict(model), "optimizer": lowband.checkpoint.State(optimizer, **options)}
    dcp.load(state, checkpoint_id=folder)


def other_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_a_distributed_checkpoint_goes_on_bit_by_bit():
    for kind in ("dion", "power_sgd"):
        make = lambda module: lowband.torch.Optimizer(module.named_parameters(), lr=0.02, kind=kind,
                                                      profile=lowband.uniform(RANK))
        model = sharded(meshes()["shard"])
        optimizer = make(model)
        train(model, optimizer, 5)
        letter = {"dion": "M", "power_sgd": "e"}[kind]
        kept = optimizer.state[model[0].weight][letter].clone()
        with shared_folder() as folder:
            optimizer.param_groups[0]["lr"] = 0.01
            save(folder, model, optimizer)
            train(model, optimizer, 5, begin=5)
            optimizer.close()

            resumed = other_weights(sharded(meshes()["shard"]))
            optimizer = make(resumed)
            load(folder, resumed, optimizer)
            assert torch.equal(optimizer.state[resumed[0].weight][letter], kept), "every replica has its own"
            train(resumed, optimizer, 5, begin=5)
            assert torch.equal(flat(resumed), flat(model))
            assert optimizer.param_groups[0]["lr"] == 0.01
            assert optimizer.state_dict()["lowband"]["steps"] == 10
            files = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            assert tuple(files[f"optimizer.state.0.weight.{letter}"].size) == (2, HIDDEN, INPUTS)
            assert tuple(files["optimizer.state.0.weight.Q"].size) == (INPUTS, RANK)
        optimizer.close()


def test_a_distributed_checkpoint_goes_on_elsewhere():
    make = lambda model, **options: lowband.torch.Optimizer(model.named_parameters(), lr=0.02, kind="power_sgd",
                                                            profile=lowband.uniform(RANK), **options)

    def goes_on(aggregated, elsewhere, saved_replicas, mesh=lowband.Mesh()):
        """From two replicas of two shards to what `elsewhere` makes of the network."""
        model = sharded(meshes()["shard"])
        optimizer = make(model, aggregated_residual=aggregated)
        train(model, optimizer, 5)
        with shared_folder() as folder:
            save(folder, model, optimizer)
            train(model, optimizer, 5, begin=5)
            optimizer.close()
            resumed = other_weights(elsewhere(network()))
            optimizer = make(resumed, aggregated_residual=aggregated, mesh=mesh)
            load(folder, resumed, optimizer, saved_replicas=saved_replicas)
            train(resumed, optimizer, 5, begin=5)
            expect_close(flat(resumed), flat(model), 1e-4)
            optimizer.close()

    # As many replicas, cut over lowband's shards: AdamW's pieces begin and end within rows.
    goes_on(False, lambda module: module, None, lowband.Mesh(shard=2))
    # Other numbers of replicas. What all together have not sent is the mean, which aggregated steps depend on alone.
    goes_on(True, lambda module: module, 2)
    goes_on(True, lambda module: sharded(meshes(1)["shard"], module), 2)
    goes_on(True, lambda module: sharded(meshes(4)["shard"], module), 2, lowband.Mesh(shard=4))


def test_a_distributed_checkpoint_of_something_else_is_refused():
    make = lambda module, **options: lowband.torch.Optimizer(module.named_parameters(), lr=0.02, **options)
    model = network()
    optimizer = make(model, profile=lowband.uniform(RANK))
    others = [("Size mismatch", dict(profile=lowband.uniform(RANK + 1)), {}),
              ("Size mismatch", dict(profile=lowband.uniform(RANK), mesh=lowband.Mesh(shard=2)), {}),
              ("Size mismatch", dict(profile=lowband.uniform(RANK)), dict(saved_replicas=3)),
              ("Missing key", dict(profile=lowband.uniform(RANK), kind="power_sgd"), {})]
    with shared_folder() as folder:
        save(folder, model, optimizer)
        optimizer.close()
        for message, options, saved in others:
            optimizer = make(model, **options)
            try:
                load(folder, model, optimizer, **saved)
                raise AssertionError(f"expected {message}")
            except dcp.CheckpointException as error:
                assert message in str(error) and "optimizer.state.0.weight" in str(error), error
            optimizer.close()
        optimizer = make(model.double(), profile=lowband.uniform(RANK))
        try:
            load(folder, model, optimizer)
            raise AssertionError("expected a refusal")
        except lowband.InvalidArgument as error:
            assert "dtype: found float32, expected float64" in str(error), error
        optimizer.close()

        # What the model has, and the checkpoint has not, or has in another shape.
        more = torch.nn.Sequential(*network(), torch.nn.Linear(OUTPUTS, 4))
        wider = torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN + 1), torch.nn.Tanh(), torch.nn.Linear(HIDDEN + 1, OUTPUTS))
        for message, name, other in (("Missing key", "optimizer.state.3.weight", more),
                                     ("Size mismatch", "optimizer.state.0.weight", wider)):
            optimizer = make(other, profile=lowband.uniform(RANK))
            try:
                dcp.load({"optimizer": lowband.checkpoint.State(optimizer)}, checkpoint_id=folder)
                raise AssertionError(f"expected {message}")
            except dcp.CheckpointException as error:
                assert message in str(error) and name in str(error), error
            optimizer.close()

        # What the checkpoint has, and the model has not, torch does not read.
        fewer = torch.nn.Sequential(*list(network())[:1])
        optimizer = make(fewer, profile=lowband.uniform(RANK))
        state = {"optimizer": lowband.checkpoint.State(optimizer)}
        expect_refused(["checkpoint, names: found 2.weight as parameter 2, expected nothing"],
                       lambda: dcp.load(state, checkpoint_id=folder))
        optimizer.close()
        model = network()
        optimizer = make(model, profile=lowband.uniform(RANK), scalar_kind="sgd")
        expect_refused(["checkpoint, scalar_kind: found adamw, expected sgd"], lambda: load(folder, model, optimizer))
        optimizer.close()
    expect_refused(["optimizer: found Adam, expected lowband.torch.Optimizer"],
                   lambda: lowband.checkpoint.State(torch.optim.Adam(network().parameters())))


def test_pieces_lie_in_the_whole():
    draw = random.Random(5)
    for _ in range(200):
        rows, cols = draw.randrange(1, 8), draw.randrange(1, 8)
        row_begin, col_begin = draw.randrange(rows), draw.randrange(cols)
        row_end, col_end = draw.randrange(row_begin, rows + 1), draw.randrange(col_begin, cols + 1)
        count = (row_end - row_begin) * (col_end - col_begin)
        begin = draw.randrange(count + 1)
        end = draw.randrange(begin, count + 1)
        whole = torch.arange(rows * cols, dtype=torch.float32).view(rows, cols)
        memory = whole[row_begin:row_end, col_begin:col_end].flatten()[begin:end].clone()
        place = StatePlace(rows, cols, row_begin, row_end, col_begin, col_end, begin, end, 0)
        piece = StatePiece("p.m", "float32", 1, end - begin, end - begin, memory.data_ptr() or None, place)
        found = []
        for (row, col), part in lowband.checkpoint.rectangles(piece):
            assert torch.equal(part, whole[row:row + part.shape[0], col:col + part.shape[1]]), place
            assert part.numel() > 0 and col >= col_begin and col + part.shape[1] <= col_end
            found += part.flatten().tolist()
        assert found == memory.tolist(), place


def test_refuses_what_it_cannot_do():
    both = meshes()
    rank1 = dict(profile=lowband.uniform(1))
    make = lambda model: lowband.torch.Optimizer(model.parameters(), **rank1)
    expect_refused(["mesh of param0: found 2 dimensions", "mesh=mesh['shard']"], lambda: make(sharded(both)))

    ignored = network()
    fully_shard(ignored, mesh=both["shard"], ignored_params={ignored[2].bias})
    expect_refused(["type of param3: found Tensor, but param0 is DTensor"], lambda: make(ignored))

    four = init_device_mesh("cpu", (4,))
    parameter = lambda placements: torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), four, placements))
    expect_refused(["placement of param0: found P(sum)"],
                   lambda: lowband.torch.Optimizer([parameter([Partial()])], **rank1))

    half = dist.new_group([0, 1, 2])
    model = sharded(both["shard"])
    optimizer = make(model)
    expect_refused(["mesh.tensor: found 4, expected 2"],
                   lambda: lowband.torch.Optimizer(model.parameters(), mesh=lowband.Mesh(tensor=4), **rank1))
    if dist.get_rank() < 3:
        expect_refused(["process_group: found processes [0, 1, 2]", "expected a group of whole replicas"],
                       lambda: lowband.torch.Optimizer(model.parameters(), process_group=half, **rank1))
    with torch.no_grad():
        if dist.get_rank() == 2:
            model[2].weight.to_local()[0, 0] += 1e-6
    expect_refused(["weights of param2: found others on process 2 than on process 0"], optimizer.step)
    with torch.no_grad():
        model[2].weight.zero_()
    model[0].weight.grad = DTensor.from_local(torch.ones(24, INPUTS), both["shard"], [Partial()])
    expect_refused(["gradient of param0: found placements (Partial(sum),), expected (Shard(dim=0),)"], optimizer.step)
    optimizer.close()
