"""Starts Python programs as subprocess does, forked from a process that has imported what takes seconds.

They know nothing of the project yet, and are processes like others: with a pid, a session, an environment, standard
streams and an exit code of their own, to be killed by any signal.
"""

import atexit
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
import traceback
import types
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

ADDRESS = "STARTER"  # in the environment: where the process listens
PACKAGES = (
    *("hydra", "hypothesis", "lightning", "matplotlib.pyplot", "numpy", "optuna", "optuna_integration", "pytest"),
    *("hydra_plugins.hydra_joblib_launcher._core", "hydra_plugins.hydra_submitit_launcher.submitit_launcher"),
    *("submitit", "tensorboard.summary.writer.event_file_writer", "torch", "torchinfo"),
    *("torch.utils.tensorboard", "torchmetrics.functional.classification", "torchvision", "xlsxwriter"),
)


class Popen(subprocess.Popen):
    """Of [sys.executable, "-m", module, …] or [sys.executable, "-c", code, …]; "-u" makes no difference."""

    def _execute_child(self, args: list, *others: Any) -> None:
        (folder, environment), streams, session = others[4:6], others[9:15], others[-2]
        request = {
            "arguments": [str(one) for one in args[1:] if one != "-u"],
            "folder": str(folder or Path.cwd()),
            "environment": {**(os.environ if environment is None else environment)},
            "session": session,
        }
        child = [own if fd == -1 else fd for own, fd in enumerate((streams[0], streams[3], streams[5]))]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(None)  # whatever a test has set as the default
            connection.connect(os.environ[ADDRESS])
            socket.send_fds(connection, [b"."], child)
            connection.sendall(json.dumps(request).encode() + b"\n")
            self.told = os.fdopen(os.dup(connection.fileno()), "rb", buffering=0)
        self.pid = int(self.told.readline())
        self._child_created = True
        self._close_pipe_fds(*streams)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags and not select.select([self.told], [], [], 0)[0]:
            return 0, 0
        with self.told:
            return self.pid, int(self.told.readline())

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and (ended := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(ended[1])
        return self.returncode


def run(command: list, **settings: Any) -> subprocess.CompletedProcess:
    """As subprocess.run."""
    with patch.object(subprocess, "Popen", Popen):
        return subprocess.run(command, **settings)


def serve(address: str) -> None:
    """Until standard input is closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print(flush=True)
        while 0 not in select.select([0, listener], [], [])[0]:
            import_all()
            connection, _ = listener.accept()
            with connection:
                if not os.fork():
                    listener.close()
                    keep(connection)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def import_all() -> None:
    if "torch" in sys.modules:
        return
    import gc

    gc.disable()
    for package in PACKAGES:
        with suppress(ImportError):  # of what is optional
            import_module(package)
    gc.enable()
    gc.freeze()
    assert not any(name.partition(".")[0] in ("src", "lab") for name in sys.modules)


def keep(connection: socket.socket) -> NoReturn:
    """Tells the program's pid, and how it ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rwb", buffering=0) as told:
        request = json.loads(told.readline())
        child = os.fork()
        if not child:
            begin(request, streams, connection)
        for number in (0, 1, 2, *streams):
            os.close(number)
        with suppress(OSError):  # nobody waits any more
            told.write(b"%d\n" % child)
            told.write(b"%d\n" % os.waitpid(child, 0)[1])
    os._exit(0)


def begin(request: dict, streams: list[int], connection: socket.socket) -> NoReturn:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.close(connection.fileno())
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name, how in (0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"):
        encoding, errors = os.environ.get("PYTHONIOENCODING"), "backslashreplace" if number == 2 else "strict"
        by_line = 1 if number == 2 or os.isatty(number) else -1
        stream = open(number, how, by_line, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    kind, program, *arguments = request["arguments"]
    sys.path[0] = request["folder"] if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    os._exit(outcome(kind, program))


def outcome(kind: str, program: str) -> int:
    """The exit code."""
    code = 1
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(program, vars(main))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream, failed in (sys.stdout, 120), (sys.stderr, 0):  # as Python ends
        try:
            stream.flush()
        except OSError:
            code = failed or code
        except ValueError:  # it is closed
            pass
    return code % 256


if __name__ == "__main__":
    serve(sys.argv[1])
