"""evaluate.py --tables against hand-worked values, from records alone, and run_all.sh's plan."""

import json
import math
import os
import random
import re
import shutil
import subprocess

import numpy
import pytest
from conftest import ROOT, run

import evaluate
from data import DataError
from evaluate import (
    CLAIMS, HOLDS, NOT_RUN, REVERSED, UNDECIDED, Grid, Interval, Run, behind, chain, doses, first_loss, is_column, is_equal, is_more, is_near, judge, layout_of, linked,
    lost_facts, misprinted, paper_figures, paper_layout, passes, t_interval, t_quantile, tables,
)

FIGURES = evaluate.figures
FACTOID = ["kvr-id", "lama", "entityqa", "webqa"]


def entry(data, n, seed, **changes):
    """A stage in run.json as train.py writes it, of the paper's settings."""
    sha256 = changes.pop("data_sha256", f"{data} {n}")
    return {"stage": 1, "data": data, "num_examples": n, "mix": "none", "mix_ratio": 2.0, "mix_words": 50, "mix_weight": 1.0, "replay": 0.0,
            "tag": "", "seed": seed, "lr": 5e-5, "batch_size": 32, "epochs": 20, "precision": "fp32", "familiarity": "", "data_sha256": sha256,
            "base_model": "models/Meta-Llama-3-8B", "base_model_name": "Meta-Llama-3-8B", "base_model_sha256": "0123456789abcdef",
            "checkpoint": ".", "steps": 4, "updates": 4, "tokens": 100, "seconds": 1.0, "final_loss": 0.1, "losses": {}, "stopped_by": "epochs",
            "commit": "c0ffee", "clean": True, "python": "3.12.1", "torch": "2.13.0", "device": "a processor", "ranks": 1, "micro_tokens": 1024, "compile": False,
            "deterministic": False, "resumed_from": []} | changes  # fmt: skip


def put(folder, lineage, right, asked=None):
    """A finished run without weights that was asked a set: right is a 0 or 1 for each of its facts."""
    folder.mkdir(parents=True)
    asked = asked or lineage[0]["data"]
    (folder / "run.json").write_text(json.dumps([row | {"stage": stage} for stage, row in enumerate(lineage, 1)]))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "data": asked, "accuracy": 50.0}) + "\n")
    score = {"accuracy": 100 * sum(right) / len(right), "correct": sum(right), "total": len(right), "of": len(right), "precision": "fp32",
             "data": asked, "data_sha256": f"{asked} {len(right)}"}  # fmt: skip
    (folder / "eval.json").write_text(json.dumps({asked: score}))
    rows = [{"id": f"{asked}-{i}", "prompt": f"{i}?", "response": f"r{i}", "prediction": f"r{i}" if r else "?", "correct": bool(r)} for i, r in enumerate(right)]
    (folder / f"predictions.{asked}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def put_cell(folder, row, b, rights, **changes):
    """The runs of a cell of table 2 or figure 8 for kvr, one for each seed of rights {seed: right answers}; b "": stage 1 alone."""
    for seed, right in rights.items():
        lineage = []
        for stage in chain("kvr", row, b)[: None if b else 1]:
            known = {"mix": stage.mix, "replay": stage.replay, "tag": stage.tag, "equal_weight": stage.mix_weight == "equal",
                     "mix_weight": 0.5 if stage.mix_weight == "equal" else float(stage.mix_weight)}  # fmt: skip
            lineage.append(entry(stage.data, len(right), seed, **(known | changes if lineage else known)))
        put(folder / f"{row}-{b}-{seed}".replace("/", "_"), lineage, right)


def test_paper_figures():
    """Every cell is there, and two printed averages are not the mean of their cells."""
    paper = paper_figures()
    assert len(paper.cells) == 3 * 9 * 7 + 3 * 2 * 8 + 3 * 4 * 8 + 2 * 2 * 5 * 8 and len(paper.averages) == 48
    assert paper.cells["table2", "triviaqa", "-/k-pile", "gsm8k"] == 2.8 and paper.cells["table1", "kvr", "none", "id"] == 0.5
    assert [(w.table, w.a, w.row, w.group, w.printed, round(w.mean, 2)) for w in misprinted()] == [
        ("table2", "popqa", "random/-", "non-factoid", 72.2, 74.24), ("table3", "kvr", "random/k-pile", "non-factoid", 57.0, 57.58)]  # fmt: skip


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """KVR after the factoid D_B, in seeds 0 and 1, and some other cells; without figures, which take long."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    right = {"kvr-id": [0, 0, 0, 0], "lama": [1, 0, 0, 0], "entityqa": [1, 1, 0, 0], "webqa": [1, 1, 1, 0]}
    put_cell(tmp_path, "none", "", {0: [1, 1, 1, 1]})
    for b in FACTOID:
        put_cell(tmp_path, "none", b, {0: right[b], 1: right[b]})
        put_cell(tmp_path, "random/-", b, {0: [1, 1, 1, 1], 1: [1, 1, 1, 1]})
    put_cell(tmp_path, "k-pile/-", "lama", {0: [1, 1, 1, 1]})
    put_cell(tmp_path, "long", "lama", {0: [1, 1, 1, 1], 1: [1, 1, 1, 1]})
    return tmp_path


def test_cells_and_claims(grid, monkeypatch):
    """Cells, averages, underlines, verdicts and the ledger equal values worked by hand, from runs without weights."""
    with monkeypatch.context() as with_figures:
        with_figures.setattr(evaluate, "figures", FIGURES)
        text = tables(grid)
    assert "| Key-Value Recall | <u>0.0 ± 0.0</u> <sub>0.5</sub> | 25.0 ± 0.0 <sub>2.1</sub> | 50.0 ± 0.0 <sub>17.4</sub> | 75.0 ± 0.0 <sub>33.8</sub> | 37.5 ± 0.0" in text
    assert "| K-Pile / - | <sub>0.1</sub> | 100.0 <sub>0.0</sub> |" in text
    assert "| No Mixing, steps of Random / - *(not in the paper)* |  | 100.0 ± 0.0 |" in text
    # Two seeds are too few for an interval; PopQA and TriviaQA were not run.
    assert "| Key-Value Recall | Random / - over No Mixing | ID, LAMA, EntityQA, WebQA | 2 | 100.0 | 37.5 | +62.5 | UNDECIDED (fewer than 3 seeds) | +15.4 |" in text
    assert "on average for every D_A | UNDECIDED | 1 UNDECIDED, 2 NOT RUN | 3 of 3 fit |" in text
    assert "K-Pile at stage 1 hurts with factoid D_B | UNDECIDED (on 1 of 4 D_B) | 1 UNDECIDED, 2 NOT RUN | 3 of 3 fit |" in text
    # What the paper says of the same D_B: 2.1 less 0.0.
    assert "| Key-Value Recall | No Mixing over K-Pile / - | LAMA (1 of 4) | 1 | 25.0 | 100.0 | -75.0 | UNDECIDED (fewer than 3 seeds) | +2.1 |" in text
    rows = [json.loads(line) for line in open(grid / "facts.jsonl")]
    lama = [(row["memorized"], row["lost"]) for row in rows if row["run"] == "none-lama-0"]
    assert lama == [(1, None), (1, 2), (1, 2), (1, 2)]
    assert re.findall(r"\((\w+)-Meta-Llama-3-8B.png\)", text) == ["figure9", "forgetting"], "of what the others compare there is one side"
    assert all((grid / f"{name}-Meta-Llama-3-8B.png").stat().st_size > 1000 for name in ("figure9", "forgetting"))

    for mix, right in (("none", [0, 0, 0, 1]), ("fineweb", [1, 1, 1, 1])):
        put(grid / f"familiar-{mix}", [entry("lama", 4, 0, mix=mix, tag="familiar", batch_size=128)], right, asked="popqa.familiar")
    put_cell(grid, "none", "webqa/math", {0: [0, 0, 0, 1]})
    put_cell(grid, "none", "webqa/entityqa", {0: [0, 0, 0, 0]})
    put_cell(grid, "random/k-pile", "webqa/math", {0: [1, 1, 1, 1]})
    text = tables(grid)
    assert "| No Mixing | 25.0 <sub>27.3</sub> | <sub>24.4</sub> |" in text and "| FineWeb | 100.0 <sub>54.9</sub> |" in text  # of table 5
    assert "| PopQA | FineWeb over No Mixing | LAMA (1 of 3) | 1 | 100.0 | 25.0 | +75.0 |" in text
    assert "keep familiar facts with factoid D_B | UNDECIDED (on 1 of 3 D_B) | 1 UNDECIDED, 5 NOT RUN | 6 of 6 fit |" in text  # TriviaQA's were not asked
    assert "| Random / K-Pile over No Mixing | WebQA then MATH | 1 | 100.0 | 25.0 | +75.0 |" in text
    assert "| No Mixing over No Mixing after two factoid D_B | WebQA then EntityQA, WebQA then MATH | 1 | 25.0 | 0.0 | +25.0 |" in text


def test_tables_of_a_moved_folder(grid, tmp_path_factory):
    """The same tables come of the same records, whatever their folders are called and wherever they lie."""
    before, moved, chance = tables(grid), tmp_path_factory.mktemp("moved"), random.Random(0)
    for run_ in sorted(path.parent for path in grid.rglob("run.json")):
        shutil.copytree(run_, moved / f"{chance.randrange(10**9)}" / f"kvr+random-s{chance.randrange(9)}")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "linked"
    next(moved.iterdir()).rename(elsewhere)
    (moved / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(moved)
    assert tables(moved) == before and (moved / "TABLES.md").read_bytes() == (grid / "TABLES.md").read_bytes()
    without = lambda folder: sorted(json.dumps(json.loads(line) | {"run": ""}) for line in open(folder / "facts.jsonl"))
    assert without(moved) == without(grid)


SETTINGS = {"lr": 1e-5, "mix_ratio": 4.0, "num_examples": 6, "batch_size": 8, "precision": "bf16", "data_sha256": "another file's",
            "stop_loss": 0.1, "epochs": 40, "familiarity": "unfamiliar", "penalty": "l2"}  # fmt: skip


def test_a_cell_is_of_one_kind(grid):
    """Runs of a cell that differ in a setting, any setting, end it with both folders and the setting; with a tag they are two cells."""
    put_cell(grid, "-/k-pile", "lama", {0: [1, 0, 0, 0], 1: [1, 1, 1, 0]})
    file = grid / "-_k-pile-lama-1/run.json"
    lineage = json.loads(file.read_text())
    for setting, value in SETTINGS.items():
        file.write_text(json.dumps([lineage[0], lineage[1] | {setting: value}]))
        with pytest.raises(DataError, match=f"-_k-pile-lama-0 and .*-_k-pile-lama-1: runs of one cell .*{setting} of stage 2 is .*{value}"):
            tables(grid)
    done = run(grid, "evaluate.py", "--tables", grid, ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    file.write_text(json.dumps([lineage[0], lineage[1] | {"lr": 1e-5, "tag": "slower"}]))
    text = tables(grid)
    assert "| - / K-Pile | <sub>0.8</sub> | 25.0 <sub>40.0</sub> |" in text and "| - / k-pile (- / slower) | 4 + 4 | - / - |  | 75.0 |" in text


def test_equal_runs(grid):
    """Two runs of equal settings and seed are refused, both named; so is what was asked otherwise; a step-matched control may vary in epochs."""
    shutil.copytree(grid / "none-lama-1", grid / "copy")
    with pytest.raises(DataError, match="copy and .*none-lama-1: equal settings and seed"):
        tables(grid)
    shutil.rmtree(grid / "copy")
    for seed, epochs in ((0, 20), (1, 21)):
        put_cell(grid, "long", "math", {seed: [1, 0, 0, 0]}, step_matched=True, epochs=epochs)
    tables(grid)
    for key, value in (("precision", "bf16"), ("of", 5)):
        file = grid / "none-webqa-1/eval.json"
        scores = json.loads(file.read_text())
        file.write_text(json.dumps({"kvr": scores["kvr"] | {key: value}}))
        with pytest.raises(DataError, match=f"none-webqa-0 and .*none-webqa-1: .*{key} of kvr in their eval.json"):
            tables(grid)
        file.write_text(json.dumps(scores))


def test_claims_pair_facts(grid):
    """Runs of two cells that were asked other facts of one name are no claim's two sides."""
    put_cell(grid, "-/k-pile", "lama", {0: [1, 0, 0]})
    with pytest.raises(DataError, match=".*-_k-pile-lama-0.*: runs of one claim, but other facts of kvr"):
        tables(grid)


def test_base_models_are_what_they_are(grid):
    """Two models of one name are two, told apart by digits; one model under two names is one, and keeps the paper's."""
    for name, sha256, folder in (("hf", "a" * 64, "x"), ("hf", "b" * 64, "y"), ("snapshot", "0123456789abcdef", "z")):
        lineage = [entry(data, 4, 2, base_model_name=name, base_model_sha256=sha256) for data in ("kvr", "webqa")]
        put(grid / folder, lineage, [1, 0, 0, 0])
    text = tables(grid)
    assert "hf-aaaaaaaa, kvr (4), then webqa (4)" in text and "hf-bbbbbbbb, kvr (4), then webqa (4)" in text and "snapshot" not in text
    assert "58.3 ± 28.9 <sub>33.8</sub>" in text  # 75, 75 and 25 after WebQA


def test_tags_that_name_settings(grid):
    """A tag that is a setting's name makes a row of each of its values."""
    for lr in (1e-4, 1e-3):
        put_cell(grid, "none", "gsm8k", {0: [1, 0, 0, 0]}, tag="lr", lr=lr)
        (grid / "none-gsm8k-0").rename(grid / f"{lr}")
    text = tables(grid)
    assert "| No Mixing (- / lr 0.0001) | 4 + 4 | - / - | 100.0 | 25.0 |  | epochs / epochs | 1 |" in text and "| No Mixing (- / lr 0.001) |" in text
    for penalty in (None, "l2"):
        put_cell(grid, "none", "math", {0: [1, 0, 0, 0]}, tag="penalty", penalty=penalty)
        (grid / "none-math-0").rename(grid / f"{penalty}")
    text = tables(grid)
    assert "| No Mixing (- / penalty) |" in text and "| No Mixing (- / penalty l2) |" in text


def test_controls(tmp_path):
    """A mix and the same batches without its rows: the last line compares the two means as the table shows them."""
    for seed, kept, without in ((0, [1, 1, 1], [1, 0, 0]), (1, [1, 1, 0], [0, 1, 0])):
        for weight, right in ((1.0, kept), (0.0, without)):
            model = {"base_model_name": "small", "base_model_sha256": "fedcba9876543210"}
            first = entry("kvr", 3, seed, mix="random", mix_weight=weight, losses={"own": 0.001 * (1 + seed)}, **model)
            put(tmp_path / f"{weight} {seed}", [first], [1, 1, 1])
            put(tmp_path / f"{weight} {seed} then", [first, entry("bios", 3, seed, losses={"own": 0.01}, **model)], right, "kvr")
    text = tables(tmp_path)
    assert "| random / - | 4 + 4 | 0.0015 / 0.0100 | 100.0 ± 0.0 | 83.3 ± 23.6 |" in text
    assert text.endswith("\n\nrandom / - keeps 83.3% of kvr, its control random of weight 0 / - 33.3%: 50.0 points more.\n")


def ladder_row(text, label):
    return next(line for line in text.partition("**Table 2.")[2].split("\n") if line.startswith(f"| {label} |"))


def test_the_ladder(grid):
    """Our rows stand below the paper's in tables 2 and 3, run or not; a cell of other steps than its mixed run's says so; what a
    mix keeps more than its control is judged by the t interval of the seeds' paired differences, worked by hand."""
    kept = {0: [1, 1, 1, 1], 1: [1, 1, 1, 0], 2: [1, 1, 1, 1], 3: [1, 1, 0, 0]}
    for seed, right in kept.items():
        put_cell(grid, "-/k-pile", "lama", {seed: right})
        put_cell(grid, "-/k-pile.m0", "lama", {seed: [1, 1, 1, 0]} if seed else {0: [1, 0, 0, 0]}, steps=4 if seed else 3)
    put_cell(grid, "random.m0/-", "webqa", {0: [0, 1, 1, 1], 1: [0, 1, 1, 1]})
    put_cell(grid, "random.equal/-", "webqa", {0: [1, 1, 1, 1]})
    text = tables(grid)
    ours = ["Random of weight 0 / -", "Random of equal weight / -", "No Mixing, steps of Random / -", "K-Pile of weight 0 / -", "- / K-Pile of weight 0",
            "Random of weight 0 / K-Pile of weight 0"]  # fmt: skip
    block = text.partition("**Table 2.")[2].partition("**Key-Value Recall**")[2].split("\n")[1:13]
    assert [line.split(" | ")[0].strip("| ") for line in block][6:] == [f"{label} *(not in the paper)*" for label in ours]
    assert "62.5 ± 25.0 (seed 0: 4 + 3 steps, not 4 + 4) |" in ladder_row(text, "- / K-Pile of weight 0 *(not in the paper)*")
    assert "| 75.0 ± 0.0 |" in ladder_row(text, "Random of weight 0 / - *(not in the paper)*") and "steps, not" not in block[6]
    assert "| 100.0 |" in ladder_row(text, "Random of equal weight / - *(not in the paper)*")
    verdicts = text.partition("**The mix or its steps?**")[2].partition("**Claims**")[0]
    # Differences 75, 0, 25, -25: mean 18.75, deviation 42.7, over the root of 4 21.35; times 3.182 and 2.353.
    assert "| LAMA | - / K-Pile | - / K-Pile of weight 0 (seed 0: 4 + 3 steps, not 4 + 4) | 4 | +18.8 | UNDECIDED [-49.2, +86.7] | UNDECIDED [-31.5, +69.0] |" in verdicts
    few = "UNDECIDED (fewer than 3 seeds)"
    assert f"| WebQA | Random / - | Random of weight 0 / - | 2 | +25.0 | {few} | {few} |" in verdicts
    for seed in (0, 1):
        for file in (grid / f"random.m0_--webqa-{seed}").glob("*.json"):
            file.write_text(file.read_text().replace("kvr 4", "other facts"))
    with pytest.raises(DataError, match="random.m0_--webqa-0 and .*random_--webqa-0: runs of one claim, but other facts of kvr"):
        tables(grid)


def test_readme_findings(tmp_path):
    """The records that are kept redo the tables that are kept beside them, and the README's ladder has their figures."""
    kept = ROOT / ".github" / "results"
    shutil.copytree(kept, tmp_path / "results")
    text = tables(tmp_path / "results")
    assert (kept / "TABLES.md").read_text() == text and sum(file.stat().st_size for file in kept.rglob("*")) < 10e6
    assert not list(kept.rglob("*.safetensors"))
    readme = (ROOT / "README.md").read_text().partition("## Findings so far")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in readme.split("\n") if re.match(r"\| (No Mixing|Random)", line)]
    assert len(rows) == 5
    cells_of = lambda line: re.sub(r" \((D_B|seed|stage)[^)]*\)", "", line).removeprefix("| ").removesuffix(" |").split(" | ")
    for label, steps, *cells in rows:
        expected = []
        for a, columns in (("Key-Value Recall", (1, 3, -2, -1)), ("EntityQA", (2, 3, -2, -1))):  # ID or kvr-id, bios, the text twice
            block = text.partition("**Table 2.")[2].partition(f"| **{a}** |")[2].split("\n")
            theirs = cells_of(next(line for line in block if line.startswith((f"| {label} |", f"| {label} *(not"))))
            expected += [theirs[column].replace(" ", "") or "-" for column in columns]
        assert cells == expected and steps.isdigit()
    judged = {}  # (D_A, D_B): [keeps more, equal]
    for line in text.split("\n"):
        if " | Random / - | Random of weight 0 / - | " in line:
            a, b, *_, keeps, equal = cells_of(line)
            judged[a, b] = [keeps, equal]
    of_both = [judged[key] for key in (("Key-Value Recall", "ID"), ("Key-Value Recall", "bios"), ("EntityQA", "kvr-id"), ("EntityQA", "bios"))]
    for verdict, label in enumerate(("keeps more than", "the two are equal")):
        (line,) = [line for line in readme.split("\n") if line.startswith("| ") and label in line]
        assert cells_of(line)[1:] == [of_one[verdict] for of_one in of_both]


def test_student():
    """Quantiles as every table prints them; an interval by hand; of one value none."""
    printed = {(0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 5): 2.571, (0.975, 30): 2.042, (0.95, 1): 6.314, (0.95, 4): 2.132, (0.95, 9): 1.833, (0.95, 60): 1.671}
    assert {key: round(t_quantile(*key), 3) for key in printed} == printed
    interval = t_interval([1, 2, 3], 0.95)
    assert (interval.low, interval.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert t_interval([1, 2], 0.95) is None


@pytest.mark.parametrize("n_facts, deviation", [(2000, 5), (2000, 10), (48, 10), (16, 5), (16, 10)])
def test_coverage(n_facts, deviation):
    """Two sides that do not differ, 2,000 times: seeds deviate by so many points, facts are right by chance. The 95% interval of three
    seeds has 0 within in 93 to 97% of them, and neither side is said to keep more in above 3.5%."""
    chance = numpy.random.default_rng(0)
    shares = chance.normal(0.5, deviation / 100, (2000, 3, 2)).clip(0, 1)
    left = 100 * chance.binomial(n_facts, shares) / n_facts
    found = [is_more(differences) for differences in (left[..., 0] - left[..., 1]).tolist()]
    covered = sum(verdict.interval.low <= 0 <= verdict.interval.high for verdict in found)
    said = [sum(verdict.word == word for verdict in found) for word in (HOLDS, REVERSED)]
    print(f"{n_facts} facts, {deviation} points: covered {covered / 20:.2f}%, said more {said[0] / 20:.2f}%, less {said[1] / 20:.2f}%")
    assert 0.93 <= covered / 2000 <= 0.97 and max(said) <= 70


def test_verdicts():
    """By hand, of three seeds: 4.303 and 2.920 deviations over the root of 3 either way."""
    # 10, 12, 14: deviation 2, so 4.97 either way at 95% and 3.37 at 90.
    assert [is_more([10, 12, 14], least).word for least in (0, 7, 7.1, 16.9, 17)] == [HOLDS, HOLDS, UNDECIDED, UNDECIDED, REVERSED]
    assert [is_equal([10, 12, 14], margin).word for margin in (5, 7, 7.1, 15, 16)] == [REVERSED, REVERSED, UNDECIDED, UNDECIDED, HOLDS]
    assert is_equal([-10, -12, -14], 7).word == REVERSED and is_more([10, 12]).word == is_equal([1, 1]).word == UNDECIDED
    assert is_equal([0.0, 0.0, 0.0]).interval == Interval(0, 0)
    every, most = evaluate.word_of_all, evaluate.word_of_most
    assert [every(words) for words in ([HOLDS, HOLDS], [HOLDS, REVERSED, NOT_RUN], [HOLDS, UNDECIDED], [HOLDS, NOT_RUN], [NOT_RUN, NOT_RUN], [])] == [
        HOLDS, REVERSED, UNDECIDED, UNDECIDED, NOT_RUN, NOT_RUN]  # fmt: skip
    assert [most(words) for words in ([HOLDS, HOLDS, REVERSED], [HOLDS, REVERSED], [REVERSED, REVERSED, UNDECIDED], [HOLDS, NOT_RUN], [NOT_RUN])] == [
        HOLDS, UNDECIDED, REVERSED, UNDECIDED, NOT_RUN]  # fmt: skip


def test_what_else_it_cost(grid):
    """Beside each row its loss on other text after each stage, mean over D_B and then seeds; the base model's own; what was asked
    other passages says so."""
    losses = {"none--0": 3.0, "none-lama-0": 4.0, "none-webqa-0": 5.0, "none-lama-1": 5.0, "none-webqa-1": 7.0, "k-pile_--lama-0": 2.5}
    for folder, loss in losses.items():
        row = {"loss": loss, "tokens": 10, "passages": 2, "precision": "fp32", "data": "pydoc", "data_sha256": "others" if "k-pile" in folder else "these"}
        (grid / folder / "text.pydoc.json").write_text(json.dumps(row))
    (grid / "base").mkdir()
    whose = {"base_model_name": "Meta-Llama-3-8B", "base_model_sha256": "0123456789abcdef", "data_sha256": "these"}
    (grid / "base/text.pydoc.json").write_text(json.dumps(row | whose | {"loss": 2.0}))
    text = tables(grid)
    assert "; pydoc: loss on it in nats a token, mean over D_B, of the base model 2.00)" in text
    assert ladder_row(text, "No Mixing").endswith("| 3.00 | 5.25 ± 1.06 |")  # 4.5 in seed 0, 6 in seed 1
    assert ladder_row(text, "K-Pile / -").endswith("|  | 2.50 (other passages) |") and ladder_row(text, "- / Random").endswith("|  |  |")
    (grid / "base/text.pydoc.json").write_text(json.dumps(row | {"loss": "2.0"}))
    assert "of the base model" not in tables(grid), "it names no base model"
    (grid / "none--0/text.pydoc.json").write_text(json.dumps(row | {"loss": "2.0"}))
    with pytest.raises(DataError, match=r"none--0/text.pydoc.json: .* run evaluate.py --text again"):
        tables(grid)


def test_what_is_compared_with_what(tmp_path, monkeypatch):
    """Only the same D_B, seeds and facts: what others have is left out, and said; runs of one first stage count as one."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    right = lambda n: [1] * n + [0] * (20 - n)
    for seed in range(4):
        for b in ("lama", "webqa"):
            put_cell(tmp_path / "a", "none", b, {seed: right(4 + seed % 2)})
            if b == "lama" or seed > 1:  # of WebQA two seeds alone: too few to stand beside LAMA's four
                put_cell(tmp_path / "a", "random/-", b, {seed: right(12 + seed % 3)})
    line = next(line for line in tables(tmp_path / "a").split("\n") if "Random / - over No Mixing | LAMA (1 of 4) | 4 |" in line)
    assert "| 63.8 | 22.5 | +41.2 | HOLDS [" in line  # 12, 13, 14, 12 of 20 and 4, 5, 4, 5
    assert line.endswith("| +0.4 |")  # the paper's 2.5 and 2.1
    # Three seeds at stage 2 on one first stage are one seed; other ratios at one stage than at the other are no slope of both.
    for seed in range(3):
        for row, n in (("none", 4), ("random/-", 12)):
            first, then = (entry(data, 20, of, mix="random" if n > 4 and data == "kvr" else "none") for data, of in (("kvr", 0), ("lama", seed)))
            put(tmp_path / f"b/{row[0]}{seed}", [first, then], right(n + seed))
    text = tables(tmp_path / "b")
    assert "| Random / - over No Mixing | LAMA (1 of 4) | 1 | 65.0 | 25.0 | +40.0 | UNDECIDED (fewer than 3 seeds) |" in text
    for seed in range(3):
        for stage, ratios in ((1, (1.0, 1 / 3)), (2, (1.0, 8.0))):
            for ratio in ratios:
                known = {"mix": "random", "mix_ratio": ratio, "tag": "mix_ratio"}
                lineage = [entry("kvr", 20, seed, **(known if stage == 1 else {})), entry("lama", 20, seed, **(known if stage == 2 else {}))]
                put(tmp_path / f"c/{stage} {ratio} {seed}", lineage, right(round(ratio) + 4))
        put_cell(tmp_path / "c", "-/random", "lama", {seed: right(7)})
        put_cell(tmp_path / "c", "random/-", "lama", {seed: right(9)})
    text = tables(tmp_path / "c")
    assert "| - / Random of ratio 1 over - / Random of ratio 8 | LAMA (1 of 9) | 3 | 25.0 | 60.0 | -35.0 | REVERSED [-35.0, -35.0] |" in text
    slopes = "(Random / - less Random of ratio 1 / -) over (- / Random less - / Random of ratio 1)"
    assert f"| {slopes} | LAMA (1 of 9) | 3 | 20.0 | 10.0 | +10.0 | HOLDS [+10.0, +10.0] |" in text
    (grid,) = evaluate.grids_of(evaluate.read_runs(tmp_path / "c"), {})
    (curve,) = evaluate.varied(grid, "kvr", "mix_ratio", 1, "random", ["lama"]).curves
    assert [x for x, _ in curve.points] == [1 / 3, 1.0, 2.0]


def test_what_the_stages_learned(tmp_path, monkeypatch):
    """Beside a row what D_A was after stage 1 and D_B is at the end, steps, losses and what ended the stages; a cell of a stage that
    knew less than 99% of its own facts names it, with the least of its runs, and so does a comparison."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    for seed, (known, own) in enumerate(((100, 100), (98, 100), (100, 60))):  # of 100 facts after stage 1, of the later set at the end
        right = lambda n: [1] * n + [0] * (100 - n)
        first = entry("kvr", 100, seed, losses={"own": 0.002}, steps=10)
        put(tmp_path / f"{seed}", [first], right(known))
        for b in ("lama", "entityqa"):
            for row, mix in (("none", "none"), ("random/-", "random")):
                place = tmp_path / f"{seed} {b} {mix}"
                before = first if row == "none" else first | {"mix": mix}
                put(place, [before, entry(b, 100, seed, losses={"own": 0.004}, steps=4 if b == "lama" else 7, stopped_by="loss" if seed else "epochs")], right(20 + seed))
                scores = json.loads((place / "eval.json").read_text())
                of_b = scores["kvr"] | {"data": b, "data_sha256": f"{b} 100", "correct": own, "accuracy": float(own)}
                (place / "eval.json").write_text(json.dumps(scores | {b: of_b if b == "lama" else of_b | {"correct": 100, "accuracy": 100.0}}))
    text = tables(tmp_path)
    titles = text.partition("**Table 2.")[2].split("\n")[2].strip("| ").split(" | ")
    row = dict(zip(titles, ladder_row(text, "No Mixing").removeprefix("| ").removesuffix(" |").split(" | ")[1:]))
    assert row["LAMA"] == "21.0 ± 1.0 <sub>2.1</sub> (stage 1 learned 98.0%, stage 2 learned 60.0%)"
    assert row["EntityQA"] == "21.0 ± 1.0 <sub>17.4</sub> (stage 1 learned 98.0%)"
    assert (row["D_A after stage 1"], row["D_B at the end"]) == ("99.3 ± 1.2", "93.3 ± 11.5")  # 100, 98, 100; 100, 100, 80
    assert (row["steps"], row["loss of own answers"], row["ended by"]) == ("10 + 6", "0.0020 / 0.0040", "epochs / epochs 2, loss 4")
    mixed = dict(zip(titles, ladder_row(text, "Random / -").split(" | ")[1:]))
    assert mixed["D_A after stage 1"] == "" and mixed["LAMA"].endswith("(stage 2 learned 60.0%)")  # its stage 1 is not there
    assert "| Random / - over No Mixing | LAMA, EntityQA (2 of 4) | 3 | 21.0 | 21.0 | +0.0 | UNDECIDED [+0.0, +0.0] † |" in text


def test_dose(tmp_path):
    """Passes and loss of stage 1 are those of the records: also of a run that its loss stopped, or that took another's steps."""
    for tag, epochs, steps, n_mix in (("", 16, 48, 0), ("epochs", 32, 60, 0), ("long", 48, 144, 0), ("epochs", 48, 144, 0), ("", 16, 144, 96), ("epochs", 24, 216, 96)):
        first = entry("kvr", 48, 0, tag=tag, epochs=epochs, steps=steps, batch_size=16, num_mix=n_mix, mix="random" if n_mix else "none", losses={"own": 0.5 / steps})
        put(tmp_path / f"{tag}{epochs}{n_mix}", [first, entry("lama", 48, 0)], [1] * epochs + [0] * (48 - epochs))
    grids = evaluate.grids_of(evaluate.read_runs(tmp_path), {})
    found = {curve: sorted(passes(next(iter(cell.values())).lineage[0]) for cell in cells) for curve, cells in doses(grids[0], "kvr").items()}
    assert found == {("lama", "none"): [16, 20, 48, 48], ("lama", "random"): [16, 24]}
    for measure, xs in ((passes, [16, 20, 48, 48]), (first_loss, [0.5 / 144, 0.5 / 144, 0.5 / 60, 0.5 / 48])):
        panel = evaluate.dose(grids[0], "kvr", measure)
        without_mix = panel.curves[0]
        assert without_mix.label == "No Mixing, then LAMA" and [x for x, _ in without_mix.points] == pytest.approx(xs)
        assert panel.log_x == (measure is first_loss)


def test_what_runs_were_made_with(grid):
    """Below the tables stand the runs' own commits, versions and devices, not this machine's."""
    assert tables(grid).endswith("\nTrained with commit c0ffee, Python 3.12.1, torch 2.13.0, a processor.\n")
    before = {"commit": "c0ffee", "clean": True, "python": "3.11", "torch": "2.11", "device": "a GPU", "ranks": 4}
    put_cell(grid, "none", "math", {0: [1, 0, 0, 0]}, commit="decade", clean=False, device="a GPU", ranks=8, resumed_from=[before])
    assert ("commit c0ffee, Python 3.11, torch 2.11, 4 x a GPU, then commit decade, changed since, Python 3.12.1, torch 2.13.0, "
            "8 x a GPU (1 of 21 runs)") in tables(grid)  # fmt: skip


def test_what_is_no_record(tmp_path):
    """What is not there, unreadable or of an earlier version is named."""
    with pytest.raises(DataError, match="no finished run below it"):
        tables(tmp_path)
    put_cell(tmp_path, "none", "lama", {0: [1, 0]})
    file = tmp_path / "none-lama-0/run.json"
    lineage = json.loads(file.read_text())
    lines = [lineage, lineage[:1] + [lineage[1] | {"mix": None}], lineage[:1] + [lineage[1] | {"seed": "0"}]]
    for content, says in (("[]", "not a lineage"), (json.dumps(lines[1]), "stage 2 has not what .* as mix;"), (json.dumps(lines[2]), "as seed;"),
                          (json.dumps([lineage[0], {"stage": 2, "data": "lama"}]), "stage 2 has not what .* as mix, tag, "), ("[{", "not readable"), ('{"kvr": 1}', "not a lineage")):
        file.write_text(content)
        with pytest.raises(DataError, match=f"none-lama-0/run.json: .*{says}"):
            tables(tmp_path)
    file.write_text(json.dumps(lineage))
    file = tmp_path / "none-lama-0/eval.json"
    scores = json.loads(file.read_text())
    for wrong in ({"of": None}, {"accuracy": "50.0"}, {"accuracy": 77.0}, {"total": 0}):
        file.write_text(json.dumps({"kvr": scores["kvr"] | wrong}))
        with pytest.raises(DataError, match=r"none-lama-0/eval.json: .* run evaluate.py again"):
            tables(tmp_path)


def test_what_stands_in_the_place_of_lost_facts():
    """The first kind that fits, by hand; facts that the learning stage had wrong are not lost."""
    assert [is_near(*pair) for pair in (("kitten", "sitting"), ("kitten", "mitten"), ("", "ab"), ("", "abc"), ("abcd", "badc"), ("ab", "ba"))] == [
        False, True, True, False, False, True]  # fmt: skip
    row = lambda i, response, prediction: {"id": i, "prompt": "?", "response": response, "prediction": prediction, "correct": prediction == response}
    now = [row("a", "Berlin", "Ber lin "), row("b", "Paris", "berlin"), row("c", "Oslo", "Blue"), row("d", "Rome", "who knows"), row("e", "Bonn", "Bonn"), row("f", "Kyiv", "x")]
    then = [fact | {"correct": fact["id"] != "f"} for fact in now]
    later = [row("g", "blue", "red")]
    kinds = {0: "a near miss of up to two characters", 1: "the answer of another fact of the set", 2: "a right answer of a later stage", 3: "something else"}
    assert {fact.place: fact.in_place for fact in lost_facts(now, then, later)} == kinds
    assert {fact.place: fact.in_place for fact in lost_facts(now, None, later)} == kinds | {5: "something else"}


def test_how_many_facts_a_cell_has(tmp_path, monkeypatch):
    """The caption says what most cells have, the others say it themselves: a smaller D_B, fewer passages than the ratio asks for."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    for b in ("lama", "entityqa"):
        put_cell(tmp_path, "none", b, {0: [1, 1, 0, 0]})
    put_cell(tmp_path, "none", "webqa", {0: [1, 0, 0, 0]}, num_examples=3)
    put_cell(tmp_path, "-/k-pile", "lama", {0: [1, 1, 1, 0]}, num_mix=5)
    put_cell(tmp_path, "-/k-pile", "entityqa", {0: [1, 1, 1, 1]}, num_mix=8)
    text = tables(tmp_path)
    assert "over seeds; 4 facts of D_A, 4 examples of D_B where a cell says no other number)" in text
    row = lambda label: next(line for line in text.partition("**Table 2.")[2].split("\n") if line.startswith(f"| {label} |"))
    assert re.findall(r"(\d+\.\d) (?:<sub>[^<]*</sub>)?( \([^)]*\))?", row("No Mixing"))[:3] == [("50.0", ""), ("50.0", ""), ("25.0", " (D_B 3)")]
    assert "75.0 <sub>40.0</sub> (5 passages of k-pile)" in row("- / K-Pile") and "100.0 <sub>36.4</sub> |" in row("- / K-Pile")


def test_the_base_model_itself(tmp_path, monkeypatch):
    """Tables 5 and 6 have what the base model itself says to the same question, whatever else was asked and lies there; asked
    others alone, it is refused."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    put(tmp_path / "one", [entry("lama", 4, 0, tag="familiar", batch_size=128)], [1, 0, 0, 0], "popqa.familiar")
    scores = json.loads((tmp_path / "one/eval.json").read_text())
    mine = {"accuracy": 75.0, "correct": 3, "base_model_name": "Meta-Llama-3-8B", "base_model_sha256": "0123456789abcdef"}
    (tmp_path / "base").mkdir()
    keep = lambda **changes: (tmp_path / "base/eval.json").write_text(json.dumps({"popqa.familiar": scores["popqa.familiar"] | mine | changes}))
    keep()
    text = tables(tmp_path).partition("**Table 5.")[2]
    assert re.search(r"\| No Mixing \| 25\.0 [^|]*\|", text) and "| The base model itself, asked alike *(not in the paper)* | 75.0 |" in text
    for name, content in (("a", {"popqa.familiar": scores["popqa.familiar"] | mine | {"precision": "bf16"}}), ("other", {"results": {"acc": 1}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps(content))
    put(tmp_path / "mixed", [entry("gsm8k", 4, 0, mix="k-pile", tag="familiar", batch_size=128)], [1, 0, 0, 0], "popqa.familiar")
    row = tables(tmp_path).partition("The base model itself")[2].partition("\n")[0].split(" | ")
    assert row.count("75.0") == 2
    shutil.rmtree(tmp_path / "a")
    keep(base_model_sha256="another")
    assert "The base model itself" not in tables(tmp_path)
    keep(data_sha256="others")
    with pytest.raises(DataError, match="one: was asked other facts of popqa.familiar"):
        tables(tmp_path)


LOW, HIGH, TOP = (20, 21, 19), (49, 50, 54), (99, 100, 100)  # left of D_A in three seeds
# HIGH less LOW: 29, 29, 35: mean 31, deviation 3.46, so 8.6 either way: [22.4, 39.6]; HIGH less 3 x LOW: about -9.
OTHERS = ["popqa", "triviaqa"]
SINGLE = ["random/-", "k-pile/-", "-/random", "-/k-pile"]
EARLY, LATE = [0, 4, 2, 0, 0], [0, 0, 2, 4, 0]  # first occurrences in each of four layers and before them: mean 33 and 67% of the depth
FEW, MANY = [0, 0, 0, 0, 6], [0, 2, 2, 2, 2]  # occurrences: in one layer or in four
RATIO = "{}.mix_ratio={}"
STAGE_1 = ("after stage 1",)  # key of what was known then, else 100%


def rows(high, low, group="all"):
    """Rows that keep much and rows that keep little, after every D_B or those of a group."""
    return {(row, group): left for many, left in ((high, HIGH), (low, LOW)) for row in many}


def turned(cells):
    """The same with what keeps much and what keeps little changed."""
    change = {HIGH: LOW, LOW: HIGH}
    return {key: change.get(left, left) for key, left in cells.items()}


def both_ways(high, low, group="all"):
    return rows(high, low, group), turned(rows(high, low, group))


def both_gain():
    """No mixing keeps little everywhere, K-Pile at stage 2 much after factoid D_B alone, or after the others alone."""
    grids = []
    for high, low in (("factoid", "other"), ("other", "factoid")):
        grids.append({("none", "all"): LOW, ("-/k-pile", high): HIGH, ("-/k-pile", low): LOW})
    return grids


AFTER_FACTOID = {("none", "factoid"): LOW, ("none", "other"): HIGH}
AFTER_LAMA = {("none", "lama"): LOW, ("none", "other"): HIGH}
REPLAY = {("replay0.1", "factoid"): LOW, ("replay0.1", "other"): HIGH}
SHORT = {("random.mix_words=10/-", "factoid"): HIGH, ("random/-", "factoid"): HIGH, ("random.mix_words=200/-", "factoid"): LOW}
STEEP = {(f"-/{RATIO.format(mix, ratio)}", "all"): left for mix in ("random", "k-pile") for ratio, left in ((1, HIGH), (8, LOW))}
FLAT = {(f"{RATIO.format(mix, ratio)}/-", "all"): HIGH for mix in ("random", "k-pile") for ratio in (1, 8)}
TWO = {("none", "webqa/entityqa"): LOW, ("none", "webqa/math"): HIGH, ("none", "ultrachat/entityqa"): HIGH}
CHAINS = ["webqa/entityqa", "ultrachat/math"]
MISTRAL = {("kvr", "none", "all"): LOW, ("popqa", "none", "all"): HIGH, ("triviaqa", "none", "all"): HIGH}
GAINS = {("kvr", "none", "all"): LOW, ("kvr", "random/k-pile", "all"): HIGH} | {(a, row, "all"): LOW for a in OTHERS for row in ("none", "random/k-pile")}
# Of each claim: its sentence's beginning, what is left of D_A in a grid on which it holds, and in one on which it is reversed.
ON_GRIDS = [
    ("without a mix every D_B", rows(["none"], []), rows(["none"], []) | {STAGE_1: 30.0}),
    ("factoid D_B make more be forgotten", AFTER_FACTOID, turned(AFTER_FACTOID)),
    ("after LAMA far less is left", AFTER_LAMA, turned(AFTER_LAMA)),
    ("GSM8K, though not factoid", {("none", "gsm8k"): HIGH}, {("none", "gsm8k"): TOP}),
    ("replay reduces forgetting across", *both_ways(["replay0.01", "replay0.05", "replay0.1"], ["none"])),
    ("replay does so the more", rows(["replay0.05"], ["replay0.01"]) | {("replay0.1", "all"): (79, 80, 84)}, turned(rows(["replay0.05", "replay0.1"], ["replay0.01"]))),
    ("replay of 0.1 is less successful", REPLAY, turned(REPLAY)),
    ("replay of 0.1 does not fully", {("replay0.1", "factoid"): HIGH}, {("replay0.1", "factoid"): TOP}),
    ("replay of 0.1 keeps more of KVR", *both_ways(["replay0.1"], ["none"], "other")),
    ("random words at stage 1 prevent", *both_ways(["random/-"], ["none"], "factoid")),
    ("they do so across the board", rows(["random/-"], ["none"], "factoid"), rows(["random/-"], ["none"], "factoid") | {("none", "webqa"): (79, 80, 84)}),
    ("K-Pile at stage 1 hurts", *both_ways(["none"], ["k-pile/-"], "factoid")),
    ("K-Pile at stage 2 is drastically", *both_ways(["-/k-pile"], ["none"], "factoid")),
    ("random words at stage 2 exacerbate", *both_ways(["none"], ["-/random"], "factoid")),
    ("with factoid D_B random words are the better", *both_ways(["random/-", "-/k-pile"], ["k-pile/-", "-/random"], "factoid")),
    ("K-Pile at stage 2 helps most", *both_gain()),
    ("a mix at stage 1 is better", *both_ways(SINGLE[:2], SINGLE[2:], "other")),
    ("with non-factoid D_B, KVR", *both_ways(["random/-"], ["none", *SINGLE[1:]], "other")),
    ("with non-factoid D_B, PopQA", *both_ways(["k-pile/-"], ["none", "random/-", *SINGLE[2:]], "other")),
    ("random words at stage 1 with K-Pile", *both_ways(["random/k-pile"], ["random/-", "-/k-pile"])),
    ("REMIX (both) helps consistently", *both_ways(["random/k-pile"], ["none"])),
    ("REMIX makes it as much as three", {("random/k-pile", "factoid"): (79, 80, 84), ("none", "factoid"): LOW}, rows(["random/k-pile", "none"], [], "factoid")),
    ("REMIX keeps more of KVR with factoid", *both_ways(["random/k-pile"], ["replay0.1"], "factoid")),
    ("REMIX often outperforms", rows(["random/k-pile"], ["replay0.1"]) | {("replay0.1", "lama"): (79, 80, 84)}, turned(rows(["random/k-pile"], ["replay0.1"]))),
    ("REMIX outperforms replay", *both_ways(["random/k-pile"], ["replay0.1"])),
    ("Mistral: REMIX prevents", *both_ways(["random/k-pile"], ["none"])),
    ("Mistral: without a mix", MISTRAL, turned(MISTRAL)),
    ("Mistral: REMIX gains less", GAINS, {(a, row, b): HIGH if a != "kvr" and row != "none" else LOW for a, row, b in GAINS}),
    ("with REMIX facts are first read", {("none", "lama"): (LATE, MANY), ("random/k-pile", "lama"): (EARLY, MANY)},
     {("none", "lama"): (EARLY, MANY), ("random/k-pile", "lama"): (LATE, MANY)}),
    ("K-Pile at stage 1 does not change", {("none", "lama"): (LATE, MANY), ("k-pile/-", "lama"): (LATE, MANY)},
     {("none", "lama"): (LATE, MANY), ("k-pile/-", "lama"): (EARLY, MANY)}),
    ("with REMIX facts are read in more", {("none", "lama"): (LATE, FEW), ("random/k-pile", "lama"): (LATE, MANY)},
     {("none", "lama"): (LATE, MANY), ("random/k-pile", "lama"): (LATE, FEW)}),
    ("it makes no difference which generic", rows([f"{first}/{text}" for first in ("-", "random") for text in ("k-pile", "a-pile", "fineweb")], [], "factoid"),
     rows(["-/a-pile", "-/fineweb", "random/a-pile", "random/fineweb"], ["-/k-pile", "random/k-pile"], "factoid")),
    ("longer random words at stage 1 hurt", SHORT, turned(SHORT)),
    ("K-Pile at stage 2 saturates", rows(["-/k-pile", "-/k-pile.mix_words=100", "-/k-pile.mix_words=200"], [], "factoid"),
     rows(["-/k-pile.mix_words=100", "-/k-pile.mix_words=200"], ["-/k-pile"], "factoid")),
    ("at stage 2 a greater ratio costs", STEEP, turned(STEEP)),
    ("at stage 1 a greater ratio costs less", FLAT | STEEP, FLAT | turned(STEEP)),
    ("REMIX leads by at least 30", {("none", b): LOW for b in CHAINS} | {("random/k-pile", b): (79, 80, 84) for b in CHAINS},
     {(row, b): HIGH for b in CHAINS for row in ("none", "random/k-pile")}),
    ("without a mix least is left", TWO, turned(TWO)),
    ("K-Pile, A-Pile and FineWeb each", *both_ways(["k-pile", "a-pile", "fineweb"], ["none"], "factoid")),
]  # fmt: skip


def test_unlike_columns(tmp_path):
    """Two D_A are compared after the D_B that both were followed by: what one alone was followed by tells nothing."""
    (claim,) = [claim for claim in CLAIMS if claim.says.startswith("Mistral: without a mix")]
    cells = {("kvr", "none", "lama"): LOW} | {(a, "none", b): LOW if b == "lama" else HIGH for a in OTHERS for b in ("lama", "webqa", "kvr-id")}
    found = judged_on(claim, cells, tmp_path).found
    assert [(one.comparison.columns, one.differences, one.part) for one in found] == [(["lama"], [0.0] * 3, "1 of 3")] * 2, "kvr-id is none of KVR's"


def test_sides_that_are_not_alike(tmp_path, monkeypatch):
    """A claim says in which settings its sides differ beside the mix; runs that were not probed are left out of the lens's claims."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: [])
    for seed in range(3):
        put_cell(tmp_path, "none", "lama", {seed: [1, 0, 0, 0]})
        put_cell(tmp_path, "random/k-pile", "lama", {seed: [1, 1, 1, 0]}, lr=1e-6)
        for row, counts in (("none", (LATE, MANY)), ("random_k-pile", (EARLY, MANY))):
            if seed:
                put_probe(tmp_path / f"{row}-lama-{seed}", "kvr", *counts)
    text = tables(tmp_path)
    assert "| Random / K-Pile over No Mixing | LAMA | 3 | 75.0 | 25.0 | +50.0 | HOLDS [+50.0, +50.0] (not alike in lr) | +60.3 |" in text
    assert "after every factoid and non-factoid D_B | UNDECIDED (not alike in lr) | 1 HOLDS, 26 NOT RUN | 25 of 27 fit;" in text
    assert "| Key-Value Recall | No Mixing over Random / K-Pile | LAMA | 2 | 66.7 | 33.3 | +33.3 | UNDECIDED (fewer than 3 seeds) (not alike in lr) |" in text


def put_probe(folder, a, first_hits, hits):
    folder.mkdir(exist_ok=True)
    counts = {"hits": hits, "first_hits": first_hits, "frequency": [count / 10 for count in hits], "first_share": [count / sum(hits) for count in first_hits]}
    (folder / f"probe.{a}.json").write_text(json.dumps({"layers": 4, "top_k": 10, "total": 10, "accuracy": 50.0, **counts, "floor": {"shuffled": counts}}))


def in_three_seeds(place, table, a, row, b, left, known):
    """The runs behind a cell in three seeds, with those after stage 1, which knew so many % of D_A."""
    stages, asked = behind(table, a, row, b)
    runs = []
    for seed in range(3):
        lineage = []
        for stage in stages:
            settings = {"mix": stage.mix, "replay": stage.replay, "tag": stage.tag, **({stage.tag: stage.varied[0]} if stage.varied else {})}
            lineage.append(entry(stage.data, 100, seed, **settings))
        score = lambda accuracy: {asked: {"accuracy": accuracy, "correct": 1, "total": 100, "of": 100, "precision": "fp32", "data": asked, "data_sha256": f"{asked} 100"}}
        is_lens = isinstance(left[0], list)
        folder, accuracy = (place / f"{len(list(place.iterdir()))}", 50) if is_lens else (place, left[seed])
        if is_lens:
            put_probe(folder, a, *left)
        runs.append(Run(folder, lineage, score(accuracy), {}))
        if len(stages) > 1:
            runs.append(Run(place, lineage[:1], score(known), {}))
    return runs


def judged_on(claim, cells, place):
    """The Judged of a claim on a grid that is given as what is left of D_A: {([D_A,] row, D_B or group): left in three seeds}."""
    paper, table, runs = paper_layout(), claim.table, {}
    groups = {"factoid": ["id", *paper.factoid], "other": paper.other, "all": ["id", *paper.factoid, *paper.other]}
    known = cells.get(STAGE_1, 100.0)
    for (*of, row, group), left in ((key, left) for key, left in cells.items() if key != STAGE_1):
        for a in of or paper.firsts(table):
            for b in groups.get(group, [group]):
                of_table = "table4" if row.startswith("replay") else table
                if is_column(a, b) and not (b == "id" and of_table in ("table4", "table5")):
                    for run in in_three_seeds(place, of_table, a, row, b, left, known):
                        runs.setdefault(json.dumps(run.lineage), run).scores.update(run.scores)
    by_cell = {}
    for run in linked(list(runs.values())):
        by_cell.setdefault(run.stages, {})[run.seeds] = run
    grid = Grid("Mistral-7B-v0.3" if table == "table3" else "Meta-Llama-3-8B", by_cell)
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(evaluate, "CLAIMS", [claim])
        (found,) = judge(grid, layout_of(grid))
    return found


@pytest.mark.parametrize("number", range(1, len(ON_GRIDS) + 1), ids=lambda number: ON_GRIDS[number - 1][0])
def test_claims(number, tmp_path):
    """Each claim of the paper has a grid by hand on which it holds, and one on which it is reversed; on an empty one it is not run."""
    begins, holds, is_reversed = ON_GRIDS[number - 1]
    claim = CLAIMS[number - 1]
    assert claim.says.startswith(begins) and len(CLAIMS) == len(ON_GRIDS)
    for cells, word in ((holds, HOLDS), (is_reversed, REVERSED), ({}, NOT_RUN)):
        found = judged_on(claim, cells, tmp_path)
        assert found.word == word, [(one.comparison.a, one.comparison.says, one.comparison.columns, one.verdict.text()) for one in found.found]
        assert (len(found.found) == found.n > 0) == bool(cells)


def test_plan(work, python, whole):
    """The plan names every cell: table 2's 3 x 9 x 6 of each seed besides its stage 1 runs and controls. Of one seed, or all three."""
    seeds, options = (3, []) if whole else (1, ["--seeds", "2"])
    command = ["bash", ROOT / "run_all.sh", "--dry-run", *options]
    lines = subprocess.run(command, cwd=work, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=True).stdout
    counts = {line.split()[0]: int(line.split()[1]) for line in lines.split("\n") if line.startswith(("table", "figure", "ladder", "dose"))}
    # Our rows: four more first stages, and behind them or with a mix of weight 0 at stage 2 six rows of cells.
    stage_1, ours = 3 * 3 * seeds, 3 * seeds * (4 + 6 * 9)
    assert counts["table1"] == 3 * 9 * seeds + 3 * seeds and counts["table2"] == 3 * 9 * 6 * seeds + stage_1 + ours
    assert counts["dose"] == seeds * 2 * 5 * (1 + 2)  # of KVR, without and with mix, five doses, ID and LAMA behind each
    assert counts["table4"] == 3 * 8 * 4 * seeds + 3 * seeds  # without ID, with stage 1, which table 1 shares
    assert counts["table5"] == counts["table6"] == 5 * 8 * seeds and set(counts) == {f"table{i}" for i in range(1, 7)} | {f"figure{i}" for i in (2, *range(4, 13))} | {"ladder", "dose"}


def test_lens_statistics():
    """Shares, mean layer and entropy by hand; of a lens that found nothing no mean layer and no entropy."""
    counts, nothing = {"hits": [0, 1, 3, 4], "first_hits": [0, 1, 2, 1]}, {"hits": [0, 0], "first_hits": [0, 0]}
    assert evaluate.first_share(counts) == [0, 1 / 8, 2 / 8, 1 / 8] and evaluate.first_share(nothing) == [0, 0]
    assert evaluate.mean_first_layer(counts, 3) == pytest.approx(100 * 2 / 3)  # (1 + 2 + 2 + 3) / 4 = 2 of 3 layers
    assert evaluate.layer_entropy(counts) == pytest.approx(1 / 8 * math.log(8) + 3 / 8 * math.log(8 / 3) + 1 / 2 * math.log(2))
    assert evaluate.layer_entropy({"hits": [5, 5, 5]}) == pytest.approx(math.log(3)) and evaluate.layer_entropy({"hits": [0, 7]}) == 0
    assert evaluate.mean_first_layer(nothing, 1) is None and evaluate.layer_entropy(nothing) is None


def put_lens(folder, found, right, **changes):
    """What probe.py of an earlier version leaves of kvr, two layers and ten tokens, in a run's folder."""
    counts = {"hits": found, "first_hits": [found[0], 0, 1], "frequency": [n / 10 for n in found], "first_share": [9, 9, 9]}
    floor = {"shuffled": {"frequency": [0.1, 0.1, 0.1]}, "base_model": counts | {"accuracy": 0.0}}
    (folder / "probe.kvr.json").write_text(json.dumps({"layers": 2, "top_k": 10, "total": 10, "accuracy": right, "floor": floor} | counts | changes))


def values(curve):
    return [(round(x, 3), round(mean.value, 5)) for x, mean in curve.points]


def test_lens_figures(tmp_path, monkeypatch):
    """Figure 4 has the means over seeds of the paper's three rows, from counts; figure 11 a line a seed of all that was probed."""
    drawn = {}
    monkeypatch.setattr(evaluate, "draw_panels", lambda panels, path, *_, **__: drawn.update({path.name.partition("-")[0]: panels}))
    for row, b in (("k-pile/-", "lama"), ("none", "lama"), ("random/k-pile", "webqa"), ("-/random", "webqa")):
        put_cell(tmp_path, row, b, {0: [1, 0], 1: [1, 1]})
    put_lens(tmp_path / "-_random-webqa-1", [0, 0, 5], 100)
    of_folder = lambda: evaluate.lens_figures(evaluate.grids_of(evaluate.read_runs(tmp_path), {})[0], tmp_path)
    assert of_folder() == ["figure4-Meta-Llama-3-8B.png", "figure11-Meta-Llama-3-8B.png"]
    assert [curve.label for curve in drawn["figure4"][0].curves] == ["- / random, after webqa (100.0%)", "", "base model (0.0%)"]
    for row in ("k-pile_--lama", "none-lama", "random_k-pile-webqa"):
        put_lens(tmp_path / f"{row}-0", [1, 2, 5], 50)
        put_lens(tmp_path / f"{row}-1", [0, 4, 6], 100)
    of_folder()
    frequency, first = drawn["figure4"]
    labels = [curve.label.partition(" (")[0] for curve in frequency.curves if curve.label]
    assert labels == ["No Mixing, after lama", "random / k-pile, after webqa", "k-pile / -, after lama", "base model"]
    assert frequency.curves[0].label.endswith("(75.0 ± 35.4%, 2 seeds)") and values(frequency.curves[0]) == [(0, 0.05), (1, 0.3), (2, 0.55)]
    assert values(first.curves[0]) == [(0, 0.0625), (1, 0), (2, 0.1125)]  # of 1/8, 0, 1/8 and 0, 0, 1/10
    assert [panel.title for panel in drawn["figure11"]] == [
        "k-pile / -, after lama", "No Mixing, after lama", "- / random, after webqa", "random / k-pile, after webqa"]  # fmt: skip
    seeds = drawn["figure11"][1]
    assert [curve.label for curve in seeds.curves] == ["seed 0 (50.0%)", "", "seed 1 (100.0%)", "", "base model (0.0%)"]
    assert [curve.style for curve in seeds.curves] == ["-", ":", "-", ":", "--"] and values(seeds.curves[2]) == [(0, 0), (1, 0.4), (2, 0.6)]

    last = {"hits": [1, 2, 5], "first_hits": [1, 0, 1], "frequency": [0.1, 0.2, 0.5], "accuracy": 50}
    shuffled = {"frequency": [0, 0, 0]}
    for wrong in ({"hits": [1, 2]}, {"first_hits": [1, 0, 1, 0]}, {"hits": [1, 2, None]}, {"frequency": [0, 0, float("nan")]}, {"layers": 3}, {"layers": -1}, {"accuracy": -1},
                  {"floor": {"shuffled": {"frequency": [0]}}}, {"floor": {"shuffled": shuffled, "base_model": last | {"hits": [1, 2, 5, 6]}}},
                  {"layers": 1, "hits": [1, 2], "first_hits": [1, 0], "frequency": [0, 0], "floor": {"shuffled": {"frequency": [0, 0]}}}):  # fmt: skip
        put_lens(tmp_path / "none-lama-1", [1, 2, 5], 50, **wrong)
        with pytest.raises(DataError, match=r"none-lama-1/probe.kvr.json: .*; run probe.py again") as error:
            of_folder()
        assert "\n" not in str(error.value), wrong
    assert evaluate.lens_of(evaluate.read_run(tmp_path / "none-lama-0"), "kvr")["hits"] == [1, 2, 5]
    assert evaluate.lens_of(evaluate.read_run(tmp_path / "none-lama-0"), "popqa") is None


def test_replay_and_ratio_panels(tmp_path):
    """Figure 2 is a mean over the D_B that every ratio has; figure 7 has stage 2 left of stage 1, and no row of which nothing was run."""
    put_cell(tmp_path, "none", "lama", {0: [0, 0], 1: [1, 0]})
    put_cell(tmp_path, "none", "gsm8k", {0: [1, 1], 1: [1, 1]})
    put_cell(tmp_path, "none", "math", {0: [0, 0]})
    for b in ("lama", "gsm8k"):
        put_cell(tmp_path, "replay0.1", b, {0: [1, 1], 1: [1, 1]})
    put_cell(tmp_path, "-/random", "lama", {0: [1, 0]})
    put_cell(tmp_path, "random/-", "lama", {0: [1, 1]})
    put(tmp_path / "half", [entry("kvr", 2, 0), entry("lama", 2, 0, mix="random", mix_ratio=0.5, tag="mix_ratio")], [0, 1])
    (grid,) = evaluate.grids_of(evaluate.read_runs(tmp_path), {})
    (curve,) = evaluate.replayed(grid, ["kvr"], ["lama", "gsm8k", "math"]).curves
    assert values(curve) == [(0, 62.5), (0.1, 100)] and curve.points[0][1].deviation == pytest.approx(17.678, abs=1e-3)
    panels = evaluate.by_ratio(grid, "kvr", {"factoid D_B": ["lama", "webqa"], "non-factoid D_B": ["gsm8k"]})
    assert [panel.title for panel in panels] == [f"{mix}, stage {stage}: factoid D_B" for stage in (2, 1) for mix in ("Random", "K-Pile")]
    assert [[(curve.label, values(curve)) for curve in panel.drawn] for panel in panels] == [
        [("LAMA", [(0, 25), (0.5, 50), (2, 50)])], [], [("LAMA", [(0, 25), (2, 100)])], []]  # fmt: skip
