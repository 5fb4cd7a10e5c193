"""Ranks that are not there: what a step among eight costs in collectives and memory, and how even their work is.

`pytest tests/test_ranks.py --long` simulates all 32 layers of Llama-3-8B instead of 4.
"""

import argparse
import contextlib
import json
import shutil
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN, run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import train
from data import batches, load_examples, load_tokenizer
from model import Config, generation_mode, local
from train import EncodedExample, Kept, build_sharded, encode, measure_load, memory_of_rank, micro_batches, train_step

CPU = torch.device("cpu")
LLAMA3_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}  # fmt: skip


@contextlib.contextmanager
def among(ranks, rank=0):
    """This process as one of so many ranks, of which the others do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    yield
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts them by kind. PyTorch's CommDebugMode does the same, but allows a module only one forward pass."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.counts[op._opname] += 1
        return op(*args, **kwargs or {})


def sharded_golden(name, kept):
    """A golden model with random weights, shared out over the ranks."""
    model = build_sharded(Config.from_folder(GOLDEN / name), CPU, "bf16-mixed", kept)
    with torch.no_grad():
        for param in model.parameters():
            local(param).normal_(std=0.02)
    return model


@pytest.mark.parametrize("name", ["llama3", "llama32", pytest.param("qwen2", marks=pytest.mark.long), pytest.param("qwen3", marks=pytest.mark.long)])  # head: own, tied, tied, own
@pytest.mark.parametrize("passes", [1, 3])  # micro-batches of a rank
@pytest.mark.parametrize("kept", [Kept(), Kept(gradients=False), Kept(weights=False), Kept(False, False, False)])
def test_collectives_of_a_step(name, passes, kept):
    """Where weights and gradients are kept, a step gathers each group once and reduces it once; the ranks agree once, clipping and AdamW included."""
    with among(8):
        model = sharded_golden(name, kept)
        optimizer = train.AdamW(model.parameters())
        blocks = len(model.model.layers)
        groups = blocks + (1 if model.config.tie_word_embeddings else 2)
        batch = [EncodedExample(str(row), [3, 4, 5, 6, 7], [-100, -100, 5, 6, 7], "own") for row in range(8 * passes)]
        for _ in range(2):
            with Collectives() as found:
                optimizer.step(train_step(model, batch, micro_tokens=5).grad_norm)
            optimizer.zero_grad()
    gathers = groups if kept.weights else passes * (groups + blocks)
    reductions = groups if kept.weights and kept.gradients else passes * groups
    assert found.counts == {"_allgather_base_": gathers, "_reduce_scatter_base_": reductions, "allreduce_": 1}


@pytest.mark.parametrize("kept", [Kept(), Kept(weights=False)])
def test_collectives_of_a_retention_check(kept):
    """However many tokens are generated, each group is gathered once, and then the step's own way is as before."""
    with among(8):
        model = sharded_golden("llama3", kept)
        groups = len(model.model.layers) + 2
        for n in (1, 6):
            with Collectives() as found, generation_mode(model):
                assert len(model.generate([[3, 4, 5]], n, eos_id=-1)[0]) == n
            assert found.counts["_allgather_base_"] == groups
        batch = [EncodedExample("fact", [3, 4, 5], [-100, -100, 5], "own")]
        with Collectives() as found:
            train_step(model, batch, micro_tokens=5)
        assert found.counts["_allgather_base_"] == groups + (0 if kept.weights else len(model.model.layers))


def test_micro_batches_are_sent_without_waiting(monkeypatch):
    """All that goes to a GPU for a micro-batch goes by to_device, from pinned memory, so that the step before goes on meanwhile."""
    sent = []
    for module in (train, model_module):
        monkeypatch.setattr(module, "to_device", lambda tensor, device: sent.append(tensor.clone()) or sent[-1])
    batch = [EncodedExample(str(row), [3, 4, 5, 6 + row], [-100, -100, 5, 6 + row], "own") for row in range(3)]
    with among(1):
        (part,) = train.collate(batch, 16384, CPU)
    tensors = [value for holder in (part, part.packed) for value in vars(holder).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 and all(any(tensor is other for other in sent) for tensor in tensors)


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def llama(tmp_path_factory, llama3_folder):
    """A folder with the config.json and the tokenizer of Llama-3-8B, and no weights."""
    folder = tmp_path_factory.mktemp("llama") / "Llama-3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    shutil.copy(llama3_folder / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def default_run(llama):
    """The encoded examples of `train.py --stage 1 --mix random`."""
    tokenizer, data = load_tokenizer(llama), llama.parent / "data"
    examples = encode(tokenizer, load_examples("kvr", 2000, data)[0])
    return examples + encode(tokenizer, load_examples("random", 4000, data, 50)[0], "mix")


class FlashAttention(torch.autograd.Function):
    """What a GPU's attention keeps for its backward pass; computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Counted(list):
    """Micro-batches, before each of which the tracker starts its books on modules anew: it keeps them for one pass alone."""

    def __init__(self, parts, tracker):
        super().__init__(parts)
        self.tracker = tracker

    def __iter__(self):
        for part in super().__iter__():
            self.tracker.reset_mod_stats()
            yield part


def simulated_peak(monkeypatch, config, ranks, precision, kept, batch, micro_tokens):
    """Bytes of tensors at the fullest moment of a step on the rank with the largest micro-batch; nothing is computed.

    Whatever a step read of the device would be an error, but for one list of figures: a GPU is waited for once.
    """
    fake, tracker, real_collate, waits = FakeTensorMode(), MemTracker(), train.collate, []

    def as_fake(value):
        if isinstance(value, torch.Tensor):
            return fake.from_tensor(value)
        return replace(value, **{field.name: as_fake(getattr(value, field.name)) for field in fields(value)})

    def collate(*args):
        with unset_fake_temporarily():  # how many answer tokens there are depends on the data
            parts = real_collate(*args)
        return Counted(map(as_fake, parts), tracker)

    groups = micro_batches({i: len(example.ids) for i, example in enumerate(batch)}, micro_tokens, ranks)
    rank = max((sum(len(batch[i].ids) for i in group), place % ranks) for place, group in enumerate(groups))[1]
    with among(ranks, rank):
        mesh = device_mesh.init_device_mesh("cpu", (ranks,))
        monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *_: mesh)
        monkeypatch.setattr(train, "collate", collate)
        monkeypatch.setattr(model_module, "attend", lambda q, k, v, mask: FlashAttention.apply(q, k, v))
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: waits.append(1) or [0.0] * tensor.numel())
        with fake:
            model = build_sharded(config, CPU, precision, kept)
            optimizer = train.AdamW(model.parameters())
            tracker.track_external(model, *[moment for state in optimizer.state.values() for moment in state.values()])
            with tracker:
                optimizer.step(train_step(model, batch, micro_tokens).grad_norm)
        (found,) = tracker.get_tracker_snapshot("peak").values()
    assert len(waits) == 1
    return found["Total"]


@pytest.mark.parametrize("ranks, precision, kept, micro_tokens, qwen", [
    (8, "bf16-mixed", Kept(), 16384, {}),
    (4, "bf16-mixed", Kept(weights=False), 16384, {}),
    (2, "bf16-mixed", Kept(activations=False), 16384, {}),
    pytest.param(2, "bf16", Kept(), 2048, {}, marks=pytest.mark.long),
    pytest.param(2, "bf16-mixed", Kept(False, False, False), 2048, {}, marks=pytest.mark.long),
    (8, "bf16-mixed", Kept(), 16384, {"qkv_bias": True}),
    (1, "fp32", Kept(), 16384, {"qk_norm": True}),
])  # fmt: skip
def test_plan_is_what_a_step_takes(monkeypatch, request, llama, default_run, ranks, precision, kept, micro_tokens, qwen):
    """The memory planned for a rank of Llama-3-8B's default run is that of a simulated step on its largest batch, within 10%.

    qwen: what Qwen2 and Qwen3 of this size have besides.
    """
    config = replace(Config.from_folder(llama), **qwen)
    if not request.config.getoption("--long"):
        config.num_hidden_layers = 4
    run_of = argparse.Namespace(batch_size=32, epochs=1, seed=0, mix_weight=1.0)
    planned = memory_of_rank(config, ranks, precision, kept, measure_load(run_of, default_run, micro_tokens, ranks), gpu=True)
    planned = sum(planned.values()) - planned["libraries"]
    order = [[default_run[i] for i in indices] for _, indices in batches(len(default_run), 32, 1, 0)]
    largest = max(order, key=lambda batch: sum(len(example.ids) for example in batch))
    found = simulated_peak(monkeypatch, config, ranks, precision, kept, largest, micro_tokens)
    print(f"{planned / 1e9:.2f} GB planned, {found / 1e9:.2f} simulated")
    assert 0.98 * found <= planned <= 1.1 * found


# ---------------------------------------------------------------- balance


@pytest.mark.parametrize("ranks, goal", [(8, 1.30), (4, 1.40), (2, 1.50)])
def test_ranks_have_equal_work(llama, default_run, ranks, goal):
    """Over all 3,760 default steps the rank with most tokens has at most so many times the mean, and no rank has another example."""
    fullest, total = 0, 0
    for _, indices in batches(len(default_run), 32, 20, 0):
        lengths = {i: len(default_run[i].ids) for i in indices}
        groups = micro_batches(lengths, 16384, ranks)
        assert sorted(i for group in groups for i in group) == sorted(indices)
        tokens = [sum(lengths[i] for group in groups[rank::ranks] for i in group) for rank in range(ranks)]
        fullest, total = fullest + max(tokens), total + sum(tokens)
    balance = fullest * ranks / total
    assert balance <= goal
    if ranks == 8:
        said = run(llama.parent, "train.py", "--stage", 1, "--mix", "random", "--model", llama, "--dry-run", ranks, "--gpu-memory", 80, ok=None)
        assert f"has {balance:.2f} times the tokens of the mean" in said.stdout and "weights gathered once a step" in said.stdout
