"""A `python` that starts in no time, for tests that run hundreds of commands: one process has imported PyTorch and the scripts and forks for each.

`python forking.py SOCKET` serves. The script of start_server() is what is called in python's place: it hands its arguments, folder, environment
and open files (with a run's lock among them) to a fork in its own process group, passes SIGTERM on and ends with the fork's status.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILED = {}  # (path, size, time of its last change) of each script: its code


def serve(address):
    sys.path.insert(0, str(ROOT))
    import matplotlib.pyplot  # noqa: F401
    import regex  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401

    import probe  # noqa: F401

    for script in ROOT.glob("*.py"):
        COMPILED[state_of(script)] = compile(script.read_bytes(), str(script), "exec")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(300)  # left alone it ends
    os.close(1)  # start_server waits for that
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    gc.freeze()  # or every fork's collection would copy all of this
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            become(connection)
        connection.close()


def state_of(path):
    return str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns


def run_script(path):
    """Be the module __main__ of a script, as python does."""
    code = COMPILED.get(state_of(path)) or compile(Path(path).read_bytes(), path, "exec")
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def draw_less(how):
    """For tests that are about something else: "once" draws no picture again that is there, "none" leaves empty files."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(figure, temporary, **options):
        path = temporary.with_name(temporary.name.partition(".png")[0] + ".png")
        if how == "none":
            temporary.write_bytes(b"")
        elif path.exists():
            shutil.copyfile(path, temporary)
        else:
            draw(figure, temporary, **options)

    Figure.savefig = savefig


def stream(number, errors):
    """Python's own stream for a file that is open, as it would begin: whether it can be sought is found out here."""
    return open(number, "w", buffering=-1 if number == 1 else 1, errors=errors, closefd=False)


def become(connection):
    """Be the command that a client asks for, to the end."""
    message, files, _, _ = socket.recv_fds(connection, 2**20, 64)
    asked = json.loads(message or os._exit(0))  # the client has been killed
    os.setpgid(0, asked["group"])  # fails where its group has been
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if asked["no_sigint"] else signal.default_int_handler)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    sys.stdout, sys.stderr = stream(1, "strict"), stream(2, "backslashreplace")
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.argv = asked["argv"]
    try:
        connection.sendall(b"%d\n" % os.getpid())
    except OSError:  # the client has been killed
        os._exit(0)
    mine, really_end = os.getpid(), os._exit

    def told_end(status):  # a script may end at once by itself, after a signal
        if os.getpid() == mine:
            with contextlib.suppress(OSError):  # the client has been killed
                connection.sendall(b"%d\n" % status)
        really_end(status)

    os._exit, status = told_end, 0
    atexit._clear()  # what is called at the end is what the script asks for
    try:
        import torch

        if how := os.environ.get("PICTURES"):
            draw_less(how)
        if backend := os.environ.get("COMPILER"):
            torch.compile = functools.partial(torch.compile, backend=backend)
        run_script(sys.argv[0])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
files = sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{{fd}}"))
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
asked = {{"argv": sys.argv[1:], "folder": os.getcwd(), "environ": dict(os.environ), "group": os.getpgrp(),
         "no_sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN}}
socket.send_fds(server, [json.dumps(asked).encode()], files)
told = server.makefile()
fork = int(told.readline() or sys.exit(137))
signal.signal(signal.SIGTERM, lambda *_: os.kill(fork, signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
sys.exit(int(told.readline() or 137))
"""


def start_server(folder):
    """(the server's process, the path of an executable to call in python's place), both in a folder."""
    address, client = folder / "socket", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=env, stdout=subprocess.PIPE)
    server.stdout.read()  # to its end: the server listens
    return server, client


if __name__ == "__main__":
    serve(sys.argv[1])
