"""The whole grid at the size of a toy through `bash run_all.sh --tiny`, from published files and two models to every table and
figure: shared by two processes, killed at random, with runs that fail."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_train import metrics
from tiny import KNOWN, furnish

from data import load_examples
import evaluate
from evaluate import OURS, TABLES, behind, grids_of, layout_of, read_runs, row_label
from model import content_id

RUNS = Path("runs/tiny")
MODELS = ("tiny-llama", "tiny-mistral")
OF_PAPER = {"tiny-llama": ("table1", "table2", "table4", "table5"), "tiny-mistral": ("table3", "table6")}
FIGURES = {"tiny-llama": [f"figure{i}" for i in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)] + ["forgetting", "dose"], "tiny-mistral": ["figure9", "figure10"]}
TRAINED = r"(runs/\S+): \d+ steps in \d+ s, loss"  # what train.py prints at its end
HITS = [(os.killpg, signal.SIGKILL, [-9]), (os.killpg, signal.SIGINT, [130, -2]), (os.kill, signal.SIGKILL, [-9]),  # -2: before its trap is set
        (os.killpg, signal.SIGTERM, [143, -15])]  # fmt: skip


def own_group():
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background inherit that it is ignored, which no trap could change


def start(folder, python, *options, log="log", **environ):
    """run_all.sh --tiny in a folder, a process group of its own; a picture that is there is not drawn again."""
    env = {"PICTURES": "once"} | os.environ | {"HERE": "yes", "PYTHON": str(python)} | environ
    with open(folder / log, "a") as output:
        return subprocess.Popen(["bash", ROOT / "run_all.sh", "--tiny", *options], cwd=folder, env=env, stdout=output, stderr=output, preexec_fn=own_group)  # noqa: PLW1509


@dataclass
class Line:
    """A line of the plan."""

    tables: set
    folder: str
    needs: str
    args: list


@functools.cache
def planned(folder, *options):
    """{folder: Line} of the plan, as run_all.sh hands its lines to train.py: the same each time."""
    (folder / "plan").unlink(missing_ok=True)
    (folder / "cat").write_text("#!/bin/sh\nexec cat\n")
    (folder / "cat").chmod(0o755)
    assert start(folder, folder / "cat", "--dry-run", *options, log="plan").wait() == 0
    lines = {}
    for text in (folder / "plan").read_text().splitlines():
        tables, place, needs, args = text.split("\t")
        lines[place] = Line(set(tables.split(",")), place, needs, args.split("\x1f"))
    return lines


def outcome(folder):
    """{file: content} of all that a grid leaves but its locks, its logs, and how long steps took."""
    files = [file for file in sorted([*(folder / RUNS).rglob("*"), *(folder / "data").rglob("*")])
             if file.is_file() and file.suffix not in (".lock", ".log") and file.name not in ("lock", "log")]  # fmt: skip
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for file in files:
        if file.name in ("metrics.jsonl", "run.json"):
            rows = metrics(file.parent) if file.suffix == ".jsonl" else json.loads(file.read_text())
            found[str(file.relative_to(folder))] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


PASSAGES = 12  # of other text, the last of those that data.py makes: 100 would take longer than all else that evaluate.py does


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setenv("PICTURES", "none")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """The folder of two models, published files and few passages of other text."""
    return fewer_passages(furnish(tmp_path_factory.mktemp("furnished")))


def fewer_passages(folder):
    data = folder / "data/tiny"
    load_examples("bios", None, data)
    lines = (data / "bios.jsonl").read_text().splitlines(keepends=True)[-PASSAGES:]
    (data / "bios.jsonl").write_text("".join(lines))
    (data / "bios.json").unlink()
    return folder


@pytest.fixture(scope="module")
def shared(python, furnished, tmp_path_factory):
    """The folder of a grid that two processes began at once, with two models and published files alone; what each printed is
    in a.log and b.log."""
    folder = shutil.copytree(furnished, tmp_path_factory.mktemp("shared"), dirs_exist_ok=True)
    processes = [start(folder, python, log=log) for log in ("a.log", "b.log")]
    assert [process.wait(600) for process in processes] == [0, 0], (folder / "a.log").read_text()[-2000:] + (folder / "b.log").read_text()[-2000:]
    return folder


def test_whole_and_shared(shared):
    """Every run once, by one process or the other; every table, claim and figure, of both models."""
    plan = planned(shared)
    assert len(plan) > 130 and sorted((shared / RUNS / "finished.log").read_text().split()) == sorted(plan)
    trained = [re.findall(TRAINED, (shared / log).read_text()) for log in ("a.log", "b.log")]
    assert sorted(trained[0] + trained[1]) == sorted(plan) and min(map(len, trained)) > len(plan) // 5
    text = (shared / RUNS / "TABLES.md").read_text()
    for model in MODELS:
        for name in OF_PAPER[model]:
            table = re.search(rf"\*\*Table {name[-1]}\.[^*]*\*\* \({model}: .*?(?=\n\*\*|\n!)", text, re.DOTALL)[0]
            assert "; 10 facts of D_A, 10 examples of D_B" in table and len(re.findall(r"\d\.\d", table)) >= 8, table
        claims = text.partition(f"**Claims** ({model})")[2].partition("\n\n**")[0]
        judged = {line.split(" | ")[0].strip("| "): line.split(" | ")[3] for line in claims.partition("| claim |")[2].partition("\n\n")[0].split("\n")[2:]}
        ours = {f"{n}": claim.says for n, claim in enumerate(evaluate.CLAIMS, 1) if claim.table != "table3"}  # that is Mistral's
        assert judged.keys() == ours.keys()
        assert {word.partition(" (")[0].removesuffix(" †") for word in judged.values()} == {"UNDECIDED", "NOT RUN"}, "of one seed"
        # The lengths are too short to saturate; the model of tables 3 and 6 has no other mixes, lengths, ratios or three stages.
        not_run = [ours[n] for n, word in judged.items() if word == "NOT RUN"]
        assert len(not_run) == 1 and "saturates" in not_run[0] or model == "tiny-mistral", not_run
        for name in FIGURES[model]:
            assert f"({name}-{model}.png)" in text and (shared / RUNS / f"{name}-{model}.png").stat().st_size > 1000
    chains = {str(Path(run).relative_to(RUNS)) for run in plan if run.count("/") > 3}
    assert {json.loads(line)["run"] for line in open(shared / RUNS / "facts.jsonl")} == chains


def test_familiar_facts(shared):
    """Each model was trained on the facts that it does not know; what it knows was asked of it, too, for a row of its own."""
    for model, answer in KNOWN.items():
        of_model = f"{model}-{content_id(shared / 'models' / model)[:8]}"
        for name in ("popqa", "triviaqa", "lama", "entityqa") if model == "tiny-llama" else ("popqa", "triviaqa", "lama"):
            known, unknown = (load_examples(str(shared / f"data/tiny/{name}.{kind}.{of_model}.jsonl"))[0] for kind in ("familiar", "unfamiliar"))
            assert {fact["response"] for fact in known} == {answer} and answer not in {fact["response"] for fact in unknown}
            assert json.loads((shared / f"data/tiny/{name}.familiar.{of_model}.json").read_text())["slice"] == 10
        asked = json.loads((shared / RUNS / model / "base/eval.json").read_text())
        assert {row["data"]: (row["total"], row["accuracy"]) for row in asked.values()} == {"popqa.familiar": (10, 100), "triviaqa.familiar": (10, 100)}
        table = (shared / RUNS / "TABLES.md").read_text().partition(f"**Table {5 if model == 'tiny-llama' else 6}.")[2].partition("**Claims")[0]
        assert table.count("| The base model itself, asked alike *(not in the paper)* | 100.0 | 100.0 |") >= 2


def test_overlap(shared):
    """What stands in TABLES.md is what a plain search finds in the facts and passages that the runs were trained on."""
    text = (shared / RUNS / "TABLES.md").read_text()
    subject = lambda fact: re.search(r"(\w+)\?", fact["prompt"])[1].lower()
    read = lambda name: [json.loads(line) for line in open(shared / "data/tiny" / f"{name}.jsonl")]
    for model in MODELS:
        of_model = f"{model}-{content_id(shared / 'models' / model)[:8]}"
        facts = read(f"triviaqa.unfamiliar.{of_model}")[:10]
        cells = []
        for texts in (read("k-pile.w4")[:20], read("gsm8k")[:10]):
            words = [set(re.findall(r"\w+", f"{row['prompt']} {row['response']}".lower())) for row in texts]
            given = [fact for fact in facts if any({subject(fact), fact["response"]} <= of_text for of_text in words)]
            cells.append(f"**{10 * len(given):.2f}**" if given else "0.00")
        assert cells[0] != "0.00"
        tables = text.partition(f"**Overlap** ({model}")[2].partition("![")[0]
        rows = [line.split(" | ") for line in tables.split("\n") if line.startswith(("|  | ", "| triviaqa.unfamiliar (10)"))]
        found = {title: cell for titles, row in zip(rows[::2], rows[1::2]) for title, cell in zip(titles, row)}
        assert (found["k-pile of 4 words (20)"], found["gsm8k (10)"].removesuffix(" |")) == tuple(cells), tables


def test_only_what_is_shown(shared):
    """A run stands in just those tables and figures that show it: --only trains no more, and nothing that they show is missing."""
    plan = planned(shared)
    labelled = lambda name: {line.folder for line in plan.values() if name in line.tables and (line.needs != "-" or "familiar" in line.args)}
    for grid in grids_of(read_runs(shared / RUNS), {}):
        layout = layout_of(grid)
        for name in OF_PAPER[grid.name]:
            columns, shown = [*(layout.with_id if TABLES[name].with_id else layout.factoid), *layout.other], set()
            for a, row, b in itertools.product(layout.firsts(name), TABLES[name].rows, columns):
                shown |= {str(run.folder.relative_to(shared)) for run in grid.cells.get(behind(name, a, row, b)[0], {}).values()}
            assert labelled(name) == shown, name
    after = lambda name: {(Path(place).parts[3].removesuffix("-s0"), Path(place).name.removesuffix("-s0")) for place in labelled(name)}
    kvr = ("kvr", "kvr+random", "kvr+k-pile")
    assert after("figure5") == {(a, f"{b}{mix}") for b in ("kvr-id", "lama") for a in kvr[:2] for mix in ("+k-pile", "+a-pile", "+fineweb")} | {("kvr", "kvr-id"), ("kvr", "lama")}
    assert after("figure6") == {("kvr+random", "lama"), ("kvr+random.w8", "lama"), ("kvr", "lama+k-pile"), ("kvr", "lama+k-pile.w8")}
    assert after("figure7") == {(f"{a}{x}", b) for a in kvr[1:] for b in ("kvr-id", "lama", "gsm8k") for x in ("", ".x1")} | {
        ("kvr", f"{b}{mix}") for b in ("kvr-id", "lama", "gsm8k") for mix in ("", "+random", "+random.x1", "+k-pile", "+k-pile.x1")}  # fmt: skip
    assert labelled("figure2") == labelled("table4")
    assert {b.partition("+")[0] for _, b in after("figure9")} == {"kvr-id", "triviaqa-id", "lama"} and {b.partition("+")[0] for _, b in after("figure10")} == {"gsm8k"}


@pytest.mark.long
def test_a_run_that_fails(shared, python, tmp_path):
    """It costs its own cells and those of what goes on from it; the end says which, with status and last line; the same command
    tries them again, and all is as if nothing had been."""
    folder = tmp_path / "failing"
    shutil.copytree(shared, folder)
    blocked = f"{RUNS}/tiny-llama/kvr-s0/gsm8k-s0"
    lost = [line.folder for line in planned(folder).values() if "fineweb" in line.args or blocked in (line.folder, line.needs)]
    for place in lost:
        shutil.rmtree(folder / place, ignore_errors=True)
    (folder / blocked).write_text("a file where a folder should be")
    passages = (folder / "data/tiny/fineweb.w4.jsonl").read_text()
    (folder / "data/tiny/fineweb.w4.jsonl").write_text("{}\n" + passages)
    assert start(folder, python, log="failed").wait(300) == 1
    said = (folder / "failed").read_text().partition(" runs failed or were not tried; the same command tries them again:\n")
    assert int(said[0].split()[-1]) == len(said[2].strip().split("\n")) == len(lost) == 10
    for place in lost:
        why = re.search(rf"^  {re.escape(place)}: (.*)$", said[2], re.MULTILINE)[1]
        expected = "status 2: train.py: data/tiny/fineweb.w4.jsonl:1: " if "fineweb" in place else f"not tried, as it needs {blocked}"
        assert why.startswith(expected) or place == blocked, why
    cells = lambda of: {json.loads(line)["run"]: line for line in open(of / RUNS / "cells.jsonl")}
    gone = {str(Path(place).relative_to(RUNS)) for place in lost}
    assert cells(folder) == {run: line for run, line in cells(shared).items() if run not in gone}
    (folder / "data/tiny/fineweb.w4.jsonl").write_text(passages)
    (folder / blocked).unlink()
    assert start(folder, python, log="again").wait(300) == 0
    expected, found = outcome(shared), outcome(folder)
    assert found.keys() == expected.keys() and not [name for name in expected if found[name] != expected[name] and "finished" not in name]


@pytest.mark.long
def test_what_falls_short(shared, python, tmp_path, without_pictures):
    """The plan names the set, how much it lacks and what for; --fewer takes what there is, and the table says how many; a model's
    folder may have a space in its name."""
    folder = tmp_path / "short"
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("runs"))
    (folder / "models/tiny-llama").rename(folder / "models/my llama")
    few = ["--num-examples", "35", "--only", "table5", "--model", "models/my llama", "--runs", "runs/fewer"]
    assert start(folder, python, "--dry-run", *few, log="plan").wait(60) == 0
    said = (folder / "plan").read_text()
    short = dict(re.findall(r"^  (\S+)(?: to my llama)?: (\d+ of \d+, \d+ too few): \d+ runs of table5$", said, re.MULTILINE))
    assert set(short) == {"gsm8k", "lama.unfamiliar", "popqa.familiar", "triviaqa.familiar"} and short["gsm8k"] == "20 of 35, 15 too few", said
    assert start(folder, python, *few, log="refused").wait(300) == 1
    assert "data/tiny/gsm8k.jsonl: holds 20 examples for gsm8k, 35 are asked for; ask for fewer" in (folder / "refused").read_text()
    assert start(folder, python, "--fewer", *few, log="taken").wait(300) == 0
    text = (folder / "runs/fewer/TABLES.md").read_text()
    assert "(D_B 20)" in text or "20 examples of D_B" in text
    lineage = json.loads((folder / "runs/fewer/my llama/gsm8k+random+familiar-s0/run.json").read_text())
    assert [(entry["num_examples"], entry["num_mix"]) for entry in lineage] == [(20, 40)]
    with open(folder / "data/tiny/gsm8k.jsonl", "a") as file:
        file.writelines(json.dumps({"id": f"more-{i}", "prompt": f"{i}?", "response": "a"}) + "\n" for i in range(9))
    assert start(folder, python, "--fewer", *few, log="more").wait(60) == 2
    assert "gsm8k+familiar-s0: holds a finished run whose num_examples is 20, not 35" in (folder / "more").read_text(), "there are more by now"


@pytest.mark.long
def test_a_model_that_knows_nothing(shared, python, tmp_path, without_pictures):
    """What a base model knows nothing of is foreseen and named; with --fewer the other set is asked all the same."""
    folder = tmp_path / "knows"
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("runs"))
    (known,) = (folder / "data/tiny").glob("popqa.familiar.tiny-llama-*.jsonl")
    (others,) = (folder / "data/tiny").glob("popqa.unfamiliar.tiny-llama-*.jsonl")
    notes = [json.loads(file.with_suffix(".json").read_text()) for file in (others, known)]
    lines = others.read_text() + known.read_text()
    others.write_text(lines)
    others.with_suffix(".json").write_text(json.dumps(notes[0] | {"kept": lines.count("\n")}))
    known.unlink()
    known.with_suffix(".json").unlink()
    options = ["--only", "table5", "--shard", "0/5"]
    for more, title in ([], "so that these runs will fail (--fewer takes what there is):"), (["--fewer"], "falls short:"):
        assert start(folder, python, "--dry-run", *options, *more, log="plan").wait(60) == 0
        said = (folder / "plan").read_text()
        assert "popqa.familiar to tiny-llama: 0 of 10, 10 too few" in said.partition(title)[2], said
        (folder / "plan").unlink()
    assert start(folder, python, *options, log="refused").wait(300) == 1
    assert "no such file, as tiny-llama has no such facts; leave out popqa" in (folder / "refused").read_text()
    assert start(folder, python, "--fewer", *options, log="taken").wait(300) == 0, (folder / "taken").read_text()[-2000:]
    asked = json.loads((folder / RUNS / "tiny-llama/base/eval.json").read_text())
    assert {row["data"] for row in asked.values()} == {"triviaqa.familiar"}


@pytest.mark.long
def test_the_base_model_is_asked_anew(shared, python, tmp_path, without_pictures):
    """What a base model was asked before is known by the facts; another model's answers are not taken for its own."""
    folder = tmp_path / "anew"
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("runs"))
    options = ["--only", "table5", "--facts", "kvr", "--shard", "0/9"]
    for n in ("10", "8"):
        assert start(folder, python, *options, "--num-examples", n, "--runs", "runs/anew", log=n).wait(300) == 0, (folder / n).read_text()
        table = (folder / "runs/anew/TABLES.md").read_text()
        assert table.count("| The base model itself, asked alike *(not in the paper)* | 100.0 |") == 4 and f"; {n} facts of D_A" in table
        for run in (folder / "runs/anew/tiny-llama").glob("*familiar*"):
            shutil.rmtree(run)
    (folder / "other").mkdir()
    shutil.copytree(folder / "models/tiny-mistral", folder / "other/tiny-llama")
    assert start(folder, python, *options, "--runs", "runs/anew", "--model", "other/tiny-llama", log="refused").wait(300) == 1
    assert "base: status 2: evaluate.py: --out runs/anew/tiny-llama/base: holds the answers of another model" in (folder / "refused").read_text()


@pytest.mark.long
def test_any_way_of_writing(shared, python, tmp_path, without_pictures):
    """A folder is the same however it is written, with brackets too; options count before --small and --tiny as behind; data that is
    complete may be read-only; a log that a full disk cut stops no plan; first stages alone have no tables, which is no failure. A run
    whose loss on other text cannot be had is whole without it, which the end says; it is measured once it can be."""
    folder = tmp_path
    shutil.copytree(shared / "models", folder / "models")
    shutil.copytree(shared / "data", folder / "data dir [1]")
    data, first = ["--data-dir", "data dir [1]/tiny"], ["--only", "figure12", "--facts", "triviaqa", "--shard", "0/6"]
    passages, run = folder / "data dir [1]/tiny/bios.jsonl", folder / "r [2]/tiny-llama/triviaqa-s0"
    kept = passages.read_text()
    passages.write_text("{}\n" + kept)
    assert start(folder, python, *first, *data, "--runs", "./r [2]//", log="first").wait(300) == 0
    said = (folder / "first").read_text()
    assert "no tables yet" in said and "the loss on bios could not be had of 2 runs, first " in said and not (run / "text.bios.json").exists()
    assert "triviaqa" in (run / "eval.json").read_text() and "status 2: evaluate.py: data dir [1]/tiny/bios.jsonl:1: " in said
    passages.write_text(kept)
    (run / "eval.json").unlink()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "tok')
    for i in range(2):
        assert start(folder, python, *first[:-2], *data, "--runs", f"{folder}/./r [2]", log=f"all{i}").wait(300) == 0, (folder / f"all{i}").read_text()[-2000:]
        assert len((folder / "r [2]/finished.log").read_text().split("\n")) == 1 + 1 + 6, "each once, the first again"
        assert json.loads((run / "text.bios.json").read_text())["passages"] == PASSAGES
        (run / "text.bios.json").unlink()  # as in a grid from before there was any: its weights are still there
    plan = lambda *words: {line.folder: line for line in planned(folder, *words).values()}
    small = plan("--model", "models/tiny-llama", "--num-examples", "5", *data, "--small")
    assert small == plan("--small", *data, "--num-examples", "5", "--model", "models/tiny-llama") and len(small) > 9
    assert all("gsm8k" not in line.folder or "5" in line.args for line in small.values()) and any("gsm8k" in name for name in small)


@pytest.mark.long
def test_a_part_and_then_another(furnished, python, tmp_path):
    """--only table1 leaves what figure 12 has still to probe; sets that are not here, or not sorted yet, are named before."""
    folder = shutil.copytree(furnished, tmp_path / "part")
    shutil.move(folder / "raw/gsm8k", folder / "gsm8k")
    part = lambda *options: start(folder, python, "--facts", "triviaqa", *options, log=f"{options[1]}.log").wait(300)
    assert part("--only", "table1", "--dry-run") == 0
    said = (folder / "table1.log").read_text()
    assert "not here yet, so not known to suffice: gsm8k (" in said and "before familiar facts are sorted out: lama, triviaqa, triviaqa-id\n" in said
    shutil.move(folder / "gsm8k", folder / "raw/gsm8k")
    assert part("--only", "table1") == 0 and not list(folder.rglob("probe.*"))
    assert part("--only", "figure12") == 0 and (folder / RUNS / "figure12-tiny-llama.png").exists()
    assert not list(folder.rglob("lama*/model.safetensors")), "they were needed for the probe alone"
    assert part("--only", "figure13") == 2 and part("--gpu-tflops", "0", "--dry-run") == 2


def test_a_finished_run_of_other_settings(shared, python):
    """What lies in a grid's folders is taken for done only if its record says what the plan does."""
    folder = shared / RUNS / "tiny-llama/kvr-s0"
    for options, says in ((["--num-examples", "7"], "num_examples is 10, not 7"), (["--unfiltered"], "familiarity is 'unfamiliar', not ''")):
        assert start(shared, python, *options, log="other").wait() == 2
        assert says in (shared / "other").read_text()
        (shared / "other").unlink()
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(record.replace('"base_model_sha256": "', '"base_model_sha256": "0'))
    assert start(shared, python, "--dry-run", log="other").wait() == 2
    (folder / "run.json").write_text(record)
    assert f"{RUNS}/tiny-llama/kvr-s0: holds a finished run whose base_model_sha256 is '0" in (shared / "other").read_text()


def test_plan_of_a_begun_grid(shared, python):
    """What another seed would take follows from what the first took: as many steps and tokens, and 6 FLOPs for each of these and
    each parameter, as far as the first facts of a set tell how long all are."""
    assert start(shared, python, "--dry-run", "--seeds", "0 1", "--gpu-tflops", "1e-9", log="begun").wait() == 0
    text, plan = (shared / "begun").read_text(), planned(shared)
    done = [row for run in plan for row in metrics(shared / run) if "tokens" in row]
    assert re.search(rf"\nall +{2 * len(plan)} +{len(plan)} +{len(plan)} ", text) and f"steps to do: at most {len(done)}\n" in text
    n_params = {model: sum(tensor.numel() for tensor in load_file(shared / "models" / model / "model.safetensors").values()) for model in MODELS}
    flops = 0
    for run in plan:
        flops += 6 * n_params[Path(run).parts[2]] * sum(row["tokens"] for row in metrics(shared / run) if "tokens" in row)
    hours = re.search(r"\nall .* ([\d,]+)   \(", text)[1].replace(",", "")
    assert int(hours) == pytest.approx(flops / 1e3 / 3600, rel=0.1) and f"by seed (--seeds): 0 0, 1 {int(hours):,};" in text
    rate = sum(row["tokens"] for row in done) / sum(row["seconds"] for row in done)
    assert f"at most {sum(row['tokens'] for row in done):.3g}; {rate:.0f} tokens/s measured: 0.0 hours" in text
    kept = {line.needs for seed in "01" for line in planned(shared, "--seeds", seed).values() if "tiny-llama" in line.needs}
    assert f"{len(kept)} checkpoints are kept for later stages, 0.000 GB each of models/tiny-llama; a run in progress takes" in text


def test_controls_and_three_stages(shared):
    """A control has the steps of what it is compared with; a third stage asks the first's facts; replay and familiar runs are what they say."""
    lineage = lambda run: json.loads((shared / RUNS / "tiny-llama" / run / "run.json").read_text())
    steps = lambda run: [entry["steps"] for entry in lineage(run)]
    assert steps("kvr+random.m0-s0/lama+k-pile.m0-s0") == steps("kvr+random-s0/lama+k-pile-s0") == [18, 18] and steps("kvr-long-s0/lama-s0") == [18, 6]
    third = lineage("kvr+random-s0/lama+k-pile-s0/entityqa+k-pile-s0")
    assert [entry["mix"] for entry in third] == ["random", "k-pile", "k-pile"]
    assert lineage("kvr-s0/lama+replay0.1-s0")[1]["num_replay"] == 1
    familiar = shared / RUNS / "tiny-llama" / "gsm8k+a-pile+familiar-s0"
    assert {row["data"]: row["total"] for row in json.loads((familiar / "eval.json").read_text()).values()} == {"popqa.familiar": 10, "triviaqa.familiar": 10}
    kept = {file.parent.name for file in (shared / RUNS).rglob("model.safetensors")}
    assert "kvr-s0" in kept and "lama+k-pile-s0" in kept and not kept & {"entityqa+k-pile-s0", "lama+k-pile.m0-s0", familiar.name}


PLAIN, CONTROL = {"mix": "none", "epochs": 6}, {"mix_weight": 0, "stop_loss": 0, "epochs": 6}
LADDER = {  # the settings that our rows' names say, of both stages
    "Random of weight 0 / -": ({"mix": "random"} | CONTROL, PLAIN), "K-Pile of weight 0 / -": ({"mix": "k-pile"} | CONTROL, PLAIN),
    "Random of equal weight / -": ({"mix": "random", "equal_weight": True, "epochs": 6}, PLAIN),
    "No Mixing, steps of Random / -": ({"mix": "none", "epochs": 18, "stop_loss": 0}, PLAIN), "- / K-Pile of weight 0": (PLAIN, {"mix": "k-pile"} | CONTROL),
    "Random of weight 0 / K-Pile of weight 0": ({"mix": "random"} | CONTROL, {"mix": "k-pile"} | CONTROL)}  # fmt: skip


def test_the_ladder(shared):
    """Our rows are planned, trained as their names say, stand in the tables of both models and are judged there; every run and each
    base model has its loss on other text."""
    text = (shared / RUNS / "TABLES.md").read_text()
    ladder = [line.folder.partition("llama/")[2] for line in planned(shared, "--only", "ladder").values() if "ladder" in line.tables]
    first = ["kvr-s0", "kvr-s0/lama-s0", "kvr+random-s0", "kvr+random-s0/lama-s0", "kvr+random.m0-s0", "kvr+random.m0-s0/lama-s0"]
    assert ladder[:6] == first, "what decides comes first"
    for grid in grids_of(read_runs(shared / RUNS), {}):
        name = OF_PAPER[grid.name][grid.name == "tiny-llama"]
        table = re.search(rf"\*\*Table {name[-1]}\.[^*]*\*\* \({grid.name}: .*?(?=\n\n\*\*|\n!)", text, re.DOTALL)[0]
        verdicts = text.partition(f"**The mix or its steps?** ({grid.name}")[2].partition("**Claims**")[0]
        assert {row_label(row) for row in evaluate.LADDER} == {f"{label}{OURS}" for label in LADDER}
        for row, like in evaluate.LADDER.items():
            label = row_label(row).removesuffix(OURS)
            line = next(line for line in table.split("\n") if line.startswith(f"| {label}{OURS} |"))
            assert re.search(r" \d+\.\d \|.* \d+\.\d\d \| \d+\.\d\d \|$", line), line  # what is left, and loss after both stages
            assert f"| Key-Value Recall | LAMA | {row_label(like)} | {label} | 1 |" in verdicts
            (run,) = grid.cells[behind(name, "kvr", row, "lama")[0]].values()
            for entry, settings in zip(run.lineage, LADDER[label]):
                assert {key: entry[key] for key in settings} == settings
    for place in [*planned(shared), *[RUNS / model / "base" for model in MODELS]]:
        assert json.loads((shared / place / "text.bios.json").read_text())["passages"] == PASSAGES


def test_killed_at_random(shared, furnished, python, tmp_path, whole):
    """Two processes; at any moment one or the other gets kill -9, with its children or without them, SIGTERM or Ctrl-C, and is started
    again: they end with the same bytes, and no run was lost or done twice. Of every twentieth run and those it needs, or all."""
    if whole:
        fewer_passages(furnish(tmp_path))  # the same bytes each time
    else:
        shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    chance, kills, shard = random.Random(0), 40 if whole else len(HITS), [] if whole else ["--shard", "0/20"]
    go = lambda: start(tmp_path, python, *shard, EXTRA="--save-every 2")
    processes = [go(), go()]
    for n in range(kills):
        time.sleep(chance.uniform(0.1, 1.5 if whole else 3))
        i, (kill, sent, statuses) = chance.randrange(2), HITS[n % len(HITS)]
        if processes[i].poll() is None:
            kill(processes[i].pid, sent)
            assert processes[i].wait(60) in [0, *statuses]  # 0: it was just done
            processes[i] = go()
    log = (tmp_path / "log").read_text
    assert [process.wait(600) for process in processes] == [0, 0], log()[-4000:]
    expected, found = outcome(shared), outcome(tmp_path)
    if not whole:  # tables and figures are of as many runs as there are
        found = {name: content for name, content in found.items() if Path(name).parent != RUNS}
        expected = {name: expected.get(name) for name in found}
    assert found.keys() == expected.keys() and len(found) > (400 if whole else 100)
    assert not [name for name in found if found[name] != expected[name]]
    done, trained = (tmp_path / RUNS / "finished.log").read_text().split(), re.findall(TRAINED, log())
    assert len(set(done)) == len(done) and len(set(trained)) == len(trained)  # killed before these lines a run lacks them
    assert min(len(done), len(trained)) >= len(list((tmp_path / RUNS).rglob("run.json"))) - kills
