"""A small GPT of Megatron-core's, its data and training, for tests on four processes: tensor and data parallel 2, or else."""

import megatron_on_cpu  # first

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

import lowband
import lowband.megatron

LAYERS, WIDTH, FFN, VOCABULARY, LENGTH, BATCH = 2, 64, 128, 256, 32, 4
MICRO_BATCHES = 4  # of all replicas together
HEADS, GROUPS = 8, 4


def gpt(dtype=torch.float32, layers={}, ends={}, tensor=2, **ddp_options):
    """`layers` and `ends` change TransformerConfig and GPTModel; Megatron's processes are divided as `tensor` says."""
    if parallel_state.model_parallel_is_initialized() and parallel_state.get_tensor_model_parallel_world_size() != tensor:
        parallel_state.destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    settings = dict(
        num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=GROUPS,
        tensor_model_parallel_size=tensor, use_cpu_initialization=True, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm", attention_dropout=0.0,
        hidden_dropout=0.0, gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, finalize_model_grads_func=finalize_model_grads, params_dtype=dtype,
        bf16=dtype == torch.bfloat16)
    config = TransformerConfig(**settings | layers)
    outer = dict(position_embedding_type="rope", share_embeddings_and_output_weights=False)
    module = GPTModel(config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
                      vocab_size=VOCABULARY, max_sequence_length=LENGTH, **outer | ends)
    options = dict(grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=False) | ddp_options
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**options),
                                    Float16Module(config, module) if config.bf16 else module)
    config.no_sync_func = model.no_sync
    return model


def micro_batches():
    """Of one replica."""
    return MICRO_BATCHES // parallel_state.get_data_parallel_world_size()


def batches(step):
    """The same from all replicas together, however many they are."""
    for i in range(micro_batches()):
        replica, k = divmod(parallel_state.get_data_parallel_rank() * micro_batches() + i, 2)
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
    reports = run(forward_step_func=forward, data_iterator=batches(step), model=[model], num_microbatches=micro_batches(),
                  seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False)
    loss = sum(report["loss"] for report in reports) / micro_batches()
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
    """What is trained: the masters of parameters that have them."""
    return torch.cat([getattr(p, "main_param", p).detach().flatten() for p in model.parameters()])


def config(dtype=torch.float32, **options):
    settings = dict(optimizer="lowband", lr=0.003, weight_decay=0.1, clip_grad=0.5, adam_beta2=0.95) | options
    return OptimizerConfig(bf16=dtype == torch.bfloat16, params_dtype=dtype, **settings)


def megatrons_own(model, dtype, optimizer, **options):
    """As its scheduler has it: gains do not decay."""
    made = get_megatron_optimizer(config(dtype, optimizer=optimizer, **options), [model])
    for group in made.param_groups:
        group["weight_decay"] *= group["wd_mult"]
    return made


def lowbands(model, dtype=torch.float32, **options):
    lowband.megatron.register(**options)
    return get_megatron_optimizer(config(dtype), [model])
