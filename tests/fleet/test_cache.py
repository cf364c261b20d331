"""The cache: exact sums, baked once among processes; what is leased stays, what is not makes room."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorastack import load
from lorastack.errors import ArgumentError, LoraStackError, NamingError, UnknownNameError, UnsupportedError
from lorastack.files import OutputError
from lorastack.fleet import Baking, CacheFullError, MixtureCache, baking
from lorastack.fleet import cache as module
from lorastack.fleet.answers import status_of
from tests.fleet.makers import WEIGHTS, adapter, dense, library

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no such file locks")


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    return library(tmp_path / "loras")


def cache(place: Path, loras: Path, demo: Path, **options: Any) -> MixtureCache:
    own = {key: options.pop(key) for key in ("max_rank", "tolerance", "uniform", "target") if key in options}
    return MixtureCache(place, loras, Baking(demo / "base", **own), **options)


def folders(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if path.name != ".lorastack"}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_mixture_is_the_dense_sum(tmp_path: Path, loras: Path, demo: Path) -> None:
    found = cache(tmp_path / "cache", loras, demo).get("a2:0.25+a0:0.7+a1:-1.5")
    for weight in WEIGHTS:
        true = sum(scale * dense(loras / name, weight) for name, scale in (("a0", 0.7), ("a1", -1.5), ("a2", 0.25)))  # type: ignore[assignment]
        np.testing.assert_allclose(dense(found, weight), true, rtol=0, atol=2e-5 * np.abs(true).max())


def test_gguf_adapters_and_recipes_are_served_beside_peft_folders(tmp_path: Path, loras: Path, demo: Path) -> None:
    (loras / "excited.gguf").write_bytes((demo / "excited.gguf").read_bytes())
    (loras / "calm.toml").write_text(
        '[[adapter]]\nsource = "a1"\nscale = -0.5\n[[adapter]]\nsource = "excited.gguf"\nscale = 2\n'
    )
    found = load(cache(tmp_path / "cache", loras, demo).get("calm:0.5+a0"))
    # llama.cpp's order of q_proj's rows, rotary pairs side by side, undone by hand.
    raw = load(demo / "excited.gguf").adapters["blk.0.attn_q.weight"].dense().astype(np.float64)
    excited = raw.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    name = next(iter(WEIGHTS))
    true = dense(loras / "a0", name) - 0.25 * dense(loras / "a1", name) + excited
    np.testing.assert_allclose(found.adapters[name].dense(), true, rtol=0, atol=2e-5 * np.abs(true).max())


def test_a_head_that_is_tied_can_be_adapted(tmp_path: Path, loras: Path, demo: Path) -> None:
    from lorastack import LoadedLora

    pair = np.ones((2, 64), np.float32), np.ones((512, 2), np.float32)
    LoadedLora.from_tensors({"lm_head.weight": pair}, naming="hf").save(loras / "head")
    assert "lm_head.weight" in load(cache(tmp_path / "cache", loras, demo).get("head+a0")).adapters


def test_all_spellings_are_one_file_and_a_replaced_adapter_is_another(tmp_path: Path, loras: Path, demo: Path) -> None:
    own = cache(tmp_path / "cache", loras, demo)
    path = own.get("a1:0.5+a0")
    raw = (path / "adapter_model.safetensors").read_bytes()
    assert own.get("a0:1.0+a1:.25+a1:0.250") == path
    fresh = cache(tmp_path / "other", loras, demo).get("a0+a1:0.5")
    assert (fresh.name, (fresh / "adapter_model.safetensors").read_bytes()) == (path.name, raw)
    adapter(9).save(loras / "a0", force=True)
    assert own.get("a0+a1:0.5") != path
    assert path.is_dir()  # an engine may read it again


def test_a_repeated_request_bakes_and_opens_nothing(
    tmp_path: Path, loras: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cache(tmp_path / "cache", loras, demo)
    path = own.get("a0+a1")
    monkeypatch.setattr("lorastack.formats.opened._open", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(module, "save", lambda *_, **__: pytest.fail("it was baked again"))
    assert own.get("a0+a1") == path
    assert cache(tmp_path / "cache", own.library, demo).get("a1+a0") == path


def test_a_uniform_adapter_has_one_rank_and_no_patterns(tmp_path: Path, loras: Path, demo: Path) -> None:
    adapter(7, rank=2, alpha=3, weights=1).save(loras / "few")
    for target, options in (("vllm", {"uniform": True}), ("sglang", {})):
        found = cache(tmp_path / target, loras, demo, target=target, **options).get("a0:0.5+few:2")
        for weight in WEIGHTS:  # which looks that there are no patterns
            true = 0.5 * dense(loras / "a0", weight) + 2 * dense(loras / "few", weight)
            np.testing.assert_allclose(dense(found, weight), true, rtol=0, atol=2e-5 * np.abs(true).max())


def test_a_rank_beyond_the_engines_is_refused_unless_an_error_is_allowed(
    tmp_path: Path, loras: Path, demo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnsupportedError, match=r"has rank 8, vLLM was started for 4; start vLLM with a maximum rank"):
        cache(tmp_path / "a", loras, demo, max_rank=4).get("a0+a1")
    with pytest.raises(UnsupportedError, match=r"cut to that it would be [0-9.]+% off, and 1\.00% are allowed"):
        cache(tmp_path / "b", loras, demo, max_rank=4, tolerance=0.01).get("a0+a1")
    found = cache(tmp_path / "c", loras, demo, max_rank=4, tolerance=0.9).get("a0+a1")
    assert "a0:1+a1:1 was cut to rank 4, which costs a relative error of" in caplog.text
    said = float(caplog.text.split("error of ")[1].split()[0])
    true = np.concatenate([dense(loras / "a0", w).ravel() + dense(loras / "a1", w).ravel() for w in WEIGHTS])
    cut = np.concatenate([dense(found, weight).ravel() for weight in WEIGHTS])
    assert np.linalg.norm(cut - true) / np.linalg.norm(true) == pytest.approx(said, rel=0.01)
    assert cache(tmp_path / "d", loras, demo, max_rank=8).get("a0+a1").is_dir()


def test_what_cannot_be_baked_leaves_nothing(tmp_path: Path, loras: Path, demo: Path) -> None:
    from lorastack import LoadedLora

    bad = np.full((4, 64), np.nan, np.float32), np.ones((64, 4), np.float32)
    LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": bad}, naming="hf", allow_nonfinite=True).save(
        loras / "nan"
    )
    pair = np.ones((2, 5), np.float32), np.ones((7, 2), np.float32)
    LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}, naming="hf").save(loras / "other")
    own = cache(tmp_path / "cache", loras, demo)
    for name, kind in (("nan", LoraStackError), ("other", NamingError), ("nobody", UnknownNameError),
                       ("a0:0", ArgumentError)):  # fmt: skip
        with pytest.raises(kind):
            own.get(name)
    assert folders(tmp_path / "cache") == set()
    assert own.leased == 0


def test_the_longest_unused_goes_and_the_new_one_counts(tmp_path: Path, demo: Path) -> None:
    loras, place = library(tmp_path / "loras", rank=64), tmp_path / "cache"
    most = 3 * baking.bytes_of(adapter(0, rank=64))
    own = cache(place, loras, demo, max_bytes=most)
    paths = {}
    for n, name in enumerate(("a0", "a1", "a2")):
        paths[name] = own.get(name)
        own.give_back(name)
        os.utime(paths[name], (1000 + n, 1000 + n))
    assert len(folders(place)) == 3
    own.get("a0")  # used again: a1 is the longest unused now
    own.give_back("a0")
    new = own.get("a2:2")
    assert folders(place) == {paths["a0"].name, paths["a2"].name, new.name}
    assert sum(map(size_of, (paths["a0"], paths["a2"], new))) <= most


def test_a_leased_folder_stays_and_a_full_cache_says_so(tmp_path: Path, demo: Path) -> None:
    loras, place = library(tmp_path / "loras", rank=64), tmp_path / "cache"
    own = cache(place, loras, demo, max_bytes=2 * baking.bytes_of(adapter(0, rank=64)))
    paths = [own.get("a0"), own.get("a1")]
    other = cache(place, loras, demo, max_bytes=own.max_bytes)
    with pytest.raises(CacheFullError, match="running engines use"):
        other.get("a2")
    assert other.leased == 0
    assert all(path.is_dir() for path in paths)
    assert other.get("a1") == paths[1]
    own.give_back("a0")
    own.give_back("a1")
    assert other.get("a2").is_dir()
    assert [path.is_dir() for path in paths] == [False, True]


def test_more_than_the_cache_can_ever_hold(tmp_path: Path, loras: Path, demo: Path) -> None:
    with pytest.raises(ArgumentError, match=r"the cache 1\.0 KiB in all"):
        cache(tmp_path / "cache", loras, demo, max_bytes=1024).get("a0")


def test_a_cap_on_distinct_mixtures(tmp_path: Path, loras: Path, demo: Path) -> None:
    own = cache(tmp_path / "cache", loras, demo, max_mixtures=2)
    own.get("a0")
    own.get("a1")
    own.get("a0:1.0")
    with pytest.raises(CacheFullError, match="serves 2 different mixtures already"):
        own.get("a2")
    own.give_back("a0")
    assert own.get("a2").is_dir()


@pytest.mark.parametrize("stored", ["f32", "f16"])
def test_what_is_reserved_is_enough(tmp_path: Path, loras: Path, demo: Path, stored: str) -> None:
    adapter(5, rank=1).save(loras / "small", dtype=stored)
    own = cache(tmp_path / "cache", loras, demo)
    for name in ("small", "small+a0:0.5", "a0+a1+a2+a0:0.3+small:9"):
        path = own.get(name)
        assert size_of(path) <= own._leases.own[path.name]


def work(place: str, loras: str, demo: str, names: list[str], said: Any) -> None:
    """A process of its own: which mixtures it baked itself."""
    save = module.save
    baked: list[str] = []
    module.save = lambda lora, *words, **options: (baked.append(lora.name), save(lora, *words, **options))[1]
    own = cache(Path(place), Path(loras), Path(demo))
    paths = [str(own.get(name)) for name in names]
    said.put((baked, paths))
    time.sleep(600)


def test_a_mixture_is_baked_once_among_processes_and_leases_end_with_them(
    tmp_path: Path, loras: Path, demo: Path
) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    names = [f"a0:0.{n}+a1" for n in range(1, 9)]
    words = (str(tmp_path / "cache"), str(loras), str(demo), names, said)
    processes = [context.Process(target=work, args=words) for _ in range(3)]
    for one in processes:
        one.start()
    found = [said.get(timeout=120) for _ in processes]
    assert Counter(name for baked, _ in found for name in baked) == Counter({f"a0:0.{n}+a1:1": 1 for n in range(1, 9)})
    assert len({tuple(paths) for _, paths in found}) == 1
    small = cache(tmp_path / "cache", loras, demo, max_bytes=3 * baking.bytes_of(adapter(0, rank=8)))
    for one in processes[:2]:
        os.kill(one.pid or 0, signal.SIGKILL)
        one.join()
    with pytest.raises(CacheFullError):  # the third lives
        small.get("a2")
    os.kill(processes[2].pid or 0, signal.SIGKILL)
    processes[2].join()
    assert small.get("a2").is_dir()
    assert sum(size_of(tmp_path / "cache" / name) for name in folders(tmp_path / "cache")) <= small.max_bytes
    assert len(list((tmp_path / "cache" / ".lorastack").glob("lease-*"))) == 1


def test_threads_that_ask_at_once_bake_once(
    tmp_path: Path, loras: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cache(tmp_path / "cache", loras, demo)
    baked: list[str] = []
    save = module.save
    monkeypatch.setattr(module, "save", lambda lora, *w, **o: (baked.append(lora.name), save(lora, *w, **o))[1])
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(own.get("a0+a1+a2"))) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (len(baked), len(found), len(set(found))) == (1, 8, 1)


def test_only_engines_that_read_peft_folders(demo: Path) -> None:
    with pytest.raises(ArgumentError, match="a cache holds PEFT folders, which Ollama does not read"):
        Baking(demo / "base", target="ollama")


def test_a_full_disk_is_an_error_of_ours_and_the_next_request_works(
    tmp_path: Path, loras: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    own = cache(tmp_path / "cache", loras, demo)
    for call in ("pwrite", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            if call == "replace":
                patch.setattr("lorastack.files.output.move_new", full)
            with pytest.raises(OutputError, match="No space left on device") as caught:
                own.get("a0+a1")
        assert status_of(caught.value) == 503
        assert folders(tmp_path / "cache") == set()
    assert own.get("a0+a1").is_dir()
    assert own.leased == 1
