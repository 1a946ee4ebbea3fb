"""A language model of Megatron-core's, two tensor-parallel processes to a replica, with lowband between replicas.

    torchrun --nproc-per-node 4 plugin/example/megatron_core.py

lowband is in three lines: `import lowband.megatron`, `register`, and `optimizer="lowband"`. Megatron-core asks for
CUDA; where there is none, tests/plugin/python/megatron_on_cpu.py runs a program with stand-ins for it.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

import lowband
import lowband.megatron
import transformer

STEPS, MICRO_BATCHES = 101, 2
LENGTH, BATCH = transformer.LENGTH, transformer.BATCH
torch.set_num_threads(1)
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
torch.manual_seed(0)  # equal on all processes
model_parallel_cuda_manual_seed(0)

config = TransformerConfig(
    num_layers=transformer.LAYERS, hidden_size=transformer.WIDTH, ffn_hidden_size=4 * transformer.WIDTH,
    num_attention_heads=transformer.HEADS, add_bias_linear=False, normalization="RMSNorm", attention_dropout=0.0,
    hidden_dropout=0.0, tensor_model_parallel_size=2, bf16=True, params_dtype=torch.bfloat16,
    use_cpu_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
    bias_activation_fusion=False, bias_dropout_fusion=False, finalize_model_grads_func=finalize_model_grads)
gpt = GPTModel(config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
               vocab_size=transformer.VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope",
               share_embeddings_and_output_weights=False)
ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
model = DistributedDataParallel(config, ddp_config, Float16Module(config, gpt))
config.no_sync_func = model.no_sync

lowband.megatron.register(profile=lowband.uniform(8), scalar_lr_mult=0.25)
optimizer = get_megatron_optimizer(
    OptimizerConfig(optimizer="lowband", lr=0.02, min_lr=0.002, weight_decay=0.01, clip_grad=1.0, bf16=True,
                    params_dtype=torch.bfloat16), [model])
scheduler = OptimizerParamScheduler(optimizer, init_lr=0.0, max_lr=0.02, min_lr=0.002, lr_warmup_steps=10,
                                    lr_decay_steps=STEPS, lr_decay_style="cosine", start_wd=0.01, end_wd=0.01,
                                    wd_incr_steps=STEPS, wd_incr_style="constant")

device = torch.cuda.current_device()
positions = torch.arange(LENGTH, device=device).expand(BATCH, LENGTH)
hides = torch.ones(LENGTH, LENGTH, device=device).tril().logical_not().expand(BATCH, 1, LENGTH, LENGTH)


def forward(batches, model):
    tokens = next(batches).to(device)
    losses = model(tokens[:, :-1].contiguous(), positions, hides, labels=tokens[:, 1:].contiguous())
    return losses, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


forward_backward = get_forward_backward_func()
batches = transformer.batches(parallel_state.get_data_parallel_rank())
for step in range(STEPS):
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reports = forward_backward(forward_step_func=forward, data_iterator=batches, model=[model], forward_only=False,
                               num_microbatches=MICRO_BATCHES, seq_length=LENGTH, micro_batch_size=BATCH)
    _, norm, _ = optimizer.step()
    scheduler.step(1)
    if dist.get_rank() == 0 and step % 20 == 0:
        loss = sum(report["loss"].item() for report in reports) / MICRO_BATCHES
        factors, dense = optimizer.optimizer.planned_bytes()
        print(f"step {step:3}  loss {loss:.3f}, at best {transformer.BEST_LOSS:.3f}  norm {norm:.2f}  between replicas "
              f"{factors} bytes of factors, {dense} dense")
dist.destroy_process_group()
