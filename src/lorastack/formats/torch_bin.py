"""Weights that torch.save wrote (adapter_model.bin): a pickle, which only ``torch.load(weights_only=True)`` may touch.

What torch says of a file it refuses is not passed on: it advises to run the code in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lorastack.core.factor import Factor
from lorastack.errors import FormatError, require, shown
from lorastack.formats.heads import refuse_foreign
from lorastack.formats.limits import MAX_NAME, MAX_TENSORS
from lorastack.formats.opened import OpenedFile
from lorastack.formats.pickled import check_pickles
from lorastack.formats.safetensors_file import Info

#: Where training programs keep the state dict inside what they save: Lightning, DeepSpeed, training loops of one's own.
_NESTED = ("state_dict", "module", "model_state_dict", "model")
_STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class TorchBin:
    """The tensors of a pickled state dict, with the same face as `SafetensorsFile`.

    Raises
    ------
    MissingDependencyError
        Without torch.
    FormatError
        When torch refuses it: it is no state dict, or asks to run code.
    """

    def __init__(self, file: OpenedFile) -> None:
        refuse_foreign(file, "torch")
        torch: Any = require("torch", "torch")
        self.path, self.files = file.path, (file,)
        path = file.path
        self.metadata: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        try:
            check_pickles(file)
            with file.stream() as stream:
                state = torch.load(stream, map_location="cpu", weights_only=True)
        except FormatError:
            raise
        except Exception as error:  # torch raises whatever its unpickler meets
            raise FormatError(f"{path}: torch.load(weights_only=True) refuses it: {_why(str(error))}") from None
        state = self._unnested(state)
        if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
            raise FormatError(f"{path}: it holds no state dict of tensors; save the adapter again with PEFT")
        if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in state) or len(state) > MAX_TENSORS:
            raise FormatError(
                f"{path}: it holds {len(state)} tensors with keys such as {shown(next(iter(state)))}; expected at most "
                f"{MAX_TENSORS}, with texts of at most {MAX_NAME} letters"
            )
        # A tensor is a view of its storage, which its strides may repeat without end.
        _check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in state.values()), file.size)
        self._arrays = {name: _to_numpy(torch, tensor, f"{path}: {name}") for name, tensor in state.items()}
        self.tensors: dict[str, Info] = {
            name: (_STORED.get(array.dtype.name, array.dtype.name), array.shape, 0, array.nbytes)
            for name, array in self._arrays.items()
        }

    def _unnested(self, state: Any) -> Any:
        """The state dict inside what a training program saved with it."""
        while isinstance(state, dict):
            inner = [key for key in _NESTED if isinstance(state.get(key), dict)]
            if len(inner) != 1:
                break
            self.notes = (*self.notes, f"the weights were saved under {inner[0]!r}; read from there")
            state = state[inner[0]]
        return state

    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor:
        return Factor.of(self._arrays[name], f"{self.path}: tensor {name}", allow_nonfinite)


def _why(said: str) -> str:
    """What a file is that torch refuses, by the name of what it asks for."""
    asked = re.search(r"GLOBAL ([\w.]+)", said)
    if asked:
        return (
            f"it asks to run {asked[1]}, which is no part of a state dict of tensors, and is not run; "
            "save the adapter again with PEFT, as safetensors"
        )
    return "it holds something else than a state dict of tensors, or is damaged or cut short; fetch or save it again"


def _check_size(path: Path, needed: int, size: int) -> None:
    # Tied weights share a storage: twice the size is nothing unusual.
    if needed > 4 * size:
        raise FormatError(f"{path}: its tensors need {needed} bytes, the file has {size}; save the adapter again")


def _to_numpy(torch: Any, tensor: Any, label: str) -> np.ndarray:
    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantised, or of a type that NumPy lacks
        raise FormatError(f"{label} is {tensor.dtype}, {tensor.layout}: expected a dense float tensor") from error
    array.flags.writeable = False
    return array
