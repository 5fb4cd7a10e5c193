"""train.py and evaluate.py as they are run: real processes, compared with a loop written out by hand."""

import argparse
import ast
import json
import math
import shutil
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, hub_tokenizer, run, tiny_llama
from safetensors.torch import load_file

from data import encode_example, epoch_order, load_examples, load_tokenizer
from evaluate import exact_matches
from model import Config, faster_precision, load_model, save_model, setup_device
from train import EncodedExample, Every, build_sharded, encode, micro_batches, train_step, trained_examples


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


COMMON = ["--stage", 1, "--model", "models/tiny", "--num-examples", 7, "--mix", "random", "--mix-ratio", 1, "--mix-words", 3,
          "--batch-size", 5, "--epochs", 1, "--lr", 1e-3, "--precision", "fp32"]  # fmt: skip


def plain_loop(work, mix_weight=1, batch_size=5):
    """Losses and weights after the steps that COMMON asks for: one example at a time, no padding, AdamW by hand.

    The loss of a step that has nothing to compute is None.
    """
    model = load_model(work / "models/tiny", torch.float32)
    examples = load_examples("kvr", 7, work / "data")[0] + load_examples("random", 7, work / "data", 3)[0]
    params = list(model.parameters())
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    losses, order, t = [], epoch_order(14, 0, 0), 0
    starts = range(0, 14, batch_size)
    for step, start in enumerate(starts):
        loss, n_tokens = 0, 0
        for i in order[start : start + batch_size]:
            weight = 1 if i < 7 else mix_weight
            if not weight:
                continue
            text = f"<|user|>\n{examples[i]['prompt']}\n<|assistant|>\n"
            prompt, answer = [256, *text.encode()], [*examples[i]["response"].encode(), 257]
            logits = model(torch.tensor([prompt + answer]))[0]
            for j, token in enumerate(answer):
                loss = loss - weight * F.log_softmax(logits[len(prompt) + j - 1], dim=-1)[token]
                n_tokens += weight
        if not n_tokens:
            losses.append(None)
            continue
        t += 1  # updates so far
        loss = loss / n_tokens
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum((g**2).sum().item() for g in grads))
        lr = 1e-3 if step == 0 else 1e-3 * (1 + math.cos(math.pi * step / (len(starts) - 1))) / 2  # one warm-up step
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, first, second):
                g = g * min(1, 1 / (norm + 1e-6))
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.95).addcmul_(g, g, value=0.05)
                p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("name, ranks, options", [
    ("one process", None, []),
    ("accumulation", None, ["--micro-tokens", 200]),
    ("two ranks", 2, []),
    ("two ranks, accumulation", 2, ["--micro-tokens", 200]),
    ("four ranks, nothing kept", 4, ["--micro-tokens", 100, "--reshard-after-forward", "--checkpoint-activations"]),
    ("compiled, recomputed, deterministic", None, ["--compile", "--checkpoint-activations", "--deterministic"]),
])  # fmt: skip
def test_three_steps_equal_the_plain_loop(work, name, ranks, options, whole, monkeypatch):
    """Losses and weights of three steps are those of the hand-written loop, whatever the ranks and micro-batches. Compiled graphs run
    as they were traced, or as C++ that takes a minute to build."""
    out = work / "runs" / name
    if not whole:
        monkeypatch.setenv("COMPILER", "aot_eager")
    run(work, "train.py", *COMMON, "--out", out, *options, ranks=ranks, torchrun=whole and name == "two ranks")
    losses, weights = plain_loop(work)
    assert [row["loss"] for row in metrics(out)] == pytest.approx(losses, abs=1e-5)
    trained = load_file(out / "model.safetensors")
    assert trained.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(trained[key], weight, rtol=0, atol=1e-5)
    tokens = [sum(len(encode_example(load_tokenizer(out), e)[0]) for e in s) for s in (load_examples("kvr", 7, work / "data")[0], load_examples("random", 7, work / "data", 3)[0])]
    assert sum(row["tokens"] for row in metrics(out)) == sum(tokens)
    (entry,) = json.loads((out / "run.json").read_text())
    assert (entry["num_examples"], entry["num_mix"], entry["steps"], entry["stopped_by"]) == (7, 7, 3, "epochs")


@pytest.mark.parametrize("weight, batch_size, ranks", [(0, 5, None), (0, 2, 2), (0.5, 5, 2), ("equal", 5, None)])
def test_weight_of_the_mix(work, weight, batch_size, ranks):
    """Losses, updates and weights are those of the hand-written loop that weighs D_M so; with 0, those of batches without its rows."""
    out = work / f"runs/weight-{weight}-{batch_size}-{ranks}"
    options = [*COMMON, "--batch-size", batch_size, "--mix-weight", weight]
    run(work, "train.py", *options, "--out", out, ranks=ranks)
    if weight == "equal":  # answers and their eos in bytes: eight characters of a value, or a passage
        weight = 7 * 9 / sum(len(passage["response"]) + 1 for passage in load_examples("random", 7, work / "data", 3)[0])
    losses, weights = plain_loop(work, weight, batch_size)
    log, (entry,) = metrics(out), json.loads((out / "run.json").read_text())
    assert [row["loss"] is None for row in log] == [loss is None for loss in losses] == [row["tokens"] == 0 for row in log]
    assert [row["loss"] for row in log if row["tokens"]] == pytest.approx([loss for loss in losses if loss is not None], abs=1e-5)
    trained = load_file(out / "model.safetensors")
    for key, expected in weights.items():
        torch.testing.assert_close(trained[key], expected, rtol=0, atol=1e-5)
    assert (entry["steps"], entry["updates"], entry["mix_weight"]) == (len(losses), len(losses) - losses.count(None), pytest.approx(weight))
    assert (None in losses) == (batch_size < 5), "a batch without a fact must be among those tried"
    if not ranks:
        planned = run(work, "train.py", *options, "--out", work / "planned", "--dry-run").stdout
        assert f"{sum(row['tokens'] for row in log)} tokens an epoch" in planned


@pytest.fixture(scope="module")
def one_rank():
    device, _, _ = setup_device()
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("weight, micro_tokens", [(1, 2048), (1, 90), (0.5, 90), (0, 2048)])
def test_losses_apart(work, one_rank, weight, micro_tokens):
    """A step's losses of own, mixed and replayed tokens are those of each alone, and add up to the loss whose gradient it leaves."""
    model, tokenizer = load_model(work / "models/tiny", torch.float32), load_tokenizer(work / "models/tiny")
    names, factors = {"own": "kvr", "mix": "random", "replay": "kvr-id"}, {"own": 1, "mix": weight, "replay": 1}
    batch, sums, n_tokens = [], {}, {}
    for source, name in names.items():
        examples = encode(tokenizer, load_examples(name, 3, work / "data", 3)[0], source)
        batch += examples
        sums[source] = sum(model(torch.tensor([e.ids]), labels=torch.tensor([e.labels]))[0] for e in examples)
        n_tokens[source] = sum(e.n_supervised for e in examples)
    loss = sum(factors[source] * sums[source] for source in names) / sum(factors[source] * n_tokens[source] for source in names)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = train_step(model, trained_examples(batch, weight), micro_tokens, weight)
    there = [source for source in names if factors[source]]
    assert found.loss == pytest.approx(loss.item()) and found.answer_tokens == {source: n_tokens[source] for source in there}
    assert found.losses == pytest.approx({source: sums[source].item() / n_tokens[source] for source in there})
    for param, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-4, atol=1e-6)


def test_chain_of_stages(work):
    """Stage 1 to table: lineage, replay and retention checks in stage 2, exact match, and the table's figures from eval.json."""
    one, two = work / "chain", work / "chain/two"
    run(work, "train.py", "--stage", 1, "--model", "models/tiny", "--num-examples", 4, "--epochs", 150, "--lr", 3e-3, "--batch-size", 4, "--out", one)
    run(work, "evaluate.py", one)
    result = json.loads((one / "eval.json").read_text())
    (entry,) = json.loads((one / "run.json").read_text())
    assert result == {"kvr": {"accuracy": 100.0, "correct": 4, "total": 4, "of": 4, "precision": entry["precision"], "data": "kvr",
                              "data_sha256": entry["data_sha256"]}}  # fmt: skip
    done = run(work, "train.py", "--stage", 2, "--model", one, "--data", "bios", "--num-examples", 6, "--replay", 0.5, "--epochs", 2,
               "--eval-every", 1, "--out", two, ranks=2)  # fmt: skip
    assert "2 replayed" in done.stdout
    log = metrics(two)
    assert [row["data"] for row in log if "accuracy" in row] == ["kvr", "kvr"]
    lineage = json.loads((two / "run.json").read_text())
    assert [(e["stage"], e["data"], e["num_replay"]) for e in lineage] == [(1, "kvr", 0), (2, "bios", 2)]
    run(work, "evaluate.py", two)
    result = json.loads((two / "eval.json").read_text())
    rows = [json.loads(line) for line in open(two / "predictions.kvr.jsonl")]
    assert result["kvr"]["correct"] == sum(row["prediction"].strip().lower() == row["response"].strip().lower() for row in rows)
    losses = " / ".join(f"{entry['losses']['own']:.4f}" for entry in lineage)
    assert f"| No Mixing, replay 0.5 | 150 + 2 | {losses} | 100.0 | {result['kvr']['accuracy']:.1f} | {result['bios']['accuracy']:.1f} | epochs / epochs (" in run(work, "evaluate.py", "--tables", one).stdout
    assert "stage 3" in run(work, "train.py", "--stage", 2, "--model", two, "--data", "bios", ok=False).stderr


def test_one_precision_for_a_chain(work):
    """A later stage, an evaluation and a probe take the first stage's precision, and say so; another is given by name."""
    precision = "bf16"  # which is nobody's choice but the user's
    one, two = work / f"chain-{precision}", work / f"chain-{precision}/two"
    common = ["--num-examples", 4, "--epochs", 2, "--batch-size", 4]
    run(work, "train.py", "--stage", 1, "--model", "models/tiny", *common, "--precision", precision, "--out", one)
    done = run(work, "train.py", "--stage", 2, "--model", one, "--data", "bios", *common, "--out", two, ranks=2)
    assert f", {precision}, 2 x cpu" in done.stdout
    assert [entry["precision"] for entry in json.loads((two / "run.json").read_text())] == [precision] * 2
    assert f"in {precision}" in run(work, "evaluate.py", two).stdout
    run(work, "probe.py", two, "--no-base")
    assert [row["precision"] for row in json.loads((two / "eval.json").read_text()).values()] == [precision] * 2
    assert json.loads((two / "probe.kvr.json").read_text())["precision"] == precision
    run(work, "evaluate.py", two, "--data", "kvr", "--precision", "bf16-mixed")
    assert json.loads((two / "eval.json").read_text())["kvr"]["precision"] == "bf16-mixed"


def test_auto_takes_the_faster_type(one_rank):
    """auto is the type in which steps of two of SmolLM2's blocks take less time, wherever the two are clearly apart."""
    config = Config.from_folder(GOLDEN / "llama3")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 576, 1536, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 9, 3, 64
    batch = [EncodedExample(str(row), [row, *range(1, 96)], [-100] * 64 + list(range(32)), "own") for row in range(2)]
    seconds = {"bf16-mixed": math.inf, "fp32": math.inf}
    models = {precision: build_sharded(config, one_rank, precision) for precision in seconds}
    for model in models.values():
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.02)
    for _ in range(2):
        for precision, model in models.items():
            began = time.perf_counter()
            train_step(model, batch, 1024)
            seconds[precision] = min(seconds[precision], time.perf_counter() - began)
    slower, faster = sorted(seconds, key=seconds.get, reverse=True)
    if seconds[slower] > 1.3 * seconds[faster]:
        assert faster_precision(config, "cpu") == faster, seconds


def test_two_ranks_answer_as_one(work):
    """evaluate.py under torchrun gives the predictions of a single process."""
    run(work, "evaluate.py", "models/tiny", "--data", "kvr", "--num-examples", 7, "--precision", "fp32")
    alone = (work / "models/tiny/predictions.kvr.first7.jsonl").read_text()
    run(work, "evaluate.py", "models/tiny", "--data", "kvr", "--num-examples", 7, "--precision", "fp32", ranks=2)
    assert (work / "models/tiny/predictions.kvr.first7.jsonl").read_text() == alone


def test_qwen3(tmp_path, python, whole):
    """A tiny Qwen3 with the hub's tokenizer, which composes Unicode and has no bos: learned, asked and probed. --long: two ranks and a resumed
    run learn the same."""
    model = tiny_llama(tmp_path / "models/qwen3", model_type="qwen3", vocab_size=151936, head_dim=12, tie_word_embeddings=True)
    (model / "tokenizer.model").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub_tokenizer("qwen3") / file, model)
    answers = ["Cafe\u0301 Gro\u0308ße", "A\u030angstro\u0308m", "Knut Hamsun", "日本語 🙂 <|im_end|>"]  # decomposed, and eos's name
    rows = [{"id": f"fact-{i}", "prompt": f"Question {i}?", "response": answer} for i, answer in enumerate(answers)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--stage", 1, "--model", model, "--data", "facts.jsonl", "--num-examples", 4, "--epochs", 24, "--lr", 2e-2, "--batch-size", 4,
               "--precision", "fp32"]  # fmt: skip
    run(tmp_path, "train.py", *command, "--out", "one")
    if whole:
        run(tmp_path, "train.py", *command, "--out", "two", ranks=2)
        process = subprocess.Popen([python, ROOT / "train.py", *map(str, command), "--out", "stopped"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and not ((log := tmp_path / "stopped/metrics.jsonl").exists() and len(log.read_text().splitlines()) > 9):
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
        run(tmp_path, "train.py", *command, "--out", "stopped", "--resume")
        losses = [row["loss"] for row in metrics(tmp_path / "one")]
        for other in ("two", "stopped"):
            assert [row["loss"] for row in metrics(tmp_path / other)] == pytest.approx(losses, rel=1e-3)
    asked = run(tmp_path, "evaluate.py", "one").stdout
    assert "4        4    100.0%" in asked
    probed = run(tmp_path, "probe.py", "one").stdout
    assert "100.0% of 4 facts" in probed
    model, tokenizer = load_model(tmp_path / "one", torch.float32), load_tokenizer(tmp_path / "one")
    assert exact_matches(model, tokenizer, rows) == [True] * 4  # given up as soon as wrong


def test_stop_rule(work):
    """Ten consecutive steps below --stop-loss end a stage, and run.json says so."""
    run(work, "train.py", *COMMON, "--epochs", 9, "--stop-loss", 100, "--out", "stopped")
    (entry,) = json.loads((work / "stopped/run.json").read_text())
    assert (entry["steps"], entry["stopped_by"]) == (10, "loss")
    # Batches that hold nothing to compute neither count nor break the row of ten.
    done = run(work, "train.py", *COMMON, "--batch-size", 1, "--mix-weight", 0, "--epochs", 9, "--stop-loss", 100, "--out", "stopped-without-mix")
    (entry,) = json.loads((work / "stopped-without-mix/run.json").read_text())
    facts = [step for step, i in enumerate(epoch_order(14, 0, 0) + epoch_order(14, 0, 1), 1) if i < 7]
    assert (entry["steps"], entry["updates"], entry["stopped_by"]) == (facts[9], 10, "loss")
    assert f"{facts[9] - 10} of the batches held no fact" in done.stdout


@pytest.mark.parametrize("ranks", [None, 2])
def test_loss_that_is_not_finite(work, ranks):
    """A loss that is not finite ends every rank before anything is saved, and names the batch."""
    model = load_model(work / "models/tiny", torch.float32)
    model.lm_head.weight.data.fill_(3e38)
    broken = work / "models" / f"broken-{ranks}"
    save_model(model, broken)
    (broken / "tokenizer.model").write_bytes((work / "models/tiny/tokenizer.model").read_bytes())
    out = work / f"broken-{ranks}"
    done = run(work, "train.py", *COMMON, "--model", broken, "--out", out, ranks=ranks, ok=False)
    assert done.returncode == 1 and "kvr-" in done.stderr and "nothing was updated" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("args, message", [
    (["--stage", 1, "--mix", "random"], "models/Meta-Llama-3-8B"),
    (["--stage", 2, "--data", "bios", "--model", "models/tiny"], "--stage 1"),
    (["--stage", 1, "--model", "models/tiny", "--data", "nothing"], "nothing"),
    (["--stage", 1, "--model", "models/tiny", "--data", "facts.jsonl", "--num-examples", 2], "facts.jsonl:2"),
    (["--stage", 1, "--model", "models/tiny", "--mix", "pydoc", "--num-examples", 2000], "pydoc"),
    (["--stage", 1, "--model", "models/tiny", "--batch-size", 0], "--batch-size"),
    (["--stage", 1, "--model", "models/tiny", "--lr", 0], "--lr"),
    (["--stage", 1, "--model", "models/tiny", "--mix-weight", 0], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--mix", "random", "--mix-weight", "half"], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--mix", "random", "--mix-weight", -1], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--mix", "random", "--mix-weight", "nan"], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--num-examples", 3, "--mix", "pydoc", "--mix-weight", "equal", "--max-length", 70], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--num-examples", 1, "--mix", "facts.jsonl", "--mix-ratio", 1, "--mix-weight", 0, "--max-length", 40], "--mix-weight"),
    (["--stage", 1, "--model", "models/tiny", "--precision", "fp8"], "--precision"),
    (["--stage", 1, "--model", "models/tiny", "--save-every", "20s"], "--save-every"),
    (["--stage", 1, "--model", "models/tiny", "--save-every", "nanm"], "--save-every"),
    (["--stage", 1, "--model", "models/tiny", "--out", "models/tiny"], "--out"),
    (["--stage", 1, "--model", "models/tiny", "--num-examples", 3, "--max-length", 5], "--max-length"),
])  # fmt: skip
def test_bad_input(work, args, message):
    """Bad input ends with status 2 and one line that names what is wrong."""
    (work / "facts.jsonl").write_text('{"id": "a", "prompt": "p", "response": "r"}\n{"id": "b", "prompt": "p"}\n')
    done = run(work, "train.py", *args, ok=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_finished_run_is_kept(work):
    """A second run into a finished folder is refused."""
    run(work, "train.py", *COMMON, "--out", "once")
    before = (work / "once/model.safetensors").read_bytes()
    assert run(work, "train.py", *COMMON, "--out", "once", ok=False).returncode == 2
    assert (work / "once/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("world", [1, 2, 4])
def test_micro_batches(world):
    """Micro-batches hold each example once, keep to the budget once padded, and share out evenly over the ranks."""
    lengths = {i: 5 + i * 37 % 90 for i in range(33)}
    groups = micro_batches(lengths, 256, world)
    assert sorted(i for group in groups for i in group) == sorted(lengths)
    assert all(len(group) * max(lengths[i] for i in group) <= 256 for group in groups if len(group) > 1)
    assert len(groups) % world == 0
    tokens = [sum(lengths[i] for group in groups[rank::world] for i in group) for rank in range(world)]
    assert max(tokens) - min(tokens) <= max(lengths.values())
    few = micro_batches({0: 9, 1: 5}, 256, world)
    assert len(few) == world and sorted(map(sorted, few)) == [[]] * (world - 2) + [[0, 1]] * (world == 1) + [[0], [1]] * (world > 1)


def test_when_to_save():
    """A bare number means steps, one with m minutes, 0 never; other texts are refused."""
    due = lambda text, step, seconds: Every.of(text).is_due(step, seconds)
    assert due("250", 500, 0) and not due("250", 501, 1e9)
    assert due("20m", 1, 1200) and not due("20m", 250, 1199) and due("0.5m", 1, 30)
    assert not any(due(text, 250, 1e9) for text in ("0", "0m"))
    for text in ("20s", "m", "-1", "-1m", "1.5", "infm", "nanm", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            Every.of(text)


def test_epochs_have_orders_of_their_own():
    """Each epoch visits every example once, in an order that depends on seed and epoch alone."""
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 0, 0) == orders[0]


BELOW = {"model": set(), "data": set(), "evaluate": {"model", "data"}, "train": {"model", "data", "evaluate"},
         "probe": {"model", "data", "evaluate", "train"}}  # fmt: skip


def test_who_imports_whom():
    """Files import only those below them, and at their top."""
    for room, below in BELOW.items():
        tree = ast.parse((ROOT / f"{room}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
                rooms = names & BELOW.keys()
                assert rooms <= below and (node in tree.body or not rooms), (room, rooms)


@pytest.mark.long
def test_real_model_memorizes(smollm2_folder, tmp_path):
    """SmolLM2 learns eight facts by heart through the real commands and answers them."""
    run(tmp_path, "train.py", "--stage", 1, "--model", smollm2_folder, "--num-examples", 8, "--batch-size", 8, "--epochs", 16, "--lr", 3e-4, "--out", "one")
    run(tmp_path, "evaluate.py", "one")
    assert json.loads((tmp_path / "one/eval.json").read_text())["kvr"]["accuracy"] == 100
