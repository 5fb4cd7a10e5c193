"""A `python` that starts in no time, for tests that run hundreds of commands: one process has imported PyTorch and the scripts and forks for each.

`python forking.py SOCKET` serves. The script of start_server() is what is called in python's place: it hands its arguments, folder, environment
and open files (with a run's lock among them) to a fork in its own process group, passes SIGTERM on and ends with the fork's status.
"""

import atexit
import contextlib
import functools
import marshal
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback


def serve(address):
    import warm  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(300)  # left alone it ends
    os.close(1)  # start_server waits for that
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            become(connection)
        connection.close()


def draw_less(how):
    """For tests that are about something else: "once" draws a picture that is there already no second time, and lays out none; "none"
    leaves empty files."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(figure, temporary, **options):
        path = temporary.with_name(temporary.name.partition(".png")[0] + ".png")
        if how == "none":
            temporary.write_bytes(b"")
        elif path.exists():
            shutil.copyfile(path, temporary)
        else:
            figure.set_layout_engine("none")  # half of what a picture takes
            draw(figure, temporary, **options)

    Figure.savefig = savefig


def stream(number, errors):
    """Python's own stream for a file that is open, as it would begin: whether it can be sought is found out here."""
    return open(number, "w", buffering=-1 if number == 1 else 1, errors=errors, closefd=False)


def become(connection):
    """Be the command that a client asks for, to the end."""
    message, files, _, _ = socket.recv_fds(connection, 2**20, 64)
    asked = marshal.loads(message or os._exit(0))  # the client has been killed
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
        import warm

        if how := os.environ.get("PICTURES"):
            draw_less(how)
        if backend := os.environ.get("COMPILER"):
            torch.compile = functools.partial(torch.compile, backend=backend)
        warm.run_script(sys.argv[0])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def become_process(folder, output, environ, script, args):
    """The same for a process of multiprocessing: be `python SCRIPT ARGS` in a folder, all that is printed going to file output."""
    import torch
    import warm

    os.chdir(folder)
    os.environ.update(environ)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background inherit that it is ignored
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.2))  # a failed rank waits for torchrun to end it, which is not here
    torch.set_num_threads(1)
    if "FILE_LIMIT" in environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environ["FILE_LIMIT"]),) * 2)
    warm.run_script(str(warm.ROOT / script))


# Of what Python is made in, as json, signal and socket alone would take twice as long to begin as the rest.
CLIENT = """#!{python} -IS
import _signal, _socket, array, marshal, os, sys
_signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGTERM])
files = sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{{fd}}"))
server = _socket.socket(_socket.AF_UNIX)
server.connect("{address}")
asked = {{"argv": sys.argv[1:], "folder": os.getcwd(), "environ": dict(os.environ), "group": os.getpgrp(),
         "no_sigint": _signal.getsignal(_signal.SIGINT) == _signal.SIG_IGN}}
server.sendmsg([marshal.dumps(asked)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", files))])
told = open(server.fileno(), "rb", closefd=False)
fork = int(told.readline() or sys.exit(137))
_signal.signal(_signal.SIGTERM, lambda *_: os.kill(fork, _signal.SIGTERM))
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGTERM])
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
