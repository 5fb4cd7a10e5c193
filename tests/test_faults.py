"""What a run survives, on real processes: kills at any moment, a dying rank, SIGTERM, full disks, damaged files.

`pytest tests/test_faults.py --long` kills 50 runs instead of 10.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import CONFIG, ROOT
from safetensors.torch import load_file
from test_train import COMMON, metrics

from model import CheckpointError, load_model, save_model

# 30 steps, a state after every fourth.
TRAIN = [*map(str, COMMON), "--epochs", "10", "--save-every", "4"]


# ---------------------------------------------------------------- processes that start in no time


@pytest.fixture(scope="module")
def server():
    """A process that has imported PyTorch and the scripts, and forks one for each command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.Process(target=int).start()
    del os.environ["PYTHONPATH"]
    return context


def command(folder, output, environ, script, args):
    """Become `python SCRIPT ARGS` in a folder, all that is printed going to file output."""
    os.chdir(folder)
    os.environ.update(environ)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background inherit that it is ignored
    torch.set_num_threads(1)
    if "FILE_LIMIT" in environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environ["FILE_LIMIT"]),) * 2)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(server, folder, *args, ranks=1, script="train.py", **environ):
    """The processes of one command, a rank each, as torchrun would start them; their output is in output.txt."""
    (folder / "output.txt").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in (ours | environ).items()}
        processes.append(server.Process(target=command, args=(folder, folder / "output.txt", environment, script, [str(a) for a in args])))
        processes[-1].start()
    return processes


def finish(processes, folder):
    """(exit statuses, output) of a command."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "hangs"
    return [process.exitcode for process in processes], (folder / "output.txt").read_text()


def train(server, folder, *args, **options):
    return finish(start(server, folder, *args, **options), folder)


def outcome(out):
    """All that must not depend on what happened on the way: weights, and the log but for its times."""
    assert not list(out.glob("state-*")) and not list(out.glob("*.tmp"))
    return (out / "model.safetensors").read_bytes(), [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(out)]


@pytest.fixture(scope="module")
def unbroken(work, server):
    """What runs on one rank and on two end with when nothing happens."""
    outcomes = {}
    for ranks in (1, 2):
        statuses, output = train(server, work, *TRAIN, "--out", f"unbroken-{ranks}", ranks=ranks)
        assert statuses == [0] * ranks, output
        outcomes[ranks] = outcome(work / f"unbroken-{ranks}")
    assert [row["step"] for row in outcomes[1][1]] == list(range(1, 31))
    return outcomes


# ---------------------------------------------------------------- kills


def logged(out):
    """How many steps a run has logged."""
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def saved(out):
    """The step of a run's newest whole state, 0 where it has none."""
    return max([int(state.name.removeprefix("state-")) for state in out.glob("state-*[0-9]")], default=0)


def wait_until(moment, processes):
    """Wait for moment(), which comes while the command runs."""
    while not moment():
        assert processes[0].is_alive()
        time.sleep(0.001)


def send(processes, sent):
    """Send a signal to those of a command's processes that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, sent)


def killed_in(moment, chance, server, work, ranks, name):
    """(folder, step) of a run killed while moment(folder, step) held: its processes are stopped before the question is put,
    so that a moment of a millisecond is hit for certain; a run that was over before is made again."""
    for again in range(20):
        out, step = work / f"{name}-{again}", chance.randint(1, 26)
        processes = start(server, work, *TRAIN, "--out", out, ranks=ranks)
        while all(process.is_alive() for process in processes):
            if not moment(out, step):
                time.sleep(0.0002)
                continue
            time.sleep(chance.choice([0, 0.002, 0.02]))
            send(processes, signal.SIGSTOP)
            caught = moment(out, step)
            send(processes, signal.SIGKILL if caught else signal.SIGCONT)
            if caught and finish(processes, work)[0] == [-signal.SIGKILL] * ranks:
                return out, step
        finish(processes, work)
    raise AssertionError("20 runs ended before that moment")


def test_killed_at_any_moment(work, server, unbroken, request):
    """kill -9 in steps, in saves of the state and in the last save: --resume ends with the unbroken run's weights and log, bit for bit."""
    chance = random.Random(0)
    moments = {  # of a run that is to have logged so many steps
        "between saves": lambda out, step: logged(out) >= step and not any(out.glob("*.tmp")),
        "in a state's save": lambda out, step: logged(out) >= step and any(out.glob("state-*.tmp")),
        "in the last save": lambda out, step: any(out.glob("model.safetensors*")),
    }
    for n in range(51 if request.config.getoption("--long") else 9):
        ranks, (name, moment) = 2 if n % 3 == 0 else 1, list(moments.items())[n // 3 % 3]
        out, step = killed_in(moment, chance, server, work, ranks, f"killed-{n}")
        done = (out / "run.json").exists()
        statuses, output = train(server, work, *TRAIN, "--out", out, "--resume", ranks=ranks)
        assert statuses == ([2] if done else [0]) * ranks, output
        assert outcome(out) == unbroken[ranks], (name, ranks, step)


def test_killed_again_and_again(work, server, unbroken):
    """A run that is killed after each of its states, and goes on with one rank, two, four and two, ends with equal losses and one log."""
    out = work / "again"
    for ranks, last in ((1, 8), (2, 16), (4, 24), (2, None)):
        processes = start(server, work, *TRAIN, "--out", out, "--resume", ranks=ranks)
        if last:
            wait_until(lambda: saved(out) >= last, processes)
            send(processes, signal.SIGKILL)
        statuses, output = finish(processes, work)
    assert statuses == [0, 0], output
    rows, losses = metrics(out), [row["loss"] for row in unbroken[1][1]]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)
    (entry,) = json.loads((out / "run.json").read_text())
    assert [part["ranks"] for part in [*entry["resumed_from"], entry]] == [1, 4, 2], "what each part was made with, once"


def test_ranks_agree(work, server, unbroken):
    """One rank, two and four end with equal losses."""
    assert train(server, work, *TRAIN, "--out", "four", ranks=4)[0] == [0] * 4
    losses = [row["loss"] for row in unbroken[1][1]]
    for rows in (unbroken[2][1], metrics(work / "four")):
        assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)


def test_split_of_two_ranks(work, server):
    """Ranks agree on what is still to be sorted, also where one asks for a set that another has just written."""
    shutil.copytree(ROOT / "tests/raw/popqa", work / "sorted/raw/popqa")
    (work / "sorted/facts.jsonl").write_text("".join(json.dumps({"id": f"{i}", "prompt": f"{i}?", "response": "a"}) + "\n" for i in range(3)))
    split = [work / "models/tiny", "--split", "popqa-id", "popqa", "facts.jsonl", "popqa", "--shots", 1, "--precision", "fp32"]
    for _ in range(2):
        processes = start(server, work / "sorted", *split, ranks=2, script="evaluate.py")
        statuses, output = finish(processes, work / "sorted")
        assert statuses == [0, 0] and output.count("of 3 facts") == output.count("of 2 facts") == 1, output


def slow_run(work, out):
    """A run under torchrun that would last minutes, once it has made two steps: (torchrun, its ranks' process ids)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py", *TRAIN,
               "--epochs", "3000", "--out", out]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = subprocess.Popen(command, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while logged(work / out) < 2:
        assert torchrun.poll() is None and time.time() < end
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True, check=True)
    return torchrun, sorted(map(int, children.stdout.split()))


def test_one_rank_dies(work):
    """kill -9 of one rank ends the whole job within a minute, and torchrun names the signal."""
    torchrun, ranks = slow_run(work, "rank-died")
    os.kill(ranks[1], signal.SIGKILL)
    began = time.time()
    _, errors = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0 and time.time() - began < 60
    assert "SIGKILL" in errors
    assert not (work / "rank-died/run.json").exists()


def test_sigterm(work):
    """SIGTERM to torchrun: both ranks end their step, save it and say how to go on; the next run goes on there."""
    torchrun, _ = slow_run(work, "terminated")
    torchrun.terminate()
    _, errors = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0 and errors.count("go on with --resume") == 1, errors
    (state,) = (work / "terminated").glob("state-*")
    step = int(state.name.removeprefix("state-"))
    assert [row["step"] for row in metrics(work / "terminated")] == list(range(1, step + 1))
    assert not (work / "terminated/run.json").exists()


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_signals_lose_no_step(work, server, unbroken, sent, status):
    """A run stopped by SIGTERM or Ctrl-C has no state but that of its last step, and ends after --resume as if nothing had happened."""
    out = work / sent.name
    processes = start(server, work, *TRAIN, "--save-every", 0, "--out", out)
    wait_until(lambda: logged(out) >= 3, processes)
    send(processes, sent)
    statuses, output = finish(processes, work)
    assert statuses == [status] and f"{sent.name}: stopped after step" in output and "Traceback" not in output, output
    statuses, output = train(server, work, *TRAIN, "--save-every", 0, "--out", out, "--resume")
    assert statuses == [0] and "goes on after step" in output
    assert outcome(out) == unbroken[1]


@pytest.mark.parametrize("command", [["data.py", "pipe.jsonl"], ["evaluate.py", "models/tiny", "--data", "pipe.jsonl"]])
def test_ctrl_c(work, command):
    """Ctrl-C and SIGTERM end a command in one line and with their status; while it is still importing, without a word."""
    os.mkfifo(work / "pipe.jsonl")
    for sent, status in ((signal.SIGINT, -2), (signal.SIGTERM, 143)):
        process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], cwd=work, stderr=subprocess.PIPE, text=True, preexec_fn=sigint_as_usual)  # noqa: PLW1509
        with open(work / "pipe.jsonl", "w"):  # open at both ends: it waits for what it is to read
            time.sleep(0.3)
            process.send_signal(sent)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == status and "Traceback" not in errors, errors
        assert errors.startswith(f"{command[0]}: {sent.name}: stopped; ") and errors.count("\n") == 1, errors
    process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], cwd=work, stderr=subprocess.PIPE, text=True, preexec_fn=sigint_as_usual)  # noqa: PLW1509
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == -2
    os.unlink(work / "pipe.jsonl")


def sigint_as_usual():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background inherit that it is ignored


def test_saved_by_the_clock(work, server, unbroken):
    """With --save-every in minutes both ranks save when rank 0's clock says so, and a killed run goes on from there."""
    out, options = work / "by-the-clock", ["--save-every", "0.001m"]
    processes = start(server, work, *TRAIN, *options, "--out", out, ranks=2)
    wait_until(lambda: saved(out), processes)
    send(processes, signal.SIGKILL)
    finish(processes, work)
    statuses, output = train(server, work, *TRAIN, *options, "--out", out, "--resume", ranks=2)
    assert statuses == [0, 0] and "goes on after step" in output, output
    assert outcome(out) == unbroken[2]


@pytest.mark.parametrize("penalty", ["l2", "kl"])
def test_penalty_after_a_kill(work, server, unbroken, penalty):
    """A penalty to the weights that the stage started from, added from outside, means the same weights after kill -9 and --resume."""
    outcomes = {}
    for name, killed in (("whole", False), ("killed", True)):
        out = work / f"{penalty}-{name}"
        command = [penalty, *TRAIN, "--out", out]
        processes = start(server, work, *command, script="tests/penalties.py", ranks=2)
        if killed:
            wait_until(lambda: saved(out) >= 8, processes)
            send(processes, signal.SIGKILL)
        statuses, output = finish(processes, work)
        if killed:
            statuses, output = train(server, work, *command, "--resume", script="tests/penalties.py", ranks=2)
            assert "goes on after step" in output
        assert statuses == [0, 0], output
        outcomes[name] = outcome(out)
    statuses, output = train(server, work, penalty, *map(str, COMMON), "--mix-weight", 0, "--batch-size", 1, "--out", f"{penalty}-0", script="tests/penalties.py")
    assert statuses == [0] and "held no fact" in output, output
    assert outcomes["killed"] == outcomes["whole"]
    ours, plain = ([row["loss"] for row in log] for _, log in (outcomes["whole"], unbroken[2]))
    assert ours[0] == pytest.approx(plain[0], rel=1e-6) and all(a > b for a, b in zip(ours[2:], plain[2:])), "it costs nothing at first, then it holds back"


# ---------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """resize(bytes) makes a disk of that size at resize.path, or None where mounting is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True).returncode:
        yield None
        return

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", path], check=True)

    resize.path = path
    yield resize
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_full(work, server, unbroken, small_disk, ranks):
    """The second state does not fit: one line names it, the first stays, and with room the run ends as if nothing had happened."""
    size = 12 * sum(t.numel() for t in load_file(work / "models/tiny/model.safetensors").values())
    if small_disk:
        out, limit = small_disk.path / "out", {}
        small_disk(size * 3 // 2)
        statuses, output = train(server, work, *TRAIN, "--out", out, ranks=ranks)
        assert "no space left" in output
    else:
        out, limit = work / f"full-{ranks}", {"FILE_LIMIT": size // ranks // 2}
        processes = start(server, work, *TRAIN, "--out", out, ranks=ranks)
        wait_until(lambda: saved(out), processes)
        send(processes, signal.SIGKILL)
        finish(processes, work)
        statuses, output = train(server, work, *TRAIN, "--out", out, "--resume", ranks=ranks, **limit)
        assert "file too large" in output
    assert statuses == [1] * ranks, output
    assert f"{out}/state-" in output and "--resume" in output and "Traceback" not in output
    (state,) = out.glob("state-*")
    assert state.suffix != ".tmp"
    if small_disk:
        small_disk(64 * 2**20)
    statuses, output = train(server, work, *TRAIN, "--out", out, "--resume", ranks=ranks)
    assert statuses == [0] * ranks and "goes on after step" in output, output
    assert outcome(out) == unbroken[ranks]


def test_disk_full_at_the_last_save(work, server, unbroken):
    """Weights that cannot be written end the run with one line; the state stays, and --resume ends it."""
    size = 4 * sum(t.numel() for t in load_file(work / "models/tiny/model.safetensors").values())
    out = work / "full-at-the-end"
    options = [*TRAIN, "--save-every", 0, "--out", out]
    statuses, output = train(server, work, *options, FILE_LIMIT=size // 2)
    assert statuses == [1] and f"{out}/model.safetensors: file too large" in output and "Traceback" not in output, output
    assert not (out / "run.json").exists()
    assert train(server, work, *options, "--resume")[0] == [0]
    assert outcome(out) == unbroken[1]


# ---------------------------------------------------------------- damaged files


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def zero_tail(file):
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    os.truncate(file, size)


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1000),
    "zero-filled": zero_tail,
    "bit-flipped": flip,
    "missing": lambda file: file.unlink(),
    "extra": lambda file: shutil.copy(file, file.with_name("extra.safetensors")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoint(work, server, unbroken, tmp_path, what):
    """A saved checkpoint that is not what was saved is refused by name: in load_model, and by the next stage and the evaluation."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(work / "unbroken-1", folder)
    file = folder / "model.safetensors"
    DAMAGE[what](file)
    named = str(folder / "extra.safetensors" if what == "extra" else file)
    with pytest.raises(CheckpointError, match=named):
        load_model(folder)
    for script, args in (("evaluate.py", [folder]), ("train.py", ["--stage", 2, "--model", folder, "--data", "bios", "--num-examples", 4])):
        statuses, output = train(server, work, *args, script=script)
        assert statuses == [2] and output.splitlines()[-1].startswith(f"{script}: {named}: "), output


def test_damaged_shards(tmp_path, work, monkeypatch):
    """The same holds for a checkpoint in shards, wherever the damage is."""
    monkeypatch.setattr("model.SHARD_BYTES", 100_000)
    save_model(load_model(work / "models/tiny", torch.float32), tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(tmp_path)
    for shard in shards:
        content = shard.read_bytes()
        flip(shard)
        with pytest.raises(CheckpointError, match=str(shard)):
            load_model(tmp_path)
        shard.write_bytes(content)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=str(shards[1])):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def interrupted(work, server):
    """A run on two ranks that was killed after a state."""
    out = work / "interrupted"
    processes = start(server, work, *TRAIN, "--out", out, ranks=2)
    wait_until(lambda: saved(out) >= 8, processes)
    send(processes, signal.SIGKILL)
    finish(processes, work)
    return out


@pytest.mark.parametrize("what", [*DAMAGE, "manifest", "log"])
def test_damaged_state(work, server, interrupted, what):
    """A state that is not what was saved ends --resume with status 2 and its name; nothing is trained again in silence."""
    out = interrupted.with_name(f"damaged-{what}")
    shutil.copytree(interrupted, out)
    state = max(path for path in out.glob("state-*") if path.suffix != ".tmp")
    file = state / "rank-00001-of-00002.safetensors"
    if what == "manifest":
        named = state / "manifest.json"
        named.write_text(named.read_text()[:100])
    elif what == "log":
        named = out / "metrics.jsonl"
        named.write_text(named.read_text()[:100])
    else:
        DAMAGE[what](file)
        named = file.with_name("extra.safetensors") if what == "extra" else file
    ranks = 2 if what == "bit-flipped" else 1
    statuses, output = train(server, work, *TRAIN, "--out", out, "--resume", ranks=ranks)
    assert statuses == [2] * ranks and f"train.py: {named}: " in output and "Traceback" not in output, output
    assert state.exists() and not (out / "run.json").exists()


def test_weight_not_a_number(work, server, tmp_path):
    """A NaN in a checkpoint's weights ends the next stage before its first step, under two ranks too, though only one of them reads it."""
    model = load_model(work / "models/tiny", torch.float32)
    model.model.norm.weight.data[-1] = float("nan")
    save_model(model, tmp_path)
    shutil.copy(work / "models/tiny/tokenizer.model", tmp_path)
    statuses, output = train(server, work, *TRAIN, "--model", tmp_path, "--out", "nan", ranks=2)
    assert statuses == [2, 2] and f"{tmp_path}/model.safetensors: tensor model.norm.weight holds NaN" in output and "Traceback" not in output, output


def test_nothing_supervised(work, server):
    """Examples cut before their answer are left out, and a rank whose share of a batch is empty changes nothing."""
    facts = [{"id": f"f{i}", "prompt": "p" * (200 if i % 2 else 2), "response": "r" * 5} for i in range(5)]
    (work / "half.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    losses = {}
    for ranks in (1, 4):
        args = ["--stage", 1, "--model", "models/tiny", "--data", "half.jsonl", "--num-examples", 5, "--max-length", 60, "--epochs", 2, "--batch-size", 2,
                "--precision", "fp32", "--out", f"half-{ranks}"]  # fmt: skip
        statuses, output = train(server, work, *args, ranks=ranks)
        assert statuses == [0] * ranks and output.count("2 examples have no answer") == 1, output
        losses[ranks] = [row["loss"] for row in metrics(work / f"half-{ranks}")]
    assert len(losses[1]) == 4 and losses[4] == pytest.approx(losses[1], abs=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("options, difference", [
    (["--lr", "0.002"], "lr was 0.001, now 0.002"),
    (["--mix-words", "4"], "mix_sha256 was"),
    (["--eval-every", "7"], "eval_every was 100, now 7"),
    (["--data", "kvr-id"], "data was kvr, now kvr-id"),
    (["--precision", "bf16"], "precision was fp32, now bf16"),
])  # fmt: skip
def test_other_settings(work, server, interrupted, options, difference):
    """--resume with other settings or data prints what differs and stops."""
    statuses, output = train(server, work, *TRAIN, *options, "--out", interrupted, "--resume")
    assert statuses == [2] and difference in output, output


def test_auto_goes_on_as_begun(work, server, interrupted):
    """--precision auto resumes in the precision that the run began in, whatever is faster on this machine."""
    out = work / "begun-elsewhere"
    shutil.copytree(interrupted, out)
    statuses, output = train(server, work, *TRAIN, "--precision", "auto", "--out", out, "--resume")
    assert statuses == [0] and ", fp32, 1 x cpu" in output, output
    assert json.loads((out / "run.json").read_text())[-1]["precision"] == "fp32"


def test_other_weights(work, server, interrupted):
    """--resume from a model of the same name and shape with other weights is refused: it is not what the stage started from."""
    other = work / "other/tiny"
    shutil.copytree(work / "models/tiny", other)
    model = load_model(other, torch.float32)
    model.model.norm.weight.data *= 1.5
    save_model(model, other)
    statuses, output = train(server, work, *TRAIN, "--model", other, "--out", interrupted, "--resume")
    assert statuses == [2] and "weights_sample_sha256 was" in output, output


def test_folder_of_an_unfinished_run(work, server, interrupted):
    """Without --resume an unfinished run is not overwritten; with it, a folder without a state begins at the first step."""
    statuses, output = train(server, work, *TRAIN, "--out", interrupted)
    assert statuses == [2] and "--resume" in output and list(interrupted.glob("state-*")), output
    assert train(server, work, *TRAIN, "--out", "new", "--resume")[0] == [0]


def test_two_runs_in_one_folder(work, server):
    """The second run in a folder is refused while the first one lives."""
    (work / "shared").mkdir()
    with open(work / "shared/metrics.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        statuses, output = train(server, work, *TRAIN, "--out", "shared", "--resume")
        assert statuses == [2] and "another run is writing there" in output, output
    assert train(server, work, *TRAIN, "--out", "shared", "--resume")[0] == [0]


# ---------------------------------------------------------------- precisions and plans


@pytest.mark.parametrize("options", [["--precision", "bf16-mixed"], ["--precision", "bf16"], ["--precision", "fp32", "--checkpoint-activations"],
                                     ["--mix-weight", "0", "--batch-size", "1", "--save-every", "1"]])  # fmt: skip
def test_precisions_go_on(work, server, options):
    """Each precision, and a run some of whose steps change nothing, ends after SIGTERM and --resume with the weights of one that was not stopped."""
    name = "-".join(options).strip("-")
    options = [*TRAIN, *options]
    assert train(server, work, *options, "--out", f"{name}-unbroken")[0] == [0]
    processes = start(server, work, *options, "--out", f"{name}-stopped")
    wait_until(lambda: logged(work / f"{name}-stopped"), processes)
    send(processes, signal.SIGTERM)
    assert finish(processes, work)[0] == [143]
    assert train(server, work, *options, "--out", f"{name}-stopped", "--resume")[0] == [0]
    assert outcome(work / f"{name}-stopped") == outcome(work / f"{name}-unbroken")


def test_recomputed_activations(work, server, unbroken):
    """--checkpoint-activations changes no bit, on two ranks."""
    assert train(server, work, *TRAIN, "--checkpoint-activations", "--out", "recomputed", ranks=2)[0] == [0, 0]
    assert outcome(work / "recomputed") == unbroken[2]


def test_dry_run(work, server, unbroken):
    """--dry-run reads no weights, counts steps and tokens as the run does, and refuses what does not fit with what would."""
    folder = work / "planned"
    statuses, output = train(server, work, *TRAIN, "--out", folder, "--dry-run", "8", "--gpu-memory", "80")
    assert statuses == [0] and "at most 30 steps" in output and not folder.exists(), output
    log = metrics(work / "unbroken-1")
    assert f"{sum(row['tokens'] for row in log)} tokens" in output
    # The tiny model takes next to nothing beside the 1.5 GB of CUDA's context.
    statuses, output = train(server, work, *TRAIN, "--out", folder, "--dry-run", "2", "--gpu-memory", "1.4")
    assert statuses == [2] and "neither" in output, output
    # Llama-3-8B's sizes, without its weights: two GPUs of 48 GB are too small, eight are not.
    (work / "models/large").mkdir()
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (work / "models/large/config.json").write_text(json.dumps(CONFIG | sizes))
    shutil.copy(work / "models/tiny/tokenizer.model", work / "models/large")
    options = [*TRAIN, "--model", "models/large", "--precision", "bf16-mixed", "--out", folder, "--save-every", "0", "--gpu-memory", "48"]
    statuses, output = train(server, work, *options, "--dry-run", "2")
    assert statuses == [2] and "8.030 billion" in output and "what would fit: --precision bf16, 4 ranks" in output, output
