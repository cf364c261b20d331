"""The group of subcommands: each is imported when it is asked for, so that help and completion need none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

from lorastack.cli.help import Command

#: Of the command itself and of each subcommand.
SETTINGS = {"help_option_names": ["-h", "--help"]}
#: Name -> (module, function, what it does in a line).
COMMANDS: dict[str, tuple[str, str, str]] = {
    "apply": ("apply", "apply", "Apply the stack's sum at one weight to an array."),
    "bake": ("bake", "bake", "Bake a weighted stack into one adapter, exactly."),
    "compare": ("compare", "compare_command", "Say what adapters do and whether they cancel or pile up."),
    "convert": ("convert", "convert_command", "Write an adapter in another format, or as a program reads it."),
    "extract": (
        "extract",
        "extract_command",
        "Extract an adapter from a fine-tuned model: its difference to its base.",
    ),
    "inspect": ("inspect", "inspect_command", "Say what adapters are: weights, ranks, scaling, and what is odd."),
    "merge": ("merge", "merge_command", "Merge a weighted stack into its base: a new base that needs no adapters."),
    "push": ("push", "push_command", "Upload an adapter, or several baked into one, with a model card."),
    "report": ("report", "report", "Write a report about adapters and their sum."),
    "resize": ("resize", "resize", "Write an adapter at a lower rank, its error said."),
    "run": ("run", "run", "Continue prompts with a base and a weighted stack of adapters."),
    "tune": ("tune", "tune", "Find the scales under which a base with adapters foretells texts best."),
    "vllm-check": ("vllm_check", "vllm_check", "Say which adapters of a library vLLM can serve, and how."),
}


class _Subcommands(Mapping[str, Any]):
    """Name -> subcommand, imported when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, function, _ = COMMANDS[name]
            alone = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings=SETTINGS)
            alone.command(name, cls=Command)(getattr(import_module(f"lorastack.cli.{module}"), function))
            self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Group(TyperGroup):
    """The command with its subcommands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Subcommands()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, says) for name, (_, _, says) in COMMANDS.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        formatter.write_text(f"{ctx.command_path} COMMAND --help shows a command's options, with examples.")
