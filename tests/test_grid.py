"""The whole grid at the size of a toy through `bash run_all.sh --tiny`: every table and figure, shared by two processes, killed at random."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_llama
from test_train import metrics

from model import content_id

RUNS = Path("runs/tiny")
FIGURES = [f"figure{i}" for i in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)] + ["forgetting"]
TRAINED = r"(runs/\S+): \d+ steps in \d+ s, loss"  # what train.py prints at its end
TINY = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # 5,000 parameters

HITS = [(os.killpg, signal.SIGKILL, [-9]), (os.killpg, signal.SIGINT, [130, -2]), (os.kill, signal.SIGKILL, [-9])]  # -2: before its trap is set


def furnish(folder):
    """Make a folder with the tiny model and the published sets that --tiny names, split as evaluate.py --split leaves them."""
    tiny_llama(folder / "models" / "tiny", **TINY)
    (folder / "data").mkdir()
    model = {"base_model": "tiny", "base_model_sha256": content_id(folder / "models" / "tiny")}
    of_model = f"tiny-{model['base_model_sha256'][:8]}"
    sets = {f"{name}.unfamiliar.{of_model}": 2010 for name in ("triviaqa", "lama", "entityqa")}  # behind 2,000 lines begins NAME-id
    sets |= {f"popqa.familiar.{of_model}": 10, f"triviaqa.familiar.{of_model}": 10, "gsm8k": 10}
    sets |= {f"{mix}.w{words}": 20 for mix in ("random", "k-pile", "a-pile", "fineweb") for words in (4, 8)}
    for name, n in sets.items():
        name_ = name.removesuffix(f".{of_model}")
        rows = [{"id": f"{name_}-{i}", "prompt": f"{name_} {i}?", "response": name[0] if i % 3 else "x"} for i in range(n)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "data" / f"{name}.json").write_text(json.dumps({"name": name, "seed": 0} | model))
    return folder


def own_group():
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background inherit that it is ignored, which no trap could change


def start(folder, python, *options, log="log", **environ):
    """run_all.sh --tiny in a folder, a process group of its own."""
    env = os.environ | {"HERE": "yes", "PYTHON": str(python)} | environ
    with open(folder / log, "a") as output:
        return subprocess.Popen(["bash", ROOT / "run_all.sh", "--tiny", *options], cwd=folder, env=env, stdout=output, stderr=output, preexec_fn=own_group)  # noqa: PLW1509


def planned(folder):
    """The plan's folders, as run_all.sh hands its lines to train.py."""
    (folder / "plan").unlink(missing_ok=True)
    (folder / "cat").write_text("#!/bin/sh\nexec cat\n")
    (folder / "cat").chmod(0o755)
    assert start(folder, folder / "cat", "--dry-run", log="plan").wait() == 0
    return [line.split("\t")[1] for line in (folder / "plan").read_text().splitlines()]


def outcome(folder):
    """{file: content} of all that a grid leaves but its locks, its log, and how long steps took."""
    files = [file for file in sorted((folder / RUNS).rglob("*")) if file.is_file() and file.name not in ("lock", "finished.log")]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for file in files:
        if file.name in ("metrics.jsonl", "run.json"):
            rows = metrics(file.parent) if file.suffix == ".jsonl" else json.loads(file.read_text())
            found[str(file.relative_to(folder))] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


@pytest.fixture(scope="module")
def shared(python, tmp_path_factory):
    """The folder of a grid that two processes began at once, undisturbed; what each printed is in a.log and b.log."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    processes = [start(folder, python, log=log) for log in ("a.log", "b.log")]
    assert [process.wait(600) for process in processes] == [0, 0], (folder / "a.log").read_text()[-2000:] + (folder / "b.log").read_text()[-2000:]
    return folder


def test_whole_and_shared(shared):
    """Every run once, by one process or the other; every table, claim and figure."""
    plan = planned(shared)
    assert len(plan) > 100 and sorted((shared / RUNS / "finished.log").read_text().split()) == sorted(plan)
    trained = [re.findall(TRAINED, (shared / log).read_text()) for log in ("a.log", "b.log")]
    assert sorted(trained[0] + trained[1]) == sorted(plan) and min(map(len, trained)) > len(plan) // 5
    text = (shared / RUNS / "TABLES.md").read_text()
    for number in range(1, 7):
        table = text.partition(f"**Table {number}.")[2].partition("**Table" if number < 6 else "**Claims")[0]
        assert len(re.findall(r"\d\.\d", table)) >= 8, table
    verdicts = [line.split(" | ")[1] for line in text.partition("| claim |")[2].partition("\n\n")[0].split("\n")[2:]]
    assert len(verdicts) > 20 and set(verdicts) <= {"PASS", "FAIL", ""}
    for name in FIGURES:
        assert f"({name}-tiny.png)" in text and (shared / RUNS / f"{name}-tiny.png").stat().st_size > 1000
    chains = {str(Path(run).relative_to(RUNS)) for run in plan if run.count("/") > 3}
    assert {json.loads(line)["run"] for line in open(shared / RUNS / "facts.jsonl")} == chains


def test_a_finished_run_of_other_settings(shared, python):
    """What lies in a grid's folders is taken for done only if its record says what the plan does."""
    folder = shared / RUNS / "tiny/kvr-s0"
    for options, says in ((["--num-examples", "7"], "num_examples is 10, not 7"), (["--unfiltered"], "familiarity is 'unfamiliar', not ''")):
        assert start(shared, python, *options, log="other").wait() == 2
        assert says in (shared / "other").read_text()
        (shared / "other").unlink()
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(record.replace('"base_model_sha256": "', '"base_model_sha256": "0'))
    assert start(shared, python, "--dry-run", log="other").wait() == 2
    (folder / "run.json").write_text(record)
    assert f"{RUNS}/tiny/kvr-s0: holds a finished run whose base_model_sha256 is '0" in (shared / "other").read_text()


def test_plan_of_a_begun_grid(shared, python):
    """What another seed would take follows from what the first took: as many steps and tokens."""
    assert start(shared, python, "--dry-run", "--seeds", "0 1", log="begun").wait() == 0
    text, done = (shared / "begun").read_text(), [row for run in planned(shared) for row in metrics(shared / run) if "tokens" in row]
    assert re.search(r"\nall +214 +107 +107 ", text) and f"steps to do: at most {len(done)}," in text
    rate = sum(row["tokens"] for row in done) / sum(row["seconds"] for row in done)
    assert f"at most {sum(row['tokens'] for row in done):.3g}; {rate:.0f} tokens/s measured: 0.0 hours" in text
    assert "30 checkpoints are kept for later stages, 0.000 GB each of models/tiny; a run in progress takes" in text


def test_controls_and_three_stages(shared):
    """A control has the steps of what it is compared with; a third stage asks the first's facts; replay and familiar runs are what they say."""
    lineage = lambda run: json.loads((shared / RUNS / "tiny" / run / "run.json").read_text())
    steps = lambda run: [entry["steps"] for entry in lineage(run)]
    assert steps("kvr-long-s0/lama-long-s0") == steps("kvr+random-s0/lama+k-pile-s0") == [18, 18] and steps("kvr-long-s0/lama-s0") == [18, 6]
    third = lineage("kvr+random-s0/lama+k-pile-s0/entityqa+k-pile-s0")
    assert [entry["mix"] for entry in third] == ["random", "k-pile", "k-pile"]
    assert lineage("kvr-s0/lama+replay0.1-s0")[1]["num_replay"] == 1
    familiar = shared / RUNS / "tiny" / "gsm8k+a-pile+familiar-s0"
    assert {name: row["total"] for name, row in json.loads((familiar / "eval.json").read_text()).items()} == {"popqa.familiar": 10, "triviaqa.familiar": 10}
    kept = {file.parent.name for file in (shared / RUNS).rglob("model.safetensors")}
    assert "kvr-s0" in kept and "lama+k-pile-s0" in kept and not kept & {"entityqa+k-pile-s0", "lama-long-s0", familiar.name}


def test_killed_at_random(shared, python, tmp_path, request):
    """Two processes; at any moment one or the other gets kill -9, with its children or without them, or Ctrl-C, and is started again:
    they end with the same bytes, and no run was lost or done twice."""
    furnish(tmp_path)
    chance, kills = random.Random(0), 40 if request.config.getoption("--long") else 12
    go = lambda: start(tmp_path, python, EXTRA="--save-every 2")
    processes = [go(), go()]
    for n in range(kills):
        time.sleep(chance.uniform(0.2, 2.5))
        i, (kill, sent, statuses) = chance.randrange(2), HITS[n % len(HITS)]
        if processes[i].poll() is None:
            kill(processes[i].pid, sent)
            assert processes[i].wait(60) in statuses
            processes[i] = go()
    log = (tmp_path / "log").read_text
    assert [process.wait(600) for process in processes] == [0, 0], log()[-4000:]
    expected, found = outcome(shared), outcome(tmp_path)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    done, trained = (tmp_path / RUNS / "finished.log").read_text().split(), re.findall(TRAINED, log())
    assert len(set(done)) == len(done) and len(set(trained)) == len(trained)  # killed before these lines a run lacks them
    assert min(len(done), len(trained)) >= len(planned(tmp_path)) - kills
