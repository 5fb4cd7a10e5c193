"""evaluate.py --tables against hand-worked values, and run_all.sh's plan."""

import json
import os
import subprocess
import sys

from conftest import ROOT, run

from evaluate import bootstrap, misprinted, paper_figures, tables


def put(folder, histories, asked="kvr"):
    """Finished runs without weights: {history: {seed: right answers, a 0 or 1 for each fact of the set asked}}."""
    for history, seeds in histories.items():
        for seed, right in seeds.items():
            run_ = folder / "Meta-Llama-3-8B"
            lineage = []
            for stage, label in enumerate(history.split("/"), 1):
                run_ = run_ / f"{label}-s{seed}"
                data, _, mix = label.removesuffix("+familiar").partition("+")
                entry = {"stage": stage, "data": data.removesuffix("-long"), "num_examples": len(right), "mix": "none" if "replay" in mix else mix or "none"}
                lineage.append(entry | {"mix_words": 50, "mix_ratio": 2.0, "steps": 4, "seed": seed, "data_sha256": "", "base_model": "models/Meta-Llama-3-8B"})
            run_.mkdir(parents=True)
            (run_ / "run.json").write_text(json.dumps(lineage))
            (run_ / "metrics.jsonl").write_text('{"step": 2, "data": "kvr", "accuracy": 50.0}\n')
            (run_ / "eval.json").write_text(json.dumps({asked: {"accuracy": 100 * sum(right) / len(right), "correct": sum(right), "total": len(right)}}))
            (run_ / f"predictions.{asked}.jsonl").write_text("".join(json.dumps({"id": f"{asked}-{i}", "correct": bool(r)}) + "\n" for i, r in enumerate(right)))


def test_paper_figures():
    """Every cell is there, and two printed averages are not the mean of their cells."""
    cells, averages = paper_figures()
    assert len(cells) == 3 * 9 * 7 + 3 * 2 * 8 + 3 * 4 * 8 + 2 * 2 * 5 * 8 and len(averages) == 48
    assert cells["table2", "triviaqa", "-/k-pile", "gsm8k"] == 2.8 and cells["table1", "kvr", "none", "id"] == 0.5
    assert [(w[:4], w[4], round(w[5], 2)) for w in misprinted()] == [
        (("table2", "popqa", "random/-", "non-factoid"), 72.2, 74.24), (("table3", "kvr", "random/k-pile", "non-factoid"), 57.0, 57.58)]  # fmt: skip


def test_cells_and_claims(tmp_path):
    """Cells, averages, underlines, verdicts and the ledger equal values worked by hand, from runs without weights."""
    factoid = ["kvr-id", "lama", "entityqa", "webqa"]
    right = {"kvr-id": [0, 0, 0, 0], "lama": [1, 0, 0, 0], "entityqa": [1, 1, 0, 0], "webqa": [1, 1, 1, 0]}
    put(tmp_path, {"kvr": {0: [1, 1, 1, 1]}} | {f"kvr/{b}": {0: right[b], 1: right[b]} for b in factoid})
    put(tmp_path, {f"kvr+random/{b}": {0: [1, 1, 1, 1], 1: [1, 1, 1, 1]} for b in factoid} | {"kvr+k-pile/lama": {0: [1, 1, 1, 1]}})
    put(tmp_path, {"kvr-long/lama": {0: [1, 1, 1, 1], 1: [1, 1, 1, 1]}})
    text = tables(tmp_path)
    assert "| Key-Value Recall | <u>0.0 ± 0.0</u> <sub>0.5</sub> | 25.0 ± 0.0 <sub>2.1</sub> | 50.0 ± 0.0 <sub>17.4</sub> | 75.0 ± 0.0 <sub>33.8</sub> | 37.5 ± 0.0" in text
    assert "| K-Pile / - | <sub>0.1</sub> | 100.0 <sub>0.0</sub> |" in text
    assert "| No Mixing, steps of Random / - at stage 1 *(not in the paper)* |  | 100.0 ± 0.0 |" in text
    claim = next(line for line in text.split("\n") if "random at stage 1 helps" in line)
    assert "| NOT RUN | Key-Value Recall | 100.0 | 37.5 | +62.5 [" in claim and claim.endswith("+15.4 |")  # PopQA and TriviaQA were not run
    assert "| k-pile beats" in text and "random/- beats its step-matched control (not in the paper) | FAIL | Key-Value Recall | 100.0 | 100.0 | +0.0 [+0.0, +0.0]" in text
    k_pile = next(line for line in text.split("\n") if "k-pile at stage 1 hurts" in line)
    assert "FAIL" in k_pile and "-75.0" in k_pile
    rows = [json.loads(line) for line in open(tmp_path / "facts.jsonl")]
    lama = [(row["memorized"], row["lost"]) for row in rows if row["run"].endswith("Meta-Llama-3-8B/kvr-s0/lama-s0")]
    assert lama == [(1, None), (1, 2), (1, 2), (1, 2)]
    for name in ["figure2", *[f"figure{i}" for i in range(5, 11)], "forgetting"]:
        assert (tmp_path / f"{name}-Meta-Llama-3-8B.png").stat().st_size > 1000

    put(tmp_path, {"lama+familiar": {0: [0, 0, 0, 1]}, "lama+fineweb+familiar": {0: [1, 1, 1, 1]}}, asked="popqa.familiar")
    put(tmp_path, {"kvr/webqa/math": {0: [0, 0, 0, 1]}, "kvr/webqa/entityqa": {0: [0, 0, 0, 0]}, "kvr+random/webqa+k-pile/math": {0: [1, 1, 1, 1]}})
    text = tables(tmp_path)
    assert "| No Mixing | 25.0 <sub>27.3</sub> | <sub>24.4</sub> |" in text and "| FineWeb | 100.0 <sub>54.9</sub> |" in text  # of table 5
    claim = next(line for line in text.split("\n") if "keep familiar facts" in line)
    assert "| NOT RUN | PopQA | 100.0 | 25.0 | +75.0 [" in claim and claim.endswith("lama; 1 | +24.6 |")  # TriviaQA's were not asked
    assert "| random/k-pile keeps more over three stages | PASS | Key-Value Recall | 100.0 | 25.0 | +75.0 [" in text
    assert "| two factoid stages after the first forget most | FAIL | Key-Value Recall | 25.0 | 0.0 | +25.0 [+0.0, " in text

    (tmp_path / "Meta-Llama-3-8B/kvr-s0/lama-s0").rename(tmp_path / "Meta-Llama-3-8B/kvr-s0/webqa+random-s0")
    with_other_name = run(tmp_path, "evaluate.py", "--tables", tmp_path, ok=False)
    assert with_other_name.returncode == 2 and "webqa+random-s0" in with_other_name.stderr


def test_bootstrap():
    """A difference that is the same for every fact has no width; facts that cancel have an interval around 0; pairing is kept."""
    assert bootstrap([[1, 1, 1], [1, 1, 1]]) == (1, 1)
    low, high = bootstrap([[1, -1] * 200])
    assert -0.12 < low < -0.07 and 0.07 < high < 0.12  # 1.96 / sqrt(400) = 0.098


def test_plan(work):
    """The plan names every cell: table 2's 3 x 9 x 6 x 3 besides its stage 1 runs and controls."""
    lines = subprocess.run(["bash", ROOT / "run_all.sh", "--dry-run"], cwd=work, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=True).stdout
    counts = {line.split()[0]: int(line.split()[1]) for line in lines.split("\n") if line.startswith(("table", "figure"))}
    stage_1, controls = 3 * 3 * 3, 3 * 3 * (1 + 2 * 9)
    assert counts["table1"] == 3 * 9 * 3 + 3 * 3 and counts["table2"] == 3 * 9 * 6 * 3 + stage_1 + controls
    assert counts["table4"] == 3 * 8 * 4 * 3 + 3 * 3 + 3 * 3  # with ID and stage 1, which table 1 shares
    assert counts["table5"] == counts["table6"] == 5 * 8 * 3 and set(counts) == {f"table{i}" for i in range(1, 7)} | {f"figure{i}" for i in (2, *range(4, 13))}
