"""lowband as the optimizer of Megatron-core, between its data-parallel replicas.

    lowband.megatron.register(profile=lowband.uniform(64))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="lowband", ...), [model])

The processes that share a replica (Megatron's tensor parallelism) become lowband's tensor axis; its data parallelism
becomes the replica axis, and its gradient all-reduce is gone.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any, Iterator, NamedTuple

import megatron.core.optimizer
import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lowband
import lowband.torch
from lowband import _megatron_state
from lowband.optimizer import is_matrix

_ROLES = {"linear_proj": "output", "linear_fc1": "up", "linear_fc2": "down", "word_embeddings": "embedding",
          "position_embeddings": "embedding", "output_layer": "head"}

# The only values of these fields with which training is what they say.
_OPTIMIZER_CONFIG = dict(
    optimizer="lowband", fp16=False, loss_scale=None, use_distributed_optimizer=False,
    use_layer_wise_distributed_optimizer=False, overlap_param_gather=False,
    overlap_param_gather_with_optimizer_step=False, use_precision_aware_optimizer=False, optimizer_cpu_offload=False,
    optimizer_cuda_graph=False, fp8_recipe=None, reuse_grad_buf_for_mxfp8_param_ag=False, decoupled_lr=None,
    decoupled_weight_decay=True, grad_norm_skip_threshold=math.inf, log_num_zeros_in_grad=False, config_logger_dir="")
_DDP_CONFIG = dict(
    use_distributed_optimizer=False, num_distributed_optimizer_instances=1, overlap_param_gather=False,
    use_megatron_fsdp=False, reduce_scatter_with_fp32_accumulation=False,
    param_name_patterns_for_fp32_local_accumulation=(), fp8_param_gather=False, fp4_param_gather=False,
    reuse_grad_buf_for_mxfp8_param_ag=False)
# What Megatron says of a group of parameters.
_GROUP_KEYS = {"params", "max_lr", "min_lr", "lr_mult", "wd_mult", "default_config", "is_expert_parallel",
               "is_decoupled_lr"}


def register(**options: Any) -> None:
    """From now on `OptimizerConfig(optimizer="lowband")` makes Megatron's `get_megatron_optimizer` build an `Optimizer`
    with these options, in the chain of one that it returns.

    Every parameter is lowband's: none is left to Megatron's Adam and its all-reduce, so that nothing has to be tagged
    before the model is wrapped. Calling it again replaces the options.
    """

    def arguments(config: OptimizerConfig, model_chunks: list[Any],
                  processes: ProcessGroupCollection) -> dict[str, Any]:
        return dict(config=config, model_chunks=model_chunks, processes=processes)

    def build(param_groups: list[dict[str, Any]], **found: Any) -> Optimizer:
        return Optimizer(**found, param_groups=param_groups, **options)

    megatron.core.optimizer._EMERGING_OPTIMIZERS["lowband"] = EmergingOptimizerEntry(
        build, config_to_kwargs=arguments, default_param_overrides={})
    # Says that NVIDIA's package of optimizers is there, without which no entry is looked up.
    megatron.core.optimizer.HAVE_EMERGING_OPTIMIZERS = True
    # Megatron wraps an entry's optimizer, to reduce its norms and keep its masters. This one does both itself.
    for wrapper in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        setattr(megatron.core.optimizer, wrapper.__name__, _leaving_ours(wrapper))


def _leaving_ours(wrapper: type[MegatronOptimizer]) -> type[MegatronOptimizer]:

    class Wrapper(wrapper):  # type: ignore[valid-type, misc]

        def __new__(cls, optimizer: Any, *_arguments: Any) -> Any:
            return optimizer if isinstance(optimizer, Optimizer) else super().__new__(cls)

    return Wrapper


class _Matrix(NamedTuple):
    """A parameter as lowband is told of it. `tensor` and its gradient are DTensors over its master or itself, and over its
    main_grad."""
    name: str
    role: str
    blocks: tuple[lowband.Block, ...]
    tensor: torch.nn.Parameter


class Optimizer(MegatronOptimizer):
    """Dion or another kind of lowband's for the matrices of layers, AdamW, SGD or Lion for the rest.

    Learning rates, weight decay, clip_grad and the settings of Adam and SGD are those of `config` and of Megatron's
    groups of parameters; the other arguments are those of `lowband.Options`. `scalar_lr_mult` multiplies the rate of
    what is no matrix of a layer. With Megatron's overlap_grad_reduce the exchange of a bucket's gradients starts when
    their reduction would.

    bfloat16 parameters have a float32 master each, which is what is updated, kept in checkpoints and, rounded, copied
    to the model after every step; gradients are accumulated in float32.

    linear_qkv is taken as the matrices of query, key and value (blocks 0, 1 and 2 of it), linear_fc1 of a gated layer as its
    gate and up (blocks 0 and 1), each with role, factor rank, state and update of its own. `split_qkv=False` leaves
    linear_qkv one matrix, its rows in Megatron's order.

    DType: float32 or bfloat16 parameters with float32 main gradients.
    Collective: all processes of the job. One model chunk, without pipeline, context and expert parallelism.
    Raises: lowband.InvalidArgument, for what is not so and for every field of Megatron's configs that would not be
    followed.
    """

    def __init__(self, config: OptimizerConfig, model_chunks: list[DistributedDataParallel], *,
                 param_groups: list[dict[str, Any]] | None = None, processes: ProcessGroupCollection | None = None,
                 scalar_lr_mult: float = 1.0, split_qkv: bool = True, **options: Any) -> None:
        processes = processes or ProcessGroupCollection.use_mpu_process_groups()
        model = _checked(config, model_chunks, processes)
        if param_groups is None:
            param_groups = megatron.core.optimizer._get_param_groups(model_chunks, config,
                                                                     get_standard_config_overrides(config))
        settings = dict(adamw_betas=(config.adam_beta1, config.adam_beta2), adamw_epsilon=config.adam_eps,
                        sgd_momentum=config.sgd_momentum, clip_norm=config.clip_grad,
                        overlap=model.ddp_config.overlap_grad_reduce)
        for name in options:
            if name in {*settings, "process_group"}:
                raise lowband.InvalidArgument(f"{name}: found it as an argument, expected it to be left to Megatron")
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        mesh = DeviceMesh.from_group(processes.tp, next(model.parameters()).device.type)
        qkv_blocks = _qkv_blocks(model.config, processes.tp.size()) if split_qkv else ()
        self._described = {parameter: _described(name, parameter, self._master(parameter), mesh, qkv_blocks)
                           for name, parameter in _named(model)}
        if options.get("kind") in lowband.optimizer.ELEMENTWISE_KINDS:  # to which blocks mean nothing
            self._described = {parameter: own._replace(blocks=()) for parameter, own in self._described.items()}
        inner = lowband.torch.Optimizer(self._groups(config, param_groups, scalar_lr_mult), lr=config.lr,
                                        weight_decay=config.weight_decay, **settings, **options)
        super().__init__(inner, config)
        self.is_stub_optimizer = False  # param_groups asks
        self._decays = [group["weight_decay"] for group in inner.param_groups]
        self._replicas = processes.dp_cp.size()
        self.model_chunks = model_chunks  # without which a chain would pass no state_dict to reload_model_params
        for group in model.bucket_groups:
            self._take_over(group)

    # ---- What Megatron calls ----

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Whether it was taken, the norm of the mean gradient before clipping, and no count of zeros."""
        self.prepare_grads()
        self.step_with_ready_grads()
        return True, self.get_grad_norm(), None

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Takes the step, clipping included: only with it is the norm of the mean gradient known, for which Megatron
        asks next. False: an infinity is found by all processes together in the step, which leaves that matrix alone."""
        for group, decay in zip(self.optimizer.param_groups, self._decays):
            if group["weight_decay"] != decay:
                raise lowband.InvalidArgument(f"weight_decay: found {group['weight_decay']} from a schedule, expected "
                                              f"{decay} at every step")
        with self._timed("optimizer-inner-step"):
            self.optimizer.step()
        return False

    def get_grad_norm(self) -> float:
        """Of the mean gradient in the last step, before clipping."""
        return self.optimizer.last_report.gradient_norm

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """None: Megatron would clip them by a norm of its own."""
        return []

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        with self._timed("optimizer-copy-main-to-model-params"):
            for parameter, master in self._masters.items():
                parameter.copy_(master)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._described:  # main_grad is the model's: zero_grad_buffer
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def get_loss_scale(self) -> torch.Tensor:
        return torch.ones(1, device=self.optimizer.device)

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        """Masters <- the model's parameters, which were changed elsewhere."""
        _expect("state_dict of reload_model_params", state_dict, None)
        for parameter, master in self._masters.items():
            master.copy_(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Of this process. Refused with several replicas: Megatron's format "torch" would keep that of one of them."""
        _expect("data_parallel_size of state_dict", self._replicas, 1)
        return {"of_process": self.optimizer.state_dict(), "fp32_from_fp16_params": list(self._masters.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of `state_dict`, or what Megatron has loaded for `sharded_state_dict`."""
        if "of_process" in state_dict:
            self.optimizer.load_state_dict(state_dict["of_process"])
        else:
            _megatron_state.load(self.optimizer, self._by_name(), state_dict["lowband"])
        for master, saved in zip(self._masters.values(), state_dict["fp32_from_fp16_params"], strict=True):
            master.copy_(saved)

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False,
                           metadata: Any = None) -> dict[str, Any]:
        """Masters as Megatron keeps them, and lowband's state, for any tensor and data parallelism.

        A checkpoint says in `metadata`, which Megatron's training keeps as content_metadata, how many replicas saved it;
        a loader that has no metadata says so itself: {"lowband_replicas": 2}. Not said, they are as many as now. Of another
        number each replica begins with their mean, which keeps all that was not sent yet.
        """
        replicas = self._replicas
        if is_loading:
            replicas = (metadata or {}).get("lowband_replicas", replicas)
        elif metadata is not None:
            metadata["lowband_replicas"] = replicas
        of_model = _megatron_state.of_parameters(model_sharded_state_dict, self._by_name())
        masters = [make_sharded_optimizer_tensor(of_model[self._described[parameter].name], master,
                                                 prefix="optimizer.state.fp32_param")
                   for parameter, master in self._masters.items()]
        return {"lowband": _megatron_state.sharded(self.optimizer, self._by_name(), of_model, replicas),
                "fp32_from_fp16_params": masters}

    # ---- The rest is its own ----

    def _by_name(self) -> dict[str, torch.nn.Parameter]:
        return {own.name: parameter for parameter, own in self._described.items()}

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What is updated: the parameter itself, unless it has too few digits."""
        if parameter.dtype == torch.float32:
            return parameter.data
        master = parameter.detach().clone().float()
        copy_tensor_model_parallel_attributes(master, parameter)
        parameter.main_param = self._masters[parameter] = master
        return master

    def _groups(self, config: OptimizerConfig, param_groups: list[dict[str, Any]],
                scalar_lr_mult: float) -> list[dict[str, Any]]:
        """Megatron's groups, each split by role and blocks."""
        groups, found = [], set()
        for group in param_groups:
            unknown = sorted(group.keys() - _GROUP_KEYS)
            _expect("overrides of a group of parameters", unknown, [])
            members = [self._described[parameter] for parameter in group["params"]]
            found.update(group["params"])
            kinds = {(own.role, own.blocks) for own in members}
            for role, blocks in sorted(kinds, key=str):
                if role == "norm":
                    _expect("wd_mult of gains and biases", group["wd_mult"], 0.0)
                factor = 1.0 if is_matrix(role) else scalar_lr_mult
                rates = {"lr": factor * group["max_lr"], "max_lr": factor * group["max_lr"],
                         "min_lr": factor * (group["min_lr"] or 0.0)}
                groups.append(group | rates | {
                    "params": [(own.name, own.tensor) for own in members if (own.role, own.blocks) == (role, blocks)],
                    "role": role, "blocks": blocks, "weight_decay": group["wd_mult"] * config.weight_decay})
        missing = [own.name for parameter, own in self._described.items() if parameter not in found]
        _expect("parameters of another optimizer, whose gradients nobody would average", missing, [])
        return groups

    def _take_over(self, group: Any) -> None:
        """From now on the bucket group leaves gradients as this process computed them."""
        ddp_config = group.ddp_config

        @torch.no_grad()
        def start(force_all_reduce: bool = False) -> None:
            _expect("force_all_reduce", force_all_reduce, False)
            if ddp_config.check_for_nan_in_grad or ddp_config.check_for_large_grads:
                group.check_grads(check_for_nan_or_inf=ddp_config.check_for_nan_in_grad,
                                  check_for_large=ddp_config.check_for_large_grads)
            if ddp_config.overlap_grad_reduce:
                for bucket in group.buckets:
                    for parameter in bucket.params_list:
                        # finalize_model_grads may sum what each process of a replica has whole.
                        if getattr(parameter, "tensor_model_parallel", False):
                            tensor = self._described[parameter].tensor
                            self.optimizer.announce(tensor, tensor.grad.to_local())

        def finish(force_all_reduce: bool = False) -> None:
            if not ddp_config.overlap_grad_reduce or (group.is_first_batch and not group.grad_reduce_finished):
                start(force_all_reduce)
            group.param_gather_dispatched = False
            group.grad_reduce_finished = True

        group.start_grad_sync, group.finish_grad_sync = start, finish

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        timers = self.config.timers
        if timers is not None:
            timers(name, log_level=1).start(barrier=self.config.barrier_with_L1_time)
        yield
        if timers is not None:
            timers(name).stop()


def _expect(field: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise lowband.InvalidArgument(f"{field}: found {found}, expected {expected}")


def _checked(config: OptimizerConfig, model_chunks: list[DistributedDataParallel],
             processes: ProcessGroupCollection) -> DistributedDataParallel:
    _expect("model chunks", len(model_chunks), 1)
    model = model_chunks[0]
    _expect("type of the model", type(model), DistributedDataParallel)
    _expect("pipeline_model_parallel_size", processes.pp.size(), 1)
    _expect("context_parallel_size", processes.cp.size(), 1)
    _expect("expert_model_parallel_size", processes.ep.size(), 1)
    for name, expected in _OPTIMIZER_CONFIG.items():
        _expect(f"optimizer_config.{name}", getattr(config, name), expected)
    for name, expected in _DDP_CONFIG.items():
        _expect(f"ddp_config.{name}", getattr(model.ddp_config, name), expected)
    _expect("calculate_per_token_loss", model.config.calculate_per_token_loss, False)
    for name, parameter in _named(model):
        _expect(f"requires_grad of {name}", parameter.requires_grad, True)
        _expect(f"allreduce of {name}", getattr(parameter, "allreduce", True), True)
        _expect(f"grad_norm_group of {name}", getattr(parameter, "grad_norm_group", None), None)
        _expect(f"is_gtp_weight_remat of {name}", getattr(parameter, "is_gtp_weight_remat", False), False)
        of_master = parameter.dtype == torch.bfloat16 and config.bf16
        _expect(f"dtype of {name}", parameter.dtype, torch.bfloat16 if of_master else torch.float32)
        _expect(f"dtype of {name}.main_grad (ddp_config.grad_reduce_in_fp32)", parameter.main_grad.dtype, torch.float32)
    return model


def _qkv_blocks(config: Any, tensor_parallel: int) -> tuple[lowband.Block, ...]:
    """Rows of query, key and value in a query group of linear_qkv."""
    _expect("attention_output_gate with split_qkv", config.attention_output_gate, False)
    if config.num_query_groups % tensor_parallel != 0:
        raise lowband.InvalidArgument(f"num_query_groups with split_qkv: found {config.num_query_groups}, expected a "
                                      f"multiple of tensor_model_parallel_size {tensor_parallel}")
    key = config.kv_channels
    return (lowband.Block("query", config.num_attention_heads // config.num_query_groups * key), lowband.Block("key", key),
            lowband.Block("value", key))


def _named(model: DistributedDataParallel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names without what Megatron wraps a model in, as they are in its checkpoints."""
    for name, parameter in model.named_parameters():
        yield re.sub(r"^(module\.)+", "", name), parameter


def _described(name: str, parameter: torch.nn.Parameter, weight: torch.Tensor, mesh: DeviceMesh,
               qkv_blocks: tuple[lowband.Block, ...]) -> _Matrix:
    role = "norm"
    if parameter.ndim >= 2:
        role = next((role for part, role in _ROLES.items() if part in name), "matrix")
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    placement = Shard(parameter.partition_dim) if is_cut else Replicate()
    blocks: tuple[lowband.Block, ...] = ()
    if name.endswith("linear_qkv.weight"):
        blocks = qkv_blocks
    elif is_cut and parameter.partition_stride > 1 and parameter.ndim >= 2:
        # Every process holds rows of several matrices: its piece of the first, then of the second.
        count = parameter.partition_stride
        _expect(f"partition_dim of {name} with partition_stride {count}", parameter.partition_dim, 0)
        before = "gate" if role == "up" else role
        blocks = tuple(lowband.Block(before if i < count - 1 else role, len(parameter) // count) for i in range(count))
    tensor, tensor_grad = (DTensor.from_local(own, mesh, [placement], run_check=False) for own in (weight, parameter.main_grad))
    tensor = torch.nn.Parameter(tensor)
    tensor.grad = tensor_grad
    return _Matrix(name, role, blocks, tensor)
