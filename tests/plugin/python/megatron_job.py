"""`lowband.megatron` with the real Megatron-core: a small GPT, tensor parallel 2, data parallel 2, over gloo.

    torchrun --nproc-per-node 4 tests/plugin/python/megatron_job.py [name of a test ...]
"""

import megatron_on_cpu  # first

import collections
import copy
import unittest.mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.timers import Timers

import lowband
import lowband.megatron
import megatron_reference
from fsdp_job import shared_folder
from megatron_gpt import (FFN, HEADS, LAYERS, VOCABULARY, WIDTH, backward, config, flat, gpt, lowbands, megatrons_own,
                          train)
from torch_job import expect_close, expect_refused, main

RANK = 8
TYPES = (torch.float32, torch.bfloat16)


def collectives(action):
    """How often each collective of a process group runs meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return collections.Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def expect_equal_replicas(model):
    everybody = [torch.empty_like(flat(model)) for _ in range(2)]
    dist.all_gather(everybody, flat(model), group=parallel_state.get_data_parallel_group())
    assert torch.equal(*everybody), "replicas differ"
    for parameter in model.parameters():
        assert torch.equal(parameter, getattr(parameter, "main_param", parameter).to(parameter.dtype)), "not its master"


def expect_planned_bytes(optimizer):
    inner = optimizer.optimizer
    counted = torch.tensor([inner.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
    dist.all_reduce(counted, group=parallel_state.get_tensor_model_parallel_group())
    assert tuple(counted.tolist()) == inner.planned_bytes(), (counted, inner.planned_bytes())


def expect_failure(message, action):
    try:
        action()
    except AssertionError as error:
        assert message in str(error), error
    else:
        raise RuntimeError(f"expected a failure that says {message}")


# ---- lowband beside Megatron with a plain implementation of the same optimizer ----

STEPS = 20


def first_q(cols):
    return torch.randn(cols, RANK, generator=torch.Generator().manual_seed(cols), dtype=torch.float64)


megatron_reference.register("plain_muon", megatron_reference.muon)
megatron_reference.register("plain_dion", megatron_reference.dion(first_q))
# The name of the reference in Megatron, and lowband's options.
KINDS = {
    "adamw": ("adam", dict(kind="adamw")),
    "muon": ("plain_muon", dict(kind="muon", sign="newton_schulz_5")),
    "dion": ("plain_dion", dict(kind="dion", profile=lowband.uniform(RANK))),
}
Run = collections.namedtuple("Run", "losses norms moved model optimizer")


def run_lowband(kind, dtype):
    model = gpt(dtype)
    begin = flat(model).clone()
    optimizer = lowbands(model, dtype, **KINDS[kind][1])
    for piece in optimizer.optimizer.exchange.state():
        if piece.name.rsplit(".", 1)[1].startswith("Q"):  # or Q[0], of a block
            whole = first_q(piece.place.rows)
            lowband.torch.tensor_over(piece).copy_(whole[piece.place.row_begin:piece.place.row_end])
    losses, norms = train(model, optimizer, STEPS)
    return Run(losses, norms, flat(model) - begin, model, optimizer)


def run_reference(kind, dtype, clip_norms, nudged=False):
    """Its norms are those of the mean gradient, clipped by `clip_norms`; from weights one rounding away if `nudged`."""
    model = gpt(dtype)
    begin = flat(model).clone()
    optimizer = megatrons_own(model, dtype, KINDS[kind][0])
    if nudged:
        for parameter in model.parameters():
            weight = getattr(parameter, "main_param", parameter).data
            weight.copy_(torch.nextafter(weight, torch.zeros_like(weight)))
    true_norm, norms, by = optimizer.get_grad_norm, [], iter(clip_norms)

    def norm_to_clip_by():
        norms.append(true_norm())
        return next(by)

    optimizer.get_grad_norm = norm_to_clip_by
    losses = train(model, optimizer, STEPS)[0]
    return Run(losses, torch.tensor(norms), flat(model) - begin, model, optimizer)


def expect_follows(run, kind, dtype):
    reference, nudged = (run_reference(kind, dtype, run.norms.tolist(), nudged) for nudged in (False, True))
    distance = lambda found, expected: (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()
    # Every step rounds anew, by some units in the last place, and training amplifies it: what is rounded last the
    # least. So STEPS times what one unit in the last place of all weights, before the first step, has become.
    for field in ("losses", "moved"):
        found, expected, other = (getattr(r, field) for r in (run, reference, nudged))
        expect_close(found, expected, STEPS * distance(other, expected))
    # Dion estimates the norm, with a relative standard deviation of at most sqrt(2 / 4096) / 2 (gradient_sketch.h).
    # The others sum 1e5 squares in another order and follow weights as far apart as above.
    tolerance = 6 * (2 / 4096)**0.5 / 2 if kind == "dion" else 1e-6 + STEPS * distance(nudged.norms, reference.norms)
    worst = (run.norms / reference.norms - 1).abs().max().item()
    assert worst <= tolerance, f"relative distance {worst:.2e} of norms, tolerance {tolerance:.2e}"
    assert run.losses[-1] < 0.5 * run.losses[0] and run.norms.max() > 0.5, (run.losses, run.norms)  # clipped, too


# ---- Tests: every process runs all of them, in this order ----


def test_follows_megatron_with_plain_torch_and_averaged_gradients():
    for dtype in TYPES:
        for kind in KINDS:
            run = run_lowband(kind, dtype)
            expect_equal_replicas(run.model)
            expect_planned_bytes(run.optimizer)
            run.optimizer.optimizer.close()
            expect_follows(run, kind, dtype)


def test_without_the_exchange_replicas_part():
    of_replica = lambda _: parallel_state.get_tensor_model_parallel_group()
    with unittest.mock.patch.object(lowband.torch, "_initialised", of_replica):
        run = run_lowband("muon", torch.float32)
    run.optimizer.optimizer.close()
    expect_failure("replicas differ", lambda: expect_equal_replicas(run.model))
    expect_failure("relative distance", lambda: expect_follows(run, "muon", torch.float32))


def test_factors_are_all_that_crosses_replicas():
    matrices = {"query": (WIDTH, WIDTH), "key": (WIDTH // 2, WIDTH), "value": (WIDTH // 2, WIDTH),
                "linear_proj": (WIDTH, WIDTH), "linear_fc1.weight.0": (FFN, WIDTH),
                "linear_fc1.weight.1": (FFN, WIDTH), "linear_fc2": (WIDTH, FFN)}
    factor_bytes = 4 * LAYERS * RANK * sum(rows + cols for rows, cols in matrices.values())
    # Embedding and head are cut; both processes of a replica have the gains, and send them.
    dense_bytes = 4 * (2 * VOCABULARY * WIDTH + 2 * (2 * LAYERS + 1) * WIDTH)
    options = dict(profile=lowband.uniform(RANK), aggregated_residual=True, scalar_lr_mult=0.5)
    averaged, own = gpt(), gpt()
    optimizers = [lowbands(model, **options) for model in (averaged, own)]
    for group in averaged.bucket_groups:  # Megatron's own all-reduce again
        del group.start_grad_sync, group.finish_grad_sync
    losses, norms = train(averaged, optimizers[0], 10)
    found, found_norms = train(own, optimizers[1], 10)
    assert losses[-1] < losses[0], losses
    expect_close(found, losses, 1e-4)
    expect_close(flat(own), flat(averaged), 1e-3)
    expect_equal_replicas(own)

    planned = optimizers[1].optimizer.planned_bytes()
    assert planned == (factor_bytes, dense_bytes), (planned, factor_bytes, dense_bytes)
    expect_planned_bytes(optimizers[1])
    with_megatrons, with_ours = (collectives(lambda: backward(model, 0)) for model in (averaged, own))
    gone = {"c10d::allreduce_coalesced_": len(averaged.bucket_groups)}
    assert with_megatrons - with_ours == gone and not with_ours - with_megatrons, (with_megatrons, with_ours)
    for optimizer in optimizers:
        optimizer.optimizer.close()


def test_matrices_have_the_ranks_of_their_roles():
    model = gpt()
    optimizer = lowbands(model, profile=lowband.structural(WIDTH, WIDTH // HEADS)).optimizer
    found = {}
    for i, described in enumerate(optimizer.exchange.parameters):
        ranks = [optimizer.exchange.factor_rank(i, block) for block in range(len(described.matrices))]
        found.update((name, rank) for name, rank in zip(described.matrices, ranks) if "layers.0." in name)
    layer, head_dim = "decoder.layers.0", WIDTH // HEADS
    qkv, fc1 = f"{layer}.self_attention.linear_qkv.weight", f"{layer}.mlp.linear_fc1.weight"
    expected = {f"{qkv}[0]": 4 * head_dim, f"{qkv}[1]": 4 * head_dim, f"{qkv}[2]": head_dim,
                f"{layer}.self_attention.linear_proj.weight": 4 * head_dim, f"{fc1}[0]": WIDTH, f"{fc1}[1]": WIDTH,
                f"{layer}.mlp.linear_fc2.weight": WIDTH, f"{layer}.input_layernorm.weight": 0,
                f"{layer}.pre_mlp_layernorm.weight": 0}
    assert found == expected, found
    # Of every query group: two heads of queries, that of the key, that of the value. Of every process: gate, then up.
    blocks = {described.name: described.blocks for described in optimizer.exchange.parameters}
    assert blocks[qkv] == (lowband.Block("query", 2 * head_dim), lowband.Block("key", head_dim), lowband.Block("value", head_dim))
    assert blocks[fc1] == (lowband.Block("gate", FFN // 2), lowband.Block("up", FFN // 2))
    weight = model.module.decoder.layers[0].self_attention.linear_qkv.weight
    own = optimizer._parameters[optimizer._names.index(qkv)]
    assert own.to_local().data_ptr() == weight.data_ptr() and own.grad.to_local().data_ptr() == weight.main_grad.data_ptr()
    optimizer.close()


def test_takes_other_layers_as_they_are():
    layers = dict(add_bias_linear=True, qk_layernorm=True, num_query_groups=1, gated_linear_unit=False)
    ends = dict(share_embeddings_and_output_weights=True, position_embedding_type="learned_absolute")
    reference, model = gpt(layers=layers, ends=ends), gpt(layers=layers, ends=ends)
    losses, norms = train(reference, megatrons_own(reference, torch.float32, "adam"), 3)
    optimizer = lowbands(model, kind="adamw", split_qkv=False)
    found, found_norms = train(model, optimizer, 3)
    # 1e5 elements summed in another order: some units in the last place (6e-8), which 3 steps amplify little; 50 of them.
    expect_close(found, losses, 3e-6)
    expect_close(found_norms, norms, 3e-6)
    expect_equal_replicas(model)
    optimizer.optimizer.close()


def test_overlap_gives_the_same_weights():
    weights = []
    for overlap in (False, True):
        model = gpt(overlap_grad_reduce=overlap)
        optimizer = lowbands(model, kind="power_sgd", profile=lowband.uniform(RANK), bucket_elements=1000)
        train(model, optimizer, 3)
        backward(model, 3)
        early = {optimizer.optimizer._names[i] for i in optimizer.optimizer._announced}
        # From the second step on; gains may still be summed over the processes of a replica.
        assert ("decoder.layers.0.self_attention.linear_qkv.weight" in early) == overlap, early
        assert not any("norm" in name for name in early), early
        optimizer.step()
        expect_close(flat(model), weights[0], 1e-6) if weights else weights.append(flat(model))
        expect_equal_replicas(model)
        optimizer.optimizer.close()


def test_keeps_the_checks_and_timers_of_megatron():
    for overlap in (False, True):
        model = gpt(check_for_nan_in_grad=True, overlap_grad_reduce=overlap)
        timers = Timers(log_level=1, log_option="minmax")
        lowband.megatron.register(profile=lowband.uniform(RANK))
        optimizer = get_megatron_optimizer(config(timers=timers), [model])
        train(model, optimizer, 2)
        for name in ("optimizer-inner-step", "optimizer-copy-main-to-model-params"):
            assert name in timers._timers and timers(name).elapsed() > 0, name
        with torch.no_grad():
            model.module.output_layer.weight.fill_(float("nan"))
        try:
            backward(model, 2)
        except RuntimeError as error:
            assert "found NaN in local grad norm" in str(error), error
        else:
            raise AssertionError("expected Megatron to find NaN in its gradients")
        optimizer.optimizer.close()


def test_schedules_the_learning_rate():
    model = gpt()
    optimizer = lowbands(model, profile=lowband.uniform(RANK))
    scheduler = OptimizerParamScheduler(optimizer, init_lr=0.0, max_lr=0.003, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=4,
                                        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=4,
                                        wd_incr_style="constant")
    rates = []
    for step in range(4):
        train(model, optimizer, 1, begin=step)
        scheduler.step(1)
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    assert torch.allclose(torch.tensor(rates), torch.tensor([0.0015, 0.003, 0.0015, 0.0])), rates
    before = flat(model).clone()
    train(model, optimizer, 1, begin=4)
    assert torch.equal(flat(model), before), "the rate is 0 now"
    expect_equal_replicas(model)
    optimizer.optimizer.param_groups[0]["weight_decay"] = 0.2
    expect_refused(["weight_decay: found 0.2 from a schedule, expected 0.1"], optimizer.step)
    optimizer.optimizer.close()


def state_of(model, optimizer, **options):
    of_model = model.module.sharded_state_dict()
    return {"model": of_model, "optimizer": optimizer.sharded_state_dict(of_model, **options)}


def save(folder, model, optimizer):
    metadata = {}
    dist_checkpointing.save(state_of(model, optimizer, metadata=metadata), folder, content_metadata=metadata)


def load(folder, model, optimizer):
    """Into a model and masters of zeros."""
    for parameter in model.parameters():
        parameter.data.zero_()
    metadata = dist_checkpointing.load_content_metadata(folder)
    loaded = dist_checkpointing.load(state_of(model, optimizer, is_loading=True, metadata=metadata), folder)
    model.module.load_state_dict(loaded["model"])
    saved = copy.deepcopy(loaded["optimizer"])  # Megatron has loaded into the masters themselves
    for parameter in model.parameters():
        getattr(parameter, "main_param", torch.empty(0)).zero_()
    optimizer.load_state_dict(saved)


def test_a_checkpoint_of_megatron_goes_on_bit_by_bit():
    for dtype in TYPES:
        for options in (dict(profile=lowband.uniform(RANK)), dict(kind="adamw")):
            model = gpt(dtype)
            optimizer = lowbands(model, dtype, **options)
            train(model, optimizer, 3)
            with shared_folder() as folder:
                save(folder, model, optimizer)
                train(model, optimizer, 3, begin=3)
                optimizer.optimizer.close()
                resumed = gpt(dtype)
                optimizer = lowbands(resumed, dtype, **options)
                load(folder, resumed, optimizer)
                expect_equal_replicas(resumed)
                train(resumed, optimizer, 3, begin=3)
                assert torch.equal(flat(resumed), flat(model))
                assert optimizer.optimizer.state_dict()["lowband"]["steps"] == 6
                optimizer.optimizer.close()


def test_a_checkpoint_of_megatron_goes_on_on_another_mesh():
    """Three steps on TP 2 x DP 2, three on another mesh, two on the first again; beside eight on the first. In bfloat16, whose
    activations other meshes sum to other digits, none on the other mesh."""
    aggregated = dict(profile=lowband.uniform(RANK), aggregated_residual=True)  # which depends on the mean of replicas alone
    for dtype, options in ((torch.float32, aggregated), (torch.bfloat16, dict(kind="power_sgd", **aggregated)),
                           (torch.float32, dict(kind="adamw"))):

        def straight(off_by_one):
            """Losses, and weights; from weights one rounding away after the third step if `off_by_one`."""
            model = gpt(dtype)
            optimizer = lowbands(model, dtype, **options)
            train(model, optimizer, 3)
            if off_by_one:
                for parameter in model.parameters():
                    weight = getattr(parameter, "main_param", parameter).data
                    weight.copy_(torch.nextafter(weight, torch.zeros_like(weight)))
            losses, _ = train(model, optimizer, 5, begin=3)
            optimizer.optimizer.close()
            return losses, flat(model)

        (losses, weights), (other_losses, other_weights) = straight(False), straight(True)
        distance = lambda found, expected: (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()
        for tensor in (1, 4):
            model = gpt(dtype)
            optimizer = lowbands(model, dtype, **options)
            train(model, optimizer, 3)
            found = []
            elsewhere = 3 if dtype == torch.float32 else 0
            for where, begin, steps in ((tensor, 3, elsewhere), (2, 3 + elsewhere, 5 - elsewhere)):
                with shared_folder() as folder:
                    save(folder, model, optimizer)
                    optimizer.optimizer.close()
                    model = gpt(dtype, tensor=where)
                    optimizer = lowbands(model, dtype, **options)
                    load(folder, model, optimizer)
                found += train(model, optimizer, steps, begin=begin)[0].tolist()
            # As in expect_follows: each of the five steps rounds by some units in the last place, as the one that was off.
            expect_close(torch.tensor(found), losses, 5 * distance(other_losses, losses))
            expect_close(flat(model), weights, 5 * distance(other_weights, weights))
            expect_equal_replicas(model)
            optimizer.optimizer.close()


def test_a_checkpoint_of_megatron_of_something_else_is_refused():
    model = gpt()
    optimizer = lowbands(model, profile=lowband.uniform(RANK))
    with shared_folder() as folder:
        save(folder, model, optimizer)
        optimizer.optimizer.close()

        def refused(message, expected=CheckpointException, model=model, metadata={}, **options):
            optimizer = lowbands(model, **options)
            try:
                loading = state_of(model, optimizer, is_loading=True, metadata=metadata)
                optimizer.load_state_dict(dist_checkpointing.load(loading, folder)["optimizer"])
            except expected as error:
                assert message in str(error), error
            else:
                raise AssertionError(f"expected {message}")
            optimizer.optimizer.close()

        refused("Global shape mismatch", profile=lowband.uniform(RANK + 1))
        refused("Global shape mismatch", profile=lowband.uniform(RANK), metadata={"lowband_replicas": 3})
        missing = "from model not in state dict"
        refused(missing, kind="power_sgd", profile=lowband.uniform(RANK))
        refused(missing, profile=lowband.uniform(RANK), split_qkv=False)
        refused(missing, model=gpt(layers=dict(add_bias_linear=True)), profile=lowband.uniform(RANK))
        refused("Global shape mismatch", model=gpt(layers=dict(num_layers=1)), profile=lowband.uniform(RANK))
        refused("checkpoint, scalar_kind: found adamw, expected lion", lowband.InvalidArgument, scalar_kind="lion",
                profile=lowband.uniform(RANK))


def test_takes_up_weights_that_were_loaded_without_it():
    model = gpt(torch.bfloat16)
    optimizer = lowbands(model, torch.bfloat16, kind="adamw")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    optimizer.reload_model_params()
    expect_equal_replicas(model)
    optimizer.optimizer.close()


# Values of Megatron's fields with which it would do something else than lowband does.
OTHER_OPTIMIZER_CONFIG = dict(
    optimizer="adam", fp16=True, loss_scale=1024.0, use_distributed_optimizer=True,
    use_layer_wise_distributed_optimizer=True, overlap_param_gather=True, overlap_param_gather_with_optimizer_step=True,
    use_precision_aware_optimizer=True, optimizer_cpu_offload=True, optimizer_cuda_graph=True, fp8_recipe="mxfp8",
    reuse_grad_buf_for_mxfp8_param_ag=True, decoupled_lr=0.1, decoupled_weight_decay=False, grad_norm_skip_threshold=10.0,
    log_num_zeros_in_grad=True, config_logger_dir="log")
OTHER_DDP_CONFIG = dict(
    use_distributed_optimizer=True, num_distributed_optimizer_instances=2, overlap_param_gather=True,
    use_megatron_fsdp=True, reduce_scatter_with_fp32_accumulation=True,
    param_name_patterns_for_fp32_local_accumulation=("linear",), fp8_param_gather=True, fp4_param_gather=True,
    reuse_grad_buf_for_mxfp8_param_ag=True)


def test_refuses_what_it_cannot_do():
    model, bfloat16, settings = gpt(), gpt(torch.bfloat16), config()
    weight = model.module.decoder.layers[0].mlp.linear_fc2.weight
    name = "decoder.layers.0.mlp.linear_fc2.weight"

    def refuses(message, chunks=None, settings=settings, **options):
        options = dict(profile=lowband.uniform(1)) | options
        expect_refused([message], lambda: lowband.megatron.Optimizer(settings, chunks or [model], **options))

    refuses("model chunks: found 2, expected 1", [model, model])
    refuses("type of the model: found", [model.module])
    refuses("clip_norm: found it as an argument", clip_norm=1.0)
    refuses("overlap: found it as an argument", overlap=True)
    refuses("process_group: found it as an argument", process_group=parallel_state.get_tensor_model_parallel_group())
    refuses("num_query_groups with split_qkv: found 1, expected a multiple of tensor_model_parallel_size 2",
            [gpt(layers=dict(num_query_groups=1))])
    for axis, title in (("pp", "pipeline_model"), ("cp", "context"), ("ep", "expert_model")):
        processes = ProcessGroupCollection.use_mpu_process_groups()
        setattr(processes, axis, processes.tp)
        refuses(f"{title}_parallel_size: found 2, expected 1", processes=processes)

    assert OTHER_OPTIMIZER_CONFIG.keys() == lowband.megatron._OPTIMIZER_CONFIG.keys()
    assert OTHER_DDP_CONFIG.keys() == lowband.megatron._DDP_CONFIG.keys()
    of_parameter = dict(allreduce=False, grad_norm_group="mtp", is_gtp_weight_remat=True)
    for owner, title, others in ((settings, "optimizer_config.{}", OTHER_OPTIMIZER_CONFIG),
                                 (model.ddp_config, "ddp_config.{}", OTHER_DDP_CONFIG),
                                 (model.config, "{}", dict(calculate_per_token_loss=True)),
                                 (model.config, "{} with split_qkv", dict(attention_output_gate=True)),
                                 (weight, "{} of " + name, of_parameter)):
        for field, found in others.items():
            with unittest.mock.patch.object(owner, field, found, create=True):
                refuses(f"{title.format(field)}: found {found}, expected ")

    weight.requires_grad_(False)
    refuses(f"requires_grad of {name}: found False, expected True")
    weight.requires_grad_(True)

    # Also in the way in which a user would meet them.
    lowband.megatron.register(profile=lowband.uniform(1))
    sharded = gpt(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    expect_refused(["optimizer_config.use_distributed_optimizer: found True, expected False"], lambda:
                   get_megatron_optimizer(config(use_distributed_optimizer=True, overlap_param_gather=True), [sharded]))
    expect_refused(["ddp_config.use_distributed_optimizer: found True, expected False"],
                   lambda: get_megatron_optimizer(config(), [sharded]))
    expect_refused(["wd_mult of gains and biases: found 1.0, expected 0.0"],
                   lambda: get_megatron_optimizer(config(), [model], config_overrides={}))
    ends = ParamKey(attr="is_embedding_or_output_parameter")
    overrides = get_standard_config_overrides(config()) | {ends: {"eps": 0.1}}
    expect_refused(["overrides of a group of parameters: found ['eps'], expected []"],
                   lambda: get_megatron_optimizer(config(), [model], config_overrides=overrides))
    refuses("parameters of another optimizer, whose gradients nobody would average: found", param_groups=[])

    refuses("dtype of embedding.word_embeddings.weight: found torch.bfloat16, expected torch.float32", [bfloat16])
    coarse = gpt(torch.bfloat16, grad_reduce_in_fp32=False)
    refuses("main_grad (ddp_config.grad_reduce_in_fp32): found torch.bfloat16, expected torch.float32", [coarse],
            config(torch.bfloat16))
    with unittest.mock.patch.object(weight, "partition_stride", 2):
        refuses(f"partition_dim of {name} with partition_stride 2: found 1, expected 0")

    optimizer = lowbands(bfloat16, torch.bfloat16, profile=lowband.uniform(1))
    expect_refused(["force_all_reduce: found True, expected False"],
                   lambda: bfloat16.finish_grad_sync(force_all_reduce=True))
    expect_refused(["data_parallel_size of state_dict: found 2, expected 1"], optimizer.state_dict)
    expect_refused(["state_dict of reload_model_params: found {}, expected None"],
                   lambda: optimizer.reload_model_params(state_dict={}))
    expect_refused(["model_sharded_state_dict: found 0 of", "expected all"],
                   lambda: optimizer.sharded_state_dict({}))
    optimizer.optimizer.close()


if __name__ == "__main__":
    main(globals())
