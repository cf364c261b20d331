"""The fuzzers themselves: some of their inputs in every run of the tests, and faults that they have to find."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from lorastack import LoadedLora, load
from lorastack.errors import FormatError, LoraStackWarning
from tests.fuzz import guard, seeds
from tests.fuzz.guard import Finding, answer, workplace
from tests.fuzz.mutator import mutated
from tests.fuzz.peers import check_against_gguf, check_against_peft
from tests.fuzz.targets import CONFIG, TARGETS, WEIGHTS, put, read

MUTANTS = 100


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_read_or_refused(target: str) -> None:
    if target == "pickled":
        pytest.importorskip("torch")
    work, make_seeds, form = TARGETS[target]
    rng, pool, said = random.Random(f"{target} 1"), list(make_seeds()), set()
    with workplace() as empty:
        for _ in range(MUTANTS):
            data = mutated(rng.choice(pool), pool, form, rng)
            said.add(answer(work, data, empty()))
    assert len(said) > 3, "all are refused for one reason: the mutants are not worth much"


def test_mutants_depend_on_the_seed_alone() -> None:
    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutated(target.seeds()[0], [], target.form, rng) for target in TARGETS.values() if target.seeds()]

    assert some(1) == some(1)
    assert some(1) != some(2)


# ---- faults that have to be found -----------------------------------------------------------------


def raises(_: bytes, __: Path) -> None:
    raise ValueError("not ours")


def works_for_long(_: bytes, __: Path) -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # what no handler may keep
            raise AssertionError from None


def takes_memory(_: bytes, __: Path) -> None:
    np.ones(100 << 17)


def warns(_: bytes, __: Path) -> None:
    np.float32(1) / np.float32(0)


def quotes_the_file(data: bytes, _: Path) -> None:
    warnings.warn(data.decode(), LoraStackWarning, stacklevel=1)


def says_much(_: bytes, __: Path) -> None:
    raise FormatError("a line\n" * 1000)


def is_wrong(_: bytes, __: Path) -> None:
    raise AssertionError("0.1 further")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (raises, "ValueError in test_mutants.py"),
        (works_for_long, "it takes more than 0.2 s, in test_mutants.py"),
        (takes_memory, "MiB of memory for 7 bytes"),
        (warns, "a warning that is not ours: RuntimeWarning in test_mutants.py"),
        (quotes_the_file, r"a message holds \['\\x1b'\]"),
        (says_much, "a message has 7000 letters"),
        (is_wrong, "it is wrong: 0.1 further"),
    ],
)
def test_a_fault_is_found(
    work: Callable[[bytes, Path], None], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if work is takes_memory and sys.platform != "linux":
        pytest.skip("only Linux tells the peak of a process' memory")
    if work is works_for_long:
        monkeypatch.setattr(guard, "SECONDS", 0.2)
    with pytest.raises(Finding, match=said):
        answer(work, b"\x1b[2Jabc", tmp_path)


def test_ours_is_no_finding(tmp_path: Path) -> None:
    def refuses(data: bytes, _: Path) -> None:
        warnings.warn("as asked for, and yet", LoraStackWarning, stacklevel=1)
        raise FormatError(f"{data!r} is no adapter")

    assert answer(refuses, b"x" * 9, tmp_path) == answer(refuses, b"y", tmp_path)


def test_the_command_runs_a_target_for_its_time(tmp_path: Path) -> None:
    words = ["run", "--engine", "mutator", "--target", "mixture", "--seconds", "1", "--findings", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 targets by mutator, 1 s each, seed 0" in done.stdout
    assert "nothing found" in done.stdout


# ---- numbers may be anything ----------------------------------------------------------------------


def test_a_flip_among_numbers_leaves_all_else_as_it_was() -> None:
    rng = random.Random(0)
    with workplace() as empty:
        for _ in range(75):
            folder = empty()
            sound, flipped = folder / "sound.gguf", folder / "flipped.gguf"
            sound.write_bytes(seeds.gguf_adapter())
            flipped.write_bytes(_flipped(seeds.gguf_adapter(), gguf.GGUFReader(sound).data_offset, rng))
            lora = read(flipped)
            check_against_gguf(flipped, lora)
            _same_but_for_one(lora, load(sound))
        for _ in range(75):
            folder, weights = empty(), seeds.safetensors()
            start = 8 + int.from_bytes(weights[:8], "little")
            made = [put(folder / name, {CONFIG: seeds.config(), WEIGHTS: data})
                    for name, data in (("sound", weights), ("flipped", _flipped(weights, start, rng)))]  # fmt: skip
            lora = read(made[1])
            check_against_peft(made[1], lora)
            _same_but_for_one(lora, load(made[0]))


def _flipped(data: bytes, start: int, rng: random.Random) -> bytes:
    out = bytearray(data)
    out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _same_but_for_one(lora: LoadedLora, sound: LoadedLora) -> None:
    """The same names, shapes, scalings and metadata; at most one array with other numbers."""
    assert lora.metadata == sound.metadata
    assert [list(values) for values in lora.extras.values()] == [list(values) for values in sound.extras.values()]
    assert list(lora.adapters) == list(sound.adapters)
    others = 0
    for name, delta in lora.adapters.items():
        twin = sound.adapters[name]
        assert (delta.scaling, delta.kind) == (twin.scaling, twin.kind)
        assert [f.shape for f in delta.factors] == [f.shape for f in twin.factors]
        others += not np.array_equal(delta.a, twin.a, equal_nan=True)
        others += not np.array_equal(delta.b, twin.b, equal_nan=True)
    assert others <= 1
