"""A forked child that stops itself before its work, and goes on under strace: nothing that was imported is traced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def traced(work: Callable[[], int], *options: str) -> int:
    """The wait status of a child that does ``work`` under strace with these options.

    The program ends with "strace cannot trace here" where it may not.
    """
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(work())
    os.waitpid(pid, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-qq", *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None:
            os.kill(pid, signal.SIGKILL)
            sys.exit("strace cannot trace here")
        time.sleep(0.002)
    os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, 0)[1]
    tracer.wait()
    return status
