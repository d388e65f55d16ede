"""A process that has imported everything once, and forks a child for each command: importing takes most of a command.

``python preloaded.py serve SOCKET`` waits for commands. ``python preloaded.py run SOCKET cli|python ARGUMENT...`` has
one run there, with its own arguments, folder, environment, input and output, and ends with its exit code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path


def serve(address: str) -> None:
    """Run commands until the process is ended."""
    import erase_concept.cli.main
    import erase_concept.eval.evaluate
    import erase_concept.run  # noqa: F401 - imported for the children

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        Path(f"{address}.new").rename(address)  # from now on there is an answer
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(connection)
            connection.close()
            _reap()


def _reap() -> None:
    """Take note of children that have ended."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _answer(connection: socket.socket) -> None:
    """Run the command in this process, a child, and end it."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    asked = json.loads(message)
    for stream, place in zip(streams, range(3), strict=True):
        os.dup2(stream, place)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        code = _run(*asked["arguments"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())
    os._exit(0)


def _run(what: str, *arguments: str) -> int:
    try:
        if what == "python":
            exec(compile(arguments[0], "<block>", "exec"), {"__name__": "__main__"})
        else:
            from erase_concept.cli.main import main

            sys.argv = ["erase-concept", *arguments]
            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run(address: str, *arguments: str) -> int:
    """Have a command run by the process that waits at an address, and return its exit code."""
    asked = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        return int(connection.recv(16) or b"1")


if __name__ == "__main__":
    action, at, *rest = sys.argv[1:]
    if action == "serve":
        serve(at)
    sys.exit(run(at, *rest))
