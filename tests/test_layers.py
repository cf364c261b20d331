"""The house: module-level imports only point upward; the few that point downward inside functions are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorastack"
#: From the ground up; ``core`` by its own files.
ORDER = (
    "errors ways decimals markdown pipeline "
    "core.dtypes core.factor core.placed core.delta core.kronecker core.lazy core.target core.extras core.patterns "
    "core.notebook core.adapter core.given core.packed core.entry core.stack "
    "files hub formats fingerprint base algebra mixture recipe_text recipe targets converting inspect "
    "pushing fleet merging extracting torch report cli __main__"
).split()
#: function -> the lower layers it imports: facades that users expect as methods.
FACADES = {
    "core.adapter.__add__": {"core.stack"},
    "core.adapter.load": {"recipe"},
    "core.adapter.from_gguf": {"formats"},
    "core.adapter.save": {"formats"},
    "core.adapter.push_to_hub": {"pushing"},
    "formats._drawn": {"report"},
    "core.stack.bake": {"algebra"},
    "core.stack.fingerprint": {"fingerprint"},
}
#: No file has more lines.
LONGEST = 400


def layer_of(module: str) -> str | None:
    """The layer of an imported module of ours; None for foreign ones and the package itself."""
    parts = module.split(".")
    if parts[0] != "lorastack" or len(parts) < 2:
        return None
    return ".".join(parts[1:3]) if parts[1] == "core" else parts[1]


def imports(node: ast.AST) -> list[str]:
    """Layers imported at module level in this tree: not inside functions, nor for type checking only."""
    found: list[str] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            packages = ("lorastack", "lorastack.core")
            modules = (
                [child.module] if child.module not in packages else [f"{child.module}.{a.name}" for a in child.names]
            )
            found += [layer for module in modules if (layer := layer_of(module)) in ORDER]
        elif isinstance(child, ast.Import):
            found += [layer for alias in child.names if (layer := layer_of(alias.name))]
        found += imports(child)
    return found


def files() -> list[tuple[str, Path]]:
    paths = [
        path
        for path in sorted(SOURCE.rglob("*.py"))
        if path not in (SOURCE / "__init__.py", SOURCE / "core/__init__.py")
    ]
    return [(layer, path) for path in paths if (layer := layer_of(module_of(path)))]


def module_of(path: Path) -> str:
    """The dotted name of one of our files."""
    parts = ["lorastack", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known_modules(path: Path, names: set[str]) -> set[str]:
    """The modules of ours that a file knows at module level, for type checking too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module:
                found.update(
                    f"{child.module}.{a.name}" if f"{child.module}.{a.name}" in names else child.module
                    for a in child.names
                )
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found & names


def test_every_file_has_a_layer() -> None:
    assert {layer for layer, _ in files()} == set(ORDER)


def test_module_level_imports_point_upward() -> None:
    wrong = []
    for layer, path in files():
        for imported in imports(ast.parse(path.read_text())):
            if ORDER.index(imported) > ORDER.index(layer):
                wrong.append(f"{path.relative_to(SOURCE)} imports {imported}")
    assert wrong == []


def test_nothing_imports_in_a_circle() -> None:
    paths = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
    paths.pop("lorastack")  # which every module brings along
    graph = {name: known_modules(path, set(paths)) - {name} for name, path in paths.items()}
    graph["lorastack.core.stack"].discard("lorastack.base")  # the annotation of bake(), a listed facade
    assert list(TopologicalSorter(graph).static_order())


def test_no_file_is_long() -> None:
    assert {module_of(path): n for _, path in files() if (n := len(path.read_text().splitlines())) > LONGEST} == {}


def test_downward_imports_inside_functions_are_the_listed_facades() -> None:
    found: dict[str, set[str]] = {}
    for layer, path in files():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                body = ast.Module(body=function.body, type_ignores=[])
                lower = {i for i in imports(body) if ORDER.index(i) > ORDER.index(layer)}
                if lower:
                    found[f"{layer}.{function.name}"] = lower
    assert found == FACADES


def test_importing_lorastack_never_imports_torch() -> None:
    heavy = "('torch', 'transformers', 'peft', 'plotly', 'optuna', 'fastapi')"
    code = f"import sys, lorastack, lorastack.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_gives_the_install_line() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport lorastack.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'lorastack[torch]'" in done.stderr
