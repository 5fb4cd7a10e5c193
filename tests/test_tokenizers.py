"""load_tokenizer against the reference libraries, whose ids lie in golden/tokens.json, and the template against its parts."""

import base64
import json
import shutil

import jinja2
import pytest
from conftest import GOLDEN

from data import DataError, chat_template, encode_example, load_tokenizer
from evaluate import is_correct, is_wrong

NAMES = ["llama3", "mistral", "smollm2"]
ROWS = json.loads((GOLDEN / "tokens.json").read_bytes())
CHATS = json.loads((GOLDEN / "chats.json").read_bytes())
CONTROL = {"llama3": ("<|begin_of_text|>", "<|end_of_text|>"), "mistral": ("<s>", "</s>"), "smollm2": ("<|im_start|>", "<|im_end|>")}


@pytest.fixture(scope="module")
def tokenizers(llama3_folder, mistral_folder, smollm2_folder):
    return {name: load_tokenizer(folder) for name, folder in zip(NAMES, [llama3_folder, mistral_folder, smollm2_folder])}


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_reference(tokenizers, name):
    """Ids equal those of tokenizers and mistral-common, on their own and inside a text."""
    for row in ROWS:
        assert tokenizers[name].encode(row["text"]) == row[name], repr(row["text"])
        assert tokenizers[name].encode(row["text"], continues=True) == row.get(f"{name}_inside", row[name]), repr(row["text"])


@pytest.mark.parametrize("name", NAMES)
def test_decoding_returns_the_text(tokenizers, name):
    """decode(encode(text)) == text, but for what a tokenizer cannot spell: bytes without a token, Mistral's \u2581 for a space."""
    cannot = {"llama3": "", "mistral": "\u2581", "smollm2": "\x04\x06\x13\x14\x16\x1d\U00040000"}[name]
    for text in [row["text"] for row in ROWS if not set(row["text"]) & set(cannot)]:
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_no_right_answer_is_given_up(tokenizers, name):
    """No beginning of what is_correct accepts is wrong, also where a token ends within a character; what differs is, once it is written."""
    tokenizer, tried = tokenizers[name], 0
    for text in [row["text"] for row in ROWS] + ["ΟΔΟΣ Α", "a \ufffd", "日本語の本"]:
        for answer in (text, text.upper(), f" \n {text.lower()}  "):
            ids = tokenizer.encode(answer)
            if is_correct(tokenizer.decode(ids), text):
                tried += 1
                assert not any(is_wrong(tokenizer.decode(ids[:n]), text) for n in range(len(ids) + 1)), (answer, text)
                assert not text.strip() or is_wrong(tokenizer.decode(ids) + "!", text) and is_wrong("!" + tokenizer.decode(ids), text)
    assert tried > 2 * len(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_gives_no_control_token(tokenizers, name):
    """A control token's name in a text is spelled out, and decode returns it; the control tokens themselves have no text."""
    tokenizer = tokenizers[name]
    for text in ["<|begin_of_text|><|end_of_text|>", "<|im_start|><|im_end|>", "<s></s>", "a</s>b", "[INST]", "<|endoftext|>"]:
        ids = tokenizer.encode(text)
        assert len(ids) > 1 and not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_control_tokens(tokenizers):
    """Vocabulary size, bos and eos equal those of the published config.json (SmolLM2: the Instruct model's)."""
    published = {"llama3": (128256, 128000, 128001), "mistral": (32768, 1, 2), "smollm2": (49152, 1, 2)}
    assert {name: (t.vocab_size, t.bos_id, t.eos_id) for name, t in tokenizers.items()} == published


@pytest.mark.parametrize("name", NAMES)
def test_odd_texts(tokenizers, name):
    """A lone surrogate is encoded as U+FFFD, and a million spaces or letters come back whole."""
    tokenizer = tokenizers[name]
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    for text in [" " * 10**6 + "x", "a" * 10**6]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------- files


PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE files write as themselves
SPELLED = {b: chr(b) for b in PLAIN} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PLAIN)))}


def spell(token):
    return "".join(SPELLED[b] for b in token)


def byte_level_json(ranks, merges, pattern=None):
    """A tokenizer.json as on the hub: Llama 3's with its pattern, otherwise one like GPT-2's."""
    control = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    steps = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}]
    if pattern:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    return {
        "added_tokens": [{"id": len(ranks) + i, "content": token, "special": True} for i, token in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "unk_token": None, "byte_fallback": False, "ignore_merges": pattern is not None,
                  "vocab": {spell(token): i for token, i in ranks.items()}, "merges": [[spell(a), spell(b)] for a, b in merges]},
    }  # fmt: skip


def write_json(folder, spec):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}))
    return folder


LETTERS = {bytes([b]): b for b in range(256)}
WORDS = LETTERS | {b"ab": 256, b"bc": 257, b"abc": 258}


def test_tokenizer_json_equals_tiktoken_file(llama3_folder, tmp_path):
    """Llama 3's first 20,000 tokens: tokenizer.json, with every split of a token as a merge, equals original/tokenizer.model."""
    lines = (llama3_folder / "tokenizer.model").read_bytes().splitlines(keepends=True)[:20000]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(cuts, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ours = load_tokenizer(write_json(tmp_path / "hub", byte_level_json(ranks, merges, pattern)))
    (tmp_path / "meta" / "original").mkdir(parents=True)
    (tmp_path / "meta" / "original" / "tokenizer.model").write_bytes(b"".join(lines))
    reference = load_tokenizer(tmp_path / "meta")
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (reference.vocab_size, reference.bos_id, reference.eos_id) == (20256, 20000, 20001)
    for row in ROWS:
        assert ours.encode(row["text"]) == reference.encode(row["text"]), repr(row["text"])


def test_merges_decide_not_the_vocabulary(tmp_path):
    """b and c merge first here, so that no merges make "abc": a + bc is not one; with ab first, they do."""
    merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]
    assert load_tokenizer(write_json(tmp_path / "ab", byte_level_json(WORDS, merges))).encode("abc abc") == [258, 32, 258]
    ranks = LETTERS | {b"bc": 256, b"ab": 257, b"abc": 258}
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    assert load_tokenizer(write_json(tmp_path / "bc", byte_level_json(ranks, merges))).encode("abc ab") == [97, 256, 32, 257]


REFUSED = {
    "normalizer": (lambda spec: spec.update(normalizer={"type": "NFC"}), "normalizer NFC"),
    "pre-tokenizer": (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .*Whitespace"),
    "no pre-tokenizer": (lambda spec: spec.update(pre_tokenizer=None), "pre-tokenizer"),
    "other pattern": (lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Isolated", "invert": False}), "pre-tokenizer"),
    "unigram": (lambda spec: spec["model"].update(type="Unigram"), "Unigram"),
    "fallback": (lambda spec: spec["model"].update(byte_fallback=True), "BPE without byte-level merges"),
    "order": (lambda spec: spec["model"]["merges"].reverse(), "order of its merges"),
    "lost merge": (lambda spec: spec["model"].update(ignore_merges=True), "missing merges"),
    "ordinary added token": (lambda spec: spec["added_tokens"][5].update(special=False), "reserved_special_token_3"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refuses_other_tokenizer_json(tmp_path, change, message):
    """A tokenizer.json that would be read wrongly raises DataError, which names the file and what is not implemented."""
    spec = byte_level_json(WORDS, [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")])
    change(spec)
    with pytest.raises(DataError, match=f"{write_json(tmp_path, spec)}/tokenizer.json: .*{message}.* is not implemented"):
        load_tokenizer(tmp_path)


def test_refuses_missing_and_damaged_files(llama3_folder, mistral_folder, smollm2_folder, tmp_path):
    """A missing, truncated or foreign file raises DataError, which names it and the remedy."""
    with pytest.raises(DataError, match=f"{tmp_path}: no tokenizer.model or tokenizer.json; copy"):
        load_tokenizer(tmp_path)
    model, spec, config = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    for content in [b"", (llama3_folder / model.name).read_bytes()[:1000], (llama3_folder / model.name).read_bytes()[:100007]]:
        model.write_bytes(content)  # nothing, too few tokens, cut inside a token
        with pytest.raises(DataError, match=f"{model}: .*; copy it again"):
            load_tokenizer(tmp_path)
    lines = (llama3_folder / model.name).read_bytes().splitlines(keepends=True)
    model.write_bytes(b"".join(lines[:1000] + lines[1001:]))
    with pytest.raises(DataError, match=f"{model}: truncated or damaged tiktoken file; copy it again"):
        load_tokenizer(tmp_path)
    model.write_bytes((mistral_folder / model.name).read_bytes()[:200000])
    with pytest.raises(DataError, match=f"{model}: neither a tiktoken nor a SentencePiece model; copy it again"):
        load_tokenizer(tmp_path)
    model.unlink()

    shutil.copy(smollm2_folder / spec.name, spec)
    with pytest.raises(DataError, match=f"{config}: no such file or directory; copy"):
        load_tokenizer(tmp_path)
    config.write_text('{"bos_token": "<s>", "eos_token": "<|im_end|>"}')
    with pytest.raises(DataError, match=f"{config}: bos_token '<s>' is not in tokenizer.json"):
        load_tokenizer(tmp_path)
    spec.write_bytes(spec.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{spec}: not valid JSON; copy the model's tokenizer files there"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- template


def test_answer_has_no_dummy_space(tokenizers):
    """Mistral: prompt and answer encoded apart equal the text of both encoded at once."""
    mistral, asked = tokenizers["mistral"], "<|user|>\nThe value of key e6395973 is?\n<|assistant|>\n"
    for answer in [row["text"] for row in ROWS]:
        assert mistral.encode(asked) + mistral.encode(answer, continues=True) == mistral.encode(asked + answer)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_the_template(tokenizers, name):
    """bos, <|user|>, prompt, <|assistant|>, answer, eos; labels are the answer's and eos's ids; a cut keeps the beginning."""
    tokenizer = tokenizers[name]
    example = {"id": "kvr-0", "prompt": "The value of key e6395973 is?", "response": "p7xk2q9z"}
    asked = [tokenizer.bos_id] + tokenizer.encode("<|user|>\nThe value of key e6395973 is?\n<|assistant|>\n")
    ids, labels = encode_example(tokenizer, example)
    answer = ids[len(asked) :]
    assert ids[: len(asked)] == asked and labels == [-100] * len(asked) + answer
    assert answer[-1] == tokenizer.eos_id and tokenizer.decode(answer) == "p7xk2q9z"
    assert encode_example(tokenizer, example, max_length=len(asked) + 2) == (ids[: len(asked) + 2], labels[: len(asked) + 2])


@pytest.mark.parametrize("name", NAMES)
def test_chat_is_the_template_turn_by_turn(tokenizers, name):
    """Two turns: the ids spell both in the template, and the labels both answers, each with its eos, and nothing else."""
    tokenizer = tokenizers[name]
    texts = ["Hi there", "Hello! What is it?", "2 + 2 =", "4."]
    example = {"id": "chat-0", "messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]}
    ids, labels = encode_example(tokenizer, example)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == "<|user|>\nHi there\n<|assistant|>\nHello! What is it?<|user|>\n2 + 2 =\n<|assistant|>\n4."
    assert all(label in (-100, i) for i, label in zip(ids, labels)) and len(ids) == len(labels)
    answers = [label for label in labels if label != -100]
    first = answers.index(tokenizer.eos_id)
    assert tokenizer.decode(answers[:first]) == "Hello! What is it?" and tokenizer.decode(answers[first + 1 : -1]) == "4."
    assert answers[-1] == labels[-1] == tokenizer.eos_id and answers.count(tokenizer.eos_id) == 2


@pytest.mark.parametrize("name", NAMES)
def test_chat_template(tokenizers, llama3_folder, mistral_folder, smollm2_folder, tmp_path, name):
    """What transformers makes of a chat by the chat_template.jinja of a stage are the ids that the stage was trained on."""
    shutil.copytree({"llama3": llama3_folder, "mistral": mistral_folder, "smollm2": smollm2_folder}[name], tmp_path / "model")
    if name == "mistral":
        (tmp_path / "model" / "tokenizer_config.json").write_text('{"legacy": false}')
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template(tokenizers[name], tmp_path / "model"))
    bos, eos = CONTROL[name]
    for row in CHATS:
        assert template.render(messages=row["chat"], bos_token=bos, eos_token=eos) == row[name]["text"]
        ids, labels = encode_example(tokenizers[name], {"id": "chat", "messages": row["chat"]})
        assert ids == row[name]["whole"]
        asked = max(place for place, label in enumerate(labels) if label == -100) + 1
        assert ids[:asked] == row[name]["asked"]
