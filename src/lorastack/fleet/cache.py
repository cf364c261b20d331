"""Cache: a folder of baked mixtures, each baked once, whichever of the processes that share it is asked first."""

from __future__ import annotations

import logging
import os
import threading
from functools import cached_property
from pathlib import Path

from lorastack.base import BaseModel
from lorastack.errors import ArgumentError, LoraStackError
from lorastack.files import OutputError, bytes_in_words, local
from lorastack.files.partials import partial_beside, sweep
from lorastack.fingerprint import fingerprint_of
from lorastack.fleet.baking import Baking, bytes_of
from lorastack.fleet.leases import Leases
from lorastack.fleet.library import Library
from lorastack.formats import save
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.mixture import Mixture
from lorastack.recipe import Recipe

LOG = logging.getLogger("lorastack.fleet")
#: Digits of a folder's name, of the 64 of its fingerprint.
_DIGITS = 32


class CacheFullError(LoraStackError):
    """There is no room for one more mixture: live processes use all there is."""


class MixtureCache:
    """Baked mixtures of a library, as PEFT folders that engines read.

    A folder is leased to the process that asked for it until that ends, or gives it back: an engine reads it again
    after it evicted the adapter, and one that does not find it stops. What nobody leases is dropped, the longest unused
    first, when a new mixture needs the room. A file that is replaced in the library makes another folder: what engines
    keep of a prompt is known by name and path.

    Parameters
    ----------
    folder
        Where they lie; made if it is not there. Several processes may share it.
    library
        The adapters, or their folder.
    baking
        For which base and engine, and within which rank.
    max_bytes
        What all folders take together at most, with the one that is about to be written.
    max_mixtures
        How many different ones this process may lease; None for any number.

    Raises
    ------
    OutputError
        When the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        library: Library | str | Path,
        baking: Baking,
        *,
        max_bytes: int = 1 << 30,
        max_mixtures: int | None = None,
    ) -> None:
        self.folder = local(os.fspath(folder)).absolute()
        self.library = library if isinstance(library, Library) else Library(library)
        self.baking, self.max_bytes, self.max_mixtures = baking, max_bytes, max_mixtures
        self._leases = Leases(self.folder)
        with self._leases.looking():  # what processes left that were killed
            sweep(self.folder)
            self._leases.all()
        self._opening = threading.Lock()

    @cached_property
    def base(self) -> BaseModel:
        """The base, opened when the first mixture is baked."""
        return self.baking.opened()

    def get(self, mixture: Mixture | str) -> Path:
        """The folder of a mixture, baked now if it is not there; leased to this process.

        Raises
        ------
        UnknownNameError
            When it is no mixture, or the library lacks one of its adapters; the message lists those there are.
        CacheFullError
            When there is no room for it.
        OutputError
            When the system refuses to write.
        LoraStackError
            With the reason, when it cannot be baked for this base and engine.
        """
        mixture = Mixture.parse(mixture) if isinstance(mixture, str) else mixture
        try:
            return self._get(mixture)
        except OSError as error:
            if isinstance(error, LoraStackError):
                raise
            raise OutputError(f"{self.folder}: the cache cannot be used: {error.strerror or error}") from error

    def _get(self, mixture: Mixture) -> Path:
        recipe = self.library.recipe(mixture)
        key = self.key(recipe)
        target = self.folder / key
        if key in self._leases.own and _is_there(target):
            os.utime(target)
            return target
        with self._leases.baking(key):
            with self._leases.looking():
                self._check_count(key)
                # From here on nobody drops it; what was dropped before is not there any more.
                self._leases.take(key, 0)
            try:
                if not _is_there(target):
                    self._bake(recipe, str(mixture), key)
                os.utime(target)
            except BaseException:
                with self._leases.looking():
                    self._leases.give_back(key)
                raise
        return target

    def give_back(self, mixture: Mixture | str) -> None:
        """End this process's lease: no engine reads the folder any more."""
        mixture = Mixture.parse(mixture) if isinstance(mixture, str) else mixture
        with self._leases.looking():
            self._leases.give_back(self.key(self.library.recipe(mixture)))

    @property
    def leased(self) -> int:
        """How many mixtures this process leases."""
        return len(self._leases.own)

    def key(self, recipe: Recipe) -> str:
        """The name of a mixture's folder: its adapters' content, scales, and the way of baking."""
        parts = [(dict(one.sha256), one.steps, one.scale) for one in recipe.ingredients]
        return fingerprint_of(parts, self.baking.how)[:_DIGITS]

    def _bake(self, recipe: Recipe, name: str, key: str) -> None:
        target = self.folder / key
        with self._opening:
            base = self.base
        lora = self.baking.bake(recipe, name, base)
        size = bytes_of(lora)
        with self._leases.looking():
            self._make_room(size)
            self._leases.take(key, size)
        save(lora, target, format="peft")
        if "error" in lora.made:
            LOG.warning(
                "%s was cut to rank %d, which costs a relative error of %.2e", name, lora.rank, lora.made["error"]
            )

    def _check_count(self, key: str) -> None:
        own = self._leases.own
        if self.max_mixtures is not None and key not in own and len(own) >= self.max_mixtures:
            raise CacheFullError(
                f"this process serves {len(own)} different mixtures already, and no more than {self.max_mixtures}; "
                "ask for one of those, or start it with a larger cap"
            )

    def _make_room(self, more: int) -> None:
        """Drop the longest unused until so many bytes have room beside the rest."""
        if more > self.max_bytes:
            raise ArgumentError(f"it takes {bytes_in_words(more)}, the cache {bytes_in_words(self.max_bytes)} in all")
        sweep(self.folder)
        leased = self._leases.all()
        folders = [path for path in self.folder.iterdir() if path.name[:1] != "." and path.is_dir()]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in folders}
        # And what others are about to write.
        there = {path.name for path in folders}
        total = more + sum(sizes.values()) + sum(size for key, size in leased.items() if key not in there)
        for path in sorted(folders, key=lambda path: path.stat().st_mtime_ns):
            if total <= self.max_bytes:
                return
            if path.name not in leased:
                _drop(path)
                total -= sizes[path]
        if total > self.max_bytes:
            used = f"{bytes_in_words(total - more)} of {bytes_in_words(self.max_bytes)}"
            raise CacheFullError(
                f"{self.folder} is full: running engines use {used}, and {bytes_in_words(more)} more are needed; ask "
                "for a mixture that is served already, or give the cache more room"
            )


def _is_there(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def _drop(folder: Path) -> None:
    """Remove a folder in one step, as others see it: it is gone from its place before a file of it is."""
    try:
        with partial_beside(folder) as partial:
            os.replace(folder, partial.new)
    except FileNotFoundError:  # somebody removed it by hand
        pass
    except OSError as error:
        raise OutputError(f"{folder}: it cannot be removed: {error.strerror}") from error
