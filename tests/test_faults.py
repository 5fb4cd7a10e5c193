"""What a run survives, on real processes: kills at any moment, a dying rank, SIGTERM, full disks, damaged files.

`pytest tests/test_faults.py --long` kills 50 runs instead of 3, and more.
"""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import forking
import gguf
import pytest
import torch
from conftest import CONFIG, ROOT, run, tiny_llama
from safetensors.torch import load_file, save_file
from test_train import COMMON, metrics

import data
from evaluate import read_lineage
from model import MANIFEST, CheckpointError, Config, content_id, load_model, save_model, weights_dtype
from train import Position, claim, load_state, read_state

# 30 steps, a state after every fourth.
TRAIN = [*map(str, COMMON), "--epochs", "10", "--save-every", "4"]


# ---------------------------------------------------------------- processes that start in no time


@pytest.fixture(scope="module")
def server():
    """A process that is warm, and forks one for each command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "forking"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.Process(target=int).start()
    del os.environ["PYTHONPATH"]
    return context


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
        processes.append(server.Process(target=forking.become_process, args=(folder, folder / "output.txt", environment, script, [str(a) for a in args])))
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
    for n in range(51 if request.config.getoption("--long") else 3):
        ranks, (name, moment) = 2 - n % 2, list(moments.items())[n % 3]
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
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


@pytest.mark.parametrize("options", [pytest.param(["--precision", "bf16-mixed"], marks=pytest.mark.long), pytest.param(["--precision", "bf16"], marks=pytest.mark.long),
                                     pytest.param(["--precision", "fp32", "--checkpoint-activations"], marks=pytest.mark.long),
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


# ---------------------------------------------------------------- folders and files that are not as they should be

INDEX = "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"
ASKED = ["--data", "facts.jsonl", "--precision", "fp32"]


@pytest.fixture
def base(tmp_path):
    """A base model as others save it, without a manifest, and beside its folder three facts."""
    folder = tiny_llama(tmp_path / "base")
    (folder / MANIFEST).unlink()
    facts = [{"id": f"{i}", "prompt": f"{i}?", "response": "a"} for i in range(3)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return folder


def refused(cwd, *command):
    """The one line that a command says before it ends with status 2."""
    done = run(cwd, *command, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "None" not in done.stderr, done.stderr
    return done.stderr


def change(file, **fields):
    """Give fields of a JSON object other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_two_checkpoints_in_one_folder(base, monkeypatch):
    """Of one file and an index of shards, even a stale one, all take the file, as transformers does; a line says so."""
    weights, id_ = load_file(base / "model.safetensors"), content_id(base)
    other = tiny_llama(base.parent / "other", seed=1)
    monkeypatch.setattr("model.SHARD_BYTES", 100_000)
    save_model(load_model(other, torch.bfloat16), other)
    for file in [INDEX, *[shard.name for shard in other.glob("model-*")][1:]]:
        shutil.copy(other / file, base)
    assert torch.equal(load_model(base, torch.float32).lm_head.weight, weights["lm_head.weight"])
    assert weights_dtype(base) == torch.float32 and content_id(base) == id_ != content_id(other)
    said = run(base.parent, "evaluate.py", "base", *ASKED).stderr
    assert said.count("base/model.safetensors: taken, and not the shards of") == 1


def test_no_head(base):
    """Where weights lack a head and config.json does not call it the embedding, the line says what to set."""
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors")
    for value in ({}, {"tie_word_embeddings": None}, {"tie_word_embeddings": False}):
        change(base / "config.json", **value)
        line = refused(base.parent, "evaluate.py", "base", *ASKED)
        assert "no tensor lm_head.weight" in line and 'set "tie_word_embeddings": true in its config.json' in line
    change(base / "config.json", tie_word_embeddings=True)
    load_model(base)


@pytest.mark.parametrize("file", ["model.safetensors", "shard", INDEX, "config.json", "run.json", "eval.json",
                                  "model.gguf"])  # fmt: skip
def test_pointers_of_git_lfs(base, file, monkeypatch):
    """What Git LFS has not fetched yet is named, with the command that does."""
    if file in ("shard", INDEX):
        monkeypatch.setattr("model.SHARD_BYTES", 100_000)
        save_model(load_model(base, torch.float32), base)
        (base / MANIFEST).unlink()
        file = sorted(path.name for path in base.glob("model-*"))[1] if file == "shard" else file
    (base / file).write_text(POINTER)
    command = ["model.py", "base/model.gguf", "out"] if file == "model.gguf" else ["evaluate.py", "base", *ASKED]
    assert f"base/{file}: a pointer of Git LFS" in (line := refused(base.parent, *command)) and "git lfs pull" in line


@pytest.mark.parametrize("command", [
    "evaluate.py X", "evaluate.py X --data facts.jsonl", "evaluate.py X --lost", "evaluate.py X --split popqa",
    "evaluate.py --tables X", "evaluate.py --overlap X", "probe.py X", "probe.py base X --data facts.jsonl",
    "probe.py base --transplant X", "model.py --precision X", "train.py --stage 1 --model X",
    "train.py --stage 2 --data bios --model X", "train.py --stage 1 --model X --dry-run 2",
    "train.py --stage 1 --model base --num-examples 2 --epochs @X",
])  # fmt: skip
def test_no_such_folder(base, command):
    """Every command says of a folder that is not there, or is a file, that there is no such folder."""
    for name in ("nowhere/", r"C:\models\ckpt", "facts.jsonl"):
        line = refused(base.parent, *[word.replace("X", name) for word in command.split()])
        assert ": no such folder" in line and name.rstrip("/") in line


@pytest.mark.parametrize("command", [
    "evaluate.py base --data X", "evaluate.py base --data facts.jsonl --text X", "evaluate.py base --split X",
    "probe.py base --data X", "train.py --stage 1 --model base --data X",
    "train.py --stage 1 --model base --num-examples 2 --mix X", "model.py X out",
])  # fmt: skip
def test_no_such_file(base, command):
    """The same for a file, before anything is asked."""
    line = refused(base.parent, *[word.replace("X", r"C:\facts.jsonl") for word in command.split()])
    assert r"C:\facts.jsonl: no such file" in line and not (base / "eval.json").exists()


def test_folder_of_others(base):
    """A model in a folder that may not be written is not loaded; with --out, which the line names, it is asked."""
    # Root may write everywhere, unless all its capabilities are taken.
    powers = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    whole, weights = (base / "model.safetensors").read_bytes(), load_file(base / "model.safetensors")
    unusable = {"model.norm.weight": torch.full((32,), float("nan"))}
    save_file(weights | unusable, base / "model.safetensors")
    base.chmod(0o555)
    for script, remedy in (("evaluate.py", "--out DIR"), ("probe.py", "a folder of links")):
        command = [*powers, sys.executable, ROOT / script, "base", *ASKED]
        done = subprocess.run(command, cwd=base.parent, capture_output=True, text=True)
        assert done.returncode == 2 and "cannot be written to (permission denied)" in done.stderr, done.stderr
        assert remedy in done.stderr
    (base / "model.safetensors").write_bytes(whole)
    assert " 3 " in run(base.parent, "evaluate.py", "base", *ASKED, "--out", "answers").stdout
    line = refused(base.parent, "evaluate.py", "base", *ASKED, "--out", "facts.jsonl")
    assert "facts.jsonl: cannot be written to (not a directory)" in line


def test_files_of_other_programs(base):
    """What another program has left in a base model's folder is passed over, and never written over."""
    theirs = {"manifest.json": {"name": "app", "files": {"main.js": "/main.js"}}, "run.json": {"id": "x1"},
              "text.x.json": [], "probe.x.json": []}  # fmt: skip
    for name, value in theirs.items():
        (base / name).write_text(json.dumps(value))
    (base / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    before = content(base)
    assert read_lineage(base) == []
    run(base.parent, "evaluate.py", "base", *ASKED)
    run(base.parent, "probe.py", "base", *ASKED)
    assert content(base).items() >= before.items()
    for name, value in (("eval.json", {"eval_loss": 1.5}), ("predictions.facts.jsonl", {"label": 1})):
        (base / name).write_text(json.dumps(value) + "\n")
        before = content(base)
        line = refused(base.parent, "evaluate.py", "base", *ASKED)
        assert f"base/{name}: " in line and "--out DIR" in line and content(base) == before
        run(base.parent, "evaluate.py", "base", *ASKED, "--out", f"answers to {name}")
        (base / name).unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json", "state-dict",
                                  "metrics.jsonl", "run.json"])  # fmt: skip
def test_out_is_not_of_a_run(base, name):
    """--out takes the place of nothing that is not of a run, and nobody is told to remove what is there."""
    theirs = base.parent / "theirs"
    theirs.mkdir()
    (theirs / name).write_text('{"step": 1, "loss": 2.5}\n')
    train_there = [*"train.py --stage 1 --model base --num-examples 2 --out theirs".split()]
    commands = [train_there, [*train_there, "--resume"]]
    commands += [["evaluate.py", "base", *ASKED, "--out", "theirs"]] if name == "config.json" else []
    for command in commands:
        line = refused(base.parent, *command)
        assert name in line or "a model itself" in line, line
        assert "give another" in line and "remove" not in line
    assert [file.name for file in theirs.iterdir()] == [name]


def test_conversion_into_a_models_folder(base):
    """Nor does a GGUF file's conversion."""
    writer = gguf.GGUFWriter(base.parent / "a.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = content(base)
    assert "base: holds another model; give another folder" in refused(base.parent, "model.py", "a.gguf", "base")
    assert content(base) == before


def test_what_is_not_a_state(work, server, interrupted):
    """In a run's own folder files that are called like its states stay, and a run goes on."""
    out = work / "with-notes"
    shutil.copytree(interrupted, out)
    (out / "state-notes.txt").write_text("x")
    statuses, output = train(server, work, *TRAIN, "--out", out, "--resume")
    assert statuses == [0] and "goes on after step" in output and (out / "state-notes.txt").exists(), output


def test_without_locks(tmp_path, monkeypatch, capsys):
    """On a file system without locks a run begins, with a line of warning; one that another process has is refused."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    claim(tmp_path / "out", resume=False)[0].close()
    claim(tmp_path / "out", resume=False)[0].close()
    assert capsys.readouterr().err.count("has no locks") == 1


# ---------------------------------------------------------------- JSON of odd types


@pytest.mark.parametrize("fields", [
    {"model_type": None}, {"model_type": ["llama"]}, {"hidden_size": None}, {"hidden_size": [32]},
    {"vocab_size": 512.5}, {"rms_norm_eps": {}}, {"num_attention_heads": True}, {"rope_theta": None},
    {"rope_scaling": "x"}, {"rope_scaling": {"rope_type": []}}, {"rope_parameters": {"rope_theta": None}},
    {"tie_word_embeddings": "false"},
    {"model_type": "qwen2", "max_window_layers": []}, {"model_type": "qwen2", "layer_types": [None, None]},
    {"model_type": "mistral", "sliding_window": "4"}, {"hidden_act": 1}, {"partial_rotary_factor": "1"},
    {"head_dim": float("nan")},
])  # fmt: skip
def test_odd_config(base, fields):
    """A config.json whose fields have odd types is refused in one line, which has null as null."""
    change(base / "config.json", **fields)
    with pytest.raises(CheckpointError) as error:
        Config.from_folder(base)
    assert str(error.value).startswith(f"{base}/config.json: ") and "None" not in str(error.value)


def test_null_is_as_good_as_nothing(base):
    """A byte order mark before config.json is none of it, and null in an optional field leaves the default."""
    plain = Config.from_folder(base)
    optional = ("hidden_act", "tie_word_embeddings", "head_dim", "partial_rotary_factor", "rope_scaling")
    change(base / "config.json", **dict.fromkeys(optional))
    (base / "config.json").write_text((base / "config.json").read_text(), encoding="utf-8-sig")
    assert Config.from_folder(base).__dict__ | {"raw": None} == plain.__dict__ | {"raw": None}


@pytest.fixture(scope="module")
def evaluated(work, server):
    """A finished run and one after it, both asked."""
    assert train(server, work, *TRAIN, "--out", "odd", "--epochs", 1)[0] == [0]
    second = ["--stage", 2, "--model", "odd", "--data", "bios", "--num-examples", 2, "--epochs", 1, "--eval-every", 1]
    assert train(server, work, *second, "--out", "odd/two")[0] == [0]
    for folder in ("odd", "odd/two"):
        run(work, "evaluate.py", folder)
    run(work, "probe.py", "odd/two", "--no-base")
    return work / "odd"


ODD = {  # file: changes of fields
    "run.json": [{"data": None}, {"mix": []}, {"lr": None}, {"losses": {"own": None}}, {"num_mix": "1"},
                 {"batch_size": [1]}, {"resumed_from": [None]}, {"device": None}, {"tag": None}, {"familiarity": None}],
    "eval.json": [{"accuracy": None}, {"data": []}, {"total": "4"}],
    "predictions.kvr.jsonl": [{"prediction": None}, {"correct": None}, {"response": 1}, {"id": []},
                              {"spelled": None}],
    "metrics.jsonl": [{"step": None}, {"accuracy": []}],
    "probe.kvr.json": [{"floor": None}, {"frequency": None}, {"floor": {"shuffled": None}}],
}  # fmt: skip


@pytest.mark.parametrize("file", ODD)
def test_odd_records(evaluated, tmp_path, file, monkeypatch):
    """Records whose fields have odd types end the tables in one line; a byte order mark does no harm."""
    monkeypatch.setenv("PICTURES", "none")
    shutil.copytree(evaluated, tmp_path / "runs", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "runs/two" / file
    text = path.read_text()

    def odd(changes):
        """The file with these changes in a row of the last stage, an answer, or a check."""
        if file.endswith("l"):
            rows = [json.loads(line) for line in text.splitlines()]
            next(row for row in rows if "correct" in row or "accuracy" in row).update(changes)
            return "".join(json.dumps(row) + "\n" for row in rows)
        whole = json.loads(text)
        (whole[1] if file == "run.json" else whole["kvr"] if file == "eval.json" else whole).update(changes)
        return json.dumps(whole)

    for changes in ODD[file]:
        path.write_text(odd(changes))
        assert f"two/{file}" in refused(tmp_path, "evaluate.py", "--tables", "runs"), changes
    path.write_text(text, encoding="utf-8-sig")
    run(tmp_path, "evaluate.py", "--tables", "runs")


@pytest.mark.parametrize("changes", [{"position": None}, {"position": {"step": "1"}}, {"settings": []},
                                     {"files": {"x": None}}, {"files": []}])  # fmt: skip
def test_odd_state(interrupted, tmp_path, changes):
    """The same for the manifest of a state."""
    state = max(path for path in interrupted.glob("state-*") if path.suffix != ".tmp")
    shutil.copytree(state, tmp_path / state.name)
    assert isinstance(load_state(state, read_state(state), read_state(state)["settings"])[0], Position)
    change(tmp_path / state.name / MANIFEST, **changes)
    with pytest.raises(ValueError, match=f"{tmp_path}/{state.name}.*: "):
        read_state(tmp_path / state.name)
