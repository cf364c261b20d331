"""The page kernels compiled for GPUs that are not here: what they need in shared memory, and how wide they read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import STRICT

if find_spec("triton") is None and not STRICT:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

#: What a block may have of an RTX 3090 or 4090 (8.6, 8.9); A100 and H100 have more.
LEAST_SHARED = 99 * 1024

# In a process of its own: kernels that were made for the interpreter are never compiled.
CODE = """
import json, re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from lorastack.torch.pool import PAGE
from lorastack.torch.ways import kernels
from lorastack.torch.ways.launch import BLOCKS, BN, TOGETHER, splits_of, stages_of

capability, dtype, itemsize = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
splits, length = splits_of(4096)

def of(name):
    if name in ("n_slots", "x_stride", "y_stride"):
        return "i32"
    if name in ("part_ptr", "page_scaling", "scale_ptr"):
        return "*fp32"
    return f"*{dtype}" if name in ("x_ptr", "y_ptr", "b_ptr", "a_0", "a_1", "a_2") else "*i32"

def compiled(kernel, constants, warps, stages):
    names = kernel.arg_names
    whole = [n for n in names if n not in constants and n != "n_slots"]
    source = ASTSource(
        kernel, {n: "constexpr" if n in constants else of(n) for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})
    ptx = made.asm["ptx"]
    wide = len(re.findall(r"cp\\.async\\.cg\\.shared\\.global \\[[^]]*\\], \\[[^]]*\\], 0x10", ptx))
    return {
        "shared": made.metadata.shared, "wide": wide + len(re.findall(r"ld\\.global[.\\w]*\\.v4\\.b32", ptx)),
        "narrow": len(re.findall(r"ld\\.global[.\\w]*\\.[bu](?:8|16)\\b", ptx)), "cubin": len(made.asm["cubin"]),
    }

found = {}
for tile, blocks in BLOCKS.items():
    constants = {"K": 4096, "R": PAGE, "BM": tile, "BK": blocks.bk, "KS": length, "LAYERS": TOGETHER}
    found[f"shrink {tile}"] = compiled(kernels.shrink, constants, blocks.shrink_warps, stages_of(itemsize))
    constants = {"N": 4096, "R": PAGE, "BM": tile, "BN": BN, "SPLITS": splits}
    found[f"expand {tile}"] = compiled(kernels.expand, constants, blocks.expand_warps, 2)
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "dtype", "itemsize"), [(89, "bf16", 2), (90, "bf16", 2), (86, "fp32", 4)])
def test_kernels_compile_fit_into_shared_memory_and_read_sixteen_bytes_at_a_time(
    capability: int, dtype: str, itemsize: int, tmp_path: Path
) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", CODE, str(capability), dtype, str(itemsize)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if "ptxas" in done.stderr and not STRICT:
        pytest.skip("triton finds no ptxas, which its wheels for Linux bring along")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found) == 6
    for name, kernel in found.items():
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= LEAST_SHARED, (name, kernel)
        assert kernel["wide"] > 0, (name, kernel)
        assert kernel["narrow"] == 0, (name, kernel)
