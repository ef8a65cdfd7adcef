"""A GPU that is not there: its tensors say that they are CUDA tensors and compute on the CPU.

What CUDA refuses is refused: operations on tensors of both devices, NumPy's look at one of the
GPU. What the host would have to wait for is counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
    "unique_consecutive", "_unique2", "unique_dim",
}  # fmt: skip


class GpuTensor(Tensor):
    """Around a CPU tensor. To C++ it lies on the `meta` device, whose backward needs no GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("meta"),
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore
        return GPU

    @property
    def is_cuda(self) -> bool:  # pyright: ignore
        return True

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: the fake GPU is gone")


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [isinstance(x, GpuTensor) for x in tensors]
        if any(on_gpu):
            _refuse_mixtures(func, name, tensors, on_gpu)
        target = kwargs.get("device")
        if target is None:
            to_gpu = on_gpu[0] if name == "copy_" else any(on_gpu)
        else:
            # A tensor made like another one asks for the device that C++ sees.
            to_gpu = torch.device(target).type in ("cuda", "meta")
            kwargs["device"] = "cpu"
        if any(on_gpu) and (name in _WAITING or (name in _COPIES and not to_gpu)):
            self.waits[name] += 1
        result = func(*tree_map(_take, args), **tree_map(_take, kwargs))
        if not to_gpu:
            return result
        result = tree_map(lambda x: GpuTensor(x) if isinstance(x, Tensor) else x, result)
        aliases = any(on_gpu) and target is None
        return return_and_correct_aliasing(func, args, kwargs, result) if aliases else result


class _Functions(TorchFunctionMode):
    """What makes tensors without being dispatched, or asks C++ for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func is Tensor.new_tensor and isinstance(args[0], GpuTensor):
            return torch.tensor(*args[1:], dtype=args[0].dtype).to(GPU)
        if func is Tensor.to and isinstance(args[1], Tensor):
            return args[0].to(device=args[1].device, dtype=args[1].dtype)
        if func is Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """Draws on the CPU whatever it is made for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # pyright: ignore


@contextmanager
def fake_gpu() -> Iterator[Counter[str]]:
    """While it lasts `GPU` can be used; counts the operations for which the host waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        # It would change what this CPU computes, where it has instructions for it.
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        with _Functions(), _Operations() as operations:
            yield operations.waits


def _take(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def _refuse_mixtures(func: Any, name: str, tensors: list[Tensor], on_gpu: list[bool]) -> None:
    """CUDA takes numbers that lie on the CPU, and indices; all else must lie where the first
    tensor does."""
    if name in _COPIES:
        return
    on_cpu = [x for x, gpu in zip(tensors, on_gpu, strict=True) if not gpu and x.ndim]
    if name in _INDEXING and on_gpu[0]:
        on_cpu = [x for x in on_cpu if x.dtype not in (torch.int64, torch.bool)]
    changed = func._schema.is_mutable and not on_gpu[0]
    if on_cpu or changed or (name == "cat" and not all(on_gpu)):
        shapes = [(*x.shape, x.device.type) for x in tensors]
        raise RuntimeError(f"{func}: tensors of two devices: {shapes}")
