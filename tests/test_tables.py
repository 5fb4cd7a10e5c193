"""evaluate.py --tables against hand-worked values, from records alone, and run_all.sh's plan."""

import json
import os
import random
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, run

import evaluate
from data import DataError
from evaluate import bootstrap, chain, doses, first_loss, is_near, lost_facts, misprinted, paper_figures, passes, t_interval, t_quantile, tables

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
    assert [(w[:4], w[4], round(w[5], 2)) for w in misprinted()] == [
        (("table2", "popqa", "random/-", "non-factoid"), 72.2, 74.24), (("table3", "kvr", "random/k-pile", "non-factoid"), 57.0, 57.58)]  # fmt: skip


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
    claim = next(line for line in text.split("\n") if "random at stage 1 helps" in line)
    assert "| NOT RUN | Key-Value Recall | 100.0 | 37.5 | +62.5 [" in claim and claim.endswith("+15.4 |")  # PopQA and TriviaQA were not run
    assert "| k-pile beats" in text
    k_pile = next(line for line in text.split("\n") if "k-pile at stage 1 hurts" in line)
    assert "FAIL" in k_pile and "-75.0" in k_pile
    rows = [json.loads(line) for line in open(grid / "facts.jsonl")]
    lama = [(row["memorized"], row["lost"]) for row in rows if row["run"] == "none-lama-0"]
    assert lama == [(1, None), (1, 2), (1, 2), (1, 2)]
    for name in ["figure2", *[f"figure{i}" for i in range(5, 11)], "forgetting"]:
        assert (grid / f"{name}-Meta-Llama-3-8B.png").stat().st_size > 1000

    for mix, right in (("none", [0, 0, 0, 1]), ("fineweb", [1, 1, 1, 1])):
        put(grid / f"familiar-{mix}", [entry("lama", 4, 0, mix=mix, tag="familiar", batch_size=128)], right, asked="popqa.familiar")
    put_cell(grid, "none", "webqa/math", {0: [0, 0, 0, 1]})
    put_cell(grid, "none", "webqa/entityqa", {0: [0, 0, 0, 0]})
    put_cell(grid, "random/k-pile", "webqa/math", {0: [1, 1, 1, 1]})
    text = tables(grid)
    assert "| No Mixing | 25.0 <sub>27.3</sub> | <sub>24.4</sub> |" in text and "| FineWeb | 100.0 <sub>54.9</sub> |" in text  # of table 5
    claim = next(line for line in text.split("\n") if "keep familiar facts" in line)
    assert "| NOT RUN | PopQA | 100.0 | 25.0 | +75.0 [" in claim and claim.endswith("lama; 1 | +24.6 |")  # TriviaQA's were not asked
    assert "| random/k-pile keeps more over three stages | PASS | Key-Value Recall | 100.0 | 25.0 | +75.0 [" in text
    assert "| two factoid stages after the first forget most | FAIL | Key-Value Recall | 25.0 | 0.0 | +25.0 [+0.0, " in text


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
    with pytest.raises(DataError, match="-_k-pile-lama-0 and .*none-.*: runs of one claim, but other facts of kvr"):
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
    assert "| No Mixing (- / lr 0.0001) | 4 + 4 | - / - | 100.0 | 25.0 |" in text and "| No Mixing (- / lr 0.001) |" in text
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
    assert "| LAMA | - / K-Pile | - / K-Pile of weight 0 (seed 0: 4 + 3 steps, not 4 + 4) | 4 | +18.8 | open [-49.2, +86.7] | open [-31.5, +69.0] |" in verdicts
    assert "| WebQA | Random / - | Random of weight 0 / - | 2 | +25.0 | yes [+25.0, +25.0] | no [+25.0, +25.0] |" in verdicts
    assert "| WebQA | Random / - | Random of equal weight / - | 1 | +0.0 | one seed | one seed |" in verdicts
    assert "| LAMA | Random / - | No Mixing, steps of Random / - | 2 | +0.0 | open [+0.0, +0.0] | yes [+0.0, +0.0] |" in verdicts
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
    cells_of = lambda line: re.sub(r" \((D_B|seed)[^)]*\)", "", line).removeprefix("| ").removesuffix(" |").split(" | ")
    for label, steps, *cells in rows:
        expected = []
        for a, columns in (("Key-Value Recall", (1, 3, 5, 6)), ("EntityQA", (2, 3, 5, 6))):  # ID or kvr-id, bios, the text twice
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
    assert t_interval([1, 2, 3], 0.95) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3) and t_interval([1], 0.95) is None


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


def test_dose(tmp_path):
    """Passes and loss of stage 1 are those of the records: also of a run that its loss stopped, or that took another's steps."""
    for tag, epochs, steps, n_mix in (("", 16, 48, 0), ("epochs", 32, 60, 0), ("long", 48, 144, 0), ("epochs", 48, 144, 0), ("", 16, 144, 96), ("epochs", 24, 216, 96)):
        first = entry("kvr", 48, 0, tag=tag, epochs=epochs, steps=steps, batch_size=16, num_mix=n_mix, mix="random" if n_mix else "none", losses={"own": 0.5 / steps})
        put(tmp_path / f"{tag}{epochs}{n_mix}", [first, entry("lama", 48, 0)], [1] * epochs + [0] * (48 - epochs))
    grids = evaluate.grids_of(evaluate.read_runs(tmp_path), {})
    found = {curve: sorted(passes(next(iter(cell.values())).lineage[0]) for cell in cells) for curve, cells in doses(grids[0], "kvr").items()}
    assert found == {("lama", "none"): [16, 20, 48, 48], ("lama", "random"): [16, 24]}
    for measure, xs in ((passes, [16, 20, 48, 48]), (first_loss, [0.5 / 144, 0.5 / 144, 0.5 / 60, 0.5 / 48])):
        _, ((axes,),) = evaluate.picture()
        evaluate.dose(grids[0], "kvr", measure)(axes)
        without_mix = axes.containers[0]
        assert without_mix.get_label() == "No Mixing, then LAMA" and list(without_mix[0].get_xdata()) == pytest.approx(xs)


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


def test_bootstrap():
    """A difference that is the same for every fact has no width; facts that cancel have an interval around 0; pairing is kept."""
    assert bootstrap([[1, 1, 1], [1, 1, 1]]) == (1, 1)
    low, high = bootstrap([[1, -1] * 200])
    assert -0.12 < low < -0.07 and 0.07 < high < 0.12  # 1.96 / sqrt(400) = 0.098


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
