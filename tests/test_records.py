"""A run is what its record says: every command on real runs of a tiny model, none of which trusts a name."""

import json
import random
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, run, tiny_llama

from data import PASSAGE, load_tokenizer
from evaluate import BaseModel, base_of, named_sets, read_lineage, set_names, split_file
from model import content_id, load_model, model_name

ONE = ["train.py", "--stage", 1, "--model", "models/tiny", "--batch-size", 4, "--lr", 3e-3, "--precision", "fp32"]
TWO = ["train.py", "--stage", 2, "--batch-size", 4, "--lr", 3e-3, "--epochs", 6, "--eval-every", 3, "--mix-words", 3]


def read(path):
    return json.loads(path.read_text())


def facts(path, n, answer):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"{i}", "prompt": f"{path.parent.name} {i}?", "response": f"{answer}{i}"}) + "\n" for i in range(n)))
    return path


@pytest.fixture(scope="module")
def runs(work):
    """Stage 1 on a/facts.jsonl, known by heart; below it runs on b/facts.jsonl, and on bios in several ways; all evaluated."""
    for name, answer in (("a", "red"), ("b", "blue")):
        facts(work / name / "facts.jsonl", 6, answer)
    run(work, *ONE, "--data", "a/facts.jsonl", "--num-examples", 6, "--epochs", 120, "--out", "runs/one")
    bios = ["--data", "bios", "--num-examples", 4]
    stages = {"two": ["--data", "b/facts.jsonl", "--num-examples", 6, "--epochs", 60], "plain": bios, "replayed": [*bios, "--replay", 0.5],
              "mixed": [*bios, "--mix", "random", "--mix-ratio", 1], "twice": [*bios, "--mix", "random", "--mix-ratio", 2, "--tag", "mix_ratio"]}  # fmt: skip
    for name, options in stages.items():
        run(work, *TWO, *options, "--model", "runs/one", "--out", f"runs/one/{name}")
    for name in ("", *stages):
        run(work, "evaluate.py", f"runs/one/{name}")
    return work / "runs"


def test_record(runs):
    """run.json holds settings, outcome, what it was done with and hashes; its paths are relative to where it lies."""
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    one, mixed = read(runs / "one/mixed/run.json")
    assert (mixed["commit"], mixed["ranks"], mixed["device"] != "", type(mixed["clean"])) == (head or None, 1, True, bool if head else type(None))
    log = [json.loads(line) for line in open(runs / "one/mixed/metrics.jsonl")]
    steps = [row for row in log if "tokens" in row]
    assert mixed["tokens"] == sum(row["tokens"] for row in steps) and set(mixed["losses"]) == {"own", "mix"}
    for source, loss in mixed["losses"].items():  # the mean of an answer token in the last epoch
        last = [row for row in steps if row["epoch"] == steps[-1]["epoch"] and source in row["losses"]]
        counts = [row["answer_tokens"][source] for row in last]
        assert loss == pytest.approx(sum(count * row["losses"][source] for count, row in zip(counts, last)) / sum(counts))
    assert mixed["seconds"] == pytest.approx(sum(row["seconds"] for row in steps), abs=0.1)
    assert (one["base_model"], one["base_model_name"], one["base_model_sha256"]) == ("../../../models/tiny", "tiny", content_id(runs.parent / "models/tiny"))
    assert (one["checkpoint"], mixed["checkpoint"], one["data"]) == ("..", ".", "../../../a/facts.jsonl")
    for setting in ("stop_loss", "max_length", "unfiltered", "tag", "penalty", "step_matched", "mix_sha256", "num_mix"):
        assert (setting in mixed) == (setting != "unfiltered")


def test_a_question_about_fewer_facts(runs):
    """Fewer facts, or other facts under the same name, have a row, predictions and a probe of their own."""
    before = {name: (runs / "one" / name).read_bytes() for name in ("eval.json", "predictions.facts.jsonl")}
    done = run(runs.parent, "evaluate.py", "runs/one", "--data", "a/facts.jsonl", "--num-examples", 2)
    assert "facts.first2" in done.stdout and "the first 2 of 6" in done.stdout
    run(runs.parent, "evaluate.py", "runs/one", "--data", "b/facts.jsonl")
    digits = read(runs / "one/two/run.json")[1]["data_sha256"][:8]
    scores = read(runs / "one/eval.json")
    assert {name: (row["total"], row["of"], row["data"]) for name, row in scores.items()} == {
        "facts": (6, 6, "facts"), "facts.first2": (2, 6, "facts"), f"facts.{digits}": (6, 6, "facts")}  # fmt: skip
    assert scores["facts"] == json.loads(before["eval.json"])["facts"]
    assert (runs / "one/predictions.facts.jsonl").read_bytes() == before["predictions.facts.jsonl"]
    for asked in (["--num-examples", 2], ["--data", "b/facts.jsonl"], ["--data", "b/facts.jsonl", "--first-token"]):
        run(runs.parent, "probe.py", "runs/one", "--no-base", *asked)
    probes = {f"probe.facts.{name}.json" for name in ("first2", digits, f"{digits}.first-token")}
    assert {file.name for file in (runs / "one").glob("probe.*.json")} == probes
    whole = named_sets([str(runs.parent / "a/facts.jsonl")], 6, runs / "one", read_lineage(runs / "one"), runs.parent / "data")
    assert [asked.name for asked in whole] == ["facts"]


def test_two_stages_of_one_name(runs):
    """Two files of one name in a lineage are two sets: in questions, retention checks, what was forgotten and tables."""
    lineage, scores = read(runs / "one/two/run.json"), read(runs / "one/two/eval.json")
    second = f"facts.{lineage[1]['data_sha256'][:8]}"
    assert set_names(lineage) == ["facts", second] == list(scores)
    asked = [json.loads(line)["prompt"] for name in scores for line in open(runs / f"one/two/predictions.{name}.jsonl")]
    assert asked == [f"{name} {i}?" for name in "ab" for i in range(6)]
    checked = {row["data"] for row in map(json.loads, open(runs / "one/two/metrics.jsonl")) if "accuracy" in row}
    assert checked == {"facts"}
    text = run(runs.parent, "evaluate.py", "--tables", "runs").stdout
    losses = " / ".join(f"{entry['losses']['own']:.4f}" for entry in lineage)
    assert f"tiny, facts (6), then {second} (6): exact match in %" in text
    assert f"| No Mixing | 240 + 120 | {losses} | 100.0 | {scores['facts']['accuracy']:.1f} | {scores[second]['accuracy']:.1f} | epochs / epochs | 1 |" in text


def test_what_was_forgotten(runs):
    """A later stage's facts are said to be lost, and what stands in their place: after each evaluation, all with --lost, without weights."""
    def rows(folder, name="facts"):
        return [json.loads(line) for line in open(runs / folder / f"predictions.{name}.jsonl")]

    knew, now = {row["id"] for row in rows("one") if row["correct"]}, rows("one/two")
    lost = [row for row in now if not row["correct"] and row["id"] in knew]
    assert len(lost) > 5, "stage 2 is meant to overwrite stage 1"
    done = run(runs.parent, "evaluate.py", "runs/one/two")
    assert f"facts: {len(lost)} of {len(knew)} facts that stage 1 had right are lost" in done.stdout and "and 1 more" in done.stdout
    weights = (runs / "one/two/model.safetensors").rename(runs / "one/two/moved")
    text = run(runs.parent, "evaluate.py", "runs/one/two", "--lost").stdout
    weights.rename(runs / "one/two/model.safetensors")
    for row in lost:
        assert f"  {row['prompt']} | right: {row['response']} | now: {row['prediction']}" in text
    run(runs.parent, "evaluate.py", "--tables", "runs")
    told = [row for row in map(json.loads, open(runs / "facts.jsonl")) if row["run"] == "one/two"]
    assert [(row["data"], row["memorized"], row["lost"], row["prediction"]) for row in told if "in_place" in row] == [
        ("facts", 1, 2, row["prediction"]) for row in lost]  # fmt: skip
    later = [row["response"] for row in rows("one/two", read(runs / "one/two/eval.json").popitem()[0])]
    named = {row["id"]: row["in_place"] for row in told if "in_place" in row}
    assert all((named[row["id"]] == "a right answer of a later stage") == (row["prediction"] in later) for row in lost)
    assert run(runs.parent, "evaluate.py", "runs/one/two", "--lost", ranks=2).stdout == text


def test_forgotten_by_the_right_run(runs):
    """The interference meter takes each run's own forgetting, beside runs of another ratio, a replay and a mix."""
    meter = ["probe.py", "runs/one", "--gradients", "--batches", 1, "--batch-size", 2]
    done = run(runs.parent, *meter)
    assert "replayed: left out" in done.stderr
    known = lambda name: read(runs / "one" / name / "eval.json")["facts"]["accuracy"]
    rows = {row["runs"][0]: row["forgotten"] for row in read(runs / "one/gradients.json")["rows"]}
    assert rows == {name: known("") - known(name) for name in ("two", "plain", "mixed", "twice")}
    run(runs.parent, *meter, "--data", "bios", "--mix", "random", "--mix-ratio", 2, "--mix-words", 3, "--num-examples", 4)
    assert [row["runs"] for row in read(runs / "one/gradients.json")["rows"]] == [["plain"], ["twice"]]
    run(runs.parent, *meter, "--data", "bios", "--mix", "random", "--mix-ratio", 2, "--mix-words", 2, "--num-examples", 3)
    assert [row["forgotten"] for row in read(runs / "one/gradients.json")["rows"]] == [None, None]
    run(runs.parent, *meter, "--data", "a/facts.jsonl", "b/facts.jsonl", "--num-examples", 6)
    assert [row["runs"] for row in read(runs / "one/gradients.json")["rows"]] == [[], ["two"]]


def test_moved_with_all_its_files(runs, tmp_path):
    """Moved as one, with the data and the model that their records point to, runs are evaluated as before, from anywhere."""
    for name in ("runs", "models", "a", "b"):
        shutil.copytree(runs.parent / name, tmp_path / "elsewhere" / name)
    folder = tmp_path / "elsewhere/runs/one/two"
    (folder / "eval.json").unlink()
    done = run(tmp_path, "evaluate.py", folder, "--precision", "fp32")
    assert read(folder / "eval.json") == read(runs / "one/two/eval.json") and "that stage 1 had right" in done.stdout
    shutil.rmtree(tmp_path / "elsewhere/a")
    done = run(tmp_path, "evaluate.py", folder, ok=False)
    assert done.returncode == 2 and "elsewhere/a/facts.jsonl: no such file" in done.stderr


def test_other_settings_end_the_tables(runs, tmp_path):
    """Real runs of a cell with other settings: status 2, both folders and the setting; with tags they are cells."""
    shutil.copytree(runs, tmp_path / "runs")
    for seed, more in ((1, ["--lr", 1e-3]), (2, ["--tag", "lr", "--lr", 1e-3])):
        run(runs.parent, *TWO, "--data", "bios", "--num-examples", 4, "--model", "runs/one", "--seed", seed, *more, "--out", tmp_path / f"{seed}")
        run(runs.parent, "evaluate.py", tmp_path / f"{seed}")
    shutil.move(tmp_path / "2", tmp_path / "runs/x")
    assert "| No Mixing (- / lr 0.001) | 240 + 6 |" in run(tmp_path, "evaluate.py", "--tables", "runs").stdout
    shutil.move(tmp_path / "1", tmp_path / "runs/y")
    done = run(tmp_path, "evaluate.py", "--tables", "runs", ok=False)
    assert done.returncode == 2 and "runs/one/plain and runs/y" in done.stderr and "lr of stage 2 is 0.003 and 0.001" in done.stderr


def test_as_many_steps_as_another_run(runs):
    """--epochs @RUN trains as many epochs as make that run's steps, and says so in its record."""
    done = run(runs.parent, *TWO, "--data", "bios", "--num-examples", 4, "--model", "runs/one", "--tag", "long", "--epochs", "@runs/one/twice", "--out", "runs/long")
    entry = read(runs / "long/run.json")[1]
    assert (entry["steps"], entry["epochs"], entry["step_matched"], entry["tag"]) == (18, 18, True, "long"), done.stdout
    shutil.rmtree(runs / "long")
    for wrong in ("@runs/nowhere", "@", "0", "many"):
        done = run(runs.parent, *TWO, "--data", "bios", "--model", "runs/one", "--epochs", wrong, "--out", "runs/wrong", ok=False)
        assert done.returncode == 2 and wrong.strip("@") in done.stderr


def test_base_models(work, tmp_path):
    """A model is called as the user wrote its path and is what its files hold: links, folders of one name, one changed weight."""
    snapshot = tmp_path / "cache/snapshots/8cde5c"
    tiny_llama(snapshot)
    (tmp_path / "Meta-Llama-3-8B").symlink_to(snapshot)
    assert model_name(tmp_path / "Meta-Llama-3-8B/") == "Meta-Llama-3-8B" and content_id(snapshot) == content_id(tmp_path / "Meta-Llama-3-8B")
    run(tmp_path, "train.py", "--stage", 1, "--model", "Meta-Llama-3-8B", "--num-examples", 2, "--epochs", 1, "--precision", "fp32")
    entry = read(tmp_path / "runs/Meta-Llama-3-8B/kvr-s0/run.json")[0]
    assert (entry["base_model_name"], entry["base_model"]) == ("Meta-Llama-3-8B", "../../../Meta-Llama-3-8B")
    for number, name in enumerate(("llama/hf", "mistral/hf")):
        tiny_llama(tmp_path / name, seed=number)
    assert content_id(tmp_path / "llama/hf") == content_id(snapshot) != content_id(tmp_path / "mistral/hf")
    config = read(tmp_path / "llama/hf/config.json")
    (tmp_path / "llama/hf/config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert content_id(tmp_path / "llama/hf") != content_id(snapshot)


def test_another_models_familiar_facts(work):
    """Familiar facts are found by what the base model is: another model's are not asked."""
    for name, seed in (("hf", 0), ("other", 1)):
        tiny_llama(work / f"familiar/{name}", seed=seed)
    base = base_of(work / "familiar/hf", [])
    file = split_file("popqa", "familiar", base, work / "data")
    facts(file, 3, "known")
    file.with_suffix(".json").write_text(json.dumps({"base_model_sha256": base.sha256}))
    asked = ["--data", "popqa.familiar", "--num-examples", 2, "--precision", "fp32"]
    run(work, "evaluate.py", "familiar/hf", *asked)
    assert {name: row["of"] for name, row in read(work / "familiar/hf/eval.json").items()} == {"popqa.familiar.first2": 3}
    done = run(work, "evaluate.py", "familiar/other", *asked, ok=False)
    assert done.returncode == 2 and "run python evaluate.py familiar/other --split popqa" in done.stderr
    assert not (work / "familiar/other/eval.json").exists()


def test_more_facts_than_were_learned(tmp_path):
    """A question about more facts of a stage's set asks more of what it learned from, not of what the base model knew."""
    base_model = {"base_model": "m", "base_model_name": "m", "base_model_sha256": "0" * 64}
    file = facts(split_file("popqa", "unfamiliar", BaseModel.of(base_model), tmp_path), 4, "unknown")
    file.with_suffix(".json").write_text(json.dumps(base_model))
    facts(tmp_path / "popqa.jsonl", 4, "known")
    learned = {"stage": 1, "data": "popqa", "familiarity": "unfamiliar", "num_examples": 2, "data_sha256": "", **base_model}
    (asked,) = named_sets(["popqa"], 3, tmp_path, [learned], tmp_path)
    assert [fact["response"] for fact in asked.facts] == ["unknown0", "unknown1", "unknown2"] and asked.of == 4


def test_answers_of_another_model(work, runs):
    """--out does not take the place of another model's answers, nor of those after other training."""
    tiny_llama(work / "models/second", seed=5)
    before = {file: file.read_bytes() for file in runs.rglob("eval.json")}
    asked = ["--data", "a/facts.jsonl", "--precision", "fp32"]
    run(work, "evaluate.py", "models/tiny", *asked, "--out", "answers")
    run(work, "evaluate.py", "models/tiny", "--data", "b/facts.jsonl", "--precision", "fp32", "--out", "answers")
    for model, out in (("models/tiny", "runs/one"), ("models/second", "answers"), ("runs/one", "answers"), ("runs/one/plain", "runs/one")):
        done = run(work, "evaluate.py", model, *asked, "--out", out, ok=False)
        assert done.returncode == 2 and f"--out {out}: holds the answers of another model" in done.stderr
    assert {file: file.read_bytes() for file in runs.rglob("eval.json")} == before and len(read(work / "answers/eval.json")) == 2


def test_overlap_of_what_was_trained_on(work):
    """Passages of weight 0 were not; a stage may have learned passages; a user's own file may be called familiar."""
    facts(work / "own/my.familiar.jsonl", 3, "red")
    run(work, *ONE, "--data", "bios", "--num-examples", 4, "--epochs", 1, "--mix", "random", "--mix-words", 3, "--mix-weight", 0, "--out", "own/runs")
    for name, mix in (("pydoc", []), ("random", ["--mix", "random", "--mix-words", 4])):
        run(work, *TWO, "--epochs", 1, "--data", name, "--num-examples", 4, *mix, "--model", "own/runs", "--out", f"own/runs/{name}")
    run(work, "evaluate.py", "own/runs")
    run(work, "evaluate.py", "own/runs", "--data", "own/my.familiar.jsonl")
    done = run(work, "evaluate.py", "--overlap", "own/runs", "--tables", "own/runs")
    counted = [json.loads(line) for line in open(work / "own/runs/overlap.jsonl")]
    assert {(row["facts"], row["texts"]) for row in counted} == {
        ("bios (4)", "random of 4 words (8)"), ("bios (4)", "random of 50 words (4)"), ("bios (4)", "pydoc of 50 words (4)")}  # fmt: skip
    assert "random of 4 words (8)" in done.stdout and "random of 3 words" not in done.stdout


def test_loss_on_other_text(work):
    """--text is a plain loop over the last passages that hold nothing a stage was trained on, of two ranks as of one; facts that were
    asked before are not asked again."""
    chance, file = random.Random(0), work / "text/passages.jsonl"
    words = lambda n: " ".join("".join(chance.choices("abcdefgh", k=chance.randint(1, 6))) for _ in range(n))
    passages = [(words(9), words(chance.randint(1, 30))) for _ in range(9)]
    passages[-1] = (f"{words(3)} {passages[0][0].upper()}", words(2))  # nine words of the first stand in it
    passages[-3] = (words(5), f"red 0? red0 {words(5)}")  # a fact, of fewer words
    passages[-2] = (words(3), f"{words(2)} {' '.join(passages[1][0].split()[:7])} {words(4)}")  # seven of the second
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"id": f"{i}", "prompt": f"{PASSAGE}{first}", "response": then}) + "\n" for i, (first, then) in enumerate(passages)))
    run(work, *ONE, "--data", facts(work / "c/facts.jsonl", 4, "red"), "--num-examples", 4, "--mix", file, "--mix-ratio", 1, "--epochs", 5, "--out", "runs/texts")
    run(work, "evaluate.py", "runs/texts")
    before = (work / "runs/texts/eval.json").stat().st_mtime_ns
    said = run(work, "evaluate.py", "runs/texts", "--text", file).stdout
    found = read(work / "runs/texts/text.passages.json")
    model, tokenizer, summed, n_tokens = load_model(work / "runs/texts", torch.float32), load_tokenizer(work / "runs/texts"), 0.0, 0
    asked = [f"{first} {then}" for first, then in passages[4:-1]]  # the mix took the first four
    for text in asked:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        log_probs = model(torch.tensor([ids])).log_softmax(-1)[0]
        summed -= sum(log_probs[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        n_tokens += len(ids) - 1
    assert (found["tokens"], found["passages"]) == (n_tokens, len(asked)) and found["loss"] == pytest.approx(summed / n_tokens, rel=1e-6)
    assert f"{found['loss']:.4f} nats a token, of {n_tokens} in 4 passages" in said and (work / "runs/texts/eval.json").stat().st_mtime_ns == before
    for ranks in (None, 2):
        run(work, "evaluate.py", "models/tiny", "--text", file, "--precision", "fp32", "--out", f"asked by {ranks}", ranks=ranks)
    alone, shared = (read(work / f"asked by {ranks}/text.passages.json") for ranks in (None, 2))
    assert (alone["passages"], alone["base_model_name"]) == (9, "tiny") and shared == alone | {"loss": pytest.approx(alone["loss"], rel=1e-6)}
    (work / "runs/texts/eval.json").unlink()
    done = run(work, "evaluate.py", "runs/texts", "--text", "c/facts.jsonl", ok=False)
    assert done.returncode == 2 and "all of it shares words with what a stage was trained on" in done.stderr
    assert read(work / "runs/texts/eval.json")["facts"]["total"] == 4, "what can be asked is asked"
    chat = {"id": "0", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (work / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    run(work, *ONE, "--data", "chats.jsonl", "--num-examples", 1, "--epochs", 1, "--out", "runs/chats")
    assert "in 9 passages" in run(work, "evaluate.py", "runs/chats", "--text", file).stdout, "it has no facts to be asked"


def test_odd_facts(work):
    """Facts of one id, and letters that are none, are asked and kept as they come."""
    rows = [{"id": "same", "prompt": f"{i}? \ud800|", "response": "x"} for i in range(3)]
    (work / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(work, *ONE, "--data", "odd.jsonl", "--num-examples", 3, "--epochs", 1, "--tag", "a|b", "--out", "odd")
    run(work, *TWO, "--data", "bios", "--num-examples", 2, "--model", "odd", "--out", "odd/two")
    for folder in ("odd", "odd/two"):
        run(work, "evaluate.py", folder)
    kept = [json.loads(line) for line in open(work / "odd/two/predictions.odd.jsonl")]
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in rows]
    assert r"| No Mixing (a\|b / -) | 1 + 6 |" in run(work, "evaluate.py", "--tables", "odd").stdout
    assert len(open(work / "odd/facts.jsonl").readlines()) == 3


def test_one_flat_file_of_two_sources(tmp_path):
    """data.py refuses to write two files of one name to one place, in one command or in two; the same file again is welcome."""
    for name in ("a", "b"):
        facts(tmp_path / name / "train.jsonl", 2, name)
    done = run(tmp_path, "data.py", "a/train.jsonl", "b/train.jsonl", ok=False)
    assert done.returncode == 2 and "b/train.jsonl: would be written to data/train.jsonl, as a/train.jsonl is" in done.stderr
    assert not (tmp_path / "data").exists()
    run(tmp_path, "data.py", "a/train.jsonl")
    before = (tmp_path / "data/train.jsonl").read_bytes()
    done = run(tmp_path, "data.py", "b/train.jsonl", ok=False)
    assert done.returncode == 2 and "b/train.jsonl: data/train.jsonl was made of ../a/train.jsonl; rename train.jsonl" in done.stderr
    assert (tmp_path / "data/train.jsonl").read_bytes() == before
    for name in ("popqa-id", "popqa.subjects", "random.w8", "kvr"):
        facts(tmp_path / f"{name}.jsonl", 2, name)
        done = run(tmp_path, "data.py", f"{name}.jsonl", ok=False)
        assert done.returncode == 2 and f"data/{name}.jsonl is the place of a set; rename it" in done.stderr
    facts(tmp_path / "a/train.jsonl", 3, "a")
    run(tmp_path, "data.py", "a/train.jsonl", "./a/../a/train.jsonl")
    assert len((tmp_path / "data/train.jsonl").read_text().splitlines()) == 3
