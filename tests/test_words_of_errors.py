"""Errors speak the language of who asks: the command names flags that it has, Python names functions."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.main
from safetensors.numpy import load_file, save_file

from lorastack import LoadedLora, LoraStack, load
from lorastack.cli.application import app
from lorastack.core.delta import LoraDelta
from lorastack.errors import LoraStackError
from lorastack.ways import Way, argument, command_line, drop_extras, ways
from tests.test_cli import Command, lorastack  # noqa: F401
from tests.test_mixed_bases import BERT, FALCON, peft

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorastack"
#: A call, or an argument with its value, as Python writes them.
PYTHON = re.compile(r"[a-z_]+\((?!s\))[^()\s]*(, [^()]*)?\)|\b[a-z_]+=(True|False|None|\.\.\.|['\"\[])")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
#: What reads like a call and is none: values of a file, and llama.cpp's and torch's own words.
FOREIGN = ("torch.load(weights_only=True)",)
GROUP = typer.main.get_command(app)


def flags_of(command: str) -> set[str]:
    """What its --help lists."""
    found = GROUP.commands[command]  # type: ignore[attr-defined]
    return {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_ways_are_those_of_who_asks() -> None:
    choices = ("train it again", Way("pass x=True", "pass --x"), Way("call f()", None), Way(None, "use --y and --z"))
    assert ways(*choices) == "; train it again, or pass x=True, or call f()"
    assert ways(Way(None, "--y")) == ""
    with command_line({"--y", "--z"}):
        assert ways(*choices) == "; train it again, or use --y and --z"
        assert (argument("y"), argument("x")) == ("--y", "x")
        with command_line({"--x", "--z"}):
            assert ways(*choices) == "; train it again, or pass --x"
        assert ways(Way("f()", None)) == ""
    assert (argument("y"), ways(choices[1])) == ("y", "; pass x=True")


# ---- the source


def spoken() -> list[tuple[str, int, str]]:
    """File, line and text of every message that is raised or noted, less the ways out."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in SPEAKERS:
                found += [(str(path.relative_to(SOURCE)), node.lineno, text) for text in _texts(node)]
    return found


SPEAKERS = {
    *("add", "Problems", "Failures", "ArgumentError", "FormatError", "NamingError", "ShapeError", "NonFiniteError"),
    *("UnsupportedError", "UnknownNameError", "OutputError"),
}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _texts(node: ast.AST) -> list[str]:
    """The literal texts below, but not those that are ways out."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and _name(child.func) in ("Way", "ways", "argument", "drop_extras", "ignoring"):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            found.append(child.value)
        found += _texts(child)
    return found


#: Files whose errors no command can meet in these words: calls that only Python makes.
PYTHON_ONLY = {
    "core/stack.py": "push() and push_adapter()",
    "core/adapter.py": "the view as a LoraAdapter",
    "torch/attach.py": "attach()",
    "torch/handle.py": "rows()",
    "torch/passes.py": "threads and rows()",
    "torch/plan.py": "rows()",
    "torch/tune.py": "push_adapter() and score()",
    "recipe.py": "load(base=)",
}


def test_no_message_outside_of_ways_names_a_function_or_an_argument() -> None:
    wrong = [
        f"{file}:{line}: {text}"
        for file, line, text in spoken()
        if PYTHON.search(text) and file not in PYTHON_ONLY and not any(word in text for word in FOREIGN)
    ]
    assert wrong == []


def test_no_message_outside_of_the_command_names_a_flag_except_as_a_way() -> None:
    wrong = [f"{file}:{line}: {text}" for file, line, text in spoken() if FLAG.search(text) and "cli/" not in file]
    assert wrong == []


def test_every_way_of_a_command_names_flags_that_exist() -> None:
    known = set().union(*(flags_of(name) for name in GROUP.commands))  # type: ignore[attr-defined]
    said = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _name(node.func) == "Way":
                said |= {flag for text in _texts(node) for flag in FLAG.findall(text)}
    assert {"--base", "--drop-extras", "--force", "--ignore", "--allow-nonfinite", "--allow-mixed-bases"} <= said
    assert said <= known


# ---- the commands, over what is wrong


def extras(folder: Path) -> Path:
    """A classification adapter: its head is a module saved whole."""
    peft(folder, "org/m", FALCON)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    head = {"base_model.model.classifier.weight": np.ones((3, 6), np.float32)}
    save_file(load_file(file) | head, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["classifier"]}))
    return folder


def dora(folder: Path) -> Path:
    peft(folder, "org/m", FALCON)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    lengths = {f"base_model.model.{m}.lora_magnitude_vector.weight": np.ones(5, np.float32) for m in FALCON}
    save_file(load_file(file) | lengths, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    return folder


def nan(folder: Path) -> Path:
    peft(folder, "org/m", FALCON)
    file = folder / "adapter_model.safetensors"
    save_file({key: array * np.float32(np.nan) for key, array in load_file(file).items()}, file, {"format": "pt"})
    return folder


def unknown_field(folder: Path, **said: object) -> Path:
    peft(folder, "org/m", FALCON)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | (said or {"new_rule": 3})))
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {
    "extras": extras,
    "dora": dora,
    "nan": nan,
    "unknown": unknown_field,
    "pissa": lambda folder: unknown_field(folder, init_lora_weights="pissa"),
    "plain": lambda folder: peft(folder, "org/m", FALCON),
    "bert": lambda folder: peft(folder, "org/bert", BERT),
}
TENSOR = f"{FALCON[0]}.weight"
#: command line -> the flags that its error must name as ways out.
BAD: dict[str, set[str]] = {
    "bake extras --rank 1 -o out": {"--drop-extras"},
    "bake dora -o out": {"--drop-extras"},
    "bake nan --rank 1 -o out": {"--allow-nonfinite"},
    "bake unknown -o out": {"--ignore"},
    "bake pissa -o out": {"--ignore"},
    "bake plain excited.gguf -o out": {"--base"},
    "bake plain bert -o out": {"--base", "--allow-mixed-bases"},
    "bake plain -o out.gguf": {"--base"},
    "bake plain -o luna": {"--force"},
    "bake plain -o out --rank 0 --energy 2": {"--rank", "--energy"},
    "bake plain -o out --tolerance -1": {"--tolerance"},
    "bake plain -o out --energy 0.5 --tolerance 0.5": {"--energy", "--tolerance"},
    "bake plain -o out --method svd": {"--rank", "--energy", "--tolerance"},
    "bake plain -o out --method ties": {"--method"},
    "bake plain -o out --method ties@core --density 3": {"--density"},
    "bake plain -o out --method linear --density 0.5": {"--density"},
    "bake plain -o out --method dare@core --seed -1": {"--seed"},
    "bake plain -o out --dtype f63": {"--dtype"},
    "bake convert.toml -o out": {"--base"},
    "bake one.toml two.toml -o out": {"--base"},
    "resize extras --rank 1 -o out": {"--drop-extras"},
    "resize nan --rank 1 -o out": {"--allow-nonfinite"},
    "resize plain --rank 0 -o out": {"--rank"},
    "resize unknown --rank 1 -o out": {"--ignore"},
    "compare nan plain": set(),
    "compare unknown": {"--ignore"},
    "compare plain excited.gguf": {"--base"},
    "compare plain bert": {"--base", "--allow-mixed-bases"},
    "report plain bert -o p.html": {"--base", "--allow-mixed-bases"},
    "report nan -o p.html": set(),
    "report unknown -o p.html": {"--ignore"},
    "inspect unknown": {"--ignore"},
    "inspect nowhere": set(),
    f"apply dora -t {TENSOR} -i x.npy -o y.npy": {"--drop-extras"},
    f"apply nan -t {TENSOR} -i x.npy -o y.npy": {"--allow-nonfinite"},
    f"apply unknown -t {TENSOR} -i x.npy -o y.npy": {"--ignore"},
    f"apply plain excited.gguf -t {TENSOR} -i x.npy -o y.npy": {"--base"},
    f"apply plain bert -t {TENSOR} -i x.npy -o y.npy": {"--base", "--allow-mixed-bases"},
    f"apply plain -t {TENSOR} -i x.npy -o x.npy": {"--force"},
    "run base unknown -p hello": {"--ignore"},
    "run base luna -p hello --dtype f63": {"--dtype"},
    "run base plain -p hello": set(),
    "run base nan -p hello": set(),
    "tune base unknown --text eval.txt": {"--ignore"},
    "tune base luna --text eval.txt --low 2 --high 1": {"--low", "--high"},
    "tune base luna --text eval.txt -o convert.toml": {"--force"},
}


@pytest.mark.parametrize("line", BAD)
def test_a_command_names_its_own_flags_and_no_python(lorastack: Command, line: str) -> None:  # noqa: F811
    words = line.split()
    for name in {word.partition(":")[0] for word in words} & set(MAKE):
        MAKE[name](lorastack.folder / name)
    np.save(lorastack.folder / "x.npy", np.ones(6, np.float32))
    (lorastack.folder / "convert.toml").write_text('[[adapter]]\nsource = "luna"\nsteps = [{names = "gguf"}]\n')
    for name in ("one", "two"):
        text = f'base = "org/{name}"\n[[adapter]]\nsource = "luna"\n'
        (lorastack.folder / f"{name}.toml").write_text(text)
    done = lorastack(*words)
    assert done.code == 1, done
    assert not PYTHON.search(done.err), PYTHON.search(done.err)
    named = set(FLAG.findall(done.err))
    assert named <= flags_of(words[0]), "a flag that this command does not have"
    assert named == BAD[line], done.err


def test_python_names_functions_and_no_flags(tmp_path: Path) -> None:
    said: dict[str, Callable[[], object]] = {
        "without_extras('modules_to_save')": lambda: LoraStack([(load(extras(tmp_path / "e")), 1.0)]).bake(),
        "allow_nonfinite=True": lambda: load(nan(tmp_path / "n")).check(),
        "ignore=['new_rule']": lambda: load(unknown_field(tmp_path / "u")),
        "force=True": lambda: load(peft(tmp_path / "p", None, FALCON)).save(tmp_path / "p"),
        "convert_names(lora, base)": lambda: load(tmp_path / "p").save(tmp_path / "p.gguf"),
        "allow_mixed_bases=True": lambda: LoraStack(
            [(load(tmp_path / "p"), 1.0), (load(peft(tmp_path / "b", None, BERT)), 1.0)]
        ).bake(),
        "use dense()": lambda: LoraDelta(np.ones((1, 2, 3, 3)), np.ones((2, 1, 1, 1))).apply(np.ones(2)),
        "architecture='llama'": lambda: LoadedLora.from_tensors(
            {"blk.0.attn_q.weight": (np.ones((1, 2)), np.ones((2, 1)))}
        ).save(tmp_path / "x.gguf"),
    }
    for words, call in said.items():
        with pytest.raises(LoraStackError) as caught:
            call()
        assert words in str(caught.value)
        assert not FLAG.search(str(caught.value))


def test_words_are_pythons_again_after_a_command(lorastack: Command) -> None:  # noqa: F811
    lorastack.fails("bake", "nowhere", "-o", "out")
    assert ways(drop_extras("dora")) == "; leave it out with without_extras('dora')"
