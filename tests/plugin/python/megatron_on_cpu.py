"""What Megatron-core 0.19.2 needs to train over gloo, without CUDA and without triton. Import it before megatron.

    torchrun --nproc-per-node 4 tests/plugin/python/megatron_on_cpu.py PROGRAM     # which knows nothing of it

Megatron asks CUDA for the current device and stream, makes tensors on it, and keeps the states of its generators.
"""

import importlib.abc
import importlib.machinery
import os
import pathlib
import runpy
import sys
import types

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch._dynamo  # before there is a stand-in for triton, which it would look into
from torch.overrides import TorchFunctionMode


class _Nothing:
    """Any attribute, any call: nothing happens."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    def __call__(self, *arguments, **_options):
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else _Nothing()  # as a decorator

    def __getitem__(self, _key):
        return self


class _Triton(importlib.abc.MetaPathFinder, importlib.abc.Loader):

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = "3.4.0"
        module.__getattr__ = lambda name: getattr(_Nothing(), name)
        return module

    def exec_module(self, module):
        pass


class _OnCpu(TorchFunctionMode):

    def __torch_function__(self, function, _types, arguments=(), options=None):
        options = dict(options or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        result = function(*arguments, **options)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


if importlib.util.find_spec("triton") is None:
    sys.meta_path.append(_Triton())
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.current_stream = lambda *_: _Nothing()
torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
torch.cuda.manual_seed = torch.manual_seed
torch.cuda.synchronize = lambda *_: None
_OnCpu().__enter__()

import megatron.core.tensor_parallel.random as _random

_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(sys.argv[1]).parent)
    runpy.run_path(sys.argv[1], run_name="__main__")
