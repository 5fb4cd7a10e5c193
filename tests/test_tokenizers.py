"""load_tokenizer against the reference libraries, whose ids lie in golden/tokens.json, and the template against its parts."""

import json
import shutil
import unicodedata

import jinja2
import pytest
import sentencepiece
from conftest import GOLDEN, hub_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
from data import DataError, encode_example, load_tokenizer
from evaluate import is_correct, is_wrong, spelled
from train import chat_template

ROWS = json.loads((GOLDEN / "tokens.json").read_bytes())
CHATS = json.loads((GOLDEN / "chats.json").read_bytes())
CONTROL = {"llama3": ("<|begin_of_text|>", "<|end_of_text|>"), "mistral": ("<s>", "</s>"), "smollm2": ("<|im_start|>", "<|im_end|>"),
           "qwen3": (None, "<|im_end|>"), "mistral_prepend": ("<s>", "</s>"), "mistral_first": ("<s>", "</s>")}  # fmt: skip
PUBLISHED = {  # (vocabulary, bos, eos) of config.json or tokenizer_config.json
    "llama3": (128256, 128000, 128001), "llama3_1": (128256, 128000, 128009), "mistral": (32768, 1, 2),
    "mistral_prepend": (32768, 1, 2), "mistral_first": (32768, 1, 2), "smollm2": (49152, 1, 2), "qwen3": (151669, None, 151645),
    "gemma3": (262145, 2, 106), "deepseek_v3": (128815, 0, 1),
}  # fmt: skip
GOLDEN_OF = {"llama3_1": "llama3", "mistral_prepend": "mistral", "mistral_first": "mistral"}  # whose ids another form has


def mistral_json(folder, target, style):
    """Mistral's tokenizer.model as tokenizer.json: what writes the space before a text is a normalizer, or Metaspace."""
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    plain = {piece: i for i, piece in enumerate(pieces) if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))}
    merges = []
    for piece, i in plain.items():
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in plain and piece[n:] in plain]
        merges += [(-model.get_score(i), i, plain[left], plain[right]) for left, right in cuts]
    bpe = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": dict(zip(pieces, range(len(pieces)))),
           "merges": [[pieces[left], pieces[right]] for *_, left, right in sorted(merges)]}  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    spec = {
        "added_tokens": [{"id": i, "content": pieces[i], "special": True} | flags for i in range(len(pieces)) if model.is_control(i)],
        "normalizer": None, "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": bpe,
    }  # fmt: skip
    if style == "prepend":
        spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    else:
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": style, "split": False}
    return write_json(target, spec, bos_token="<s>", eos_token={"__type": "AddedToken", "content": "</s>"}, tokenizer_class="LlamaTokenizer")


def write_json(folder, spec, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(llama3_folder, mistral_folder, smollm2_folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("mistral")
    found = {name: hub_tokenizer(name) for name in ("llama3_1", "qwen3", "gemma3", "deepseek_v3")}
    found |= {f"mistral_{style}": mistral_json(mistral_folder, made / style, style) for style in ("prepend", "first")}
    return found | {"llama3": llama3_folder, "mistral": mistral_folder, "smollm2": smollm2_folder}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_equal_the_reference(tokenizers, name):
    """Ids equal those of tokenizers, transformers and mistral-common, on their own and inside a text."""
    golden = GOLDEN_OF.get(name, name)
    for row in ROWS:
        if not (name == "mistral_first" and row["text"][:1] in (" ", "\u2581")):  # Metaspace puts none before another
            assert tokenizers[name].encode(row["text"]) == row[golden], repr(row["text"])
        assert tokenizers[name].encode(row["text"], continues=True) == row.get(f"{golden}_inside", row[golden]), repr(row["text"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_decoding_returns_the_text(tokenizers, name):
    """decode(encode(text)) == text, but for what a tokenizer cannot spell: SmolLM2 some bytes, the others \u2581 for a space, Qwen what is not NFC."""
    tokenizer, cannot = tokenizers[name], "\u2581" if name.startswith(("mistral", "gemma")) else ""
    if name == "smollm2":
        cannot = "\x04\x06\x13\x14\x16\x1d\U00040000"
    for text in [row["text"] for row in ROWS if not set(row["text"]) & set(cannot)]:
        if name != "mistral_first" or not text.startswith(" "):  # the library takes the space for one of its own
            assert tokenizer.decode(tokenizer.encode(text)) == (unicodedata.normalize("NFC", text) if name == "qwen3" else text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_right_answer_is_given_up(tokenizers, name):
    """No beginning of what is_correct accepts is wrong, also where a token ends within a character; what differs is, once it is written.

    What is learned as an answer is accepted, also where a normalizer has composed its characters.
    """
    tokenizer, tried = tokenizers[name], 0
    for text in [row["text"] for row in ROWS] + ["ΟΔΟΣ Α", "a \ufffd", "日本語の本", "Cafe\u0301 A\u030a", "\u1100\u1161"]:
        right = spelled(tokenizer, text)
        _, labels = encode_example(tokenizer, {"id": "fact", "prompt": "What?", "response": text})
        assert is_correct(tokenizer.decode([label for label in labels[:-1] if label != -100]), right)
        for answer in (text, text.upper(), f" \n {text.lower()}  "):
            ids = tokenizer.encode(answer)
            if is_correct(tokenizer.decode(ids), right):
                tried += 1
                assert not any(is_wrong(tokenizer.decode(ids[:n]), right) for n in range(len(ids) + 1)), (answer, text)
                assert not right.strip() or is_wrong(tokenizer.decode(ids) + "!", right) and is_wrong("!" + tokenizer.decode(ids), right)
    assert tried > 2 * len(ROWS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_plain_text_gives_no_control_token(tokenizers, name):
    """A control token's name in a text is spelled out, and decode returns it; the control tokens themselves have no text."""
    tokenizer = tokenizers[name]
    for text in ["<|begin_of_text|><|end_of_text|>", "<|im_start|><|im_end|>", "<s></s>", "a</s>b", "[INST]", "<|endoftext|>", "<bos><end_of_turn>",
                 "<\uff5cend\u2581of\u2581sentence\uff5c>"]:  # fmt: skip
        ids = tokenizer.encode(text)
        assert len(ids) > 1 and not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        spelled_out = text.replace("\u2581", " ") if name.startswith(("mistral", "gemma")) else text
        assert tokenizer.decode([*data.start_ids(tokenizer), *ids, tokenizer.eos_id]) == spelled_out


def test_control_tokens(tokenizers):
    """Vocabulary size, bos and eos equal those of the published config.json (SmolLM2: the Instruct model's)."""
    assert {name: (t.vocab_size, t.bos_id, t.eos_id) for name, t in tokenizers.items()} == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_odd_texts(tokenizers, name):
    """A lone surrogate is encoded as U+FFFD, and a million spaces or letters come back whole."""
    tokenizer = tokenizers[name]
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    for text in ["x" + " " * 10**6 + "x", "a" * 10**6]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------- files


def letters(lacks="", merges=(), **changes):
    """A tokenizer.json of single bytes, as the library itself writes it."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(lacks))
    vocab = {token: i for i, token in enumerate(["<unk>", "<end>", *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    spec = json.loads(tokenizer.to_str())
    return spec | {"model": spec["model"] | changes}


def test_what_a_tokenizer_json_must_have(tmp_path):
    """Refused by name: chance, an eos that text can give or that nobody names, a text that has no ids of its own."""
    for changes, config, message in [
        ({"dropout": 0.1}, {"eos_token": "<end>"}, "tokenizer.json: dropout, .*set it to null"),
        ({}, {"eos_token": "a"}, "tokenizer.json: some plain text gives its 'a'; use another"),
        ({"lacks": "z"}, {"eos_token": "<end>"}, "tokenizer.json: some plain text gives its '<unk>'; use another"),
        ({"merges": [("<", "e"), ("<e", "n"), ("<en", "d"), ("<end", ">")]}, {"eos_token": "<end>"}, "gives its '<end>'; use another"),
        ({}, {"eos_token": None}, "tokenizer_config.json: names no eos_token; add"),
        ({}, {"eos_token": "<end>", "tokenizer_class": "LlamaTokenizer"}, "tokenizer_config.json: names no bos_token; add .* or null"),
        ({}, {"eos_token": "\ud83d"}, "tokenizer_config.json: eos_token .* is not in tokenizer.json; copy both"),
        ({}, {"eos_token": ["<end>"]}, "tokenizer_config.json: eos_token .* is not in tokenizer.json; copy both"),
        ({"type": "Bigram"}, {"eos_token": "<end>"}, "tokenizer.json: not read by the tokenizers library .*; copy"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tokenizer(write_json(tmp_path, letters(**changes), **config))
    spec = letters()
    spec["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(DataError, match="tokenizer.json: begins texts with a space and has no byte tokens"):
        load_tokenizer(write_json(tmp_path, spec, eos_token="<end>"))


def test_who_names_control_tokens(tmp_path):
    """special_tokens_map.json is asked first, but not beside an added_tokens_decoder; add_bos_token may take bos away."""
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<unk>"}, "eos_token": {"content": "<end>"}}')
    for config, bos_id, eos_id in [({"eos_token": "<unk>"}, 0, 1), ({"eos_token": "<unk>", "added_tokens_decoder": {}}, None, 0),
                                   ({"add_bos_token": False}, None, 1)]:  # fmt: skip
        tokenizer = load_tokenizer(write_json(tmp_path, letters(), **config))
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, bos_id, eos_id)
        assert tokenizer.decode([*tokenizer.encode("a<end>d"), eos_id]) == "a<end>d" and ("bos_token" in chat_template(tokenizer, tmp_path)) == (bos_id == 0)


def test_special_tokens_beyond_the_embedding(tmp_path):
    """A padding token that no text can have needs no row of the embedding; one that a text can have needs it."""
    for special, largest in ((True, 257), (False, 258)):
        tokenizer = Tokenizer.from_str(json.dumps(letters()))
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["[PAD]"])
        tokenizer = load_tokenizer(write_json(tmp_path, tokenizer.to_str(), eos_token="<end>"))
        assert (tokenizer.vocab_size, tokenizer.largest_id) == (259, largest)


def test_padding_and_cutting_are_passed_over(tmp_path):
    """What a tokenizer.json says of lengths, as a fine-tuning tool leaves it there, changes no ids."""
    spec = letters()
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    padded = load_tokenizer(write_json(tmp_path, tokenizer.to_str(), eos_token="<end>"))
    assert padded.decode(padded.encode("abcd")) == "abcd" and len(padded.encode("abcd")) == 4


def test_both_files(folders, tmp_path, capsys):
    """tokenizer.json is taken where it can be; where tokenizer.model gives a text other ids, or cannot be read, one line says so."""
    shutil.copytree(folders["llama3_1"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "original").mkdir()
    for model, said in [(folders["llama3"] / "tokenizer.model", ""), (folders["mistral"] / "tokenizer.model", "gives other ids than tokenizer.json, which is taken")]:
        shutil.copy(model, tmp_path / "original/tokenizer.model")
        assert load_tokenizer(tmp_path).eos_id == 128009
        errors = capsys.readouterr().err
        assert said in errors and errors.count("\n") == bool(said)
    (tmp_path / "original/tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert load_tokenizer(tmp_path).eos_id == 128009 and "tokenizer.json is taken" in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").unlink()  # without it nothing names tokenizer.json's eos
    shutil.copy(folders["llama3"] / "tokenizer.model", tmp_path / "original/tokenizer.model")
    assert load_tokenizer(tmp_path).eos_id == 128001 and not capsys.readouterr().err


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
    with pytest.raises(DataError, match=f"{spec}: not read by the tokenizers library .*; copy the model's tokenizer files there"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- template


def test_answer_has_no_dummy_space(tokenizers):
    """Mistral, in each form: prompt and answer encoded apart equal the text of both encoded at once."""
    asked = "<|user|>\nThe value of key e6395973 is?\n<|assistant|>\n"
    for mistral in (tokenizers[name] for name in ("mistral", "mistral_prepend", "mistral_first")):
        for answer in [row["text"] for row in ROWS]:
            assert mistral.encode(asked) + mistral.encode(answer, continues=True) == mistral.encode(asked + answer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_example_is_the_template(tokenizers, name):
    """bos (Qwen has none), <|user|>, prompt, <|assistant|>, answer, eos; labels are the answer's and eos's ids; a cut keeps the beginning."""
    tokenizer = tokenizers[name]
    example = {"id": "kvr-0", "prompt": "The value of key e6395973 is?", "response": "p7xk2q9z"}
    asked = [] if name == "qwen3" else [tokenizer.bos_id]
    asked += tokenizer.encode("<|user|>\nThe value of key e6395973 is?\n<|assistant|>\n")
    ids, labels = encode_example(tokenizer, example)
    answer = ids[len(asked) :]
    assert ids[: len(asked)] == asked and labels == [-100] * len(asked) + answer
    assert answer[-1] == tokenizer.eos_id and tokenizer.decode(answer) == "p7xk2q9z"
    assert encode_example(tokenizer, example, max_length=len(asked) + 2) == (ids[: len(asked) + 2], labels[: len(asked) + 2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_chat_is_the_template_turn_by_turn(tokenizers, name):
    """Two turns: the ids spell both in the template, and the labels both answers, each with its eos, and nothing else."""
    tokenizer = tokenizers[name]
    texts = ["Hi there", "Hello! What is it?", "2 + 2 =", "4."]
    example = {"id": "chat-0", "messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]}
    ids, labels = encode_example(tokenizer, example)
    assert name == "qwen3" or ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == "<|user|>\nHi there\n<|assistant|>\nHello! What is it?<|user|>\n2 + 2 =\n<|assistant|>\n4."
    assert all(label in (-100, i) for i, label in zip(ids, labels)) and len(ids) == len(labels)
    answers = [label for label in labels if label != -100]
    first = answers.index(tokenizer.eos_id)
    assert tokenizer.decode(answers[:first]) == "Hello! What is it?" and tokenizer.decode(answers[first + 1 : -1]) == "4."
    assert answers[-1] == labels[-1] == tokenizer.eos_id and answers.count(tokenizer.eos_id) == 2


@pytest.mark.parametrize("name", CONTROL)
def test_chat_template(tokenizers, folders, tmp_path, name):
    """What transformers makes of a chat by the chat_template.jinja of a stage are the ids that the stage was trained on."""
    shutil.copytree(folders[name], tmp_path / "model")
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


def test_space_behind_bos(tokenizers, tmp_path):
    """Where transformers reads tokenizer.json as it is, the template has a space behind bos if the file itself puts none there."""
    for name, written in (("mistral_prepend", False), ("mistral_first", True), ("qwen3", False), ("gemma3", False)):
        assert ("bos_token + ' '" in chat_template(tokenizers[name], tmp_path)) == written
