"""LyCORIS adapters, against what the real program makes of the layers they were made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorastack import load
from lorastack.core.kronecker import Kronecker
from lorastack.errors import FormatError
from lorastack.inspect import inspect

FILES = Path(__file__).parents[1] / "fixtures" / "lycoris"
CASES = sorted(path.name.removesuffix(".layers.safetensors") for path in FILES.glob("*-r*.layers.safetensors"))


def merged(weight: np.ndarray, update: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """The weight with the update, its rows brought to the magnitude if there is one, in float64."""
    whole = weight.astype(np.float64).reshape(weight.shape[0], -1) + update.reshape(weight.shape[0], -1)
    if magnitude is not None:
        whole *= (magnitude.reshape(-1) / np.linalg.norm(whole, axis=1))[:, None]
    return whole.reshape(weight.shape)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_what_lycoris_makes_of_it(case: str) -> None:
    lora, layers = load(FILES / f"{case}.safetensors"), load_file(FILES / f"{case}.layers.safetensors")
    assert lora.naming == "kohya"
    names = [name.removesuffix(".weight") for name in layers if name.endswith(".weight")]
    for name in names:
        weight, expected, key = layers[f"{name}.weight"], layers[f"{name}.merged"], f"lora_unet_{name}"
        product = lora.extras.get("lokr", {}).get(key)
        if product is not None:
            update = product.rows(0, weight.shape[0], np.float64)
            assert key not in lora.adapters
        else:
            a, b = (factor.astype(np.float64) for factor in (lora.adapters[key].a, lora.adapters[key].b))
            update = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1) * lora.adapters[key].scaling
        magnitude = lora.extras.get("dora", {}).get(key)
        got = merged(weight, update, None if magnitude is None else magnitude.array)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert len(lora.adapters) + len(lora.extras.get("lokr", {})) == len(names)
    assert sum("LoHa" in line for line in inspect(lora).odd) == case.startswith("loha")


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("loha")])
def test_the_rank_of_a_product_of_products_is_the_smallest_that_holds_it(case: str) -> None:
    rank = int(case.rpartition("-r")[2])
    for name, delta in load(FILES / f"{case}.safetensors").adapters.items():
        a, b = delta.factors
        smaller = min(b.shape[0], int(np.prod(a.shape[1:])))
        assert delta.rank == min(rank * rank, smaller), name


@pytest.mark.parametrize("rank", [1, 5, 12, 500])
def test_two_full_factors_are_cut_to_the_best_of_a_rank(rank: int) -> None:
    path = FILES / "lokr-full-r4.safetensors"
    whole, cut = load(path).extras["lokr"], load(path, rank=rank)
    assert not cut.extras
    for name, product in whole.items():
        assert isinstance(product, Kronecker)
        exact = product.rows(0, product.shape[0], np.float64)
        u, s, v = np.linalg.svd(exact, full_matrices=False)
        kept = min(rank, len(s))
        best = (u[:, :kept] * s[:kept]) @ v[:kept]
        delta = cut.adapters[name]
        assert delta.rank <= rank
        np.testing.assert_allclose(delta.dense().reshape(exact.shape), best, atol=1e-5 * s[0])
        _, error = product.best(rank)
        np.testing.assert_allclose(error, np.linalg.norm(s[kept:]) / np.linalg.norm(s), atol=1e-7)
        assert any(
            name in line and f"rank {delta.rank}, relative error {error:.3g}" in line for line in inspect(cut).odd
        )


def test_full_differences_are_kept_as_they_are() -> None:
    lora, layers = load(FILES / "full.safetensors"), load_file(FILES / "full.layers.safetensors")
    for name in ("linear", "norm"):
        for kind, key, part in (("diff", "", ""), ("diff_b", ".bias", "_bias")):
            own = layers[f"{name}.{'bias' if part else 'weight'}"]
            got = own + lora.extras[kind][f"lora_unet_{name}{key}"].array
            np.testing.assert_allclose(got, layers[f"{name}.merged{part}"], atol=1e-6)
    assert not lora.adapters


REFUSED = {
    "on_input": ({"x.weight": (4,), "x.on_input": ()}, "module x has an IA3 update"),
    "oft": ({"x.oft_blocks": (2, 3, 3), "x.alpha": ()}, "module x has an OFT or BOFT update"),
    "glora": ({"x.a1.weight": (2, 4), "x.a2.weight": (4, 2)}, "module x has a GLora update"),
    "columns": (
        {"x.lora_down.weight": (2, 6), "x.lora_up.weight": (5, 2), "x.dora_scale": (1, 6)},
        "a magnitude for each column",
    ),
    "half": ({"x.hada_w1_a": (4, 2), "x.hada_w1_b": (2, 4)}, "of LoHa it lacks hada_w2_a, hada_w2_b"),
    "both": ({"x.lokr_w1": (2, 2), "x.lokr_w1_a": (2, 2), "x.lokr_w2": (2, 2)}, "beside LoKr it has lokr_w1_a"),
    "misfit": (
        {"x.hada_w1_a": (4, 2), "x.hada_w1_b": (2, 4), "x.hada_w2_a": (5, 2), "x.hada_w2_b": (2, 4)},
        "its factors do not fit",
    ),
    "dora of two full": ({"x.lokr_w1": (2, 2), "x.lokr_w2": (2, 2), "x.dora_scale": (4, 1)}, "with a DoRA magnitude"),
    "huge": (
        {f"x.hada_w{n}_{h}": shape for n in "12" for h, shape in (("a", (70000, 300)), ("b", (300, 70000)))},
        "larger than any layer's",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_update_is_refused_by_name(tmp_path: Path, case: str) -> None:
    shapes, said = REFUSED[case]
    if case == "huge":
        header(
            tmp_path / "one.safetensors", {key.replace("x.", "lora_unet_x."): shape for key, shape in shapes.items()}
        )
    else:
        arrays = {key.replace("x.", "lora_unet_x."): np.ones(shape, np.float32) for key, shape in shapes.items()}
        save_file(arrays, tmp_path / "one.safetensors")
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "one.safetensors")
    assert said.replace("module x", "module lora_unet_x") in str(caught.value)
    assert len(caught.value.problems) == 1


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of this size with nothing in it but holes."""
    import json
    import math

    entries, at = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
