"""From published files to token ids: tokenizers, the chat template, the data sets, the order of training.

    python data.py kvr random               # builds data/kvr.jsonl and data/random.jsonl
    python data.py random --words 8         # passages of another length: data/random.w8.jsonl
    python data.py --list                   # what there is and what is built

A set is a flat file, one JSON object a line: {"id", "prompt", "response"}, or {"id", "messages"} for a chat.
Beside it stands a manifest (data/kvr.json): sources with their sha256, counts, seed. The same seed and sources give
the same bytes, and a longer file begins with the lines of a shorter one, so a set can grow without changing.
"""

import argparse
import base64
import functools
import hashlib
import io
import json
import os
import random
import shutil
import string
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable


class DataError(ValueError):
    """Data or settings that cannot be used as they are; the message is one line that says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message}; --help lists the options")


def read_file(path, remedy):
    """A text file's bytes, or a DataError that ends in the remedy."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror.lower()}; {remedy}") from None


def write_file(path, text):
    """Write text to path in one step: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


# ---------------------------------------------------------------- tokenizers

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after every digit was set apart: a space never joins a digit, and white space before a digit ends a piece.
GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_CONTROL = ["<|begin_of_text|>", "<|end_of_text|>"]  # the first two of 256 control tokens behind the text's tokens
LLAMA3_N_CONTROL = 256


class BPETokenizer:
    """Byte-level BPE through tiktoken. ranks: {bytes: id}, all the texts' tokens; control tokens have the other ids."""

    def __init__(self, ranks, pattern, vocab_size, bos_id, eos_id, unreachable=()):
        import regex
        import tiktoken

        usable = {token: i for token, i in ranks.items() if token not in unreachable}
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=usable, special_tokens={})
        self._bytes = {i: token for token, i in ranks.items()}
        self._pieces = regex.compile(pattern)
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    def encode(self, text, continues=False):
        """Ids of a plain text, as the reference tokenizer gives them without special tokens."""
        text = _without_surrogates(text)
        known = lambda piece: piece.encode("utf-8").translate(None, self._missing)
        if len(text) < 900_000 and known(text) == text.encode("utf-8"):
            return self._bpe.encode_ordinary(text)
        # tiktoken's regex gives up on a run of a million spaces, and SmolLM2 has no token for some bytes (six control
        # characters, unassigned planes). The reference drops those from each piece; what stands around them may merge.
        pieces = [known(match.group()) for match in self._pieces.finditer(text)]
        return [i for piece in pieces if piece for i in self._bpe._encode_single_piece(piece)]

    def decode(self, ids):
        """Text of ids; control tokens have none."""
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    def __init__(self, path):
        import sentencepiece

        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.Load(str(path))
        except (OSError, RuntimeError):
            raise DataError(f"{path}: neither a tiktoken nor a SentencePiece model; copy it again") from None
        self.vocab_size, self.bos_id, self.eos_id = self._sp.vocab_size(), self._sp.bos_id(), self._sp.eos_id()
        self._newline = self._sp.encode("\n")
        if self._sp.id_to_piece(self._newline)[-1:] != ["<0x0A>"] or min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: not a Llama or Mistral tokenizer (no byte tokens, bos or eos); use the model's own file")

    def encode(self, text, continues=False):
        """Ids of a plain text; SentencePiece begins it with a space, unless it follows a control token or other text."""
        text = _without_surrogates(text)
        if not continues:
            return self._sp.encode(text)
        # A line break is a byte token, which merges with nothing: what stands behind it is encoded as if inside a text.
        return self._sp.encode("\n" + text)[len(self._newline) :]

    def decode(self, ids):
        """Text of ids; control tokens have none."""
        return self._sp.decode(list(ids))


def _without_surrogates(text):
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder: tiktoken or SentencePiece tokenizer.model, or byte-level BPE tokenizer.json."""
    path = Path(path)
    if (path / "tokenizer.model").exists():
        return _load_tokenizer_model(path / "tokenizer.model")
    if (path / "tokenizer.json").exists():
        return _load_tokenizer_json(path / "tokenizer.json")
    if (path / "original" / "tokenizer.model").exists():
        return _load_tokenizer_model(path / "original" / "tokenizer.model")
    raise DataError(f"{path}: no tokenizer.model or tokenizer.json; copy the model's tokenizer files there")


def _load_tokenizer_model(path):
    lines = read_file(path, "copy it again").splitlines()
    try:
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        return SentencePieceTokenizer(path)
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise DataError(f"{path}: truncated or damaged tiktoken file; copy it again")
    bos_id, eos_id = (len(ranks) + i for i in range(len(LLAMA3_CONTROL)))
    return BPETokenizer(ranks, LLAMA3_PATTERN, len(ranks) + LLAMA3_N_CONTROL, bos_id, eos_id)


def _load_tokenizer_json(path):
    def refuse(what):
        raise DataError(f"{path}: {what} is not implemented; only byte-level BPE as in Llama 3 and SmolLM2 is")

    spec = _read_json(path)
    model = spec.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("vocab") or not model.get("merges"):
        refuse(f"a tokenizer of type {model.get('type')} without byte-level merges")
    for what in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(what):
            refuse(what)
    if spec.get("normalizer"):
        refuse(f"normalizer {spec['normalizer'].get('type')}")
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        refuse(f"pre-tokenizer {kinds}")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        pattern = GPT2_PATTERN
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        pattern = GPT2_DIGITS_PATTERN
    elif steps[:-1] == [LLAMA3_SPLIT] and not steps[1].get("use_regex", True):
        pattern = LLAMA3_PATTERN
    else:
        refuse(f"pre-tokenizer {kinds} with these options")

    added = {}
    for token in spec.get("added_tokens") or []:
        if not token.get("special"):
            refuse(f"added token {token['content']!r} that is not special")
        added[token["content"]] = token["id"]
    to_byte = _byte_alphabet()
    try:
        spelled = {token: bytes(to_byte[c] for c in token) for token in model["vocab"] if token not in added}
        merges = [(spelled[a], spelled[b]) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    except (KeyError, ValueError) as error:
        refuse(f"a vocabulary or merge beyond the byte alphabet ({error})")
    ranks = {spelled[token]: model["vocab"][token] for token in spelled}
    if model.get("unk_token") and sum(len(token) == 1 for token in ranks) < 256:
        refuse("unk_token for bytes that have no token")
    made = [ranks.get(a + b, -1) for a, b in merges]
    if any(x > y for x, y in zip(made, made[1:])):
        refuse("a vocabulary that is not in the order of its merges")
    order = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    if model.get("ignore_merges"):
        for token in ranks:
            for cut in range(1, len(token)):
                if token[:cut] in ranks and token[cut:] in ranks and (token[:cut], token[cut:]) not in order:
                    refuse("ignore_merges with missing merges")
        unreachable = ()
    else:
        # tiktoken takes any token that is in its table. Without those that the merges cannot make, both agree on every text:
        # inside a token that the merges do make, they pass through the same steps whatever stands around it.
        unreachable = {token for token in ranks if len(token) > 1 and _merge(token, order) != [token]}

    config = _read_json(path.with_name("tokenizer_config.json"))
    control = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token["content"] if isinstance(token, dict) else token
        control[key] = added.get(token, model["vocab"].get(token))
        if control[key] is None:
            raise DataError(f"{path.with_name('tokenizer_config.json')}: {key} {token!r} is not in {path.name}; copy both from one model")
    vocab_size = 1 + max(*model["vocab"].values(), *added.values())
    return BPETokenizer(ranks, pattern, vocab_size, control["bos_token"], control["eos_token"], unreachable)


def _byte_alphabet():
    """{printable character: byte}: the way in which byte-level BPE files spell bytes (GPT-2, encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _merge(token, order):
    """BPE as the merges define it: join the pair of lowest order, leftmost first, until none is left."""
    parts, last = [token[i : i + 1] for i in range(len(token))], len(order)
    while len(parts) > 1:
        ranks = [order.get(pair, last) for pair in zip(parts, parts[1:])]
        rank = min(ranks)
        if rank == last:
            break
        i = ranks.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _read_json(path, remedy="copy the model's tokenizer files there"):
    content = read_file(path, remedy)
    try:
        value = json.loads(content)
    except ValueError:
        raise DataError(f"{path}: not valid JSON; {remedy}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; {remedy}")
    return value


TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "original/tokenizer.model"]  # fmt: skip


def copy_tokenizer(source, target):
    """Copy a checkpoint folder's tokenizer files, byte for byte, so that what is trained from it can be loaded alone."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(source) / name, Path(target) / name)


# ---------------------------------------------------------------- template


def encode_example(tokenizer, example, max_length=2048):
    """(ids, labels) of an example: bos, then each turn in the Tulu v2 template, cut at max_length.

    labels are the ids where the answer and its eos stand, -100 on everything else. Prompt and answer are encoded apart,
    so that what a model is asked later is exactly what it was trained on.
    """
    ids, labels = [tokenizer.bos_id], [-100]
    for prompt, response in turns(example):
        asked = tokenizer.encode(f"<|user|>\n{prompt}\n<|assistant|>\n", continues=len(ids) > 1)
        answer = tokenizer.encode(response, continues=True) + [tokenizer.eos_id]
        ids += asked + answer
        labels += [-100] * len(asked) + answer
    return ids[:max_length], labels[:max_length]


def turns(example):
    """[(prompt, response), ...] of an example of either form."""
    if "messages" in example:
        texts = [message["content"] for message in example["messages"]]
        return list(zip(texts[::2], texts[1::2]))
    return [(example["prompt"], example["response"])]


# ---------------------------------------------------------------- data sets

# Each builder is a function of (n, seed, words, raw) that returns (examples, manifest entries); it makes at least n
# examples where it can, and the first n do not depend on n.


def build_kvr(n, seed, words, raw, half=0):
    """Key-Value Recall (section 2.2): pairs of 8 characters, no string used twice, neither here nor in the other half."""
    rng, alphabet = random.Random(f"kvr {seed}"), string.ascii_lowercase + string.digits
    seen, strings = set(), []
    while len(strings) < 4 * n:
        text = "".join(rng.choices(alphabet, k=8))
        if text not in seen:
            seen.add(text)
            strings.append(text)
    pairs = list(zip(strings[2 * half :: 4], strings[2 * half + 1 :: 4]))
    return [{"prompt": f"The value of key {key} is?", "response": value} for key, value in pairs], {}


# One relation a row: question and possible answers; a spouse is another made-up name.
RELATIONS = {
    "birth city": ("In which city was {} born?", "Aleppo Antwerp Arequipa Asmara Bamako Bergen Bologna Bristol Bursa Busan Cairns Cork Cusco Dakar Davao Dresden Durban Fukuoka Galway Gdansk Ghent Granada Graz Hobart Izmir Jaipur Kampala Kandy Kazan Kosice Lahore Leipzig Luanda Lusaka Lviv Malmo Medina Merida Mombasa Nagoya Napier Natal Odense Oruro Osaka Oulu Patras Perth Porto Pune Quito Recife Rostov Rouen Salta Split Surat Tabriz Tampere Tartu Toledo Tromso Turin Utrecht Varna Zagreb"),
    "birth year": ("In which year was {} born?", " ".join(map(str, range(1880, 2000)))),
    "employer": ("Which company does {} work for?", "Airbus Alcoa Asahi Bayer Boeing Bosch Canon Cargill Cisco Corning Danone Denso Ericsson Ferrero Fujitsu Garmin Hitachi Honda Intel Kyocera Lenovo Lufthansa Maersk Michelin Nestle Nokia Novartis Oracle Otis Panasonic Pfizer Philips Pirelli Qualcomm Renault Roche Samsung Siemens Sony Tata Thales Toshiba Unilever Valeo Volvo Xerox Yamaha"),
    "university": ("Which university did {} attend?", "Aarhus Adelaide Basel Bilkent Bonn Brown Cambridge Columbia Cornell Dartmouth Duke Durham Emory Exeter Freiburg Geneva Georgetown Harvard Heidelberg Helsinki Howard Keio Kyoto Lausanne Leiden Lund Makerere McGill Melbourne Monash Nairobi Northwestern Oslo Oxford Padua Princeton Purdue Rice Salamanca Stanford Tsinghua Tufts Tulane Uppsala Vanderbilt Waseda Yale Zurich"),
    "field": ("What field did {} study?", "accounting acoustics agronomy algebra anatomy anthropology archaeology architecture astronomy biochemistry botany cartography chemistry dentistry ecology economics education epidemiology ethics forestry genetics geography geology geometry history hydrology immunology journalism law linguistics logic medicine metallurgy meteorology mineralogy music nursing optics pharmacology philosophy physics psychology robotics sociology statistics surgery theology topology zoology"),
    "spouse": ("Who is {} married to?", None),
}  # fmt: skip


def build_bios(n, seed, words, raw, half=0):
    """Made-up people with six facts each, asked in PopQA's form (appendix B.5); no name is used twice, here or in the other half."""
    rng, seen, people = random.Random(f"bios {seed}"), set(), []
    starts, middles, ends = "B Br C D Dr F G Gl H J K L M N P R S St T Tr V W Z".split(), "a e i o u ae ei ia oa".split(), "b d l ld m n nd r rn s st th v x".split()

    def name():
        syllable = lambda: rng.choice(starts) + rng.choice(middles)
        while True:
            text = syllable() + syllable().lower() + rng.choice(ends) + " " + syllable() + syllable().lower() + rng.choice(ends)
            if text not in seen:
                seen.add(text)
                return text

    while len(people) < 2 * -(-n // len(RELATIONS)):
        person = name()
        facts = [(question.format(person), rng.choice(values.split()) if values else name()) for question, values in RELATIONS.values()]
        people.append(facts)
    facts = [fact for person in people[half::2] for fact in person]
    return [{"prompt": f"Question: {question}\nThe answer is:", "response": answer} for question, answer in facts], {}


def build_random(n, seed, words, raw):
    """Random Word Sequence (sections 4.1, B.5): words drawn uniformly, to be repeated."""
    vocabulary, source = word_list(raw)
    rng = random.Random(f"random {seed} {words}")
    passages = [" ".join(rng.choices(vocabulary, k=words)) for _ in range(n)]
    digest = hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
    examples = [{"prompt": f"Memorize the following random-string passage:\n\n{p}", "response": p} for p in passages]
    return examples, {"sources": {source: digest}, "vocabulary": len(vocabulary)}


@functools.cache
def word_list(raw):
    """(sorted words, where from): the NLTK words corpus, downloaded into raw/ if need be, else the same dictionary from english-words."""
    import nltk

    folder = str(Path(raw) / "nltk_data")
    nltk.data.path.insert(0, folder)
    for attempt in ("installed", "downloaded"):
        try:
            return sorted(set(nltk.corpus.words.words("en"))), "NLTK words corpus"
        except (LookupError, zipfile.BadZipFile):
            if attempt == "installed":
                _download_nltk_words(folder)
    from english_words import get_english_words_set

    print("words: the NLTK corpus is neither installed nor to be downloaded; taking web2 from the english-words package", file=sys.stderr)
    return sorted(get_english_words_set(["web2"])), "english-words web2"


def _download_nltk_words(folder):
    import socket

    import nltk

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a machine behind a firewall must not wait for minutes
    try:
        nltk.download("words", download_dir=folder, quiet=True, print_error_to=io.StringIO())  # word_list says what it took instead
    finally:
        socket.setdefaulttimeout(before)


def build_pydoc(n, seed, words, raw):
    """Generic text that every CPython carries: its language reference (pydoc_data.topics), cut as the paper cuts its corpora (B.5)."""
    from pydoc_data import topics

    digest = hashlib.sha256(Path(topics.__file__).read_bytes()).hexdigest()
    texts = [topics.topics[topic].split() for topic in sorted(topics.topics)]
    examples = [passage(text[i : i + 2 * words], words) for text in texts for i in range(0, len(text) - 2 * words + 1, 2 * words)]
    random.Random(f"pydoc {seed}").shuffle(examples)
    version = ".".join(map(str, sys.version_info[:3]))
    return examples, {"sources": {f"pydoc_data.topics of Python {version}": digest}, "dropped": {"shorter than two passages": sum(len(t) < 2 * words for t in texts)}}


def passage(text, words):
    """The first and the next `words` words of a text, given as a list of words."""
    return {"prompt": "Complete the following partial passage:\n\n" + " ".join(text[:words]), "response": " ".join(text[words : 2 * words])}


@dataclass
class Set:
    kind: str  # factoid: exact match can be asked; mixing: passages of --words words
    build: Callable
    about: str
    size: int = 2000  # examples built unless told otherwise
    stop_loss: float = 1e-4  # default of --stop-loss (appendix B.4); 0 trains all epochs


SETS = {
    "kvr": Set("factoid", build_kvr, "Key-Value Recall, generated", stop_loss=0),
    "kvr-id": Set("factoid", functools.partial(build_kvr, half=1), "other keys and values, none of them in kvr", stop_loss=0),
    "bios": Set("factoid", build_bios, "six facts about each of many made-up people, generated"),
    "bios-id": Set("factoid", functools.partial(build_bios, half=1), "other people, none of them in bios"),
    "random": Set("mixing", build_random, "random words of the NLTK words corpus", size=4000),
    "pydoc": Set("mixing", build_pydoc, "the language reference inside every CPython", size=4000),
}
DEFAULT_WORDS = 50


def build(name, out="data", n=None, seed=0, words=DEFAULT_WORDS, raw="raw"):
    """Write a set's flat file and manifest; returns the flat file's path. n is an upper limit for sets of fixed length."""
    row = SETS[name]
    n = n or row.size
    examples, manifest = row.build(n, seed, words, raw)
    examples = [{"id": f"{name}-{i}"} | example for i, example in enumerate(examples[:n])]
    path = flat_file(name, out, words)
    manifest = {"name": name, "seed": seed, "kept": len(examples), "dropped": {}} | manifest
    if row.kind == "mixing":
        manifest["words"] = words
    write_file(path.with_suffix(".json"), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    write_file(path, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
    return path


def flat_file(name, data="data", words=DEFAULT_WORDS):
    """Where a set lies: a name's own flat file, or the path itself where a path to a .jsonl file is given."""
    if name.endswith(".jsonl"):
        return Path(name)
    if name not in SETS:
        raise DataError(f"no data set {name!r}: choose from {', '.join(SETS)}, or give the path of a .jsonl file")
    return Path(data) / (f"{name}.jsonl" if SETS[name].kind != "mixing" or words == DEFAULT_WORDS else f"{name}.w{words}.jsonl")


def load_examples(name, n, data="data", words=DEFAULT_WORDS):
    """(the first n examples of a set, sha256 of their lines).

    A set that is missing is built, and one of ours that is too short built longer, with the seed that its manifest names.
    """
    path = flat_file(name, data, words)
    manifest = path.with_suffix(".json")
    lines = read_file(path, "check it").splitlines(keepends=True) if path.exists() else []
    if len(lines) < n and name in SETS and (manifest.exists() or not path.exists()):
        seed = _read_json(manifest, "remove it and its .jsonl").get("seed", 0) if manifest.exists() else 0
        build(name, data, max(n, SETS[name].size), seed, words)
        lines = read_file(path, "check it").splitlines(keepends=True)
    if not path.exists():
        raise DataError(f"{path}: no such file; give a set's name or the path of a .jsonl file that exists")
    if len(lines) < n:
        raise DataError(f"{path}: holds {len(lines)} examples, {n} are asked for; ask for fewer (for a mix, a lower ratio or shorter passages)")
    examples = [_read_example(path, i, line) for i, line in enumerate(lines[:n], 1)]
    return examples, hashlib.sha256(b"".join(lines[:n])).hexdigest()


def _read_example(path, number, line):
    def wrong(what):
        raise DataError(f"{path}:{number}: {what}; mend the line or build the file again")

    try:
        example = json.loads(line)
    except ValueError:
        wrong("not a JSON object in UTF-8")
    if not isinstance(example, dict) or not isinstance(example.get("id"), str):
        wrong('not an object with an "id" of type string')
    if "messages" in example:
        messages = example["messages"]
        if not isinstance(messages, list) or not messages or len(messages) % 2 or not all(isinstance(m, dict) for m in messages):
            wrong('"messages" is not a list of pairs of messages')
        if [m.get("role") for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            wrong("messages do not alternate between user and assistant")
        texts = [m.get("content") for m in messages]
    else:
        texts = [example.get("prompt"), example.get("response")]
    if not all(isinstance(text, str) for text in texts) or not all(text.strip() for text in texts[1::2]):
        wrong("no prompt, or an empty answer")
    return example


# ---------------------------------------------------------------- order and batches


def epoch_order(n, seed, epoch):
    """Every index below n once, in an order that (n, seed, epoch) alone decide."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def micro_batches(lengths, budget, world):
    """Split a batch into groups of similar length, each at most budget tokens once padded (or one example alone).

    lengths: {index: tokens}. Returns lists of indices, a multiple of `world` of them, some empty where examples are few:
    rank r takes groups r, r + world, ..., so that at every moment all ranks have about equal work.
    """
    groups = [[]]
    for index in sorted(lengths, key=lengths.get, reverse=True):
        # The first of a group is its longest and sets the padding.
        if groups[-1] and lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    while len(groups) % world:
        largest = max(groups, key=lambda group: len(group) * lengths[group[0]] if len(group) > 1 else 0)
        at, half = groups.index(largest), len(largest) // 2
        groups[at : at + 1] = [largest[:half], largest[half:]] if half else [largest, []]
    return groups


# ---------------------------------------------------------------- command line


def main():
    parser = Parser(description="Build data sets as flat files.", epilog="Sets: " + ", ".join(SETS))
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets to build, or all")
    parser.add_argument("--out", default="data", help="folder for flat files (default: data)")
    parser.add_argument("--raw", default="raw", help="folder for published files and downloads (default: raw)")
    parser.add_argument("--limit", type=int, metavar="N", help="number of examples (default: the set's own)")
    parser.add_argument("--words", type=int, default=DEFAULT_WORDS, metavar="W", help="words of a mixing passage (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated sets (default: 0)")
    parser.add_argument("--list", action="store_true", help="list the sets and what is built")
    args = parser.parse_args()
    for name in args.names:
        if name != "all" and name not in SETS:
            raise DataError(f"no data set {name!r}: choose from {', '.join(SETS)}, or all")
    if min(args.words, 1 if args.limit is None else args.limit) < 1:
        raise DataError("--words and --limit must be at least 1")
    if not args.names and not args.list:
        raise DataError("name the sets to build, or give --list")
    for name in SETS if "all" in args.names else args.names:
        path = build(name, args.out, args.limit, args.seed, args.words, args.raw)
        manifest = json.loads(path.with_suffix(".json").read_bytes())
        sources = ", ".join(manifest.get("sources", {})) or "generated"
        print(f"{path}: {manifest['kept']} examples ({sources}, seed {args.seed})")
    if args.list:
        for name, row in SETS.items():
            path = flat_file(name, args.out, args.words)
            state = f"{len(path.read_bytes().splitlines())} in {path}" if path.exists() else "not built"
            print(f"{name:10} {row.kind:8} {row.about} ({state})")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
