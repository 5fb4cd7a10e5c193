"""probe.py against values worked out by hand, against plain loops, and as it is run."""

import argparse
import json
import math
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN, run, tiny_llama
from safetensors.torch import load_file

import probe
from data import DataError, encode_example, load_examples, load_tokenizer
from evaluate import exact_matches, is_correct, predict, questions, read_lineage
from model import CheckpointError, Config, Transformer, load_model, setup_device
from train import encode


def read(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Llama that learned eight facts ("one") and then lost some to others ("one/two")."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(folder / "models" / "tiny", num_hidden_layers=3)
    common = ["--batch-size", 8, "--lr", 3e-3, "--precision", "fp32"]
    run(folder, "train.py", "--stage", 1, "--model", "models/tiny", "--num-examples", 8, "--epochs", 120, *common, "--out", "one")
    run(folder, "train.py", "--stage", 2, "--model", "one", "--data", "bios", "--num-examples", 6, "--epochs", 2, "--mix", "random",
        "--mix-words", 3, *common, "--out", "one/two")  # fmt: skip
    for stage in ("one", "one/two"):
        run(folder, "evaluate.py", stage, "--precision", "fp32")
    return folder


@pytest.fixture(scope="module")
def one_rank():
    device, _, _ = setup_device()
    yield device
    dist.destroy_process_group()


# ---------------------------------------------------------------- logit lens


class Numbers:
    """A tokenizer of texts that are numbers."""

    bos_id, eos_id = 0, 0

    def encode(self, text, continues=False):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def worked_out():
    """A model whose residual is one unit vector everywhere: token v embeds as v mod 4; the first block turns j into j + 1, the
    second into j + 2 (mod 4); where it is j, token v has logit -2 ((v + 6 j) mod 24)."""
    raw = {"model_type": "llama", "vocab_size": 24, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2,
           "num_attention_heads": 1, "rms_norm_eps": 1e-12}  # fmt: skip
    config = Config(**{**vars(Config.from_folder(GOLDEN / "llama2")), **raw, "num_key_value_heads": 1, "head_dim": 4, "raw": raw})
    model, unit = Transformer(config), torch.eye(4)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(unit[torch.arange(24) % 4])
        for block, shift in zip(model.model.layers, (1, 2)):
            for projection in block.self_attn.children():
                projection.weight.zero_()
            # The norm doubles a unit vector, so unit j of the MLP is silu(100) * 0.01 = 1 where the residual is j, else 0.
            block.mlp.gate_proj.weight.copy_(50 * unit)
            block.mlp.up_proj.weight.copy_(0.005 * unit)
            block.mlp.down_proj.weight.copy_((unit.roll(shift, dims=1) - unit).T)
        model.lm_head.weight.copy_(-((torch.arange(24)[:, None] + 6 * torch.arange(4)) % 24).float())
    return model


def test_lens_by_hand():
    """Ranks, log-probabilities, hits and first hits of the hand-made model."""
    facts = [{"prompt": p, "response": r} for p, r in (("1", "13 5"), ("0", "23 2"), ("2", "15"))]
    ranks, log_probs, _, owner, _ = probe.read_layers(worked_out(), Numbers(), facts)
    # 13 stands after 1, whose residual is 1, then 2, then 0: (13 + 6, 13 + 12, 13 + 0) mod 24, counted from 1. The others likewise.
    by_hand = torch.tensor([[20, 12, 24, 21, 4], [2, 18, 6, 3, 10], [14, 6, 18, 15, 22]])
    assert torch.equal(ranks, by_hand) and owner.tolist() == [0, 0, 1, 1, 2]
    total = sum(math.exp(-2 * k) for k in range(24))
    torch.testing.assert_close(log_probs, -2.0 * (by_hand - 1).double() - math.log(total), rtol=1e-4, atol=1e-4)
    result = probe.summary(ranks, log_probs)
    assert (result["hits"], result["first_hits"], result["median_rank"]) == ([1, 4, 1], [1, 3, 1], [20, 6, 15])
    assert result["first_share"] == pytest.approx([1 / 6, 3 / 6, 1 / 6]) and result["frequency"] == pytest.approx([0.2, 0.8, 0.2])
    first, _, _, owner, _ = probe.read_layers(worked_out(), Numbers(), facts, first_token=True)
    assert torch.equal(first, by_hand[:, [0, 2, 4]]) and owner.tolist() == [0, 1, 2]


def test_equal_logits():
    """Of equal logits the lower id has the better rank."""
    found = probe.read(torch.tensor([[1.0, 3, 3, 2, 3]] * 2), torch.tensor([[1, 0], [4, 2]]))
    assert found[0].tolist() == [1, 3] and found[2].tolist() == [5, 2]


def test_shuffled_answers():
    """Every token of the floor comes from the same place of another answer, and each is used once."""
    answers = [[i, 10 + i, 20 + i][: 2 + i % 2] for i in range(6)]
    others = probe.shuffled_answers(answers)
    for j in range(3):
        ours, theirs = ([row[j] for row in rows if len(row) > j] for rows in (answers, others))
        assert sorted(ours) == sorted(theirs) and all(a != b for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@torch.no_grad()
def test_last_layer_is_the_model(smollm2_folder, dtype, tmp_path, whole):
    """On SmolLM2 the last layer's lens passes its check, and its log-probabilities are those of model(ids); another norm does not pass."""
    model, tokenizer = load_model(smollm2_folder, dtype), load_tokenizer(smollm2_folder)
    facts = load_examples("kvr", 2 if whole or dtype == torch.float32 else 1, tmp_path)[0]  # bf16 is slow on many processors
    _, log_probs, _, _, _ = probe.read_layers(model, tokenizer, facts)
    expected = []
    for ids, labels in (encode_example(tokenizer, fact) for fact in facts):
        rows = model(torch.tensor([ids]))[0].float().log_softmax(-1)
        expected += [rows[t - 1, ids[t]] for t in range(len(ids) - 1) if labels[t] != -100]
    torch.testing.assert_close(log_probs[-1].float(), torch.stack(expected), rtol=0, atol=1e-3 if dtype == torch.float32 else 0.2)
    probe.read_layers(model, tokenizer, [facts[0] | {"prompt": "Once more. " * 100 + facts[0]["prompt"]}])  # long: another kernel, other roundings
    lens = probe.lens
    probe.lens = lambda model, hidden: lens(model, hidden * 2) * 1.05
    try:
        with pytest.raises(RuntimeError, match="last layer"):
            probe.read_layers(model, tokenizer, facts[:1])
    finally:
        probe.lens = lens


def test_exact_matches(work, one_rank):
    """Breaking off wrong answers changes no verdict: of a model that knows all, some or none of the facts."""
    facts, verdicts = load_examples("kvr", 8, work / "data")[0], []
    for folder in ("one", "one/two", "models/tiny"):
        model, tokenizer = load_model(work / folder, torch.float32), load_tokenizer(work / folder)
        answers = predict(model, tokenizer, facts)
        verdicts.append(exact_matches(model, tokenizer, facts))
        assert verdicts[-1] == [is_correct(answer, fact["response"]) for answer, fact in zip(answers, facts)]
    assert [sum(right) for right in verdicts[::2]] == [8, 0] and 0 < sum(verdicts[1]) < 8


def test_command(work):
    """probe.py as it is run: the contract's fields, accuracy as evaluate.py has it, pictures, and the same from two ranks."""
    printed = run(work, "probe.py", "one", "one/two", "--precision", "fp32", "--out", "figure4.png").stdout
    assert "first occurrences at this layer / occurrences at all layers" in printed and "teacher-forced: each token" in printed
    alone = read(work / "one/two/probe.kvr.json")
    assert (alone["layers"], alone["top_k"], alone["total"], len(alone["hits"])) == (3, 10, 64, 4)
    assert alone["accuracy"] == read(work / "one/two/eval.json")["kvr"]["accuracy"]
    assert alone["frequency"] == pytest.approx([hits / 64 for hits in alone["hits"]]) and sum(alone["first_hits"]) <= 64
    assert alone["first_share"] == [first / sum(alone["hits"]) for first in alone["first_hits"]]
    assert alone["floor"].keys() == {"shuffled", "base_model"}
    for picture in ("figure4.png", "one/probe.kvr.png", "one/two/probe.kvr.png"):
        assert (work / picture).read_bytes().startswith(b"\x89PNG")
    run(work, "probe.py", "one/two", "--precision", "fp32", ranks=2)
    both = read(work / "one/two/probe.kvr.json")
    assert both.pop("log_prob") == pytest.approx(alone.pop("log_prob"), abs=1e-5) and both == alone


def test_long_questions():
    """A question is asked whole, however long it is."""
    prompts, answers, _ = questions(Numbers(), [{"prompt": "1 " * 3000, "response": "2 3"}])
    assert prompts == [[0] + [1] * 3000] and answers == [[2, 3, 0]]


# ---------------------------------------------------------------- interference meter


def test_inner_products_equal_a_plain_loop(work, one_rank, monkeypatch):
    """Inner products by parameter are those of gradients taken one example at a time; micro-batches change nothing."""
    tokenizer, facts = load_tokenizer(work / "one"), load_examples("kvr", 8, work / "data")[0] + load_examples("bios", 6, work / "data")[0]
    batches = [encode(tokenizer, half) for half in (facts[:8], facts[8:])]
    plain, gradients = load_model(work / "one", torch.float32), []
    for batch in batches:
        loss = sum(plain(torch.tensor([e.ids]), labels=torch.tensor([e.labels]))[0] for e in batch) / sum(e.n_supervised for e in batch)
        gradients.append(torch.autograd.grad(loss, list(plain.parameters())))
    expected = [sum((x.double() * y.double()).flatten().tolist()) for x, y in zip(*gradients)]
    model = probe.sharded(work / "one", "fp32", one_rank)
    for budget in (2048, 150):
        monkeypatch.setitem(probe.MICRO_TOKENS, "cpu", budget)
        (_, a), (_, b) = (probe.gradient(model, batch) for batch in batches)
        assert probe.inner(a, b).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_first_order_change_is_the_real_one(smollm2_folder, one_rank, tmp_path):
    """On SmolLM2 a small step on other facts changes the loss by -lr times the inner product, within 5%, and leaves the weights."""
    tokenizer = load_tokenizer(smollm2_folder)
    a, b = (encode(tokenizer, load_examples(name, 2, tmp_path)[0]) for name in ("kvr", "bios"))
    model = probe.sharded(smollm2_folder, "fp32", one_rank)
    weights = [p.detach().clone() for p in model.parameters()]
    (loss, grad_a), (_, grad_b) = probe.gradient(model, a), probe.gradient(model, b)
    real = probe.real_change(model, weights, grad_b, 1e-5, a, loss)
    assert real == pytest.approx(-1e-5 * probe.inner(grad_a, grad_b).sum().item(), rel=0.05)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


def test_gradients_command(work):
    """--gradients measures the run below a checkpoint; two ranks that are given its set and its mix by name find the same."""
    sampled = ["probe.py", "one", "--gradients", "--num-examples", 6, "--batches", 2, "--batch-size", 3]
    done = run(work, *sampled)
    (row,) = read(work / "one/gradients.json")["rows"]
    lost = [read(work / folder / "eval.json")["kvr"]["accuracy"] for folder in ("one", "one/two")]
    assert (row["data"], row["mix"], row["forgotten"]) == ("bios", "random", lost[0] - lost[1]) and "bios" in done.stdout
    assert row["delta_2"] == pytest.approx(row["first_order"]["B"]["mean"] - row["first_order"]["B+M"]["mean"])
    for parts in (row["by_layer"], row["by_kind"]):
        assert sum(part["AB"]["dot"]["mean"] for part in parts.values()) == pytest.approx(row["dot"]["AB"]["mean"])
    run(work, *sampled, "--data", "bios", "--mix", "random", "--mix-words", 3, ranks=2)
    unmixed, mixed = read(work / "one/gradients.json")["rows"]
    assert (unmixed["mix"], mixed["mix"]) == (None, "random") and unmixed["dot"]["AB"] == mixed["dot"]["AB"]
    for pair in ("AB", "AM", "BM"):
        assert mixed["dot"][pair]["mean"] == pytest.approx(row["dot"][pair]["mean"], rel=1e-3)
    assert mixed["real"]["B+M"]["mean"] == pytest.approx(row["real"]["B+M"]["mean"], rel=1e-2)


def test_spearman():
    """Ranks of 1 2 2 3 are 1, 2.5, 2.5, 4; against 10 20 40 30 by hand."""
    assert probe.spearman([1, 2, 2, 3], [10, 20, 40, 30]) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert probe.spearman([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)


# ---------------------------------------------------------------- transplant and recovery


def test_transplant_of_all_and_none(work):
    """All parts of stage 1 give back its accuracy, none leave that of stage 2; an interrupted run goes on, here on two ranks; the checkpoint stays."""
    before = (work / "one/two/model.safetensors").read_bytes()
    run(work, "probe.py", "one/two", "--transplant", "one", "--precision", "fp32", "--grid", 2)
    result = read(work / "one/two/transplant.json")
    assert result["parts"] == ["embedding", "0-1", "2", "end"] and len(result["windows"]) == 10
    assert [result["all"], result["none"]] == [read(work / folder / "eval.json")["kvr"]["accuracy"] for folder in ("one", "one/two")]
    assert result["lost"] and result["windows"][3]["returned"] == 1
    facts = [fact["id"] for fact in load_examples("kvr", 8, work / "data")[0]]
    kept = [{"other": "..", "precision": "fp32", "parts": result["parts"], "facts": facts}, {"first": 1, "last": 1, "correct": facts}]
    (work / "one/two/transplant.part").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"first": 1, "la')
    run(work, "probe.py", "one/two", "--transplant", "one", "--precision", "fp32", "--grid", 2, ranks=2)
    again = read(work / "one/two/transplant.json")
    assert again["windows"].pop(4)["accuracy"] == 100 and again["windows"] == result["windows"][:4] + result["windows"][5:]
    assert (work / "one/two/model.safetensors").read_bytes() == before and not (work / "one/two/transplant.part").exists()


def test_transplant_from_memory_and_from_disk(work, one_rank):
    """Parts of the other checkpoint are the same, and the model's own are back after them, whether memory holds both or one."""
    mine, others = (load_file(work / folder / "model.safetensors") for folder in ("one/two", "one"))
    names = {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"}
    for other in (None, load_model(work / "one", torch.float32)):
        model = load_model(work / "one/two", torch.float32)
        with probe.parts_of(model, other, names, work / "one/two", work / "one"):
            for name, param in model.named_parameters():
                assert torch.equal(param, (others if name in names else mine)[name]), name
        assert all(torch.equal(param, mine[name]) for name, param in model.named_parameters())


def test_transplant_killed_twice(work, one_rank, monkeypatch):
    """A transplant goes on after every kill, also one that cuts a line; windows that were asked are not asked again."""
    monkeypatch.chdir(work)
    args = argparse.Namespace(transplant="one", precision="fp32", grid=2, num_examples=None, data_dir="data")
    asked, part = [], work / "one/two/transplant.part"

    def killed(*rest):
        if len(asked) in (3, 6):
            asked.append("killed")
            raise KeyboardInterrupt
        asked.append("asked")
        return exact_matches(*rest)

    monkeypatch.setattr(probe, "exact_matches", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            probe.transplant(args, "one/two", read_lineage("one/two"), one_rank, 0)
        part.write_text(part.read_text() + '{"first": 0, "la')
    probe.transplant(args, "one/two", read_lineage("one/two"), one_rank, 0)
    assert asked.count("asked") == 11 and asked.count("killed") == 2 and not part.exists()


def test_recover_command(work):
    """--recover trains both arms on as many facts, asks the same others, on two ranks too, and leaves the checkpoint as it is."""
    before = (work / "one/two/model.safetensors").read_bytes()
    run(work, "probe.py", "one/two", "--recover", 2, "--steps", 6)
    result = read(work / "one/two/recover.json")
    assert result["others"] == result["lost"] - 2 and list(result["arms"]) == ["own", "never seen"]
    assert [row["step"] for row in result["arms"]["own"]] == [0, 1, 2, 3, 4, 5, 6]
    run(work, "probe.py", "one/two", "--recover", 2, "--steps", 6, ranks=2)
    both = read(work / "one/two/recover.json")
    assert [both[key] for key in ("lost", "others", "steps")] == [result[key] for key in ("lost", "others", "steps")]
    for arm in both["arms"]:
        assert [row["loss"] for row in both["arms"][arm][1:]] == pytest.approx([row["loss"] for row in result["arms"][arm][1:]], rel=1e-2)
    assert (work / "one/two/model.safetensors").read_bytes() == before
    done = run(work, "probe.py", "one/two", "--recover", 99, ok=False)
    assert done.returncode == 2 and "--recover 99" in done.stderr


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nowhere: no such folder"),
    (["one", "--gradients", "--transplant", "one"], "--transplant"),
    (["one/two", "--transplant", "nowhere"], "nowhere: no such folder"),
    (["one", "--batches", "0"], "--batches"),
    (["one", "--mix", "random"], "--mix"),
])  # fmt: skip
def test_bad_input(work, args, message, monkeypatch):
    """Bad input raises one line that names what is wrong."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["probe.py", *args])
    with pytest.raises((DataError, CheckpointError)) as error:
        probe.main()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_exit_status(work):
    """The command ends with status 2 and one line on stderr."""
    done = run(work, "probe.py", "models/tiny", ok=False)
    assert done.returncode == 2 and "models/tiny" in done.stderr and done.stderr.count("\n") == 1, done.stderr
