"""`python` for tests that launch many processes. Importing torch, Lightning and this package takes
seconds, so each process is forked from one server that has imported them.

Only the start differs from a real `python`: arguments, environment, folder, open files, exit status
and forwarded signals are those of a launched process.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), ignored]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
child = int.from_bytes(server.recv(8), "big")
for number in set(numbers) - set(ignored):
    signal.signal(number, lambda number, _: os.kill(child, number))
status = int.from_bytes(server.recv(8), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """Path of a program that takes the arguments of `python`; its server ends with the context."""
    address, program = folder / "socket", folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    root = Path(__file__).parents[1]
    server = subprocess.Popen(
        [sys.executable, __file__, str(address), str(program)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    try:
        yield str(program)
    finally:
        server.kill()
        server.wait()


def serve(address: str, program: str) -> list[str]:
    """Returns in each forked process, with the arguments of `python`."""
    import torch

    import magnet_train.cli.fit
    import magnet_train.data.tokenize
    import magnet_train.evaluation.evaluate  # noqa: F401

    torch.set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(32)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that pass on signals
    print("ready", flush=True)
    parent = os.getppid()
    listener.settimeout(10)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != parent:  # the tests were killed
                os._exit(0)
            continue
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return handle(connection, program)
        connection.close()


def handle(connection: socket.socket, program: str) -> list[str]:
    """Returns in the process that shall run; this one reports its status, and kills it if the
    client is gone."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request = connection.makefile("rb").read(int.from_bytes(size, "big"))
    arguments, folder, environment, ignored = json.loads(request)
    child = os.fork()
    if child == 0:
        connection.close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        if signal.SIGINT not in ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        become(program, folder, environment, files)
        return arguments
    connection.sendall(child.to_bytes(8, "big"))
    end = os.pidfd_open(child)
    ready, _, _ = select.select([end, connection], [], [])
    if end not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def become(program: str, folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Take folder, environment and files of the client."""
    from lightning.pytorch.utilities import rank_zero_only

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # As at a start: the server's own know whether its files can be sought.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.executable = program
    sys.path[:1] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    # Lightning reads the rank when it is imported.
    ranks = [environment.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")]
    rank_zero_only.rank = next((int(rank) for rank in ranks if rank), 0)


def run(arguments: list[str]) -> None:
    """Run `-m MODULE …`, `-c CODE …` or `FILE …`, after torchrun's `-u`."""
    first, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    run(serve(*sys.argv[1:]))
