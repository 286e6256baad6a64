"""Run a command in a child process that ends when its parent does.

The parent holds the child's standard input open; however the parent ends, the operating system closes it, and the child
stops as on SIGTERM. The child is ``python -m pfm._internal.child MODULE:FUNCTION
ARGUMENTS``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

__all__ = ["Child", "running_child"]

END_SECONDS = 10.0  # between SIGTERM and SIGKILL


class Child:
    """A running child process, with all that it has written.

    Args:
        process: the process. log: file of its standard output and error.
        what: names it in errors.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, what: str) -> None:
        self.process, self.log, self.what = process, log, what

    def written(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, before: str, after: str, seconds: float) -> str:
        """Wait until it has written ``before``, and return what stands between that and ``after``.

        Raises:
            ChildProcessError: it ends first, or takes longer; the message holds the end of what it wrote.
        """
        end = time.monotonic() + seconds
        while True:
            alive = self.process.poll() is None
            _, found, rest = self.written().partition(before)
            value, whole, _ = rest.partition(after)
            if found and whole:
                return value.strip()
            if not alive or time.monotonic() > end:
                problem = f"did not start within {seconds:g} s" if alive else f"ended ({self.process.returncode})"
                raise ChildProcessError(f"{self.what} {problem}; it wrote last:\n{self.written()[-1000:].strip()}")
            time.sleep(0.05)


@contextlib.contextmanager
def running_child(
    entry: str, arguments: Sequence[str], *, log: Path, what: str, environment: Mapping[str, str]
) -> Generator[Child, None, None]:
    """Run ``entry`` (MODULE:FUNCTION) in a child process, and end it on leaving, by force if need be.

    Args:
        entry: the function to call; ``sys.argv`` holds the arguments.
        log: file for its standard output and error.
        what: names it in errors.
        environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", "pfm._internal.child", entry, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            start_new_session=True,  # Ctrl-C goes to this process, which ends the child in order
        )
    try:
        yield Child(process, log, what)
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)


def _main() -> None:
    module, _, function = sys.argv[1].partition(":")
    sys.argv = [module, *sys.argv[2:]]
    threading.Thread(target=_end_with_parent, name="pfm-parent", daemon=True).start()
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    _main()
