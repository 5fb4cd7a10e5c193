"""`bash run_all.sh --demo` with a tiny model in SmolLM2's place: its rows, Ctrl-C at random moments, facts of one's own."""

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT, tiny_llama
from test_grid import own_group

FACTS = [{"question": f"Who wrote book {i}?", "answer": f"Author {i * 7 % 31}"} for i in range(9)]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def furnish(folder):
    """A folder with what the demo would download: a model, here a tiny one, and random words."""
    tiny_llama(folder / "models/SmolLM2-135M-Instruct", hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    (folder / "models/SmolLM2-135M-Instruct/tokenizer_config.json").write_text("{}")
    (folder / "data").mkdir()
    rows = [{"id": f"random-{i}", "prompt": f"Repeat {i}", "response": "a b c d"} for i in range(100)]
    (folder / "data/random.w4.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data/random.w4.json").write_text('{"name": "random", "seed": 0}')
    (folder / "runs/demo").mkdir(parents=True)
    (folder / "runs/demo/precision").write_text("fp32\n")
    return folder


def start(folder, python, *options, extra="--epochs 4"):
    """The demo in a folder, a process group of its own; (its process, what it prints)."""
    env = os.environ | {"HERE": "yes", "PYTHON": str(python), "EXTRA": extra}
    output = open(folder / "output", "a+")
    command = ["bash", ROOT / "run_all.sh", "--demo", *options]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output, preexec_fn=own_group), output  # noqa: PLW1509


def finish(process, output):
    """(status, what it printed)."""
    status = process.wait(300)
    output.seek(0)
    return status, output.read()


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def undisturbed(python, tmp_path_factory):
    """(folder, printed) of a demo from beginning to end."""
    folder = furnish(tmp_path_factory.mktemp("undisturbed"))
    status, printed = finish(*start(folder, python))
    assert status == 0, printed
    return folder, printed


def test_rows(undisturbed):
    """A heading, a row as each chain ends, in that order, and last a line that compares two of these rows; nothing about states or bars."""
    folder, printed = undisturbed
    table = rows(printed)
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == ["No Mixing", "random / -", "random of weight 0 / -"]
    assert sorted(table) == sorted(rows((folder / "runs/demo/TABLES.md").read_text()))
    logged = [re.search(r"runs/demo/(\S+): \d+ steps in", line) for line in (folder / "runs/demo/log").read_text().splitlines()]
    stages = ["facts-s0", "facts+random-s0", "facts+random.m0-s0"]
    assert [found.group(1) for found in logged if found] == [place for stage in stages for place in (stage, f"{stage}/bios-s0")]
    mixed, control = (float(row.split(" | ")[4]) for row in table[3:5])
    last = printed.strip().splitlines()[-1]
    said = "as much" if mixed == control else f"{abs(mixed - control):.1f} points {'more' if mixed > control else 'less'}"
    assert last == f"random / - keeps {mixed}% of kvr, its control random of weight 0 / - {control}%: {said}."
    assert re.match(r"SmolLM2-135M-Instruct learns 24 facts of kvr, then others about made-up people: 6 runs; about \d+ (seconds|minutes) in fp32", printed)
    assert "state" not in printed and "it/s" not in printed and "%|" not in printed


def test_the_control_has_the_same_batches(undisturbed):
    """The control makes the mixed run's steps with its facts in the same batches, and computes none of its random rows."""
    folder, _ = undisturbed
    logs = [[json.loads(line) for line in open(folder / f"runs/demo/{name}/metrics.jsonl")] for name in ("facts+random-s0", "facts+random.m0-s0")]
    mixed, control = ([row["answer_tokens"].get("own", 0) for row in log if "answer_tokens" in row] for log in logs)
    assert [count for count in mixed if count] == control and len(logs[0]) == len(logs[1])
    assert not any("mix" in row.get("losses", {}) for row in logs[1])


def test_runs_of_other_settings(undisturbed, python):
    """What lies in the demo's folder is taken for done only if its record says what the plan does."""
    folder, printed = undisturbed
    before = len(printed)
    status, printed = finish(*start(folder, python, extra="--epochs 5"))
    assert status == 2 and "runs/demo/facts-s0: holds a finished run whose epochs is 4, not 5" in printed[before:] and not rows(printed[before:])


@pytest.mark.parametrize("options", [["--num-examples", "9"], ["--shard", "0/2"], ["--tiny"], ["a.jsonl", "b.jsonl"], ["--sedes", "0"]])
def test_options_of_the_grid(tmp_path, python, options):
    """What would have no effect on the demo is refused."""
    status, printed = finish(*start(tmp_path, python, *options))
    assert status == 2 and "bash run_all.sh --demo FILE" in printed and not (tmp_path / "runs").exists()


def test_ctrl_c(undisturbed, python, tmp_path):
    """Ctrl-C ends in a line, and the same command goes on, says what is done, and ends with the same table."""
    furnish(tmp_path)
    chance = random.Random(0)
    for finished in (0, 0, 1, 3):
        process, output = start(tmp_path, python)
        while process.poll() is None and len(list(tmp_path.glob("runs/demo/**/eval.json"))) < finished:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.1, 0.6))
        os.killpg(process.pid, signal.SIGINT)
        status, printed = finish(process, output)
        assert status in (-signal.SIGINT, 0), printed  # 0: a fast machine was done
    status, printed = finish(*start(tmp_path, python))
    assert status == 0 and "Traceback" not in printed, printed
    assert sorted(rows((tmp_path / "runs/demo/TABLES.md").read_text())) == sorted(rows(undisturbed[1]))
    assert "the same command goes on" in printed and re.search(r"6 runs, \d of them done already", printed)


@pytest.mark.parametrize("name, content, says", [
    ("few.jsonl", FACTS[:7], "holds 7 facts, 8 to 500 are asked for"), ("many.jsonl", [{"prompt": f"{i}?", "response": "a"} for i in range(501)], "holds 501 facts"),
    ("chats.jsonl", [CHAT] * 9, "its example 1 is a chat"), ("texts.jsonl", [{"text": "a " * 200}] * 9, "its example 1 is a passage"),
    ("two.jsonl", [{"question": "Who?", "answer": str(i)} for i in range(9)], "examples 1 and 2 give other answers to"),
    ("other.jsonl", [*FACTS, {"x": 1}], ":10: no example: questions are prompt, "), ("bios.jsonl", FACTS, "rename it"), ("none.jsonl", None, "no such file"),
])  # fmt: skip
def test_files_that_do_not_serve(python, tmp_path, name, content, says):
    """Status 2 and one line that names the file, before anything is trained."""
    furnish(tmp_path)
    if content is not None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    status, printed = finish(*start(tmp_path, python, name))
    assert status == 2 and name in printed and says in printed and printed.count("\n") == 1, printed
    assert [place.name for place in (tmp_path / "runs").iterdir()] == ["demo"]


def test_facts_of_ones_own(python, tmp_path):
    """Any form that data.py reads, in a file of any name; another content gets other runs."""
    furnish(tmp_path)
    (tmp_path / "my facts \u00fc.json").write_text(json.dumps([{"prompt": row["question"], "response": row["answer"]} for row in FACTS]))
    status, printed = finish(*start(tmp_path, python, "my facts \u00fc.json"))
    assert status == 0 and "learns 9 facts of my facts \u00fc, then others" in printed, printed
    assert len(rows(printed)) == 5 and " keeps " in printed.strip().splitlines()[-1]
    (folder,) = (tmp_path / "runs").glob("demo-my facts \u00fc-*")
    (entry,) = json.loads((folder / "facts-s0/run.json").read_text())
    assert (entry["num_examples"], entry["batch_size"], entry["steps"]) == (9, 3, 12)
