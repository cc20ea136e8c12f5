"""Starts programs in forks of itself, in which torch, transformers and swirl_fast are imported already: see forks.py, which starts it.

    python tests/support/fork_server.py FD

FD is a socket of whole packets. A packet is JSON (arguments, environment, folder, new_session) with three open files: standard output,
standard error, and a pipe that gets two lines, the program's process id and, when it has ended, its exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

PACKET = 1 << 17


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Returns in every program that is to run, with what is to run; in the server with None, when nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the programs by itself
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        packet, files, _, _ = socket.recv_fds(requests, PACKET, 3)
        if not packet:
            return None
        if not os.fork():
            break
        for file in files:
            os.close(file)
    # The keeper of one program: its parent, which tells how it ended.
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, errors, status = files
    program = os.fork()
    if program:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        os.write(status, b"%d\n" % code)
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request: dict[str, Any] = json.loads(packet)
    if request["new_session"]:
        os.setsid()
    os.write(status, b"%d\n" % os.getpid())
    os.close(status)
    for file, number in ((out, 1), (errors, 2)):
        os.dup2(file, number)
        os.close(file)
    return request


def run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """As `python ARGUMENTS` would: -m MODULE, -c CODE or a file, and what follows it. Raises what the program raises."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    os.chdir(folder)
    kind, *rest = arguments
    if kind == "-m":
        sys.path[0], sys.argv = folder, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(kind), arguments
        runpy.run_path(kind, run_name="__main__")


def end(code: object) -> None:
    """As the interpreter does at sys.exit(code), but for taking all modules apart, which takes a second."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import swirl_fast.stages  # noqa: F401

    assert threading.active_count() == 1, "only this thread would be there in a fork"
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request:
        try:
            run(request["arguments"], request["environment"], request["folder"])
            end(0)
        except SystemExit as exit_:
            end(exit_.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            end(1)
