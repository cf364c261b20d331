"""Ask transformers, where it is installed, what it calls the weights of a model today: its own conversion tables."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: An older spelling -> today's.
Rename = Callable[[str], str]


def renaming_of_model(model: Any) -> Rename | None:
    """How transformers renames the keys of a file when it loads ``model``; None where it has no such table."""
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return _of_patterns(getattr(model, "_checkpoint_conversion_mapping", None))
    try:
        transforms = get_model_conversion_mapping(model)
    except (AttributeError, TypeError, ValueError, KeyError):  # no model of its own, or of code it does not know
        return None
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]

    def rename(name: str) -> str:
        renamed, converted = rename_source_key(name, renamings, converters)
        return name if converted else renamed  # what changes numbers too, or joins tensors, is no second name

    return rename


class LiveNames(NamedTuple):
    """What a base's class calls its weights: shapes by name, second names of tied ones, prefix, renaming, roles.

    ``roles`` are those of torch's own modules: ``linear``, ``embedding``, ``conv``, and ``other`` for those that do
    more than their kind, and for convolutions in groups, to which no low-rank update of their weight is added.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    prefix: str | None
    rename: Rename | None
    roles: dict[str, str]


def live_names(config: Mapping[str, Any]) -> LiveNames | None:
    """The names that transformers' own class gives the weights of a base that is not loaded; None where it has none.

    The class is built without weights, on the meta device.
    """
    names = config.get("architectures")
    if (
        not isinstance(names, list)
        or not names
        or importlib.util.find_spec("transformers") is None
        or importlib.util.find_spec("torch") is None
    ):
        return None
    import torch
    import transformers

    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        return None
    try:
        said = transformers.AutoConfig.for_model(**_plain(config))
        with torch.device("meta"):
            model = cls(said)
    except Exception:  # whatever a configuration from somewhere makes a class do: then nothing is known
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(weight.shape)
        if first.setdefault(id(weight), name) != name:
            tied[name] = first[id(weight)]
    shapes |= {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in shapes}
    roles = {f"{path}.weight": role for path, module in model.named_modules() if (role := _role(module))}
    return LiveNames(shapes, tied, getattr(model, "base_model_prefix", None), renaming_of_model(model), roles)


def _role(module: Any) -> str | None:
    """What a module's weight is; None of one that is not torch's own, nor transformers' Conv1D."""
    from torch import nn

    if isinstance(module, nn.Embedding):
        looks_up = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if looks_up else "other"
    if isinstance(module, nn.modules.conv._ConvNd):
        plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        return "conv" if module.groups == 1 and plain else "other"
    if isinstance(module, nn.Linear):
        return "linear" if type(module).forward is nn.Linear.forward else "other"
    return "linear" if type(module).__name__ == "Conv1D" else None


def _plain(value: Any) -> Any:
    """A configuration with its infinite numbers, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if list(value) == ["__float__"] else {k: _plain(v) for k, v in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _of_patterns(patterns: Any) -> Rename | None:
    """transformers 4.52 to 4.57: patterns with what stands in their place."""
    if not isinstance(patterns, dict) or not patterns:
        return None

    def rename(name: str) -> str:
        for pattern, live in patterns.items():
            changed, count = re.subn(pattern, live, name)
            if count:
                return changed
        return name

    return rename
