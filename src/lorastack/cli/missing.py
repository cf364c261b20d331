"""What of the package's extras is not installed: said all at once, with what works without it."""

from __future__ import annotations

from importlib.util import find_spec

from lorastack.errors import MissingDependencyError

#: Extra -> the packages it brings that its commands import.
_PACKAGES = {
    "torch": ("torch", "transformers"),
    "tune": ("torch", "transformers", "optuna"),
    "report": ("plotly",),
}
#: Command -> the extra it needs; the others need none.
_NEEDS = {"run": "torch", "tune": "tune", "report": "report"}


def require_all(*extras: str) -> None:
    """Raise unless all that these extras bring is there.

    Raises
    ------
    MissingDependencyError
        Naming every package that is missing, the one line that installs them, and what works meanwhile.
    """
    missing = list(dict.fromkeys(name for extra in extras for name in _PACKAGES[extra] if find_spec(name) is None))
    if not missing:
        return
    wanted = ",".join(sorted(extra for extra in extras if _lacks(extra)))
    works = [name for name in _commands() if not _lacks(_NEEDS.get(name))]
    raise MissingDependencyError(
        f"this needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; run: "
        f"pip install 'lorastack[{wanted}]'; in this installation work: {', '.join(works)}"
    )


def _lacks(extra: str | None) -> bool:
    return extra is not None and any(find_spec(name) is None for name in _PACKAGES[extra])


def _commands() -> list[str]:
    from lorastack.cli.group import COMMANDS

    return list(COMMANDS)
