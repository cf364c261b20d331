"""A stack behaves as Python's own collections do: how it is made, gone through, indexed, added, saved and shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load
from lorastack.errors import ArgumentError, NamingError, UnknownNameError

W = "model.layers.0.self_attn.q_proj.weight"


def lora(seed: int, name: str) -> LoadedLora:
    rng = np.random.default_rng(seed)
    return LoadedLora.from_tensors(
        {W: (rng.standard_normal((2, 6)).astype("f4"), rng.standard_normal((4, 2)).astype("f4"))}, name=name, alpha=4
    )


A, B, C = lora(1, "a"), lora(2, "b"), lora(3, "c")
X = np.random.default_rng(9).standard_normal((3, 6))


def dense(*pairs: tuple[LoadedLora, float]) -> np.ndarray:
    return sum(s * d.scaling * X @ d.a.astype("f8").T @ d.b.astype("f8").T for o, s in pairs if (d := o.adapters[W]))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([A, (B, 0.3)], ("a", "b")),
        ({A: 1.0, B: 0.3}, ("a", "b")),
        ({"one": A, "two": (B, 0.3)}, ("one", "two")),
        (LoraStack([(A, 1.0), (B, 0.3)]), ("a", "b")),
        (((one, scale) for one, scale in [(A, 1.0), (B, 0.3)]), ("a", "b")),
        ([[A, 1], (B, np.float32(0.3))], ("a", "b")),
    ],
    ids=["list", "dict", "named", "stack", "generator", "other numbers"],
)
def test_it_is_made_of_whatever_says_adapters_and_scales(given: object, names: tuple[str, ...]) -> None:
    stack = LoraStack(given)  # type: ignore[arg-type]
    assert stack.names == names
    np.testing.assert_allclose(stack.apply(W, X, 4), dense((A, 1.0), (B, 0.3)), rtol=1e-6)


@pytest.mark.parametrize("given", [A, [A, 0.5], ["a"], [(A, 1.0, 2)], {1: 2.0}, [(A, "much")]])
def test_what_it_cannot_be_made_of_is_said(given: object) -> None:
    with pytest.raises((ArgumentError, TypeError)) as caught:
        LoraStack(given)  # type: ignore[arg-type]
    assert isinstance(caught.value, ArgumentError)


def test_it_is_gone_through_and_indexed() -> None:
    stack = LoraStack([A, (B, 0.3), (C, -1.0)])
    assert list(stack) == [(A, 1.0), (B, 0.3), (C, -1.0)] == list(LoraStack(stack))
    assert stack[1] == stack["b"] == (B, 0.3)
    assert stack[-1] == (C, -1.0)
    assert stack[1:].names == ("b", "c")
    assert "b" in stack
    assert "z" not in stack
    with pytest.raises(IndexError):
        stack[3]
    with pytest.raises(UnknownNameError, match="there are: a, b, c"):
        stack["z"]


def test_stacks_and_adapters_add_up() -> None:
    for both in (A + B, LoraStack([A]) + B, LoraStack([A]) + LoraStack([B]), sum([LoraStack([A]), LoraStack([B])])):
        assert both.names == ("a", "b")
        np.testing.assert_allclose(both.apply(W, X, 4), dense((A, 1.0), (B, 1.0)), rtol=1e-6)
    left = LoraStack([A])
    assert (left + B, left.names)[1] == ("a",), "neither is changed"
    assert (A + A).names == ("a", "a#2")
    with pytest.raises(TypeError):
        left + 3  # type: ignore[operator]
    gguf = LoadedLora.from_tensors({"blk.0.attn_q.weight": (np.ones((1, 6)), np.ones((4, 1)))})
    with pytest.raises(NamingError):
        left + gguf


def test_the_second_list_adds_up_too() -> None:
    class Mine:
        rank, alpha, target_modules = 1, 1.0, ()

        def delta(self, target: object, layer: int) -> None:
            return None

    one, two = LoraStack([A]), LoraStack()
    two.push_adapter(Mine())
    assert len((one + two).adapters) == 1
    assert len(one.adapters) == 0


def test_a_stack_is_saved_as_its_sum(tmp_path: Path) -> None:
    stack = LoraStack([(A, 0.5), (B, -2.0)])
    assert stack.save(tmp_path / "both") == tmp_path / "both"
    found = LoraStack([load(tmp_path / "both")])
    np.testing.assert_allclose(found.apply(W, X, 4), dense((A, 0.5), (B, -2.0)), rtol=1e-5)
    with pytest.raises(ArgumentError, match="force"):
        stack.save(tmp_path / "both")
    stack.save(tmp_path / "both", force=True, dtype="fp16")


def test_a_notebook_shows_a_table_without_markup_from_names() -> None:
    shown = LoraStack([(A.renamed("<script>\x1b"), 0.5)])._repr_html_()
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert "<td>0.5</td><td>&lt;script&gt;\\x1b</td><td>1</td><td>2</td>" in shown
    assert "<td>Hugging Face</td>" in A._repr_html_()


def test_select_that_matches_nothing_refuses_as_scaled_does() -> None:
    for call in (lambda: A.select("blk.*"), lambda: A.scaled({"blk.*": 2.0})):
        with pytest.raises(ArgumentError, match=r"a: no weight matches .*blk.*; its weights are named"):
            call()
