"""Random edits of the files that commands read, and the commands on them: each works, or refuses in one line.

`pytest tests/test_edits.py --long` makes 200 edits instead of 24. A seed draws the same edit each time, but for what
differs in the files themselves, as times do; a failing one tells the folder in which it is left.
"""

import codecs
import gzip
import json
import math
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ONE = "train.py --stage 1 --model models/tiny --data data/own.jsonl --num-examples 4 --epochs 20 --lr 0.03 --out"
TWO = "train.py --stage {depth} --model {folder} --data bios --num-examples 4 --epochs 1 --batch-size 2 --out"
POPQA = "train.py --stage 1 --model models/tiny --data popqa --num-examples 2 --out new --dry-run"
ASK = "evaluate.py models/tiny --data popqa popqa-id"
SPLIT = "evaluate.py models/tiny --split popqa --shots 1"
OVERLAP = "data.py --overlap popqa gsm8k k-pile"

READERS = {  # of a file that a pattern matches: one of these commands is given
    "raw/*/**/*.*": ["data.py {set} --out new"],
    "mine/*": ["data.py {file} --out new --words 5"],
    "models/tiny/*.json": [f"{ONE} new --dry-run", ASK, "probe.py models/tiny --data data/own.jsonl"],
    "runs/**/*.json*": ["evaluate.py --tables runs", "evaluate.py {folder}", "evaluate.py {folder} --lost",
                        "evaluate.py {folder} --text k-pile", "probe.py {folder}", f"{TWO} new"],
    "begun/**/*.json*": [f"{ONE} begun --resume"],
    "data/own*": ["evaluate.py runs/one/two", "probe.py runs/one", "data.py mine/own.jsonl",
                  "evaluate.py --overlap runs"],
    "data/bios*": ["evaluate.py runs/one/two", "evaluate.py runs/one --data bios", "data.py --list"],
    "data/popqa*": [ASK, SPLIT, POPQA, f"{POPQA} --unfiltered", "data.py --list", OVERLAP],
    "data/[gk]*": [OVERLAP, "evaluate.py runs/one --text k-pile", f"{POPQA} --unfiltered --mix k-pile --fewer"],
}  # fmt: skip

WRITES = {  # what a command that succeeds may write over: its own results, what it goes on with or builds longer
    "data.py": r"data/own\..*", "train.py": r"begun/.*", "probe.py": r".*/probe\..*",
    "evaluate.py": r"runs/[^/]*|.*/(eval\.json|(predictions|text)\..*)|data/(popqa\.(un)?f|bios\.).*",
}  # fmt: skip

STOPPED = """\"\"\"train.py, but that its third step comes with a SIGTERM.\"\"\"
import os, signal, train
steps, step = iter(range(3)), train.train_step
def train_step(*args, **options):
    if next(steps) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **options)
train.train_step = train_step
train.main()
"""


def write_mine(folder):
    """A user's own files, one of each kind."""
    folder.mkdir()
    rows = [{"prompt": f"What has {x}?", "response": "ox", "aliases": ["an ox"]} for x in "ABCü"]
    own = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / "own.jsonl").write_bytes(own)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(own, mtime=0))
    chat = [{"role": role, "content": "Hi."} for role in ("system", "user", "assistant")]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "questions.json").write_text(json.dumps([{"question": f"Who met {x}?", "answers": ["Bo"]} for x in "AB"]))
    (folder / "tasks.tsv").write_text('instruction\toutput\nAdd 1 and 2.\t3\n"Say ""yes""."\tyes\n')
    (folder / "words.txt").write_text("A few words,\nmore of them on a line of their own, and enough.\n" * 3)


def make_model(folder):
    """A tiny Llama in shards, with a tokenizer.json of single bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.SHARD_BYTES", 8_000)
        tiny_llama(folder, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=258)
    (folder / "tokenizer.model").unlink()
    tokenizer = Tokenizer(models.BPE(dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256))), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of all that is edited: published files and a user's own, sets, a model, two stages and what is made of
    them, a run that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(ROOT / "tests/raw", folder / "raw")
    with zipfile.ZipFile(folder / "raw/entityqa/dataset.zip", "w") as archive:
        for file in sorted((folder / "raw/entityqa").rglob("*.json")):
            archive.writestr(zipfile.ZipInfo(str(file.relative_to(folder / "raw/entityqa"))), file.read_bytes())
    shutil.rmtree(folder / "raw/entityqa/dataset")
    write_mine(folder / "mine")
    make_model(folder / "models/tiny")
    (folder / "stopped.py").write_text(STOPPED)
    two = TWO.format(depth=2, folder="runs/one")
    for command in ("data.py popqa gsm8k k-pile mine/own.jsonl --slice 2", SPLIT, f"{ONE} runs/one --precision fp32",
                    f"{two} runs/one/two", "evaluate.py runs/one --text k-pile", "evaluate.py runs/one",
                    "evaluate.py runs/one/two --text k-pile", "evaluate.py runs/one/two",
                    "probe.py runs/one runs/one/two", "evaluate.py --tables runs"):  # fmt: skip
        run(folder, *command.split())
    stopped = run(folder, folder / "stopped.py", *f"{ONE} begun --precision fp32".split()[1:], ok=False)
    assert "go on with --resume" in stopped.stderr
    return folder


# ---------------------------------------------------------------- edits: each gives a file's new content


def of_a(piece, change):
    """Puts change(rng, piece) in the place of a piece of the file; piece: a pattern."""
    def edit(rng, file):
        content = file.read_bytes()
        match = rng.choice(list(re.finditer(piece, content, re.DOTALL)))
        return content[: match.start()] + change(rng, match[0]) + content[match.end() :]

    return edit


def of_a_field(change):
    """Does change(rng, container, key) to a value somewhere in the JSON of a file, at any depth."""
    def edit(rng, file):
        content = file.read_bytes()
        inside = values = [json.loads(part) for part in ([content] if file.suffix == ".json" else content.splitlines())]
        key = rng.randrange(len(values))
        while isinstance(inside[key], (dict, list)) and inside[key] and rng.random() < 0.8:
            inside = inside[key]
            key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        change(rng, inside, key)
        return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()

    return edit


def put(*values):
    return of_a_field(lambda rng, inside, key: inside.__setitem__(key, rng.choice(values)))


BYTE, LINE = b".", b"[^\n]+\n?"
EDITS = {
    "a byte flipped": of_a(BYTE, lambda rng, byte: bytes([byte[0] ^ 1 << rng.randrange(8)])),
    "a field dropped": of_a_field(lambda rng, inside, key: inside.__delitem__(key)),
    "a line cut": of_a(LINE, lambda rng, line: line[: rng.randrange(len(line))] + b"\n"),
    "a field retyped": put("text", 7, 2.5, True, [], ["text"], {}, {"a": 1}),
    "truncated": lambda rng, file: file.read_bytes()[: rng.randrange(file.stat().st_size)],
    "a field nulled": put(None),
    "UTF-8 with a byte order mark": lambda rng, file: codecs.BOM_UTF8 + file.read_bytes(),
    "UTF-16": lambda rng, file: file.read_bytes().decode("latin-1").encode("utf-16"),
    "ü in Latin-1": of_a(BYTE, lambda rng, byte: b"\xfc"),
    "a line doubled": of_a(LINE, lambda rng, line: 2 * line),
    "a line without its beginning": of_a(LINE, lambda rng, line: line[rng.randrange(len(line)) :]),
    "a field of an odd number": put(0, -1, 3, math.nan, math.inf),
    "emptied": lambda rng, file: b"",
}


def drawn(seed, folder):
    """(file, its new content, what was edited, a command that reads it); kinds of edits and of files take turns."""
    rng, kind, pattern = random.Random(seed), list(EDITS)[seed % len(EDITS)], list(READERS)[seed % len(READERS)]
    suffixes = (".json", ".jsonl") if "field" in kind else ("",)
    file = rng.choice(sorted(file for file in folder.glob(pattern) if file.is_file() and file.name.endswith(suffixes)))
    name, command = file.relative_to(folder), rng.choice(READERS[pattern])
    names = {"file": name, "folder": name.parent, "set": name.parts[1], "depth": len(name.parts) - 1}
    return name, EDITS[kind](rng, file), kind, command.format(**names)


# ---------------------------------------------------------------- what must hold


def pytest_generate_tests(metafunc):
    metafunc.parametrize("seed", range(200 if metafunc.config.getoption("--long") else 24))


def test_edit(made, tmp_path, seed):
    """Status 0, or 2 and a last line that names the file or its folder; nothing is written over or left unfinished."""
    name, content, kind, command = drawn(seed, made)
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    (folder / name).write_bytes(content)
    files = lambda: filter(Path.is_file, folder.rglob("*"))
    contents = lambda: {str(file.relative_to(folder)): file.read_bytes() for file in files()}
    before = contents()
    script, *options = command.split()
    done = run(folder, script, *options, ok=False)
    told = f"seed {seed}, {name}: {kind}; in {folder}: {command}\nstatus {done.returncode}, {done.stderr}"
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, told
    if done.returncode:
        last = done.stderr.splitlines()[-1]
        assert re.match(rf"{script}: .*({re.escape(str(name))}|\b{re.escape(str(name.parent))}[/:,;])", last), told
    after, may = contents(), "" if done.returncode else WRITES[script]
    over = [file for file in before if after.get(file) != before[file] and not re.fullmatch(may, file)]
    left = [file for file in after.keys() - before.keys() if file.endswith(".tmp") or not after[file]]
    assert not over + left, f"written over: {over}, left: {left}\n{told}"
