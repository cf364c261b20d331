"""The house: module-level imports only point upward; the few that point downward inside functions are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorastack"
ORDER = (
    "errors pipeline dtypes factor delta target extras adapter packed stack hub files formats base algebra recipe "
    "inspect torch report cli"
).split()
#: function -> the lower layers it imports: facades that users expect as methods.
FACADES = {
    "adapter.load": {"formats"},
    "adapter.from_gguf": {"formats"},
    "adapter.save": {"formats"},
    "stack.bake": {"algebra"},
    "formats._recipe_of": {"recipe"},
}


def layer_of(module: str) -> str | None:
    """The layer of an imported module of ours; None for foreign ones and the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lorastack" and len(parts) > 1 else None


def imports(node: ast.AST) -> list[str]:
    """Layers imported at module level in this tree: not inside functions, nor for type checking only."""
    found: list[str] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            modules = [child.module] if child.module != "lorastack" else [f"lorastack.{a.name}" for a in child.names]
            found += [layer for module in modules if (layer := layer_of(module)) in ORDER]
        elif isinstance(child, ast.Import):
            found += [layer for alias in child.names if (layer := layer_of(alias.name))]
        found += imports(child)
    return found


def files() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), path)
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    ]


def test_every_file_has_a_layer() -> None:
    assert {layer for layer, _ in files()} == set(ORDER)


def test_module_level_imports_point_upward() -> None:
    wrong = []
    for layer, path in files():
        for imported in imports(ast.parse(path.read_text())):
            if ORDER.index(imported) > ORDER.index(layer):
                wrong.append(f"{path.relative_to(SOURCE)} imports {imported}")
    assert wrong == []


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
