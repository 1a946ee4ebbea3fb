"""`lowband.megatron` with the real Megatron-core: a small GPT, tensor parallel 2, data parallel 2, over gloo.

    torchrun --nproc-per-node 4 tests/plugin/python/megatron_job.py [name of a test ...]
"""

import megatron_on_cpu  # first

import collections

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

import lowband
import lowband.megatron
from fsdp_job import shared_folder
from torch_job import expect_close, expect_refused, main

LAYERS, WIDTH, FFN, VOCABULARY, LENGTH, BATCH, MICRO_BATCHES = 2, 64, 128, 256, 32, 4, 2
RANK = 8


def gpt(**ddp_options):
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=FFN, num_attention_heads=4, num_query_groups=2,
        tensor_model_parallel_size=2, use_cpu_initialization=True, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm", attention_dropout=0.0,
        hidden_dropout=0.0, gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, finalize_model_grads_func=finalize_model_grads)
    module = GPTModel(config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
                      vocab_size=VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope",
                      share_embeddings_and_output_weights=False)
    options = dict(use_distributed_optimizer=False, overlap_grad_reduce=False) | ddp_options
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**options), module)
    config.no_sync_func = model.no_sync
    return model


def batches(step):
    replica = parallel_state.get_data_parallel_rank()
    for k in range(MICRO_BATCHES):
        draw = torch.Generator().manual_seed(1000 * step + 10 * k + replica)
        begin = torch.randint(VOCABULARY, (BATCH, 1), generator=draw)
        yield (begin + 7 * torch.arange(LENGTH + 1)) % VOCABULARY


def forward(iterator, model):
    tokens = next(iterator)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    hides = torch.ones(LENGTH, LENGTH).tril().logical_not().expand(BATCH, 1, LENGTH, LENGTH)
    output = model(tokens[:, :-1].contiguous(), positions, hides, labels=tokens[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def backward(model, step):
    """Loss over all replicas; gradients are in the model's buffers."""
    model.zero_grad_buffer()
    run = get_forward_backward_func()
    reports = run(forward_step_func=forward, data_iterator=batches(step), model=[model], num_microbatches=MICRO_BATCHES,
                  seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False)
    loss = sum(report["loss"] for report in reports) / MICRO_BATCHES
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / parallel_state.get_data_parallel_world_size()


def train(model, optimizer, steps, begin=0):
    losses, norms = [], []
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        losses.append(backward(model, step))
        taken, norm, _ = optimizer.step()
        assert taken
        norms.append(float(norm))
    return torch.tensor(losses), torch.tensor(norms)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expect_equal_replicas(model):
    everybody = [torch.empty_like(flat(model)) for _ in range(2)]
    dist.all_gather(everybody, flat(model), group=parallel_state.get_data_parallel_group())
    assert torch.equal(*everybody), "replicas differ"


def collectives(action):
    """How often each collective of a process group runs meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return collections.Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def config(**options):
    return OptimizerConfig(optimizer="adam", lr=0.003, weight_decay=0.1, clip_grad=0.5, adam_beta2=0.95, **options)


# ---- Tests: every process runs all of them, in this order ----


def test_adamw_is_that_of_megatron():
    reference = gpt()
    megatrons = get_megatron_optimizer(config(), [reference])
    for group in megatrons.param_groups:  # as its scheduler does: gains do not decay
        group["weight_decay"] *= group["wd_mult"]
    losses, norms = train(reference, megatrons, 5)
    model = gpt()
    optimizer = lowband.megatron.Optimizer(config(), [model], kind="adamw")
    found, found_norms = train(model, optimizer, 5)
    assert losses[-1] < losses[0] and norms.max() > 0.5, (losses, norms)  # and clipped
    expect_close(found, losses, 1e-5)
    expect_close(found_norms, norms, 1e-4)
    expect_close(flat(model), flat(reference), 1e-4)
    expect_equal_replicas(model)
    optimizer.optimizer.close()


def test_factors_are_all_that_crosses_replicas():
    matrices = {"linear_qkv": (2 * WIDTH, WIDTH), "linear_proj": (WIDTH, WIDTH), "linear_fc1.weight.0": (FFN, WIDTH),
                "linear_fc1.weight.1": (FFN, WIDTH), "linear_fc2": (WIDTH, FFN)}
    factor_bytes = 4 * LAYERS * RANK * sum(rows + cols for rows, cols in matrices.values())
    # Embedding and head are cut; both processes of a replica have the gains, and send them.
    dense_bytes = 4 * (2 * VOCABULARY * WIDTH + 2 * (2 * LAYERS + 1) * WIDTH)
    options = dict(profile=lowband.uniform(RANK), aggregated_residual=True, scalar_lr_mult=0.5)
    averaged, own = gpt(), gpt()
    optimizers = [lowband.megatron.Optimizer(config(), [model], **options) for model in (averaged, own)]
    for group in averaged.bucket_groups:  # Megatron's own all-reduce again
        del group.start_grad_sync, group.finish_grad_sync
    losses, norms = train(averaged, optimizers[0], 10)
    found, found_norms = train(own, optimizers[1], 10)
    assert losses[-1] < losses[0], losses
    expect_close(found, losses, 1e-4)
    expect_close(flat(own), flat(averaged), 1e-3)
    expect_equal_replicas(own)

    inner = optimizers[1].optimizer
    assert inner.planned_bytes() == (factor_bytes, dense_bytes), (inner.planned_bytes(), factor_bytes, dense_bytes)
    counted = torch.tensor([inner.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
    dist.all_reduce(counted, group=parallel_state.get_tensor_model_parallel_group())
    assert counted.tolist() == [factor_bytes, dense_bytes], counted
    with_megatrons, with_ours = (collectives(lambda: backward(model, 0)) for model in (averaged, own))
    gone = {"c10d::allreduce_coalesced_": len(averaged.bucket_groups)}
    assert with_megatrons - with_ours == gone and not with_ours - with_megatrons, (with_megatrons, with_ours)
    for optimizer in optimizers:
        optimizer.optimizer.close()


def test_overlap_gives_the_same_weights():
    weights = []
    for overlap in (False, True):
        model = gpt(overlap_grad_reduce=overlap)
        optimizer = lowband.megatron.Optimizer(config(), [model], kind="power_sgd", profile=lowband.uniform(RANK),
                                               overlap=overlap, bucket_elements=1000)
        train(model, optimizer, 3)
        backward(model, 3)
        assert bool(optimizer.optimizer._announced) == overlap, "from the second step on Megatron starts early"
        optimizer.step()
        expect_close(flat(model), weights[0], 1e-6) if weights else weights.append(flat(model))
        expect_equal_replicas(model)
        optimizer.optimizer.close()


def test_schedules_the_learning_rate():
    model = gpt()
    optimizer = lowband.megatron.Optimizer(config(), [model], profile=lowband.uniform(RANK))
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


def test_a_checkpoint_of_megatron_goes_on_bit_by_bit():
    make = lambda model: lowband.megatron.Optimizer(config(), [model], profile=lowband.uniform(RANK))
    model = gpt()
    optimizer = make(model)
    train(model, optimizer, 3)
    state_of = lambda model, optimizer, **options: {
        "model": model.module.sharded_state_dict(), "optimizer": optimizer.sharded_state_dict({}, **options)}
    with shared_folder() as folder:
        dist_checkpointing.save(state_of(model, optimizer), folder)
        train(model, optimizer, 3, begin=3)
        optimizer.optimizer.close()
        resumed = gpt()
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.zero_()
        optimizer = make(resumed)
        loaded = dist_checkpointing.load(state_of(resumed, optimizer, is_loading=True), folder)
        resumed.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        train(resumed, optimizer, 3, begin=3)
        assert torch.equal(flat(resumed), flat(model))
        optimizer.optimizer.close()


def test_refuses_what_it_cannot_do():
    rank1 = dict(profile=lowband.uniform(1))
    make = lowband.megatron.Optimizer
    model = gpt()
    expect_refused(["model chunks: found 2, expected 1"], lambda: make(config(), [model, model], **rank1))
    expect_refused(["type of the model: found"], lambda: make(config(), [model.module], **rank1))
    expect_refused(["ddp_config.use_distributed_optimizer: found True, expected False"],
                   lambda: make(config(), [gpt(use_distributed_optimizer=True)], **rank1))
    expect_refused(["clip_norm: found it as an argument"], lambda: make(config(), [model], clip_norm=1.0, **rank1))
    half = gpt()
    half.module.output_layer.weight.data = half.module.output_layer.weight.data.bfloat16()
    expect_refused(["dtype of output_layer.weight: found torch.bfloat16"], lambda: make(config(), [half], **rank1))


if __name__ == "__main__":
    main(globals())
