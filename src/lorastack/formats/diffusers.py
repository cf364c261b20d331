"""Read diffusers' files: ``unet.``, ``transformer.`` or ``text_encoder.`` before a path, in any of its spellings.

The spellings are those of diffusers/utils/state_dict_utils.py; the scaling is 1 unless the header's
``lora_adapter_metadata`` has the fields of a PEFT configuration for the component, or the file alphas.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import orjson

from lorastack.core.adapter import LoadedLora
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.kohya import made
from lorastack.formats.limits import MAX_JSON, parsed_size_problem
from lorastack.formats.modules import Modules
from lorastack.formats.peft_config import PeftConfig, parse_config
from lorastack.formats.tensors import Tensors

#: Where a file keeps its scalings.
METADATA_KEY = "lora_adapter_metadata"
#: What a pipeline calls its models that adapters change.
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
#: The first part of a path inside a UNet, which files of attention processors begin with.
_OF_UNET = frozenset("down_blocks up_blocks mid_block conv_in conv_out time_embedding add_embedding".split())
_OLD = re.compile(r"\.to_(q|k|v|out)_lora$")
_OLD_OF_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
#: DoRA of old files is at ``to_out``, their factors at ``to_out_lora``.
_WITHOUT_NUMBER = re.compile(r"\.to_out$")


def load(
    tensors: Tensors,
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
) -> LoadedLora:
    """The adapter in an open file: the header is checked, factors and alphas stay in the file.

    Raises
    ------
    FormatError
        Listing every tensor that is no part of an update read here, and every field that is not honoured.
    """
    problems = Problems(f"cannot load {tensors.path}")
    configs = _configs(tensors, problems, ignore)
    fields = _Scalings(configs, tensors, problems) if configs else None
    modules = Modules(tensors, weight_of, allow_nonfinite, problems, fields.of if fields else None)
    for component, config in configs.items():
        _check_dora(component, config, modules, problems)
    problems.raise_any(FormatError)
    lora = made(tensors, modules, "hf", "diffusers", name)
    alphas = {config.alpha for config in configs.values()}
    return replace(lora, file_alpha=alphas.pop() if len(alphas) == 1 else None)


def weight_of(module: str) -> str:
    """A weight's name, today's spelling of a module of any.

    >>> weight_of("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora")
    'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight'
    >>> weight_of("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora")
    'text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight'
    """
    path = module.replace(".processor.", ".")
    first = path.partition(".")[0]
    if first not in COMPONENTS:
        first = "unet" if first in _OF_UNET else "text_encoder" if first == "text_model" else "transformer"
        path = f"{first}.{path}"
    if old := _OLD.search(path):
        part = _OLD_OF_TEXT[old[1]] if first.startswith("text_encoder") else f"to_{old[1]}"
        path = f"{path[: old.start()]}.{part}" + (".0" if part == "to_out" else "")
    return f"{_WITHOUT_NUMBER.sub('.to_out.0', path)}.weight"


def _configs(tensors: Tensors, problems: Problems, ignore: Collection[str]) -> dict[str, PeftConfig]:
    """Component -> its configuration, out of the header; empty where there is none."""
    text = tensors.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    raw = text.encode(errors="surrogatepass")
    where = f"{tensors.path}: {METADATA_KEY} in the header"
    problem = parsed_size_problem(raw, len(raw)) or (f"it has {len(raw)} bytes" if len(raw) > MAX_JSON else None)
    try:
        said = None if problem else orjson.loads(raw)
    except ValueError as error:
        problem = f"it is no JSON ({error})"
        said = None
    if problem or not isinstance(said, dict):
        problems.add(f"{where}: {problem or 'it is no JSON object'}")
        return {}
    fields: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, _, field = key.partition(".")
        if not field:
            problems.add(f"{where} has {shown(key)}, expected a component's field such as unet.r")
        elif value is not None:
            fields.setdefault(component, {})[field] = value
    found = {}
    for component, own in fields.items():
        config = parse_config({"peft_type": "LORA", **own}, f"{where}: {component}", problems, ignore)
        if config is not None:
            found[component] = config
    return found


def _check_dora(component: str, config: PeftConfig, modules: Modules, problems: Problems) -> None:
    """Whether the magnitudes there are are those that the configuration of a component speaks of."""
    has = {name for name in modules.extras.get("dora", ()) if name.startswith(f"{component}.")}
    wants = {name for name in modules.how if name.startswith(f"{component}.")} if config.raw.get("use_dora") else set()
    for weight in sorted(has ^ wants):
        why = "is set, but it has no magnitude" if weight in wants else "is not set, but it has a magnitude"
        problems.add(f"{modules.tensors.path}: {weight}: use_dora of {component} {why}; save the adapter again")


class _Scalings:
    """The scaling of each weight by the configuration of its component, and whether its rank is the one said there."""

    def __init__(self, configs: Mapping[str, PeftConfig], tensors: Tensors, problems: Problems) -> None:
        self._configs, self._tensors, self._problems = configs, tensors, problems

    def of(self, weight: str, rank: int) -> float | None:
        component, _, path = weight.removesuffix(".weight").partition(".")
        config = self._configs.get(component)
        if config is None:
            return None
        said = config.rank_of(path)
        if said != rank:
            self._problems.add(
                f"{self._tensors.path}: module {component}.{path} has rank {rank}, {METADATA_KEY} says {said} (r or "
                "rank_pattern), on which the scaling depends"
            )
            return None
        return config.scaling_of(path)
