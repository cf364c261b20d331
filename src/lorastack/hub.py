"""Where a path or a hub id lies on this machine, through ``huggingface_hub``; and what others may be told of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from lorastack.errors import FormatError
from lorastack.files import local, looked_into, nearest, present, status_of

#: owner/name, then a folder inside, then a revision.
_HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)((?:/[\w][\w.-]*)*)(?:@([\w][\w./-]*))?")
#: owner/name, then perhaps a revision, and a place in it.
_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?#]+)((?:/[^/?#]+)*))?/?(?:[?#].*)?"
)
#: owner/name as the hub lets it be, or one of the names without an owner that it still has, then perhaps a revision.
_NAME = re.compile(r"((?:[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*)(?:@[\w./-]+)?", re.ASCII | re.IGNORECASE)
_LONGEST = 96
#: A place in the cache: owner, name, revision, what is inside.
_CACHED = re.compile(r"(?:^|/)models--(?:([^/]+?)--)?([^/]+)/snapshots/([^/]+)(?:/(.+))?$")
_FILES = (".gguf", ".safetensors", ".bin")
_CONFIG = "adapter_config.json"
#: With shards and their index.
ADAPTER_FILES = (_CONFIG, "adapter_model*", "adapters.safetensors", "pytorch_lora_weights*", "*.gguf", "config.json")


def resolve(given: str, subfolder: str | None = None, patterns: tuple[str, ...] = ADAPTER_FILES) -> Path:
    """The file or folder that ``given`` names; a hub id is fetched, or found in the cache when offline.

    Raises
    ------
    FormatError
        When there is no such path, and no such repository can be had.
    """
    path = local(given)
    if status_of(path) is not None:
        return looked_into(path) if subfolder is None else looked_into(_inside(looked_into(path), subfolder))
    word = _of_address(given)
    match = _HUB_ID.fullmatch(word)
    # An id with the name of a file in it is more likely a path that is not there; an address is what it says.
    if not match or word.startswith((".", "/", "~")) or (word == given and word.endswith(_FILES)):
        raise FormatError(f"{given}: there is no such file or folder{nearest(path)}")
    repository, inner, revision = match.groups()
    # The client looks a revision up as a path in its cache, and ".." would lead out of it.
    if revision and any(part in ("", ".", "..") for part in revision.split("/")):
        raise FormatError(f"{given}: {revision} is no revision; give a branch, a tag or a commit")
    inner = "/".join(part for part in (inner.strip("/"), subfolder) if part)
    if inner.endswith(_FILES):
        return _inside(_snapshot(given, repository, revision, [inner]), inner)
    folder = _snapshot(given, repository, revision, [f"{inner}/{p}" if inner else p for p in patterns])
    if not inner and _CONFIG in patterns and (inner := _lone_subfolder(folder)):
        folder = _snapshot(given, repository, revision, [f"{inner}/{p}" for p in patterns])
        return _inside(folder, inner)
    return _inside(folder, inner) if inner else folder


def hub_id(said: object) -> str | None:
    """The id of a model on the hub that a word means; None for a path of a machine, and for anything else.

    What is there on this machine under that name is a path.

    >>> hub_id("acme/base"), hub_id("gpt2"), hub_id("acme/base@v2"), hub_id("https://huggingface.co/acme/base")
    ('acme/base', 'gpt2', 'acme/base', 'acme/base')
    >>> [hub_id(path) for path in ("/models/base", "../base", "~/base", "C:\\\\base", "base.gguf", "a/b/c", None)]
    [None, None, None, None, None, None, None]
    """
    if not isinstance(said, str):
        return None
    if found := _ADDRESS.fullmatch(said):
        said, local_ = found[1], False
    else:
        said, local_ = of_cache(said) or said, present(local(said)) and not of_cache(said)
    match = _NAME.fullmatch(said)
    if local_ or not match or said.endswith(_FILES):
        return None
    name = match[1]
    odd = "--" in name or ".." in name or name.endswith((".", "-")) or len(name) > _LONGEST
    return None if odd else name


def told(said: str) -> str:
    """What others are told of a model or an adapter: its id on the hub, or the last name of a path.

    >>> told("acme/base"), told("/home/me/models/base/"), told("../x.gguf"), told("C:\\\\models\\\\base")
    ('acme/base', 'base', 'x.gguf', 'base')
    """
    return hub_id(said) or re.split(r"[/\\]", said.rstrip("/\\"))[-1]


def of_cache(path: str) -> str | None:
    """The word for a place in the hub's cache, as `resolve` takes it; None for any other.

    >>> of_cache("/home/me/.cache/huggingface/hub/models--acme--base/snapshots/0a1b/v2")
    'acme/base/v2@0a1b'
    """
    found = _CACHED.search(path)
    return found and f"{'/'.join(filter(None, (found[1], found[2], found[4])))}@{found[3]}"


def _of_address(given: str) -> str:
    """The hub id that an address of the hub's web pages means, as copied from a browser; else what was given.

    >>> _of_address("https://huggingface.co/acme/style/tree/main/v2?x=1"), _of_address("https://hf.co/acme/style/")
    ('acme/style/v2@main', 'acme/style')
    >>> _of_address("https://huggingface.co/acme/style/blob/main/adapter_model.safetensors")
    'acme/style@main'
    """
    if not given.startswith(("https://", "http://")):
        return given
    found = _ADDRESS.fullmatch(given)
    if not found:
        raise FormatError(f"{given}: it is no address of a model on huggingface.co; give owner/name, or a file here")
    repository, revision, inner = found[1], found[2], found[3] or ""
    folder, _, last = inner.rpartition("/")
    if last.startswith("adapter_"):  # a file of the adapter's folder
        inner = folder
    return f"{repository}{inner}" + (f"@{revision}" if revision else "")


def _lone_subfolder(folder: Path) -> str | None:
    """The only folder of a snapshot that holds an adapter, where the snapshot itself is none."""
    if (folder / _CONFIG).exists() or any(folder.glob("*.gguf")):
        return None
    inside = [path.parent for path in folder.glob("*/**/" + _CONFIG)]
    return inside[0].relative_to(folder).as_posix() if len(inside) == 1 else None


def _inside(folder: Path, subfolder: str) -> Path:
    path = folder / subfolder
    if status_of(path) is None:
        there = sorted(path.name for path in itertools.islice(folder.iterdir(), 20)) if folder.is_dir() else []
        raise FormatError(f"{folder} has no {subfolder}; it has {', '.join(there) or 'nothing'}")
    return path


def _snapshot(given: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[*patterns, f"*/{_CONFIG}"]))
    except Exception as error:  # the client raises its own errors, and those of its HTTP library
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"{given}: there is no such file or folder here, and the hub repository {repository}"
            f"{'@' + revision if revision else ''} cannot be had: {first}"
        ) from error
