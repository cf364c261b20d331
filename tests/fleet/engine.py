"""The real vLLM, started for a test, and asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, lacking

#: Where `make fleet-venv` puts it; another place is named by the variable.
VENV = Path(os.environ.get("LORASTACK_FLEET_VENV") or ROOT / ".fixtures" / "fleet")
STARTS_WITHIN = 600


class Server:
    """A running ``vllm serve``."""

    def __init__(self, port: int, base: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.base, self.process, self.log = port, base, process, log

    def get(self, path: str) -> tuple[int, Any]:
        """Status and answer."""
        return self._open(urllib.request.Request(self._url(path)))

    def complete(self, model: str, prompt: str | list[int], count: int = 24) -> tuple[int, Any]:
        """Status and answer of a greedy completion."""
        said = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
        return self.post("/v1/completions", said)

    def tokens(self, model: str, prompt: str | list[int], count: int = 24) -> list[int]:
        """The tokens of a greedy completion."""
        status, answer = self.complete(model, prompt, count)
        assert status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    def post(self, path: str, said: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer."""
        raw = json.dumps(said).encode()
        return self._open(urllib.request.Request(self._url(path), raw, {"content-type": "application/json"}))

    @property
    def alive(self) -> bool:
        """Whether the engine answers, and not only the server in front of it."""
        return self.process.poll() is None and self.complete(str(self.base), "Once", 1)[0] == 200

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _open(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")


def program(name: str = "vllm") -> Path:
    """A program of vLLM's environment; skips the test where there is none."""
    found = VENV / "bin" / name
    if not found.exists():
        lacking(f"the real vLLM is not in {VENV} (make fleet-venv, or name its environment: LORASTACK_FLEET_VENV)")
    return found


@contextlib.contextmanager
def serving(base: Path, library: Path, folder: Path, *words: str, **settings: str) -> Iterator[Server]:
    """``vllm serve`` with mixtures of ``library``; its log and its cache lie in ``folder``."""
    vllm = program()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(
        os.environ, PYTHONPATH=str(ROOT / "src"), VLLM_ALLOW_RUNTIME_LORA_UPDATING="True", VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", LORASTACK_LIBRARY=str(library),
        LORASTACK_CACHE=str(folder / "cache"), LORASTACK_MAX_RANK="32",
    ) | {f"LORASTACK_{key.upper()}" if key.islower() else key: value for key, value in settings.items()}  # fmt: skip
    log = folder / "vllm.log"
    line = [
        str(vllm), "serve", str(base), "--enable-lora", "--max-lora-rank", "32", "--port", str(port), "--host",
        "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-model-len", "256", *words,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment, start_new_session=True)
    server = Server(port, base, process, log)
    try:
        begun = time.monotonic()
        while True:
            time.sleep(0.5)
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - begun < STARTS_WITHIN, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(server._url("/health"), timeout=5):
                break
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
