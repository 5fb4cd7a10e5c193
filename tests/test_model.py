"""model.py against transformers, whose logits lie in tests/golden, and against plainer ways to compute the same."""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import model as model_py
from model import CausalAttention, CheckpointError, Packed, load_model, save_model

TINY = ["llama3", "llama2", "mistral", "llama32", "qwen2", "qwen3"]
PROMPTS = [[1, 5, 9], [7] * 30 + [8, 3], [2], list(range(40, 60))]  # two of them longer than the Mistral's window of 16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def load(name):
    return load_model(GOLDEN / name, torch.float32)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_logits_equal_transformers(name):
    """Logits equal transformers': right-padded prompts in one batch, and positions around 4,000 of a long text."""
    model, golden = load(name), load_file(GOLDEN / name / "golden.safetensors")
    logits = model(golden["prompts"])
    ours = torch.cat([row[:n] for row, n in zip(logits, golden["lengths"])])
    assert (ours - golden["prompt_logits"]).abs().max() < 1e-4
    ours = model(golden["text"].long()[None])[0, golden["positions"]]
    assert (ours - golden["text_logits"]).abs().max() < 1e-4


@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2_folder, whole):
    """A pretrained model: our conversion's logits on English text equal those of transformers, which read the GGUF file itself. At the
    text's first positions, or also 4,000 tokens on."""
    model, golden = load_model(smollm2_folder, torch.float32), load_file(GOLDEN / "smollm2.safetensors")
    here = golden["positions"] < (4100 if whole else 257)
    text, positions = golden["text"][: int(golden["positions"][here].max()) + 1].long(), golden["positions"][here]
    ours = model(text[None])[0, positions][:, golden["vocabulary"]]
    assert len(positions) >= 4 and (ours - golden["text_logits"][here]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths, common", [
    ([9], 5),  # one text
    ([9, 9, 9], 9),  # all the same
    ([7, 12, 3, 10], 0),  # nothing in common
    ([12, 9, 10], 8),  # more than the shortest prompt
    ([130, 70, 90], 65),  # more than a block of queries
])  # fmt: skip
@pytest.mark.parametrize("name", TINY)
def test_packed_texts_equal_each_alone(name, lengths, common, dtype, limit):
    """Texts packed into one row, a start they share once: loss, gradients, logits and hidden states of each text alone."""
    model, longest = load(name).to(dtype), max(lengths)
    start, prompt = torch.randint(3, 128, (longest,)), min(lengths) // 2
    ids, labels = torch.zeros(len(lengths), longest, dtype=torch.long), torch.full((len(lengths), longest), -100)
    loss, logits, hidden = 0, [], []
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.cat((start[:common], torch.randint(3, 128, (longest,))))[:n]
        labels[row, prompt:n] = ids[row, prompt:n]
        text = ids[row : row + 1, :n].clone()
        logits.append(model(text)[0])
        hidden.append(model(text, return_hidden=True)[:, 0])
        loss = loss - logits[-1][prompt - 1 : -1].log_softmax(-1).gather(1, text[0, prompt:, None]).sum()
    prefix_len = min(common, min(lengths) - 1)
    packed = Packed.of(lengths, prefix_len)
    n_computed = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: n_computed.append(output.shape[:2]))
    found, n_tokens = model(ids, labels=labels, packed=packed)
    assert n_computed == [(1, sum(lengths) - prefix_len * (len(lengths) - 1))] and n_tokens == sum(lengths) - prompt * len(lengths)
    assert abs(found / n_tokens - loss / n_tokens) < limit
    expected = torch.autograd.grad(loss / n_tokens, list(model.parameters()))
    for gradient, other in zip(torch.autograd.grad(found / n_tokens, list(model.parameters())), expected):
        assert (gradient - other).abs().max() < limit
    model.model.layers[0].mlp._forward_hooks.clear()
    all_logits, all_hidden = model(ids, packed=packed), model(ids, packed=packed, return_hidden=True)
    for row, (n, own, stream) in enumerate(zip(lengths, logits, hidden)):
        assert (all_logits[row, :n] - own).abs().max() < 10 * limit
        assert (all_hidden[:, row, :n] - stream).abs().max() < 10 * limit


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_else_is_kept_for_the_backward_pass(fused, monkeypatch):
    """What attention keeps are its tensors alone, no larger ones of which they are slices; so too through PyTorch's own attention, as on a GPU."""
    model, kept = load("llama3"), {}

    def note(tensor):
        kept[tensor.data_ptr(), tensor.shape] = tensor
        return tensor

    if fused:
        attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        monkeypatch.setattr(model_py, "attend", attend)
    x, T = torch.randn(1, 40, model.config.hidden_size), 40
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model.layers[0].self_attn(x, *model._rope(torch.arange(T)[None], x.dtype), None)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept.values()}
    assert sum(held.values()) <= sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_causal_attention_is_its_definition(T):
    """Attention in blocks of queries: outputs and gradients of the softmax over all scores, future ones masked."""
    q, k, v = (torch.randn(*shape, T, 8, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (2,), (2,)))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = (q @ k[:, None].transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1) @ v[:, None]
    found, weight = CausalAttention.apply(q, k, v), torch.randn(2, 3, T, 8, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((found * weight).sum(), (q, k, v))
    exact = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(gradients, exact)
    # In bf16 no further from that than the plain form is in bf16.
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    plain = (half[0] @ half[1][:, None].transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1) @ half[2][:, None]
    usual, ours = (torch.autograd.grad((y * weight.bfloat16()).sum(), half) for y in (plain, CausalAttention.apply(*half)))
    for found, other, gradient in zip(ours, usual, exact):
        assert (found - gradient).norm() <= 1.5 * (other - gradient).norm() + 1e-2 * gradient.norm()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_hidden_states_lead_to_the_logits(name):
    """return_hidden: the embedding comes first, and the head applied to the last block's output equals model(ids)."""
    model, ids = load(name), torch.randint(128, (2, 24))
    hidden = model(ids, return_hidden=True)
    assert hidden.shape == (model.config.num_hidden_layers + 1, 2, 24, 32)
    assert torch.equal(hidden[0], model.model.embed_tokens(ids))
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    assert torch.equal(F.linear(model.model.norm(hidden[-1]), head.weight), model(ids))


@pytest.mark.parametrize("name", TINY)
def test_loss_equals_cross_entropy_of_the_logits(name):
    """model(ids, labels) equals -log softmax(logits at t - 1)[labels[t]] summed one token at a time, and so do its gradients."""
    model, ids = load(name), torch.randint(128, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.5, torch.randint(128, (3, 20)), -100)
    labels[0, 0], labels[0, -1], labels[2] = 5, 6, -100
    loss, n_tokens = model(ids, labels=labels)
    logits = model(ids)
    terms = [-logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b in range(3) for t in range(1, 20) if labels[b, t] != -100]
    assert n_tokens == len(terms)
    torch.testing.assert_close(loss, sum(terms))
    params = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, params), torch.autograd.grad(sum(terms), params), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adds_its_bias(dtype):
    """A Linear with a bias computes what PyTorch's does, in the type of what it is given; without one it has none."""
    layer, x = model_py.Linear(5, 3, bias=True), torch.randn(2, 5, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    assert torch.equal(layer(x), F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype)))
    assert model_py.Linear(5, 3).bias is None


def test_loss_of_nothing_is_zero():
    """A batch without supervised tokens has loss 0 and gradients 0, not NaN."""
    model, ids = load("llama2"), torch.randint(128, (2, 5))
    loss, n_tokens = model(ids, labels=torch.full_like(ids, -100))
    loss.backward()
    assert loss == 0 and n_tokens == 0
    assert all((p.grad == 0).all() for p in model.parameters())


# ---------------------------------------------------------------- generation


@torch.no_grad()
def plain_generate(model, prompt, n):
    """Greedy continuation without a cache: the whole text again for each new token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids], device=model.model.embed_tokens.weight.device))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", TINY)
def test_generate_equals_a_loop_without_cache(name):
    """generate equals argmax of a full forward for each token: prompts alone, all together, in pairs and in another order."""
    model = load(name)
    plain = [plain_generate(model, prompt, 20) for prompt in PROMPTS]
    for batch in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 1], [2, 0], [1, 3, 2, 0]):
        assert model.generate([PROMPTS[i] for i in batch], 20, eos_id=-1) == [plain[i] for i in batch]


def test_generate_stops_at_eos():
    """Each row ends before its first eos, whatever the rows beside it do; no prompts or no tokens give nothing."""
    model = load("llama3")
    plain = [plain_generate(model, prompt, 20) for prompt in PROMPTS]
    for eos in (plain[0][0], plain[1][5], plain[3][19]):
        expected = [row[: row.index(eos)] if eos in row else row for row in plain]
        assert model.generate(PROMPTS, 20, eos) == expected
        assert [model.generate([prompt], 20, eos)[0] for prompt in PROMPTS] == expected
    assert model.generate([], 20, eos_id=2) == []
    assert model.generate(PROMPTS, 0, eos_id=2) == [[], [], [], []]


@pytest.mark.parametrize("name", TINY)
def test_drafts_change_no_answer(name, monkeypatch):
    """Whatever is guessed - right, wrong from some token on, too long, nothing - the answers are those without a guess; right guesses take one pass."""
    model, passes = load(name), []
    plain = [plain_generate(model, prompt, 20) for prompt in PROMPTS]
    model.register_forward_hook(lambda *_: passes.append(1))
    for agreed in ((0, 0, 0, 0), (1, 5, 19, 20), (20, 0, 7, 3), (19, 19, 19, 19)):
        drafts = [row[:n] + [row[n] ^ 1 if n < 20 else 5] * 5 for row, n in zip(plain, agreed)]
        assert model.generate(PROMPTS, 20, eos_id=-1, drafts=drafts) == plain
        assert model.generate(PROMPTS, 20, eos_id=plain[1][5], drafts=drafts) == model.generate(PROMPTS, 20, plain[1][5])
    passes.clear()
    assert model.generate(PROMPTS, 20, -1, drafts=plain) == plain
    assert len(passes) == 1
    monkeypatch.setattr(model_py, "DRAFT_LOGITS", 30)  # six of each draft's tokens
    assert model.generate(PROMPTS, 20, -1, drafts=plain) == plain


@pytest.mark.parametrize("name", TINY)
def test_a_shared_start_changes_no_answer(name):
    """Prompts that begin alike give the same answers and residuals however many of their first ids go through the model once."""
    model, start = load(name), PROMPTS[-1][:7]
    prompts = [start + prompt for prompt in PROMPTS]
    plain = [plain_generate(model, prompt, 20) for prompt in prompts]
    drafts = [row[:n] for row, n in zip(plain, (3, 0, 7, 20))]
    _, expected = model.generate(prompts, 20, -1, drafts, return_hidden=True)
    for prefix_len in (1, 4, 7):
        assert model.generate(prompts, 20, -1, prefix_len=prefix_len) == plain
        new, hidden = model.generate(prompts, 20, -1, drafts, prefix_len=prefix_len, return_hidden=True)
        assert new == plain
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    assert model.generate([], 20, -1, prefix_len=4) == []


def test_stop_and_hidden():
    """An answer given up is the beginning of the whole one, the others stay whole; hidden is what a plain pass holds at the same places."""
    model = load("llama3")
    plain = [plain_generate(model, prompt, 20) for prompt in PROMPTS]
    drafts = [row[:n] for row, n in zip(plain, (3, 0, 7, 20))]
    new, hidden = model.generate(PROMPTS, 20, -1, drafts, stop=lambda i, ids: i in (0, 2) and len(ids) >= 9, return_hidden=True)
    assert new == [row[:n] for row, n in zip(plain, (9, 20, 9, 20))]
    expected = []
    for prompt, draft in zip(PROMPTS, (plain[0][:3], [], plain[2][:7], plain[3][:19])):  # the last token needs no guess
        expected.append(model(torch.tensor([prompt + draft]), return_hidden=True)[:, 0, len(prompt) - 1 :])
    torch.testing.assert_close(hidden, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_save_and_load_give_the_same_bits(name, dtype, tmp_path, monkeypatch):
    """load_model of save_model equals the model bit for bit: in shards, and then in one file in the same folder."""
    model = load_model(GOLDEN / name, dtype)
    for limit, single in ((30_000, False), (10**9, True)):
        monkeypatch.setattr(model_py, "SHARD_BYTES", limit)
        with torch.no_grad():
            model.model.norm.weight += 1
        save_model(model, tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert ("model.safetensors" in files) == single and not any(file.endswith(".tmp") for file in files)
        again = load_model(tmp_path, dtype)
        assert model.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
        assert again.config.rope == model.config.rope and again.config.windows == model.config.windows


def test_what_other_releases_leave_in_a_folder_is_harmless(tmp_path):
    """Files outside the index and tensors that can be computed (RoPE's frequencies, a tied head) change nothing."""
    shutil.copytree(GOLDEN / "llama32", tmp_path, dirs_exist_ok=True)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another format")
    in_file(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path)
    in_file(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(tmp_path)
    model, again = load("llama32"), load_model(tmp_path, torch.float32)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


def in_file(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def in_json(file, change):
    def damage(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def in_config(**fields):
    return in_json("config.json", lambda config: config.update(fields))


def in_index(tensor, file):
    return in_json(INDEX, lambda index: index["weight_map"].update({tensor: file}))


DAMAGE = {  # what happened: (to which model, how, what the message names)
    "missing tensor": ("llama2", in_file(lambda t: t.pop(NORM)), [NORM]),
    "extra tensor": ("llama2", in_file(lambda t: t.update(extra=torch.ones(2))), ["model.safetensors", "extra"]),
    "bias": ("llama2", in_file(lambda t: t.update({"lm_head.bias": torch.ones(128)})), ["model.safetensors", "lm_head.bias"]),
    "misshapen tensor": ("llama2", in_file(lambda t: t.update({NORM: torch.ones(31)})), ["model.safetensors", NORM, "[31]", "[32]"]),
    "config of another size": ("llama2", in_config(intermediate_size=65), ["model.safetensors", "mlp", "[65, 32]"]),
    "NaN": ("llama2", in_file(lambda t: t[NORM].__setitem__(3, float("nan"))), ["model.safetensors", NORM, "NaN"]),
    "infinity": ("llama2", in_file(lambda t: t[NORM].__setitem__(3, float("inf"))), ["model.safetensors", NORM]),
    "int8 tensor": ("llama2", in_file(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), ["model.safetensors", NORM, "I8"]),
    "tied to another head": ("llama32", in_file(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})), ["lm_head.weight", "tie"]),
    "no weights": ("llama2", lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "missing shard": ("llama3", lambda folder: (folder / SHARD).unlink(), [SHARD]),
    "truncated shard": ("llama3", lambda folder: os.truncate(folder / SHARD, 20_000), [SHARD]),
    "zero-length shard": ("llama3", lambda folder: os.truncate(folder / SHARD, 0), [SHARD]),
    "zero-length file": ("llama2", lambda folder: os.truncate(folder / "model.safetensors", 0), ["model.safetensors"]),
    "index to a parent": ("llama3", in_index(NORM, f"../{SHARD}"), [INDEX, NORM, "../"]),
    "index to the root": ("llama3", in_index(NORM, f"/tmp/{SHARD}"), [INDEX, NORM, "/tmp"]),
    "index to another shard": ("llama3", in_index("model.embed_tokens.weight", SHARD), [SHARD, "model.embed_tokens.weight"]),
    "index of a lost tensor": ("llama3", in_index("lost", SHARD), [SHARD, "lost"]),
    "index without map": ("llama3", in_json(INDEX, lambda index: index.pop("weight_map")), [INDEX]),
    "index not JSON": ("llama3", lambda folder: (folder / INDEX).write_text('{"weight_map'), [INDEX]),
    "no config": ("llama2", lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config not JSON": ("llama2", lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    "config not text": ("llama2", lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), ["config.json"]),
    "config a list": ("llama2", lambda folder: (folder / "config.json").write_text("[]"), ["config.json"]),
    "no hidden size": ("llama2", in_json("config.json", lambda config: config.pop("hidden_size")), ["config.json", "hidden_size"]),
    "text for a number": ("llama2", in_config(vocab_size="128"), ["config.json", "vocab_size", "'128'"]),
    "other architecture": ("llama2", in_config(model_type="qwen2_moe"), ["config.json", "qwen2_moe"]),
    "unknown RoPE": ("llama3", in_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["config.json", "yarn"]),
    "old RoPE": ("llama2", in_config(rope_scaling={"type": "linear", "factor": 2.0}), ["config.json", "linear"]),
    "RoPE without factor": ("llama3", in_config(rope_scaling={"rope_type": "llama3"}), ["config.json", "factor"]),
    "biases": ("llama2", in_config(attention_bias=True), ["config.json", "attention_bias"]),
    "biases beside Qwen3's norms": ("qwen3", in_config(attention_bias=True), ["config.json", "attention_bias"]),
    "windows switched off": ("qwen3", in_config(layer_types=["full_attention", "sliding_attention"]), ["sliding_attention", "use_sliding_window"]),
    "other attention": ("qwen2", in_config(layer_types=["linear_attention"] * 3), ["config.json", "layer_types", "linear_attention"]),
    "too few layer types": ("qwen2", in_config(layer_types=["full_attention"]), ["config.json", "layer_types", "3"]),
    "missing bias": ("qwen2", in_file(lambda t: t.pop("model.layers.1.self_attn.k_proj.bias")), ["self_attn.k_proj.bias"]),
    "RoPE for each kind of layer": ("qwen3", in_config(rope_parameters={"full_attention": {"rope_theta": 1e6}}), ["rope_parameters", "full_attention"]),
    "quantized": ("llama2", in_config(quantization_config={"quant_method": "gptq"}), ["config.json", "quantization_config"]),
}


def test_windows_of_qwen(tmp_path):
    """Which blocks have a window: by layer_types, else from max_window_layers on, and none unless use_sliding_window says so."""
    shutil.copytree(GOLDEN / "qwen2", tmp_path, dirs_exist_ok=True)
    for fields, windows in [
        ({}, [None, None, 16]),
        ({"max_window_layers": 0}, [16, 16, 16]),
        ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [16, None, 16]),
        ({"layer_types": None, "use_sliding_window": False}, [None] * 3),
        ({"use_sliding_window": True, "sliding_window": None}, [None] * 3),
    ]:
        in_config(**fields)(tmp_path)
        assert model_py.Config.from_folder(tmp_path).windows == windows


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_refused(what, tmp_path):
    """Whatever is wrong with a folder, load_model raises CheckpointError with one line that names it."""
    name, damage, named = DAMAGE[what]
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and "\n" not in message
    assert all(part in message for part in named), message
