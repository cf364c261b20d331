"""Numbers are finite where they compute, and what is written holds what it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lorastack import LoadedLora, LoraDelta, LoraStack, load, save
from lorastack.core.dtypes import cast, numpy_type
from lorastack.errors import ArgumentError, FormatError, LoraStackError, ShapeError

W = "blk.{}.attn_q.weight"


def adapter(b: float, rank: int = 2, count: int = 1, width: int = 6, dtype: str = "f4", **options: Any) -> LoadedLora:
    """A GGUF adapter of ``count`` weights of different rank, A all ones, B all ``b``."""
    tensors = {
        W.format(k): (np.ones((rank + k, width), dtype), np.full((width, rank + k), b, dtype)) for k in range(count)
    }
    one = LoadedLora.from_tensors(tensors, naming="gguf", **options)
    return replace(one, metadata={"general.architecture": "llama"})


LOST = {
    "a scaling beyond float32": (lambda: adapter(1).scaled(1e39), {}, "values up to 1e.39 do not fit float32"),
    "a scaling folded into B": (
        lambda: adapter(1e20, count=2).scaled(1e30),
        {},
        "to 1e.50 do not fit float32",
    ),
    "q8_0 whose scale overflows": (lambda: adapter(9e6, 32, width=32), {"dtype": "q8_0"}, "9e.06 do not fit q8_0"),
    "q8_0 whose scale vanishes": (
        lambda: adapter(1e-9, 32, width=32),
        {"dtype": "q8_0"},
        "all become zero in q8_0",
    ),
    "f16 that overflows": (lambda: adapter(7e4), {"dtype": "f16"}, "values up to 70000 do not fit float16"),
    "f16 that vanishes": (lambda: adapter(1e-9), {"dtype": "f16"}, "values up to 1e-09 all become zero in float16"),
    "bf16 that overflows": (lambda: adapter(3.4e38), {"dtype": "bf16"}, "do not fit bfloat16"),
    "bf16 that vanishes": (lambda: adapter(1e-42), {"dtype": "bf16"}, "all become zero in bfloat16"),
    "a scaling that makes zeros": (lambda: adapter(1e-30, count=2).scaled(1e-30), {}, "all become zero in float32"),
    "float64 beyond float32": (lambda: adapter(1e300, dtype="f8"), {}, "values up to 1e.300 do not fit float32"),
}


@pytest.mark.parametrize("name", LOST)
def test_gguf_that_would_lose_values_is_not_written(name: str, tmp_path: Path) -> None:
    make, options, said = LOST[name]
    with pytest.raises(FormatError, match=said):
        save(make(), tmp_path / "x.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_that_would_lose_values_is_listed(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        save(adapter(7e4, count=3), tmp_path / "x.gguf", dtype="f16")
    assert [W.format(k) + ".lora_B" in str(caught.value) for k in range(3)] == [True] * 3


def test_peft_that_would_lose_values_is_not_written(tmp_path: Path) -> None:
    for value, said in ((1e300, "do not fit float32"), (1e-300, "all become zero in float32")):
        one = LoadedLora.from_tensors({"q.weight": (np.full((2, 6), value), np.ones((5, 2)))})
        with pytest.raises(FormatError, match=said):
            save(one, tmp_path / "x")
    plain = LoadedLora.from_tensors({"q.weight": (np.ones((2, 6)), np.ones((5, 2)))})
    with pytest.raises(FormatError, match=r"its alpha would be 2e.39, which float32 cannot hold"):
        save(plain.scaled(1e39), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", [1e15, 1e16, 1e18, 1e19, 1e20, 1e37, 1e-20, 1e-37])
def test_large_and_small_alphas_are_written_and_read_again(scale: float, tmp_path: Path) -> None:
    one = LoadedLora.from_tensors({"q.weight": (np.ones((2, 6), "f4"), np.ones((5, 2), "f4"))}, alpha=4)
    save(LoraStack([(one, scale)]).bake(), tmp_path / "x")
    assert load(tmp_path / "x").adapters["q.weight"].scaling == pytest.approx(2 * scale, rel=1e-12)
    save(LoraStack([(adapter(1, alpha=4), scale)]).bake(), tmp_path / "x.gguf", architecture="llama")
    alpha = gguf.GGUFReader(tmp_path / "x.gguf").fields["adapter.lora.alpha"].contents()
    again = load(tmp_path / "x.gguf").adapters[W.format(0)]
    assert again.scaling * float(again.b[0, 0]) == pytest.approx(2 * scale, rel=1e-6), alpha


def test_what_was_zero_before_is_written(tmp_path: Path) -> None:
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        save(adapter(0, 32, width=32), tmp_path / f"{dtype}.gguf", dtype=dtype)
        assert not load(tmp_path / f"{dtype}.gguf").adapters[W.format(0)].b.any()
    save(adapter(1, count=2).scaled(0), tmp_path / "zero.gguf")
    assert not load(tmp_path / "zero.gguf").adapters[W.format(1)].dense().any()


def test_nothing_is_lost_where_only_a_part_is_too_small(tmp_path: Path) -> None:
    b = np.full((6, 2), 1e-9, np.float32)
    b[5, 1] = 1
    one = replace(adapter(1), adapters={W.format(0): LoraDelta(np.ones((2, 6), np.float32), b)})
    save(one, tmp_path / "x.gguf", dtype="f16")
    assert load(tmp_path / "x.gguf").adapters[W.format(0)].b[5, 1] == 1


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, "bf16"])
@pytest.mark.parametrize("times", [1.0, 0.37, 1e-300, 1e-42, 1e30, 1e300])
@pytest.mark.parametrize("size", [100, 1 << 17])
def test_casting_rounds_once_from_what_holds_it(source: Any, times: float, size: int) -> None:
    dtype = numpy_type("bf16") if source == "bf16" else np.dtype(source)
    rng = np.random.default_rng(0)
    array = rng.standard_normal(size).astype(dtype)
    if dtype == np.float64:
        array = (array / times).astype(dtype) if times > 1e100 or times < 1e-100 else array
    true = array.astype(np.longdouble) * np.longdouble(times)
    for to in (np.dtype(np.float32), np.dtype(np.float16), numpy_type("bf16")):
        top = {"float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}[to.name]
        least = {"float32": 1e-45, "float16": 5.9e-8, "bfloat16": 9e-41}[to.name]
        most = float(np.abs(true).max())
        if most > top * 1.001 or most < least / 2:
            with pytest.raises(FormatError, match="do not fit" if most > top else "all become zero"):
                cast(array, times, to, "x")
            continue
        found = cast(array, times, to, "x").astype(np.longdouble)
        step = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[to.name]
        assert np.all(np.abs(found - true) <= np.abs(true) * step + least)


# ---- numbers that compute -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1j, np.complex64(1j), "x", None, [1, 2],
                                 np.datetime64("2020-01-01"), np.timedelta64(5, "s"), 10**400])  # fmt: skip
def test_a_number_that_is_none_is_refused(bad: Any) -> None:
    a, b = np.ones((2, 6)), np.ones((5, 2))
    with pytest.raises(ArgumentError, match="a scaling is a"):
        LoraDelta(a, b, bad)
    one = LoadedLora.from_tensors({"w": (a, b)})
    with pytest.raises(ArgumentError, match="a scale is a"):
        LoraStack([(one, bad)])
    if bad is not None:
        with pytest.raises(ArgumentError, match="an alpha is a"):
            LoadedLora.from_tensors({"w": (a, b)}, alpha=bad)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "datetime64[s]", "timedelta64[s]", "U3", "O", "S2"])
def test_an_array_of_no_floats_is_refused(dtype: str) -> None:
    with pytest.raises(ShapeError, match="not a float array"):
        LoraDelta(np.zeros((2, 6), dtype), np.ones((5, 2)))
    with pytest.raises(ShapeError, match="not a float array"):
        LoadedLora.from_tensors({"w": (np.ones((2, 6)), np.zeros((5, 2), dtype))})


def test_lists_of_several_lengths_are_refused() -> None:
    with pytest.raises(ShapeError, match="not a float array"):
        LoraDelta([[1, 2], [3]], np.ones((5, 2)))  # type: ignore[arg-type]


def test_a_product_beyond_the_type_that_computes_is_refused() -> None:
    one = LoadedLora.from_tensors({"w": (np.ones((2, 6), "f4"), np.ones((5, 2), "f4"))}, alpha=2e30)
    stack = LoraStack([(one, 1e20)])
    with pytest.raises(ArgumentError, match=r"scale 1e\+20 times the scaling 1e\+30 is more than float32 holds"):
        stack.apply("w", np.ones(6, np.float32), 5)
    np.testing.assert_allclose(stack.apply("w", np.ones(6), 5), 12e50, rtol=1e-12)
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        one.adapters["w"].apply(np.ones(6, np.float32), 1e20)
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        one.scaled(1e10).adapters["w"].dense()
    with pytest.raises(LoraStackError, match="finite"):
        one.scaled(1e300).scaled(1e300).adapters["w"]


def test_float64_factors_beyond_float32_are_refused_there_and_used_in_float64() -> None:
    one = LoadedLora.from_tensors({"w": (np.full((2, 6), 1e200), np.full((5, 2), 1e-200))})
    stack = LoraStack([(one, 1.0)])
    np.testing.assert_allclose(stack.apply("w", np.ones(6), 5), 12, rtol=1e-12)
    for use in (lambda: stack.apply("w", np.ones(6, np.float32), 5), one.adapters["w"].dense):
        with pytest.raises(FormatError, match=r"lora_A: values up to 1e.200 do not fit float32"):
            use()


def test_a_name_that_is_no_text_is_an_error_of_ours(tmp_path: Path) -> None:
    bad = b"ad\xff".decode(errors="surrogateescape")
    for make, name in ((lambda: adapter(1).renamed(bad), "x.gguf"), (lambda: adapter(1, name=bad), "y.gguf")):
        with pytest.raises(FormatError, match=r"no text that UTF-8 holds|only texts that UTF-8 holds"):
            save(make(), tmp_path / name)
    odd = LoadedLora.from_tensors({f"{bad}.weight": (np.ones((2, 6)), np.ones((5, 2)))})
    with pytest.raises(FormatError, match="the name is no text that UTF-8 holds"):
        save(odd, tmp_path / "z", recipe=False)
