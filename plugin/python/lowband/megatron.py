"""lowband as the optimizer of Megatron-core, between its data-parallel replicas.

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
    model = DistributedDataParallel(config, ddp_config, module)
    optimizer = lowband.megatron.Optimizer(optimizer_config, [model], profile=lowband.uniform(64))

The processes that share a replica (Megatron's tensor parallelism) become lowband's tensor axis; its data parallelism
becomes the replica axis, and its gradient all-reduce is gone.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lowband
import lowband.torch
from lowband.optimizer import is_matrix

_ROLES = {"linear_proj": "output", "linear_fc1": "up", "linear_fc2": "down", "word_embeddings": "embedding",
          "position_embeddings": "embedding", "output_layer": "head"}


class Optimizer(MegatronOptimizer):
    """Dion or PowerSGD for the matrices of layers, AdamW, SGD or Lion for the rest.

    Learning rate, weight decay, clip_grad and the betas and epsilon of Adam are those of `config`; the other arguments are
    those of `lowband.Options`. `scalar_lr_mult` multiplies the rate of what is no matrix of a layer. `overlap=True` starts the
    exchange of a bucket's gradients when Megatron's overlap_grad_reduce would start to reduce them.

    linear_fc1 of a gated layer is taken as its two matrices; linear_qkv is one, its rows in Megatron's order, which is
    the same for every tensor-parallel size.

    Collective: all processes of the job. One model chunk of float32 parameters: without pipeline, context and expert
    parallelism. Raises: lowband.InvalidArgument for what is not so.
    """

    def __init__(self, config: OptimizerConfig, model_chunks: list[DistributedDataParallel], *,
                 scalar_lr_mult: float = 1.0, **options: Any) -> None:
        model = _checked(config, model_chunks)
        mesh = DeviceMesh.from_group(parallel_state.get_tensor_model_parallel_group(), "cpu")
        self._pieces = {parameter: list(_pieces(name, parameter, mesh))
                        for name, parameter in model.module.named_parameters()}
        pieces = [piece for pieces in self._pieces.values() for piece in pieces]
        matrices = [(name, p, role) for name, p, role in pieces if is_matrix(role)]
        rest = [(name, p, role) for name, p, role in pieces if not is_matrix(role)]
        groups = []
        for members, factor in ((matrices, 1.0), (rest, scalar_lr_mult)):
            for role in sorted({role for _, _, role in members}):
                decay = 0.0 if role == "norm" else 1.0
                groups.append({"params": [(name, p) for name, p, found in members if found == role], "role": role,
                               "lr": factor * config.lr, "weight_decay": decay * config.weight_decay,
                               "max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0),
                               "wd_mult": decay, "lr_mult": 1.0, "default_config": members is matrices,
                               "is_expert_parallel": False, "is_decoupled_lr": False})
        settings = dict(adamw_betas=(config.adam_beta1, config.adam_beta2), adamw_epsilon=config.adam_eps,
                        sgd_momentum=config.sgd_momentum, clip_norm=config.clip_grad)
        for name in options:
            if name in settings:
                raise lowband.InvalidArgument(f"{name}: found it as an argument, expected it in the OptimizerConfig")
        inner = lowband.torch.Optimizer(groups, lr=config.lr, weight_decay=config.weight_decay, **settings, **options)
        super().__init__(inner, config)
        self.is_stub_optimizer = False  # param_groups asks
        self._decays = [group["weight_decay"] for group in inner.param_groups]
        for group in model.bucket_groups:
            self._take_over(group)

    # ---- What Megatron calls ----

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Whether it was taken, the norm of the mean gradient before clipping, and no count of zeros."""
        self.prepare_grads()
        self.step_with_ready_grads()
        return True, self.optimizer.last_report.gradient_norm, None

    def prepare_grads(self) -> bool:
        """False: an infinity is found by all processes together in the step, which leaves that matrix alone."""
        return False

    def step_with_ready_grads(self) -> bool:
        for group, decay in zip(self.optimizer.param_groups, self._decays):
            if group["weight_decay"] != decay:
                raise lowband.InvalidArgument(f"weight_decay: found {group['weight_decay']} from a schedule, expected "
                                              f"{decay} at every step")
        self.optimizer.step()
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._pieces:  # main_grad is the model's: zero_grad_buffer
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def get_loss_scale(self) -> torch.Tensor:
        return torch.ones(1)

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Nothing: it updates the model's parameters themselves."""

    def state_dict(self) -> dict[str, Any]:
        """Of this process, which another cannot load."""
        return {"of_process": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["of_process"])

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False,
                           metadata: Any = None) -> dict[str, ShardedObject]:
        """An object for every process: to go on with the same mesh. For another there is
        `lowband.checkpoint.State(optimizer.optimizer)`, with torch.distributed.checkpoint."""
        world = self.optimizer.world
        return {"of_process": ShardedObject("optimizer.lowband", self.optimizer.state_dict(), (world.processes,),
                                            (world.process,))}

    def _take_over(self, group: Any) -> None:
        """From now on the bucket group leaves gradients as this process computed them."""
        for bucket in group.buckets:
            if bucket.params_with_extra_main_grads:
                raise lowband.InvalidArgument("main_grad: found copies outside the gradient buffer, expected none")

        def start(force_all_reduce: bool = False) -> None:
            if self.optimizer.exchange.options.overlap:
                for bucket in group.buckets:
                    for parameter in bucket.params_list:
                        for _, piece, _ in self._pieces[parameter]:
                            self.optimizer.announce(piece, piece.grad.to_local())

        def finish(force_all_reduce: bool = False) -> None:
            group.param_gather_dispatched = False
            group.grad_reduce_finished = True

        group.start_grad_sync, group.finish_grad_sync = start, finish


def _checked(config: OptimizerConfig, model_chunks: list[DistributedDataParallel]) -> DistributedDataParallel:

    def expect(field: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise lowband.InvalidArgument(f"{field}: found {found}, expected {expected}")

    expect("model chunks", len(model_chunks), 1)
    model = model_chunks[0]
    expect("type of the model", type(model), DistributedDataParallel)
    expect("pipeline_model_parallel_size", parallel_state.get_pipeline_model_parallel_world_size(), 1)
    expect("context_parallel_size", parallel_state.get_context_parallel_world_size(), 1)
    expect("expert_model_parallel_size", parallel_state.get_expert_model_parallel_world_size(), 1)
    expect("expert_parallel_bucket_groups", len(model.expert_parallel_bucket_groups), 0)
    expect("optimizer_config.use_distributed_optimizer", config.use_distributed_optimizer, False)
    expect("ddp_config.use_distributed_optimizer", model.ddp_config.use_distributed_optimizer, False)
    expect("optimizer_config.log_num_zeros_in_grad", config.log_num_zeros_in_grad, False)
    expect("calculate_per_token_loss", model.config.calculate_per_token_loss, False)
    for name, parameter in model.module.named_parameters():
        expect(f"dtype of {name}", parameter.dtype, torch.float32)
        expect(f"requires_grad of {name}", parameter.requires_grad, True)
        expect(f"dtype of {name}.main_grad", parameter.main_grad.dtype, torch.float32)
    return model


def _pieces(name: str, parameter: torch.nn.Parameter,
            mesh: DeviceMesh) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
    """Name, DTensor over the memory of weight and gradient, and role, of the matrices or the vector in a parameter."""
    role = "norm"
    if parameter.ndim >= 2:
        role = next((role for part, role in _ROLES.items() if part in name), "matrix")
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    placement = Shard(parameter.partition_dim) if is_cut else Replicate()
    # Rows that every process holds of several matrices: its piece of the first, then of the second.
    blocks = parameter.partition_stride if is_cut else 1
    if blocks > 1 and parameter.partition_dim != 0:
        raise lowband.InvalidArgument(f"partition_stride of {name}: found {blocks} in dimension "
                                      f"{parameter.partition_dim}, expected 1, or dimension 0")
    gradients = parameter.main_grad.chunk(blocks)
    for i, (weight, gradient) in enumerate(zip(parameter.data.chunk(blocks), gradients)):
        piece = torch.nn.Parameter(DTensor.from_local(weight, mesh, [placement], run_check=False))
        piece.grad = DTensor.from_local(gradient, mesh, [placement], run_check=False)
        yield (f"{name}.{i}" if blocks > 1 else name), piece, ("gate" if role == "up" and i < blocks - 1 else role)
