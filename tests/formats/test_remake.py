"""Fixtures that other programs wrote are what those programs still write: made again, in places of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["lycoris", "mlx"])
def test_a_program_still_writes_what_it_wrote(tmp_path: Path, program: str) -> None:
    done = subprocess.run(
        ["make", f"fixtures-{program}", f"OUT={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode and any(word in done.stderr for word in ("No matching distribution", "onnection", "resolution")):
        pytest.skip(f"{program} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    own = sorted(path.relative_to(FIXTURES / program) for path in (FIXTURES / program).rglob("*.safetensors"))
    assert own == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    for path in own:
        one, other = load_file(FIXTURES / program / path), load_file(tmp_path / path)
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
        for key, value in one.items():
            np.testing.assert_allclose(other[key], value, rtol=1e-4, atol=1e-4, err_msg=f"{path}: {key}")
