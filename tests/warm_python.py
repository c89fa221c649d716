"""A `python` whose imports are done: commands that a test runs by the dozen start at once.

A server imports PyTorch, Diffusers and LocalDiT once. `python` and `localdit` in a folder of their
own ask it for a fork of itself, which takes over arguments, folder, environment, streams and exit
status. What it can't do (`python -m pip`, ...) goes to the real interpreter.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = [
    "accelerate",
    "localdit.pipelines",
    "localdit.training.session",
    "localdit.utils",
    "torch.utils.data",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.t5.modeling_t5",
]
COMMAND = """#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
import warm_python
warm_python.ask({path!r}, {prefix!r} + sys.argv[1:])
"""


@contextlib.contextmanager
def warm_python() -> Iterator[dict[str, str]]:
    """Serve `python` and `localdit`; yields the environment that finds them."""
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as environment:
        yield environment


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[dict[str, str]]:
    address = folder / "server"  # the path of a socket has to be short
    for name, prefix in {"python": [], "python3": [], "localdit": ["-m", "localdit"]}.items():
        text = COMMAND.format(
            python=sys.executable, tests=str(ROOT / "tests"), path=str(address), prefix=prefix
        )
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout and server.stdout.readline() == "ready\n", "see its errors"
        yield environment
    finally:
        server.kill()
        server.wait()


def ask(address: str, arguments: list[str]) -> None:
    """Have the server run what these arguments of `python` say, and exit as it does."""
    real = [sys.executable, *arguments]
    module = arguments[1] if arguments[:1] == ["-m"] else ""
    flagged = arguments[:1] and arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")
    if not arguments or flagged or module.split(".")[0] in ("pip", "venv", "pytest", "mypy"):
        os.execv(sys.executable, real)
    order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps(order).encode())
        connection.shutdown(socket.SHUT_WR)
        status = connection.recv(16)
    sys.exit(int(status) if status else 1)


def serve(address: str) -> None:
    """Fork once for each order, for ever."""
    sys.path[0] = str(ROOT)  # not the tests' folder: `tests/as_diffusers` would stand for Diffusers
    for name in IMPORTS:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _obey(connection)
        connection.close()


def _obey(connection: socket.socket) -> None:
    """In a fork: run the order in a fork of its own, and tell its exit status."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    order = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _run(**order)
        sys.exit()
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What `python` does with these arguments."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = folder
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # among the tests are folders named as libraries
    serve(sys.argv[1])
