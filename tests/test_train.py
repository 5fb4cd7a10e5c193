"""train.py and evaluate.py as they are run: real processes, compared with a loop written out by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from safetensors.torch import load_file

from data import encode_example, epoch_order, load_examples, load_tokenizer, micro_batches
from model import load_model, save_model


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


COMMON = ["--stage", 1, "--model", "models/tiny", "--num-examples", 7, "--mix", "random", "--mix-ratio", 1, "--mix-words", 3,
          "--batch-size", 5, "--epochs", 1, "--lr", 1e-3, "--precision", "fp32"]  # fmt: skip


def plain_loop(work):
    """Losses and weights after the three steps that COMMON asks for: one example at a time, no padding, AdamW by hand."""
    model = load_model(work / "models/tiny", torch.float32)
    examples = load_examples("kvr", 7, work / "data")[0] + load_examples("random", 7, work / "data", 3)[0]
    params = list(model.parameters())
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    losses, order = [], epoch_order(14, 0, 0)
    for t, batch in enumerate([order[:5], order[5:10], order[10:]], 1):
        loss, n_tokens = 0, 0
        for i in batch:
            text = f"<|user|>\n{examples[i]['prompt']}\n<|assistant|>\n"
            prompt, answer = [256, *text.encode()], [*examples[i]["response"].encode(), 257]
            logits = model(torch.tensor([prompt + answer]))[0]
            for j, token in enumerate(answer):
                loss = loss - F.log_softmax(logits[len(prompt) + j - 1], dim=-1)[token]
                n_tokens += 1
        loss = loss / n_tokens
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum((g**2).sum().item() for g in grads))
        lr = 1e-3 if t == 1 else 1e-3 * (1 + math.cos(math.pi * (t - 1) / 2)) / 2  # one warm-up step of three
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
    ("compiled and recomputed", None, ["--compile", "--checkpoint-activations"]),
])  # fmt: skip
def test_three_steps_equal_the_plain_loop(work, name, ranks, options):
    """Losses and weights of three steps are those of the hand-written loop, whatever the ranks and micro-batches."""
    out = work / "runs" / name
    run(work, "train.py", *COMMON, "--out", out, *options, ranks=ranks)
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


def test_chain_of_stages(work):
    """Stage 1 to table: lineage, replay and retention checks in stage 2, exact match, and the table's figures from eval.json."""
    one, two = work / "chain", work / "chain/two"
    run(work, "train.py", "--stage", 1, "--model", "models/tiny", "--num-examples", 4, "--epochs", 150, "--lr", 3e-3, "--batch-size", 4, "--out", one)
    run(work, "evaluate.py", one)
    result = json.loads((one / "eval.json").read_text())
    assert result == {"kvr": {"accuracy": 100.0, "correct": 4, "total": 4}}
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
    assert f"| No Mixing, replay 0.5 | 150 + 2 | 100.0 | {result['kvr']['accuracy']:.1f} | {result['bios']['accuracy']:.1f} | 1 |" in run(work, "evaluate.py", "--tables", one).stdout
    assert "stage 3" in run(work, "train.py", "--stage", 2, "--model", two, "--data", "bios", ok=False).stderr


def test_two_ranks_answer_as_one(work):
    """evaluate.py under torchrun gives the predictions of a single process."""
    run(work, "evaluate.py", "models/tiny", "--data", "kvr", "--num-examples", 7, "--precision", "fp32")
    alone = (work / "models/tiny/predictions.kvr.jsonl").read_text()
    run(work, "evaluate.py", "models/tiny", "--data", "kvr", "--num-examples", 7, "--precision", "fp32", ranks=2)
    assert (work / "models/tiny/predictions.kvr.jsonl").read_text() == alone


def test_stop_rule(work):
    """Ten consecutive steps below --stop-loss end a stage, and run.json says so."""
    run(work, "train.py", *COMMON, "--epochs", 9, "--stop-loss", 100, "--out", "stopped")
    (entry,) = json.loads((work / "stopped/run.json").read_text())
    assert (entry["steps"], entry["stopped_by"]) == (10, "loss")


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
    assert metrics(out) == [] and not (out / "run.json").exists()


@pytest.mark.parametrize("args, message", [
    (["--stage", 1, "--mix", "random"], "models/Meta-Llama-3-8B"),
    (["--stage", 2, "--data", "bios", "--model", "models/tiny"], "--stage 1"),
    (["--stage", 1, "--model", "models/tiny", "--data", "nothing"], "nothing"),
    (["--stage", 1, "--model", "models/tiny", "--data", "facts.jsonl", "--num-examples", 2], "facts.jsonl:2"),
    (["--stage", 1, "--model", "models/tiny", "--mix", "pydoc", "--num-examples", 2000], "pydoc"),
    (["--stage", 1, "--model", "models/tiny", "--batch-size", 0], "--batch-size"),
    (["--stage", 1, "--model", "models/tiny", "--lr", 0], "--lr"),
    (["--stage", 1, "--model", "models/tiny", "--precision", "fp8"], "--precision"),
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
    assert len(micro_batches({0: 9, 1: 5}, 256, world)) % world == 0


def test_epochs_have_orders_of_their_own():
    """Each epoch visits every example once, in an order that depends on seed and epoch alone."""
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 0, 0) == orders[0]


def test_real_model_memorizes(smollm2_folder, tmp_path):
    """SmolLM2 learns eight facts by heart through the real commands and answers them."""
    run(tmp_path, "train.py", "--stage", 1, "--model", smollm2_folder, "--num-examples", 8, "--batch-size", 8, "--epochs", 16, "--lr", 3e-4, "--out", "one")
    run(tmp_path, "evaluate.py", "one")
    assert json.loads((tmp_path / "one/eval.json").read_text())["kvr"]["accuracy"] == 100
