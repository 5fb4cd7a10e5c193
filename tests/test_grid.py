"""The whole grid at the size of a toy through `bash run_all.sh --tiny`: every table and figure, shared by two processes, killed at random."""

import json
import os
import random
import re
import signal
import subprocess
import time

import forking
import pytest
from conftest import ROOT, tiny_llama
from test_train import metrics

FIGURES = [f"figure{i}" for i in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)] + ["forgetting"]
TRAINED = r"(runs/\S+): \d+ steps, loss"  # what train.py prints at its end
TINY = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # 5,000 parameters


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    server, client = forking.pioneer(tmp_path_factory.mktemp("python"))
    yield client
    server.kill()


def furnish(folder):
    """Make a folder with the tiny model and the published sets that --tiny names, split as evaluate.py --split leaves them."""
    tiny_llama(folder / "models" / "tiny", **TINY)
    (folder / "data").mkdir()
    sets = {f"{name}.unfamiliar": 2010 for name in ("triviaqa", "lama", "entityqa")}  # behind 2,000 lines begins NAME-id
    sets |= {"popqa.familiar": 10, "triviaqa.familiar": 10, "gsm8k": 10}
    sets |= {f"{mix}.w{words}": 20 for mix in ("random", "k-pile", "a-pile", "fineweb") for words in (4, 8)}
    for name, n in sets.items():
        rows = [{"id": f"{name}-{i}", "prompt": f"{name} {i}?", "response": name[0] if i % 3 else "x"} for i in range(n)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "data" / f"{name}.json").write_text(json.dumps({"name": name, "seed": 0, "base_model": "tiny"}))
    return folder


def start(folder, python, *options, log="log", **environ):
    """run_all.sh --tiny in a folder, a process group of its own."""
    env = os.environ | {"HERE": "yes", "PYTHON": str(python)} | environ
    with open(folder / log, "a") as output:
        return subprocess.Popen(["bash", ROOT / "run_all.sh", "--tiny", *options], cwd=folder, env=env, stdout=output, stderr=output, preexec_fn=os.setpgrp)


def planned(folder):
    """The plan's folders, as run_all.sh hands its lines to evaluate.py."""
    (folder / "cat").write_text("#!/bin/sh\nexec cat\n")
    (folder / "cat").chmod(0o755)
    assert start(folder, folder / "cat", "--dry-run", log="plan").wait() == 0
    return [line.split("\t")[1] for line in (folder / "plan").read_text().splitlines()]


def outcome(folder):
    """{file: content} of all that a grid leaves but its locks, its log, and how long steps took."""
    files = [file for file in sorted((folder / "runs").rglob("*")) if file.is_file() and file.name not in ("lock", "finished.log")]
    return {str(file.relative_to(folder)): [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(file.parent)]
            if file.name == "metrics.jsonl" else file.read_bytes() for file in files}  # fmt: skip


@pytest.fixture(scope="module")
def shared(python, tmp_path_factory):
    """The folder of a grid that two processes began at once, undisturbed; what each printed is in a.log and b.log."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    processes = [start(folder, python, log=log) for log in ("a.log", "b.log")]
    assert [process.wait(600) for process in processes] == [0, 0], (folder / "a.log").read_text()[-2000:] + (folder / "b.log").read_text()[-2000:]
    return folder


def test_whole_and_shared(shared, python):
    """Every run once, by one process or the other; every table, claim and figure; then nothing is left to do."""
    plan = planned(shared)
    assert len(plan) > 100 and sorted((shared / "runs" / "finished.log").read_text().split()) == sorted(plan)
    trained = [re.findall(TRAINED, (shared / log).read_text()) for log in ("a.log", "b.log")]
    assert sorted(trained[0] + trained[1]) == sorted(plan) and min(map(len, trained)) > len(plan) // 5
    text = (shared / "runs" / "TABLES.md").read_text()
    for number in range(1, 7):
        table = text.partition(f"**Table {number}.")[2].partition("**Table" if number < 6 else "**Claims")[0]
        assert len(re.findall(r"\d\.\d", table)) >= 8, table
    verdicts = [line.split(" | ")[1] for line in text.partition("| claim |")[2].partition("\n\n")[0].split("\n")[2:]]
    assert len(verdicts) > 20 and set(verdicts) == {"PASS", "FAIL", ""}
    for name in FIGURES:
        assert f"({name}-tiny.png)" in text and (shared / "runs" / f"{name}-tiny.png").stat().st_size > 1000
    chains = [run for run in plan if run.count("/") > 2]
    assert {json.loads(line)["run"] for line in open(shared / "runs" / "facts.jsonl")} == set(chains)
    assert start(shared, python, "--dry-run", log="after").wait() == 0
    assert re.search(rf"all +{len(plan)} +{len(plan)} +0 [^$]*tokens/s measured: 0.0 hours[^$]*GB more", (shared / "after").read_text())


def test_controls_and_three_stages(shared):
    """A control has the steps of what it is compared with; a third stage asks the first's facts; replay and familiar runs are what they say."""
    lineage = lambda run: json.loads((shared / "runs" / "tiny" / run / "run.json").read_text())
    steps = lambda run: [entry["steps"] for entry in lineage(run)]
    assert steps("kvr-long-s0/lama-long-s0") == steps("kvr+random-s0/lama+k-pile-s0") == [18, 18] and steps("kvr-long-s0/lama-s0") == [18, 6]
    third = lineage("kvr+random-s0/lama+k-pile-s0/entityqa+k-pile-s0")
    assert [entry["mix"] for entry in third] == ["random", "k-pile", "k-pile"]
    assert lineage("kvr-s0/lama+replay0.1-s0")[1]["num_replay"] == 1
    familiar = shared / "runs" / "tiny" / "gsm8k+a-pile+familiar-s0"
    assert {name: row["total"] for name, row in json.loads((familiar / "eval.json").read_text()).items()} == {"popqa.familiar": 10, "triviaqa.familiar": 10}
    kept = {file.parent.name for file in (shared / "runs").rglob("model.safetensors")}
    assert "kvr-s0" in kept and "lama+k-pile-s0" in kept and not kept & {"entityqa+k-pile-s0", "lama-long-s0", familiar.name}


def test_killed_at_random(shared, python, tmp_path, request):
    """Two processes, kill -9 of one or the other or Ctrl-C at any moment: restarted, they end with the same bytes, and no run was lost or done twice."""
    furnish(tmp_path)
    chance, kills = random.Random(0), 40 if request.config.getoption("--long") else 10
    go = lambda: start(tmp_path, python, EXTRA="--save-every 2")
    processes = [go(), go()]
    for n in range(kills):
        time.sleep(chance.uniform(0.5, 3))
        i = chance.randrange(2)
        if processes[i].poll() is None:
            os.killpg(processes[i].pid, signal.SIGINT if n % 4 == 1 else signal.SIGKILL)
            assert processes[i].wait(60) in ((130, -signal.SIGINT) if n % 4 == 1 else (-signal.SIGKILL,))
            processes[i] = go()
    log = (tmp_path / "log").read_text
    assert [process.wait(600) for process in processes] == [0, 0], log()[-4000:]
    expected, found = outcome(shared), outcome(tmp_path)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    done, trained = (tmp_path / "runs" / "finished.log").read_text().split(), re.findall(TRAINED, log())
    assert len(set(done)) == len(done) and len(set(trained)) == len(trained)  # killed before these lines a run lacks them
    assert min(len(done), len(trained)) >= len(planned(tmp_path)) - kills
