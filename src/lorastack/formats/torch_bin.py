"""Old PEFT adapters, ``adapter_model.bin``: a pickle, which only ``torch.load(weights_only=True)`` may touch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lorastack.core.factor import Factor
from lorastack.errors import FormatError, require
from lorastack.formats.safetensors_file import Info

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

    def __init__(self, path: Path) -> None:
        torch: Any = require("torch", "torch")
        self.path = path
        self.metadata: dict[str, str] = {}
        size = path.stat().st_size
        try:
            if zipfile.is_zipfile(path):  # torch stores its parts as they are, but would unpack others
                with zipfile.ZipFile(path) as parts:
                    _check_size(path, sum(part.file_size for part in parts.infolist()), size)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FormatError:
            raise
        except Exception as error:  # torch raises whatever its unpickler meets
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FormatError(f"{path}: torch.load(weights_only=True) refuses it: {first}") from error
        if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
            raise FormatError(f"{path}: it holds no state dict of tensors; save the adapter again with PEFT")
        # A tensor is a view of its storage, which its strides may repeat without end.
        _check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in state.values()), size)
        self._arrays = {str(name): _to_numpy(torch, tensor, f"{path}: {name}") for name, tensor in state.items()}
        self.tensors: dict[str, Info] = {
            name: (_STORED.get(array.dtype.name, array.dtype.name), array.shape, 0, array.nbytes)
            for name, array in self._arrays.items()
        }

    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor:
        return Factor.of(self._arrays[name], f"{self.path}: tensor {name}", allow_nonfinite)


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
