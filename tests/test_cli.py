"""The command as a user runs it: what it prints, writes and exits with, and that an error changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer.main
from safetensors.numpy import load_file, save_file

from lorastack import LoadedLora, LoraStack, __version__, convert_names, load
from lorastack.cli import main
from lorastack.cli.application import app

Q = "blk.0.attn_q.weight"
COMMAND = Path(sys.executable).with_name("lorastack")


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """Runs ``lorastack WORDS`` in this process, in a folder of its own, as the installed script would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *words: object) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["lorastack", *map(str, words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    def works(self, *words: object) -> str:
        """What it prints when all is well: nothing then goes to the error stream but what was replaced."""
        done = self(*words)
        errors = [line for line in done.err.splitlines() if not line.startswith("replaced ")]
        assert (done.code, errors) == (0, [])
        return done.out

    def fails(self, *words: object, code: int = 1) -> str:
        """The error; the folder is what it was before, and nothing is printed as a result."""
        before = self.contents()
        done = self(*words)
        assert (done.code, done.out) == (code, ""), done
        assert self.contents() == before, "an error changed something on the disk"
        return done.err

    def contents(self) -> dict[str, bytes | None]:
        return {
            str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")
        }


@pytest.fixture
def lorastack(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command in a folder with the demo's files."""
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Command(tmp_path, monkeypatch, capsys)


def dense(lora: LoadedLora, name: str = Q) -> np.ndarray:
    delta = lora.adapters[name]
    return delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))


def spoil(source: str, target: str, keys: dict[str, float], **config: object) -> None:
    """A copy of a PEFT folder with one value of some tensors changed, and some fields of its config."""
    shutil.copytree(source, target)
    tensors = load_file(f"{target}/adapter_model.safetensors")
    for key, value in keys.items():
        tensors[key].reshape(-1)[0] = value
    save_file(tensors, f"{target}/adapter_model.safetensors")
    said = json.loads(Path(target, "adapter_config.json").read_text())
    Path(target, "adapter_config.json").write_text(json.dumps(said | config))


def with_dora_and_head(source: str, target: str) -> None:
    spoil(source, target, {}, use_dora=True, modules_to_save=["lm_head"])
    tensors = load_file(f"{target}/adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(tensors[key].shape[0], np.float32)
    tensors["base_model.model.lm_head.weight"] = np.ones((512, 64), np.float32)
    save_file(tensors, f"{target}/adapter_model.safetensors")


# ---- the installed script


def test_the_installed_command_says_its_version() -> None:
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lorastack {__version__}\n", "")


def test_the_installed_command_bakes_and_says_so(lorastack: Command) -> None:
    words = [COMMAND, "bake", "luna:0.5", "robot:-0.25", "-o", "both"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "both: 2 adapters as one, 28 weights of rank 16\n"
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "error: both exists; choose another name, or pass --force\n"


def test_the_installed_command_shows_no_traceback(lorastack: Command) -> None:
    done = subprocess.run([COMMAND, "inspect", "no.gguf"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no.gguf: there is no such file or folder\n"


def test_every_command_has_examples_in_its_help(lorastack: Command) -> None:
    commands = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"apply", "bake", "inspect", "run"} <= set(commands)
    for name in commands:
        shown = lorastack.works(name, "--help")
        assert re.search(rf"Examples:\s+lorastack {name} ", shown), name
        assert lorastack.works(name, "-h") == shown
    assert all(re.search(rf"\b{name}\b", lorastack.works("--help")) for name in commands)


def test_what_is_no_command_is_refused_with_2(lorastack: Command) -> None:
    assert "No such command 'blend'" in lorastack.fails("blend", code=2)
    assert "Missing option '--output'" in lorastack.fails("bake", "luna", code=2)
    assert "Missing argument" in lorastack.fails("inspect", code=2)


# ---- apply


def test_apply_writes_the_sum(lorastack: Command) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    np.save("x.npy", x)
    load("excited.gguf").scaled(3.0).save("louder.gguf")
    said = lorastack.works("apply", "excited.gguf:0.7", "louder.gguf:-1", "-t", Q, "-i", "x.npy", "-o", "y.npy")
    assert said == f"y.npy: float32 [3, 64], the sum of 2 of 2 adapters at {Q}\n"
    np.testing.assert_allclose(np.load("y.npy"), x @ (-2.3 * dense(load("excited.gguf"))).T, rtol=1e-4, atol=1e-5)


def test_apply_takes_recipes_and_one_kind_of_names(lorastack: Command) -> None:
    x = np.random.default_rng(0).standard_normal(64)
    np.save("x.npy", x)
    Path("r.toml").write_text('[[adapter]]\nsource = "excited.gguf"\nscale = 0.5\nscales = { "blk.0.*" = 4 }\n')
    lorastack.works("apply", "r.toml:3", "excited.gguf", "--tensor", Q, "--input", "x.npy", "--output", "y.npy")
    assert np.load("y.npy").dtype == np.float64
    np.testing.assert_allclose(np.load("y.npy"), 7 * dense(load("excited.gguf")) @ x, rtol=1e-6)
    said = lorastack.fails("apply", "excited.gguf", "luna", "-t", Q, "-i", "x.npy", "-o", "z.npy")
    assert "luna has Hugging Face names, excited on this stack has GGUF tensor names" in said


def test_apply_says_what_is_wrong(lorastack: Command) -> None:
    np.save("x.npy", np.ones(64, np.float32))
    np.save("narrow.npy", np.ones(5, np.float32))
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    Path("y.npy").write_text("mine")
    usual = ["apply", "excited.gguf", "-t", Q, "-i", "x.npy", "-o", "z.npy"]

    def with_(**changed: str) -> list[str]:
        return [changed.get(re.sub(r"\W", "_", word), word) for word in usual]

    said = lorastack.fails(*with_(blk_0_attn_q_weight="blk.0.attn_qq.weight"))
    assert "no adapter has a weight 'blk.0.attn_qq.weight'; the nearest of 28 are: blk.0.attn_q.weight, " in said
    assert "x has 5 features, this delta takes 64" in lorastack.fails(*with_(x_npy="narrow.npy"))
    assert "objects.npy: cannot be read as a .npy array: " in lorastack.fails(*with_(x_npy="objects.npy"))
    assert "no.npy: there is no such file" in lorastack.fails(*with_(x_npy="no.npy"))
    assert "y.npy exists; choose another name" in lorastack.fails(*with_(z_npy="y.npy"))
    assert "the folder no does not exist; create it first" in lorastack.fails(*with_(z_npy="no/y.npy"))
    assert "'much' is no scale; write FILE:SCALE" in lorastack.fails(*with_(excited_gguf="excited.gguf:much"))
    lorastack.works(*with_(z_npy="y.npy"), "--force")
    assert np.load("y.npy").shape == (64,)


# ---- inspect


def test_inspect_shows_a_table(lorastack: Command) -> None:
    shown = lorastack.works("inspect", "excited.gguf", "robot")
    rows = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in (
        re.split("[│┃|]", line.strip("│┃| ")) for line in shown.splitlines()) if len(cells) == 3}  # fmt: skip
    assert rows["adapter"] == ["excited", "robot"]
    assert rows["format"] == ["GGUF", "PEFT"]
    assert rows["base"] == ["llama", "lorastack-demo-base"]
    assert rows["weights"] == ["28", "28"]
    assert rows["modules"][0] == "attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down"
    assert rows["rank"] == ["4", "8"]
    assert rows["alpha"] == ["8", "8"]
    assert rows["scaling"] == ["2", "2.82843"]
    assert rows["types"] == ["F32", "F32"]
    size = Path("excited.gguf").stat().st_size
    assert rows["size"][0] == f"{size / 1024:.1f} KiB"
    assert "robot: use_rslora is True" in shown


def test_inspect_gives_json(lorastack: Command) -> None:
    excited, luna = json.loads(lorastack.works("inspect", "excited.gguf", "luna", "--json"))
    assert excited["path"] == "excited.gguf"
    assert (excited["format"], excited["architecture"], excited["base"]) == ("GGUF", "llama", None)
    assert (excited["weights"], excited["ranks"], excited["alpha"], excited["scalings"]) == (28, [4], 8.0, [2.0])
    lora = load("excited.gguf")
    assert excited["parameters"] == sum(d.a.size + d.b.size for d in lora.adapters.values())
    assert excited["size"] == Path("excited.gguf").stat().st_size
    assert (excited["odd"], excited["misfits"], excited["recipe"]) == ([], None, None)
    assert (luna["format"], luna["architecture"], luna["base"]) == ("PEFT", None, "lorastack-demo-base")
    assert luna["size"] == sum(file.stat().st_size for file in Path("luna").glob("adapter_*"))
    assert sorted(luna["modules"]) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("base", ["base", "base.gguf"])
@pytest.mark.parametrize("adapter", ["luna", "excited.gguf"])
def test_inspect_says_that_an_adapter_fits_its_base(lorastack: Command, adapter: str, base: str) -> None:
    if (adapter, base) == ("excited.gguf", "base"):
        assert "excited fits the base" in lorastack.works("inspect", adapter, "-b", base)
        return
    (found,) = json.loads(lorastack.works("inspect", adapter, "--base", base, "--json"))
    assert found["misfits"] == []


def test_inspect_lists_all_that_does_not_fit_and_exits_with_1(lorastack: Command) -> None:
    rng = np.random.default_rng(0)
    ab = rng.standard_normal((2, 64)).astype(np.float32), rng.standard_normal((64, 2)).astype(np.float32)
    names = [Q, "blk.9.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.attn_v.weight"]
    lora = LoadedLora.from_tensors(dict.fromkeys(names, ab), alpha=4)
    lora.save("odd.gguf", architecture="qwen2")
    done = lorastack("inspect", "odd.gguf", "luna", "--base", "base.gguf", "--json")
    assert done.code == 1
    odd, luna = json.loads(done.out)
    assert odd["misfits"] == [
        "it is for architecture 'qwen2', the base is 'llama'",
        f"weight blk.9.attn_q.weight is none of the base's {load_base_size()} weights",
        "weight blk.0.ffn_up.weight is [176, 64] in the base, this adapter changes [64, 64]",
        "weight blk.0.attn_v.weight is [32, 64] in the base, this adapter changes [64, 64]",
    ]
    assert luna["misfits"] == []
    table = lorastack("inspect", "odd.gguf", "--base", "base.gguf")
    assert table.code == 1
    assert all(f"odd does not fit: {line}\n" in table.out for line in odd["misfits"])


def load_base_size() -> int:
    import gguf

    return len(gguf.GGUFReader("base.gguf").tensors)


def test_inspect_shows_the_others_when_one_is_broken(lorastack: Command) -> None:
    Path("broken.gguf").write_bytes(Path("excited.gguf").read_bytes()[:-64])
    done = lorastack("inspect", "broken.gguf", "excited.gguf", "no", "--json")
    assert done.code == 1
    assert [one["name"] for one in json.loads(done.out)] == ["excited"]
    first, cut, second = done.err.splitlines()
    assert first == "error: cannot read broken.gguf: 1 problem"
    assert cut.endswith("it is cut short")
    assert second == "error: no: there is no such file or folder"
    assert "excited" in lorastack("inspect", "broken.gguf", "excited.gguf").out


def test_inspect_says_what_is_odd(lorastack: Command) -> None:
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    spoil("luna", "odd", {key.format(1, "A"): np.nan, key.format(2, "B"): np.inf}, init_lora_weights="eva")
    tensors = load_file("odd/adapter_model.safetensors")
    tensors[key.format(0, "B")][:] = 0
    save_file(tensors, "odd/adapter_model.safetensors")
    with_dora_and_head("luna", "dora")
    odd, dora = json.loads(lorastack.works("inspect", "odd", "dora", "--json"))
    weight = "model.layers.{}.self_attn.q_proj.weight"
    assert odd["odd"] == [
        "init_lora_weights is eva",
        f"1 weights change nothing (A or B is all zero), such as {weight.format(0)}",
        f"2 factors hold NaN or Inf, such as {weight.format(1)}.lora_A",
    ]
    assert dora["extras"] == {"dora": 28, "modules_to_save": 1}
    assert "use_dora is True" in dora["odd"]
    assert "28 dora: a DoRA magnitude (rescales the rows of the changed weight)" in dora["odd"]
    assert "1 modules_to_save: a whole module saved in place of the base's" in dora["odd"]


def test_inspect_shows_the_recipe_of_what_was_baked(lorastack: Command) -> None:
    lorastack.works("bake", "luna:0.5", "robot", "-o", "both")
    (both,) = json.loads(lorastack.works("inspect", "both", "--json"))
    assert (both["ranks"], both["scalings"]) == ([16], [2.828427125])
    assert 'source = "luna"\nscale = 0.5\n' in both["recipe"]
    assert "a recipe (--json shows it)" in lorastack.works("inspect", "both")


def test_an_unknown_base_is_refused(lorastack: Command) -> None:
    for words in (["inspect", "luna"], ["bake", "luna", "-o", "out"]):
        assert "no-base: there is no such file or folder" in lorastack.fails(*words, "--base", "./no-base")
        assert "base luna: it has no config.json" in lorastack.fails(*words, "--base", "luna")
        said = lorastack.fails(*words, "--base", "excited.gguf")
        assert "base excited.gguf: it is an adapter (general.type), give the model it was trained on" in said


# ---- bake


def truth(base: str, naming: str, *words: tuple[str, float]) -> dict[str, np.ndarray]:
    """The stack's sums under one kind of names."""
    stack = LoraStack([(convert_names(load(path), base, naming), scale) for path, scale in words])  # type: ignore[arg-type]
    return {
        name: sum(scale * dense(lora, name) for lora, scale in stack.entries if name in lora.adapters)
        for name in stack.weights
    }


def assert_is(path: str, sums: dict[str, np.ndarray], atol: float = 1e-6) -> LoadedLora:
    lora = load(path)
    assert sorted(lora.adapters) == sorted(sums)
    for name, expected in sums.items():
        np.testing.assert_allclose(dense(lora, name), expected, rtol=0, atol=atol, err_msg=name)
    return lora


MIXED = ("excited.gguf", 0.7), ("luna", -0.4)


@pytest.mark.parametrize(("output", "base"), [("both.gguf", "base"), ("both.gguf", "base.gguf"), ("both", "base")])
def test_bake_makes_one_of_two_formats_given_the_base(lorastack: Command, output: str, base: str) -> None:
    naming = "gguf" if output.endswith(".gguf") else "hf"
    said = lorastack.works("bake", "excited.gguf:0.7", "luna:-0.4", "--base", base, "-o", output)
    assert said == f"{output}: 2 adapters as one, 28 weights of rank 12\n"
    lora = assert_is(output, truth("base", naming, *MIXED))
    assert lora.naming == naming
    assert lora.metadata.get("general.architecture") == ("llama" if naming == "gguf" else None)
    assert lora.metadata.get("base_model_name_or_path") == (None if naming == "gguf" else "lorastack-demo-base")


def test_bake_without_the_base_says_what_to_give(lorastack: Command) -> None:
    said = lorastack.fails("bake", "excited.gguf", "luna", "-o", "both.gguf")
    assert "luna has Hugging Face names, excited on this stack has GGUF tensor names" in said
    assert "give --base" in said
    said = lorastack.fails("bake", "luna", "-o", "out.gguf")
    assert "out.gguf: these adapters have Hugging Face names; give --base to convert them to GGUF's" in said
    said = lorastack.fails("bake", "excited.gguf", "-o", "out")
    assert "out: these adapters have GGUF names; write a .gguf file, or give --base to convert them for PEFT" in said
    said = lorastack.fails("bake", "excited.gguf", "-o", "out", "--base", "base.gguf")
    assert "base.gguf is a GGUF file: give the folder or hub id it was converted from" in said


def test_bake_needs_no_base_for_one_format(lorastack: Command) -> None:
    lorastack.works("bake", "luna:0.5", "robot:2", "luna:0.25", "-o", "out")
    assert_is("out", truth("base", "hf", ("luna", 0.75), ("robot", 2)), atol=1e-5)
    load("luna").select("*.mlp.*").save("part")
    said = lorastack.works("bake", "part", "robot", "-o", "more")
    assert said == "more: 2 adapters as one, 28 weights of rank 8 to 16\n"
    lorastack.works("bake", "excited.gguf:-1", "-o", "less.gguf", "--name", "less")
    assert assert_is("less.gguf", truth("base", "gguf", ("excited.gguf", -1))).metadata["general.name"] == "less"


def test_bake_writes_the_type_asked_for(lorastack: Command) -> None:
    sums = truth("base", "gguf", *MIXED)
    largest = max(np.abs(array).max() for array in sums.values())
    for dtype, rounding in (("f32", 1e-6), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)):
        lorastack.works("bake", "excited.gguf:0.7", "luna:-0.4", "-b", "base", "-o", f"{dtype}.gguf", "--dtype", dtype)
        lora = assert_is(f"{dtype}.gguf", sums, atol=rounding * largest)
        stored = {factor.stored.lower() for delta in lora.adapters.values() for factor in delta.factors}
        # Rows of 8 or 12 fill no block of 32.
        assert stored == ({"q8_0", "f16"} if dtype == "q8_0" else {dtype})
    assert "dtype 'q8_0' cannot be written here; there are f32, f16, bf16" in lorastack.fails(
        "bake", "luna", "-o", "out", "--dtype", "q8_0"
    )


def test_bake_keeps_an_output_that_exists_unless_forced(lorastack: Command) -> None:
    Path("out.gguf").write_text("mine")
    Path("out").mkdir()
    for words in (["excited.gguf", "-o", "out.gguf"], ["luna", "-o", "out"], ["luna", "-o", "luna"]):
        assert f"{words[-1]} exists; choose another name" in lorastack.fails("bake", *words)
    lorastack.works("bake", "excited.gguf", "-o", "out.gguf", "--force")
    assert "luna is not replaced: luna is made use of" in lorastack.fails("bake", "luna:0.5", "-o", "luna", "-f")
    lorastack.works("bake", "luna", "-o", "half")
    assert lorastack("bake", "luna:0.5", "-o", "half", "-f").err.startswith("replaced half (")
    assert load("half").adapters["model.layers.0.self_attn.q_proj.weight"].scaling == 1.0
    assert load("out.gguf").num_adapters() == 28
    assert "the folder no does not exist; create it first" in lorastack.fails("bake", "luna", "-o", "no/out")


def test_bake_takes_a_recipe_and_its_own(lorastack: Command) -> None:
    Path("sub").mkdir()
    Path("sub/r.toml").write_text(
        'base = "../base"\n[[adapter]]\nsource = "../excited.gguf"\nscale = 0.7\n[[adapter]]\nsource = "../luna"\n'
        'scale = -0.8\nscales = { "*" = 0.5 }\n'
    )
    lorastack.works("bake", "sub/r.toml", "-o", "one.gguf")
    sums = truth("base", "gguf", *MIXED)
    assert_is("one.gguf", sums)
    (one,) = json.loads(lorastack.works("inspect", "one.gguf", "--json"))
    Path("again.toml").write_text(one["recipe"])
    lorastack.works("bake", "again.toml", "-o", "two.gguf")
    assert Path("two.gguf").read_bytes().replace(b"two", b"one") == Path("one.gguf").read_bytes()
    lorastack.works("bake", "again.toml:-2", "excited.gguf:1.4", "-o", "three", "--base", "base")
    assert_is("three", {n: 0.8 * array for n, array in truth("base", "hf", ("luna", 1.0)).items()}, atol=1e-5)
    Path("luna/adapter_model.safetensors").write_bytes(Path("robot/adapter_model.safetensors").read_bytes())
    assert "luna is not the file of the recipe: sha256" in lorastack.fails("bake", "again.toml", "-o", "four.gguf")


def test_bake_of_a_bake_of_one_format_asks_for_no_base(lorastack: Command) -> None:
    lorastack.works("bake", "luna:0.5", "robot", "-o", "both")
    (both,) = json.loads(lorastack.works("inspect", "both", "--json"))
    Path("again.toml").write_text(both["recipe"])
    lorastack.works("bake", "again.toml", "-o", "again")
    assert Path("again/adapter_model.safetensors").read_bytes() == Path("both/adapter_model.safetensors").read_bytes()


def test_bake_leaves_extras_out_only_when_told(lorastack: Command) -> None:
    with_dora_and_head("luna", "dora")
    said = lorastack.fails("bake", "dora", "robot", "-o", "out")
    assert "dora: dora, a DoRA magnitude (rescales the rows of the changed weight) (28 of them" in said
    assert (
        "dora: modules_to_save, a whole module saved in place of the base's (1 of them, such as lm_head.weight)" in said
    )
    lorastack.works("bake", "dora", "robot", "-o", "out", "--drop-extras")
    assert_is("out", truth("base", "hf", ("luna", 1), ("robot", 1)), atol=1e-5)
    assert "without_extras" in str(load("out").metadata["lorastack.recipe"])
    said = lorastack.fails("bake", "dora", "-o", "out.gguf", "--base", "base")
    assert "dora has extras whose names cannot be converted" in said
    lorastack.works("bake", "dora", "-o", "out.gguf", "--base", "base", "--drop-extras")
    assert_is("out.gguf", truth("base", "gguf", ("luna", 1)))


def test_bake_lists_every_nan_and_lets_them_through_only_when_told(lorastack: Command) -> None:
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    spoil("luna", "bad", {key.format(1, "A"): np.nan, key.format(2, "B"): np.inf})
    spoil("robot", "worse", {key.format(1, "A"): np.nan})
    said = lorastack.fails("bake", "bad", "worse:0.5", "-o", "out")
    for folder, tensor in (("bad", key.format(1, "A")), ("bad", key.format(2, "B")), ("worse", key.format(1, "A"))):
        line = f"{folder}/adapter_model.safetensors: tensor {tensor}: 1 of 512 values are NaN or Inf"
        assert line in said, said
    assert said.count("are NaN or Inf") == 3
    lorastack.works("bake", "bad", "worse:0.5", "-o", "out", "--allow-nonfinite")
    tensors = load_file("out/adapter_model.safetensors")
    assert [int((~np.isfinite(tensors[key.format(*at)])).sum()) for at in ((1, "A"), (2, "B"), (3, "A"))] == [2, 1, 0]


def test_bake_lists_all_that_does_not_fit(lorastack: Command) -> None:
    (one, *_), lora = load("luna").adapters.items(), load("luna")
    replace(lora, adapters={one[0]: one[1], "model.layers.9.mlp.up_proj.weight": one[1]}, source=None).save("odd")
    said = lorastack.fails("bake", "odd", "excited.gguf", "-o", "out.gguf", "--base", "base.gguf")
    assert "weight model.layers.9.mlp.up_proj.weight has no GGUF name in architecture llama" in said
    said = lorastack.fails("bake", "odd", "-o", "out", "--base", "base")
    assert "weight model.layers.9.mlp.up_proj.weight is none of the base's" in said
    said = lorastack.fails("bake", "no.gguf", "excited.gguf", "gone", "-o", "out.gguf")
    assert "cannot load the stack: 2 problems" in said
    assert "- no.gguf: there is no such file or folder" in said
    assert "- gone: there is no such file or folder" in said


def test_bake_refuses_a_field_it_does_not_know_unless_told_to_ignore_it(lorastack: Command) -> None:
    spoil("luna", "new", {}, use_magic=True)
    said = lorastack.fails("bake", "new", "-o", "out")
    assert "use_magic" in said
    assert "--ignore use_magic" in said
    lorastack.works("bake", "new", "-o", "out", "--ignore", "use_magic")
    assert_is("out", truth("base", "hf", ("luna", 1)))


def test_a_bake_at_a_lower_rank_says_and_stores_its_error(lorastack: Command, shared: Path) -> None:
    adapters = [shared / "stories260k" / "gguf" / f"{name}.f32.gguf" for name in ("excited", "zara")]
    out = lorastack.works("bake", f"{adapters[0]}:0.7", adapters[1], "--rank", "4,8", "-o", "both.gguf")
    assert re.search(r"both.gguf: 2 adapters as one, \d+ weights of rank [48]", out)
    error = re.search(r"relative error ([\d.e-]+) overall, at most", out)
    said = tomllib.loads(load(lorastack.folder / "both.gguf").metadata["lorastack.recipe"])["lorastack"]
    assert said["method"] == "svd"
    assert error is not None
    assert float(error[1]) == pytest.approx(said["error"], rel=1e-2)


def test_resize_writes_a_smaller_adapter(lorastack: Command, shared: Path) -> None:
    zara = shared / "stories260k" / "adapters" / "zara"
    out = lorastack.works("resize", zara, "--rank", 2, "-o", "small")
    assert "small: one adapter, 35 weights of rank 2" in out
    assert load(lorastack.folder / "small").rank == 2
    assert "say how far to go" in lorastack.fails("resize", zara, "-o", "other")
    out = lorastack.works("resize", zara, "--rank", 9, "-o", "whole")
    assert "whole: one adapter, 35 weights of rank 8" in out
    assert "relative error 0 overall, at most 0" in out
    assert "rank is 0" in lorastack.fails("resize", zara, "--rank", 0, "-o", "other")
    assert "--rank is 'x'" in lorastack.fails("resize", zara, "--rank", "x", "-o", "other")


def test_a_sweep_writes_a_file_for_each_merge_coefficient(lorastack: Command, shared: Path) -> None:
    adapters = [shared / "stories260k" / "adapters" / name for name in ("excited", "zara")]
    lorastack.works("bake", *adapters, "--method", "ties@knots", "--scales", "0.5:1.0:0.25", "-o", "both")
    found = {c: load(lorastack.folder / f"both-{c}") for c in ("0.5", "0.75", "1")}
    weight = "model.layers.0.self_attn.q_proj.weight"
    whole = found["1"].adapters[weight].dense()
    for c, lora in found.items():
        assert np.allclose(lora.adapters[weight].dense(), float(c) * whole, atol=1e-6)
        assert f"coefficient = {float(c)}" in lora.metadata["lorastack.recipe"]
    assert "--scales is '1:0'" in lorastack.fails("bake", *adapters, "--scales", "1:0", "-o", "other")
