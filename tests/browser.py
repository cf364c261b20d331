"""A real browser without a window, driven through its debugging pipe: a page at a width, in a scheme."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import lacking

#: Seconds that a page may take to load, on a busy machine.
_LONGEST = 120


def words(profile: Path) -> list[str]:
    """What starts it."""
    found = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if found is None:
        lacking("no chromium is installed, which the page is looked at with")
    assert found
    return [
        found,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]


class Browser:
    """One tab."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._number, self._session = to, back, 0, ""
        #: What pages wrote to the console, errors included.
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if self._session:
            said["sessionId"] = self._session
        self._to.write(json.dumps(said).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (one := self._back.read(1)) != b"\0":
            assert one, "the browser has ended"
            text += one
        found = json.loads(text)
        if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.console.append(json.dumps(found["params"]))
        return found

    def open(self, page: Path, width: int = 1400, dark: bool = False, settle: bool = True) -> None:
        """Show a page on a screen of that width, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="", features=scheme)
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + _LONGEST
        while self.ask("document.readyState + location.href") != "complete" + page.resolve().as_uri():
            assert time.monotonic() < end, f"{page} is not loaded"
        if settle:
            self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def ask(self, code: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        found = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "x": 0, "y": 0, "scale": 1}
        )
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block."""
    start = [*words(profile), "--remote-debugging-pipe"]
    (down, to), (back, up) = os.pipe(), os.pipe()
    # It reads from 3 and writes to 4, where our ends may lie: they go higher first.
    down, up = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (down, up))

    def place() -> None:
        os.dup2(down, 3)
        os.dup2(up, 4)

    run = subprocess.Popen(
        start, pass_fds=(3, 4), preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(down)
    os.close(up)
    with os.fdopen(to, "wb") as writes, os.fdopen(back, "rb") as reads:
        try:
            yield Browser(writes, reads)
        finally:
            run.terminate()
            run.wait(30)
