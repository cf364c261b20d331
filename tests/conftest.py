"""Where the reference data is, and what a test needs that a plain machine may lack."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Models here are tiny: on a busy machine, threads that wait for each other take twenty times as long as one. Set before
# torch and NumPy are loaded, and for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Scripts that other programs run, in environments of their own.
collect_ignore_glob = ["fixtures/make_*.py"]

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "examples" / "demo"
#: Set in CI: what a plain machine may lack must be there, and a skip for its sake is a failure.
STRICT = os.environ.get("LORASTACK_TEST_STRICT") == "1"


def lacking(reason: str) -> None:
    """Skip with a reason; fail where everything has to be there."""
    if STRICT:
        pytest.fail(f"must not be skipped here: {reason}")
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The corpus of all that ever got through comes first."""
    items.sort(key=lambda item: item.path.name != "test_corpus.py")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the repository."""
    if not SHARED.is_dir():
        lacking("the reference data is not beside this checkout (../shared/data)")
    return SHARED


@pytest.fixture(scope="session")
def demo() -> Path:
    """The small model and the adapters that come with the repository."""
    return DEMO


@pytest.fixture(scope="session")
def llama_cpp() -> object:
    """The real llama.cpp."""
    if importlib.util.find_spec("llama_cpp") is None:
        lacking("llama-cpp-python is not installed (it needs a C++ compiler: pip install llama-cpp-python)")
    import llama_cpp

    return llama_cpp
