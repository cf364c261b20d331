"""Where a model's weights are: which module computes with a weight, how, in which type."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lorastack.base.architectures import BY_HF
from lorastack.base.model import BaseModel, Use
from lorastack.base.tables import renaming_of_model
from lorastack.core.delta import LoraDelta
from lorastack.torch.bypass import reads_weight
from lorastack.torch.parts import Parts
from lorastack.torch.wrappers import Where, index_of, offloaded_to

_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


class Place(NamedTuple):
    """One weight of a live model.

    ``kind`` says how the module computes with it: ``linear`` (also quantised ones, and transformers'
    Conv1D), ``embedding``, ``conv``, or ``parameter`` (a tensor that the module's own code uses).
    """

    name: str
    module: nn.Module
    parameter: str
    kind: str
    dtype: torch.dtype
    device: torch.device

    def misfit(self, delta: LoraDelta) -> str | None:
        """Why the update does not fit here; None when it does."""
        module: Any = self.module
        if self.kind == "linear":
            have: tuple[int, ...] = linear_features(module)
        elif self.kind == "embedding":
            have = (module.num_embeddings, module.embedding_dim)
        elif self.kind == "conv":
            return _conv_misfit(module, delta)
        else:
            return _parameter_misfit(getattr(module, self.parameter), delta)
        wanted_kind = "embedding" if self.kind == "embedding" else "linear"
        if delta.kind != wanted_kind:
            return f"{type(module).__name__} takes {wanted_kind} factors, the adapter has {delta.kind} ones"
        if have != (delta.in_features, delta.out_features):
            return f"the module is {have[0]} -> {have[1]}, the update {delta.in_features} -> {delta.out_features}"
        return None

    def turned(self, rows: int, columns: int) -> bool:
        """Whether a parameter is the transpose of a product that is ``[..., rows, columns]``.

        Where it is square, a module of experts says so.
        """
        shape = tuple(getattr(self.module, self.parameter).shape)
        if rows != columns:
            return shape[-2:] != (rows, columns)
        return len(shape) == 3 and says_turned(self.module)


class Places:
    """Every weight of a model by name, found when asked for; what wraps a module has no part in its name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if isinstance(model, Parts):
            model.refresh()
        self._index: dict[str, Where] = index_of(model)
        self.modules: dict[str, nn.Module] = {path: where.module for path, where in self._index.items()}
        self._default = _model_dtype(model)
        self._found: dict[str, Place | None] = {}

    def get(self, name: str) -> Place | None:
        """The place of the weight ``name``, as it was when first asked for; None for a name not there."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Place | None:
        path, _, parameter = name.rpartition(".")
        module = self.modules.get(path)
        if module is None:
            return None
        kind = _kind(module, parameter)
        if kind is None:
            return None
        if kind == "linear" and not is_conv1d(module) and reads_weight(*self.parent_of(path)):
            kind = "parameter"
        return Place(name, module, parameter, kind, *self._type_of(module, parameter))

    def parent_of(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds the one at ``path``, and the name it has there."""
        where = self._index[path]
        return where.parent, where.key

    def _type_of(self, module: nn.Module, parameter: str) -> tuple[torch.dtype, torch.device]:
        first = getattr(module, parameter, None)
        if not isinstance(first, torch.Tensor):
            held = (*module._parameters.values(), *module._buffers.values())
            first = next((tensor for tensor in held if tensor is not None), None)
        device = torch.device("cpu") if first is None else first.device
        if device.type == "meta":
            device = offloaded_to(module) or device
        if first is not None and first.dtype in _FLOATS:
            return first.dtype, device
        own = getattr(module, "compute_dtype", None)
        return (own if isinstance(own, torch.dtype) else self._default), device

    def as_base(self) -> BaseModel:
        """The live model as a base: its own class, configuration, names and shapes."""
        model: Any = self.model
        config: Any = getattr(model, "config", None)
        said = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config)) if config is not None else {}
        shapes: dict[str, tuple[int, ...]] = {}
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        for path, module in self.modules.items():
            start = f"{path}." if path else ""
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    shapes[start + name] = tuple(tensor.shape) if tensor.is_floating_point() else ()
                    if (of := first.setdefault(id(tensor), start + name)) != start + name:
                        tied[start + name] = of
            if _kind(
                module, "weight"
            ):  # a quantised module has its weight under other names, and in a shape of its own
                shapes.setdefault(f"{start}weight", ())
        architecture = type(model).__name__
        parts = model.names if isinstance(model, Parts) else ()
        if architecture not in BY_HF and getattr(config, "architectures", None):
            architecture = config.architectures[0]
        return BaseModel(
            type(model).__name__,
            "hf",
            architecture,
            said,
            shapes,
            prefix=getattr(model, "base_model_prefix", None),
            tied=tied,
            renaming=lambda: None if parts else renaming_of_model(model),
            parts=parts,
            use=self._use,
        )

    def _use(self, name: str) -> Use | None:
        place = self.get(name)
        if place is None or place.kind == "conv":
            return None
        if place.kind == "parameter":
            stacked = getattr(place.module, place.parameter).dim() == 3
            return Use("experts", says_turned(place.module)) if stacked else None
        if place.kind == "embedding":
            return Use("embedding", True)
        turned = _keeps_turned(place.module)
        return None if turned is None else Use("linear", turned)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that keeps its weight ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _keeps_turned(module: Any) -> bool | None:
    """Whether a linear layer keeps its weight ``[in, out]``; None where nothing tells, of a square one of any class."""
    if is_conv1d(module) or isinstance(module, nn.Linear):
        return is_conv1d(module)
    n_in, n_out = linear_features(module)
    shape = tuple(getattr(module.weight, "shape", ()))
    return None if n_in == n_out or shape not in ((n_in, n_out), (n_out, n_in)) else shape == (n_in, n_out)


def says_turned(module: nn.Module) -> bool:
    """Whether a module of experts says that it keeps them ``[E, in, out]``."""
    return bool(getattr(module, "is_transposed", False))


def linear_features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    return tuple(module.weight.shape) if is_conv1d(module) else (module.in_features, module.out_features)


def _kind(module: nn.Module, parameter: str) -> str | None:
    if parameter == "weight":
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "conv"
        if is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return "linear"
    weight = module._parameters.get(parameter)
    return "parameter" if weight is not None and weight.dim() in (2, 3) else None


def _model_dtype(model: nn.Module) -> torch.dtype:
    for tensor in model.parameters():
        if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return tensor.dtype
    return torch.float32


def _conv_misfit(module: Any, delta: LoraDelta) -> str | None:
    if delta.kind != "conv":
        return f"{type(module).__name__} takes convolution factors, the adapter has {delta.kind} ones"
    have = (module.in_channels, module.out_channels, tuple(module.kernel_size))
    want = (delta.in_features, delta.out_features, delta.factors[0].shape[2:])
    return None if have == want else f"the convolution is {have}, the update {want} (in, out, kernel)"


def _parameter_misfit(weight: torch.Tensor, delta: LoraDelta) -> str | None:
    shape, plain = tuple(weight.shape), (delta.out_features, delta.in_features)
    wanted = (delta.num_experts, *plain) if delta.num_experts else plain
    turned = (*wanted[:-2], wanted[-1], wanted[-2])
    if delta.kind in ("linear", "experts", "stored") and (
        shape == wanted or (delta.kind == "experts" and shape == turned)
    ):
        return None
    return f"the parameter is {list(shape)}, the update {list(wanted)} ({delta.kind})"
