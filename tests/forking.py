"""Starts `python -m contextd …` by a fork of a process that has imported contextd already.

Importing contextd costs more than all the rest of a server's start, and the tests start hundreds. What
is forked is a process of its own like any other: with its own environment, output, signals and end.
Benchmarks and long runs by hand do not use it.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESSAGE_BYTES_MAX = 1 << 20
EXIT_CRASH = 1
PR_SET_PDEATHSIG = 1


class Forked:
    """A process that was forked, with what the tests use of `subprocess.Popen` in text mode."""

    def __init__(self, pid: int, ended: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = os.fdopen(stdout, encoding="utf-8")
        self.stderr = os.fdopen(stderr, encoding="utf-8")
        self._ended = ended

    def poll(self) -> int | None:
        """The exit code, or the number of the signal that ended it, negative; None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("contextd", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout_s: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout_s)[0]:
            status = os.read(self._ended, 32)
            os.close(self._ended)
            self.returncode = os.waitstatus_to_exitcode(int(status)) if status else EXIT_CRASH
        return self.returncode


class _Nursery:
    """The process that forks, as its owner sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )
        atexit.register(self.close)

    def fork(self, arguments: Sequence[str], environ: Mapping[str, str]) -> Forked:
        """Runs `contextd` with these arguments in this folder."""
        order = {"arguments": list(arguments), "environ": dict(environ), "cwd": str(Path.cwd())}
        pipes = [os.pipe() for _ in range(3)]
        theirs = [write for _, write in pipes]
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], theirs)
            pid = int(self._socket.recv(32))
        for descriptor in theirs:
            os.close(descriptor)
        stdout, stderr, ended = (read for read, _ in pipes)
        return Forked(pid, ended, stdout, stderr)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_nursery: _Nursery | None = None


def spawn(arguments: Sequence[str], env: Mapping[str, str]) -> Forked:
    """Starts `python -m contextd` with these arguments; its output comes through pipes."""
    global _nursery  # noqa: PLW0603 - one for each process of the tests, made when it is needed
    _nursery = _nursery or _Nursery()
    return _nursery.fork(arguments, env)


def _serve_forks(orders: socket.socket) -> None:
    """Forks as it is told until its owner is gone. What it has forked ends with it."""
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: its owner ends it
    signal.set_wakeup_fd(woken)
    ends: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([orders.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _tell_ends(ends)
        if orders.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(orders, MESSAGE_BYTES_MAX, 3)
            if not message:
                return
            stdout, stderr, ended = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number in (orders.detach(), wake, woken, ended, *ends.values()):
                    os.close(number)
                _become(json.loads(message), stdout, stderr)
            os.close(stdout)
            os.close(stderr)
            ends[pid] = ended
            orders.send(str(pid).encode())


def _tell_ends(ends: dict[int, int]) -> None:
    while ends:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        ended = ends.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(ended, str(status).encode())
        os.close(ended)


def _become(order: dict[str, object], stdout: int, stderr: int) -> None:
    """Is `contextd` from here on."""
    code = EXIT_CRASH
    try:
        _end_with_the_nursery()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((null, 0), (stdout, 1), (stderr, 2)):
            os.dup2(descriptor, place)
            os.close(descriptor)
        # Anew, since those of before the fork believe that they can seek.
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        environ, arguments = order["environ"], order["arguments"]
        assert isinstance(environ, dict)
        assert isinstance(arguments, list)
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(str(order["cwd"]))
        python_path = environ.get("PYTHONPATH", "")
        sys.path[:0] = [str(order["cwd"]), *filter(None, python_path.split(os.pathsep))]
        sys.argv = ["contextd", *arguments]
        from contextd.cli import main  # noqa: PLC0415 - imported before the fork

        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_the_nursery() -> None:
    """What the tests have left running must not outlive them, however they end."""
    import ctypes  # noqa: PLC0415 - only here

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    import gc

    import contextd.app
    import contextd.cli
    import contextd.provider.openai
    import contextd.tools.mcp  # noqa: F401

    gc.freeze()
    _serve_forks(socket.socket(fileno=int(sys.argv[1])))
