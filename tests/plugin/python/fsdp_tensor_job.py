"""`lowband.torch` with FSDP2 over tensor parallelism, on the processes of torchrun: four are one replica or two, eight two."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import lowband
import lowband.torch
from fsdp_job import expect_equal_everywhere, flat, load, other_weights, save, shared_folder
from lowband import _pieces
from torch_job import INPUTS, RANK, expect_close, expect_refused, loss_of, moved

OUTPUTS = 24


def network():
    """Of matrices that both cut by rows, or one by rows and the other by columns, that one cuts alone, and of which no
    cut is even."""
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, 20), torch.nn.Tanh(), torch.nn.Linear(20, 18), torch.nn.LayerNorm(18),
                               torch.nn.Linear(18, 10), torch.nn.Tanh(), torch.nn.Linear(10, OUTPUTS)).double()


def mesh_of(replicas, shards):
    return init_device_mesh("cpu", (replicas, shards, dist.get_world_size() // (replicas * shards)),
                            mesh_dim_names=("replica", "shard", "tensor"))


def parallel(mesh, module=None):
    """Layers 0 and 2 are tensor parallel, the others on FSDP2's mesh alone."""
    module = parallelize_module(module if module is not None else network(), mesh["tensor"],
                                {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in module:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh["shard"])
    return fully_shard(module, mesh=mesh["shard"])


def alone_with_all_data(settings, steps, batches, off_by=0.0):
    """Weights and losses of one process that computes what all compute."""
    group = [dist.new_group([p]) for p in range(dist.get_world_size())][dist.get_rank()]
    model = moved(network(), off_by)
    optimizer = lowband.torch.Optimizer(model.named_parameters(), process_group=group, **settings)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(loss_of(model, step, number) for number in range(batches)) / batches
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    return flat(model), torch.tensor(losses, dtype=torch.float64)


def train(model, optimizer, mesh, steps, begin=0):
    """Losses over all data; processes that are tensor parallel have the same."""
    number = mesh["shard"].get_local_rank() + mesh["shard"].size() * mesh["replica"].get_local_rank()
    losses = []
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, number)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / dist.get_world_size())
    return torch.tensor(losses, dtype=torch.float64)


def expect_planned_bytes(optimizer, replicas):
    counted = torch.tensor([optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
    dist.all_reduce(counted)
    assert counted.tolist() == [replicas * planned for planned in optimizer.planned_bytes()], counted
    assert optimizer.step_bytes("gradient").payload_bytes == 0, "FSDP2 has summed them within the replica"


# ---- Tests: every process runs all of them, in this order ----


def test_every_replica_of_both_takes_the_steps_of_one_process():
    processes = dist.get_world_size()
    matrices = {"0.weight": (20, INPUTS), "2.weight": (18, 20), "4.weight": (10, 18), "6.weight": (OUTPUTS, 10)}
    vectors = 20 + 18 + 2 * 18 + 10 + OUTPUTS
    settings = dict(lr=0.02, profile=lowband.uniform(RANK), aggregated_residual=True)
    for kind, dense in (("dion", vectors), ("muon", vectors + sum(m * n for m, n in matrices.values()))):
        options = {**settings, "kind": kind} if kind == "dion" else dict(lr=0.02, kind=kind)
        factors = RANK * sum(m + n for m, n in matrices.values()) if kind == "dion" else 0
        for replicas, shards in ((1, 2), (2, 1), (2, 2)) if processes == 4 else ((2, 2),):
            mesh = mesh_of(replicas, shards)
            weights, losses = alone_with_all_data(options, 50, replicas * shards)
            nudged, nudged_losses = alone_with_all_data(options, 50, replicas * shards, off_by=5e-13)
            model = parallel(mesh)
            optimizer = lowband.torch.Optimizer(model.named_parameters(), **options)
            assert optimizer.exchange.options.mesh.tensor == processes // replicas
            found = train(model, optimizer, mesh, 50)
            # As in expect_same_trajectory: 50 steps round by less than 5e-13 of the weights, and training amplifies both.
            for one, other, expected in ((found, nudged_losses, losses), (flat(model), nudged, weights)):
                changed = (torch.linalg.norm(other - expected) / torch.linalg.norm(expected)).item()
                assert changed < 1e-9, f"found a trajectory that amplifies 5e-13 to {changed:.2e}, expected a stable one"
                expect_close(one, expected, changed)
            assert losses[-1] < 0.8 * losses[0], losses
            expect_equal_everywhere(model)
            # What crosses replicas is what a replica of one process would send; vectors that nothing cuts, from each process.
            again = (processes // (replicas * shards) - 1) * (18 + 2 * 18 + 10 + OUTPUTS) if shards == 1 else 0
            assert optimizer.planned_bytes() == (8 * factors, 8 * (dense + again)), (kind, optimizer.planned_bytes())
            expect_planned_bytes(optimizer, replicas)
            optimizer.close()


def test_moves_nothing_that_lies_as_lowband_cuts_it():
    mesh = mesh_of(1, 2)
    model = parallel(mesh)
    optimizer = lowband.torch.Optimizer(model.named_parameters(), profile=lowband.uniform(RANK))
    names = {optimizer._names[optimizer._position[p]] for p in optimizer._moved}
    # What tensor parallelism and FSDP2 both cut by rows, stays.
    assert names == {"2.weight", "2.bias", *(f"{layer}.{name}" for layer in (3, 4, 6) for name in ("weight", "bias"))}, names
    assert {p.name: p.cut for p in optimizer.exchange.parameters}["2.weight"] == "cols"
    optimizer.close()


def test_overlap_gives_the_same_weights():
    mesh, weights = mesh_of(2, 1), []
    for overlap in (False, True):
        model = parallel(mesh)
        optimizer = lowband.torch.Optimizer(model.named_parameters(), lr=0.02, kind="power_sgd", overlap=overlap,
                                            bucket_elements=100, profile=lowband.uniform(RANK))
        train(model, optimizer, mesh, 5)
        loss_of(model, 5).backward()
        assert (optimizer._position[model[0].weight] in optimizer._announced) == overlap
        assert not any(optimizer._position[p] in optimizer._announced for p in optimizer._moved)
        optimizer.step()
        weights.append(flat(model))
        optimizer.close()
    assert torch.equal(*weights)


def test_a_distributed_checkpoint_goes_on_on_other_meshes():
    make = lambda model: lowband.torch.Optimizer(model.named_parameters(), lr=0.02, kind="power_sgd",
                                                 profile=lowband.uniform(RANK), aggregated_residual=True)
    both, other = mesh_of(1, dist.get_world_size() // 2), mesh_of(2, 1)
    model = parallel(both)
    optimizer = make(model)
    train(model, optimizer, both, 5)
    batches = both["shard"].size()
    with shared_folder() as folder:
        save(folder, model, optimizer)
        train(model, optimizer, both, 5, begin=5)
        optimizer.close()
        for mesh, elsewhere in ((both, parallel), (other, parallel), (None, lambda _, module: module)):
            resumed = other_weights(elsewhere(mesh, network()))
            optimizer = make(resumed)
            load(folder, resumed, optimizer, saved_replicas=1)
            for step in range(5, 10):
                optimizer.zero_grad()
                # The mean over all data, wherever a process stands.
                (sum(loss_of(resumed, step, number) for number in range(batches)) / batches).backward()
                optimizer.step()
            # In float64 five steps round by 1e-13, and amplify little.
            expect_close(flat(resumed), flat(model), 1e-10)
            optimizer.close()


def test_pieces_are_those_of_torch():
    """Of every placement that is taken, on every process: what torch holds is what it is taken for, and comes and goes."""
    mesh = mesh_of(1, 2)
    both = mesh["shard", "tensor"]
    for shape in ((9, 7), (4, 2), (8, 8), (3, 1), (7, 4, 3), (11,)):
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        dimensions = range(min(len(shape), 2))
        one = [Replicate(), *(Shard(d) for d in dimensions)]
        twice = [(Shard(a), how) for a in dimensions for how in one] + [
            (_StridedShard(a, split_factor=2), Shard(a)) for a in dimensions]
        for placements in twice:
            tensor = distribute_tensor(whole, both, placements, src_data_rank=None)
            team = _pieces.team_of([tensor], ["w"])
            held = _pieces.held_by_each(tensor, "w", team)
            own = held[team.ranks.index(dist.get_rank())]
            matrix = _pieces.Rectangle(0, own.row_end, 0, own.col_end)  # of which it is the end
            assert torch.equal(own.of(whole.view(_pieces.matrix_shape(shape))[:own.row_end, :own.col_end].contiguous(), matrix),
                               tensor.to_local().view(own.shape)), (shape, placements, own)
            _, offset = compute_local_shape_and_global_offset(shape, both, placements)
            if own.elements > 0:
                assert (own.row_begin if len(shape) > 1 else own.col_begin) == offset[0], (shape, placements, own, offset)
            _, updated = _pieces.cut_of(tensor, held, False)
            moves = lowband.torch.Moves(team, dist.group.WORLD, 60.0, [held, held], [updated, updated])
            there = updated[team.ranks.index(dist.get_rank())]
            arrived, back = [torch.empty(there.shape) for _ in range(2)], torch.zeros_like(tensor.to_local())
            moves.gather([tensor.to_local(), 2 * tensor.to_local()], arrived)
            piece = whole.view(_pieces.matrix_shape(shape))[there.row_begin:there.row_end, there.col_begin:there.col_end]
            assert torch.equal(arrived[0], piece) and torch.equal(arrived[1], 2 * piece), (shape, placements)
            moves.scatter(arrived, [back, back.clone()])
            assert torch.equal(back, tensor.to_local()), (shape, placements)


def test_takes_pieces_of_one_axis_that_lowband_cuts_elsewhere():
    four = init_device_mesh("cpu", (4,))
    whole = {"uneven": torch.randn(10, 3), "whole": torch.randn(6, 5), "vector": torch.randn(5)}
    for value in whole.values():
        dist.broadcast(value, src=0)

    def trained(placements, group=None):
        place = lambda name, value: value if placements is None else distribute_tensor(value, four, [placements[name]],
                                                                                       src_data_rank=None)
        named = {name: torch.nn.Parameter(place(name, value.clone())) for name, value in whole.items()}
        optimizer = lowband.torch.Optimizer(named.items(), lr=0.02, profile=lowband.uniform(2), process_group=group)
        for step in range(3):
            for i, (name, parameter) in enumerate(named.items()):
                draw = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = place(name, torch.randn(whole[name].shape, generator=draw))
            optimizer.step()
        optimizer.close()
        return [(p.full_tensor() if placements else p).detach() for p in named.values()]

    group = [dist.new_group([p]) for p in range(4)][dist.get_rank()]
    expected = trained(None, group)
    # Rows 3, 3, 3 and 1 where lowband has 3, 3, 2 and 2; a matrix that every process has whole.
    found = trained({"uneven": Shard(0), "whole": Replicate(), "vector": Replicate()})
    for one, other in zip(found, expected):
        expect_close(one, other, 1e-5)


def test_refuses_what_it_cannot_do():
    mesh = mesh_of(1, 2)
    make = lambda model: lowband.torch.Optimizer(model.named_parameters(), profile=lowband.uniform(1))
    hybrid = parallelize_module(network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(hybrid, mesh=mesh["replica", "shard"])
    expect_refused(["mesh of 0.weight: found 3 dimensions", "mesh=mesh['shard']"], lambda: make(hybrid))

    both = mesh["shard", "tensor"]
    of = lambda placements, shape=(4, 4): torch.nn.Parameter(
        distribute_tensor(torch.ones(shape), both, placements, src_data_rank=None))
    refused = lambda message, *parameters: expect_refused(
        message, lambda: lowband.torch.Optimizer(list(parameters), profile=lowband.uniform(1)))
    refused(["placement of param0: found S(2) of shape (4, 4, 4), expected Shard(0)"], of([Shard(0), Shard(2)], (4, 4, 4)))
    refused(["placement of param0: found _S(0, 2)", "expected what FSDP2 makes of it on a mesh of 2 x 2"],
            of([_StridedShard(0, split_factor=2), Shard(1)]))
    refused(["mesh of param1: found DeviceMesh", "expected DeviceMesh", "or one of its dimensions"],
            of([Shard(0), Shard(1)]), torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (4,)),
                                                                           [Shard(0)], src_data_rank=None)))

    model = parallel(mesh)
    optimizer = make(model)
    with torch.no_grad():  # which FSDP2 does not know to be the same
        if mesh["tensor"].get_local_rank() == 1:
            model[3].weight.to_local()[0] += 1e-6
    expect_refused(["weights of 3.weight: found others on process 2 than on process 0"], optimizer.step)
    optimizer.close()
