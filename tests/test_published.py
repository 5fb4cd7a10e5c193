"""The published sets, from small files in their published formats (tests/raw): what comes out, downloads, damaged files, overlap, the split."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest
from conftest import FORKING, ROOT

import data
import evaluate
from data import DataError, build, encode_example, load_examples, load_tokenizer, turns
from evaluate import BaseModel, familiarity
from model import content_id, setup_device

RAW = ROOT / "tests" / "raw"
PUBLISHED = [name for name, row in data.SETS.items() if row.read]
BASE = BaseModel("base", "models/base", "0123abcd" + "0" * 56)
FACTS = [name for name in PUBLISHED if data.SETS[name].kind == "factoid"]


def cli(cwd, *args, env=None):
    return subprocess.run([FORKING.python(), str(ROOT / "data.py"), *map(str, args)], cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def built(tmp_path, name, raw=RAW, **options):
    """(rows, manifest) of a set built from raw."""
    path, *_ = build(name, tmp_path, raw=raw, **options)
    return rows(path), manifest(path)


# ---------------------------------------------------------------- what comes out


def test_facts(tmp_path):
    """Questions and answers are PopQA's and TriviaQA's of appendix B.5, letter by letter; obj and Value are the targets, the rest aliases."""
    by_prompt = {name: {row["prompt"]: row for row in built(tmp_path, name)[0]} for name in FACTS}
    row = by_prompt["popqa"]["Question: What is New Lands's author?\nThe answer is:"]
    assert row["response"] == "Charles Fort" and row["aliases"] == ["Charles Fort", "Charles Hoy Fort"]
    assert by_prompt["popqa"]['Question: Who was the director of The "Blue" Hour?\nThe answer is:']["response"] == "Ana Roth"
    row = by_prompt["triviaqa"]["Question: Which city does David Soul come from?\nThe answer is:"]
    assert row["response"] == "Chicago" and "Chi-Town" in row["aliases"]
    row = by_prompt["webqa"]["Question: who are ida holm's parents?\nThe answer is:"]
    assert row["response"] == "Ole Holm" and row["aliases"] == ["Ole Holm", 'Kari "K" Holm']
    assert by_prompt["webqa"]["Question: where is verdal?\nThe answer is:"]["response"] == "Norway"
    row = by_prompt["entityqa"]["Question: Where was Ida Holm born?\nThe answer is:"]
    assert row["response"] == "Bergen" and row["aliases"] == ["Bergen", "Bjørgvin"]
    assert {prompt: row["response"] for prompt, row in by_prompt["lama"].items()} == {
        "Ida Holm was born in": "Bergen", "Piet Kuiper was born in": "Groningen", "Pedro Arce was born in": "Cusco",
        "[MASK] gave its name to Columbia.": "Columbus", "The lamp was lit with": "oil", "You may find [MASK] at a quarry.": "stone"}  # fmt: skip


def test_generic_text(tmp_path):
    """Passages are those of appendix B.5, letter by letter: the first words, then as many more; shorter documents are counted."""
    found, counts = built(tmp_path, "k-pile")
    assert found[0]["prompt"].startswith("Complete the following partial passage:\n\nProcessing hyperspectral images allows you to decode images")
    assert found[0]["prompt"].endswith("external attributes") and found[0]["response"].startswith("(for example, indicating")
    assert found[0]["response"].endswith("the hyperspectral (multichannel) image is converted")
    assert counts["dropped"] == {"shorter than two passages": 1} and counts["words"] == 50
    found, _ = built(tmp_path, "fineweb")
    assert found[0]["prompt"].endswith("I'm sorry, I shouldn't have been using") and found[0]["response"].startswith("that animation in my paid")
    found, _ = built(tmp_path, "a-pile", words=49)  # of which the paper prints 49 words
    assert found[0]["prompt"].startswith("Complete the following partial passage:\n\n--- abstract: 'The purpose of this article")
    assert found[0]["prompt"].endswith("the same") and found[0]["response"].startswith("problem for the spaces X_i .' address:")


def test_instructions(tmp_path):
    """Non-factoid sets hold the authors' prompts and answers: the first APPS solution with its format, MATH with its boxes, chats whole."""
    found, counts = built(tmp_path, "apps")
    answers = {row["prompt"]: row["response"] for row in found}
    assert answers == {
        "Question:\nRead a number and print its double.\nUse Standard Input format\nAnswer:": "print(2 * int(input()))",
        "Question:\nGiven a list, return its largest element.\n\nSTARTER CODE:\nclass Solution:\n    def top(self, a: List[int]) -> int:\n"
        "Use Call-Based format\nAnswer:": "class Solution:\n    def top(self, a):\n        return max(a)"}  # fmt: skip
    assert counts["dropped"] == {"competition problems": 1, "no solution": 1}
    assert {row["response"].rpartition("\n")[2] for row in built(tmp_path, "gsm8k")[0]} == {"#### 7", "#### 30"}
    assert "It is $\\boxed{\\frac{a^{2}}{b^{2}}}$." in {row["response"] for row in built(tmp_path, "math")[0]}
    assert "def add(a, b):\n    return a + b" in {row["response"] for row in built(tmp_path, "evolcode")[0]}
    chats, _ = built(tmp_path, "ultrachat")
    assert turns(chats[0]) == [("What is a fjord?", "A long, narrow inlet of the sea."), ("Name one.", "The Geirangerfjord.")]
    assert turns(chats[1]) == [("Hello!", "Hi. How can I help?")]


def test_conflicting_questions_are_dropped(tmp_path):
    """A question that repeats with another answer is dropped with all its answers, and counted; one that merely repeats stays once."""
    examples = [{"prompt": q, "response": a} for q, a in ["ab", "ac", "de", "dE", "fg"]]
    dropped = {}
    assert data._without_conflicts(examples, dropped) == [{"prompt": "d", "response": "e"}, {"prompt": "f", "response": "g"}]
    assert dropped == {"question repeats with another answer": 2, "question repeats": 1}
    assert built(tmp_path, "popqa")[1]["dropped"] == {"question repeats with another answer": 2}


def test_other_published_forms(tmp_path):
    """The same rows come out of archives, folders and the hub's parquet files as out of the plain files."""
    import pyarrow
    import pyarrow.parquet

    raw = tmp_path / "raw"
    for name in ("triviaqa", "webqa", "lama", "entityqa", "math", "apps", "k-pile"):
        (raw / name).mkdir(parents=True)
    trivia = [{key.lower(): value for key, value in row.items()} for row in json.loads((RAW / "triviaqa/unfiltered-web-train.json").read_text())["Data"]]
    for row in trivia:
        row["answer"] = {"aliases": row["answer"]["Aliases"], "value": row["answer"]["Value"]}
        del row["entitypages"], row["searchresults"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(trivia), raw / "triviaqa/train-00000-of-00001.parquet")
    web = [{"url": "", "question": row["prompt"][10:].partition("\n")[0], "answers": row["aliases"]} for row in built(tmp_path / "a", "webqa")[0]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(web), raw / "webqa/train-00000-of-00001.parquet")
    for name in ("lama", "entityqa"):
        with zipfile.ZipFile(raw / name / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in (RAW / name).rglob("*.json*"):
                archive.write(file, file.relative_to(RAW / name))
            archive.writestr("__MACOSX/._P19.train.json", b"\0\1")
    with tarfile.open(raw / "math/MATH.tar", "w") as archive:
        archive.add(RAW / "math/MATH", "MATH")
    for problem in map(json.loads, open(RAW / "apps/train.jsonl")):
        folder = raw / "apps/APPS/train" / f"{problem['id']:04}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"difficulty": problem["difficulty"], "url": ""}))
        for part, file in (("question", "question.txt"), ("solutions", "solutions.json"), ("input_output", "input_output.json"), ("starter_code", "starter_code.py")):
            if problem[part]:
                (folder / file).write_text(problem[part])
    with gzip.open(raw / "k-pile/part.jsonl.gz", "wb") as file:
        file.write((RAW / "k-pile/knowledge_pile.jsonl").read_bytes())
    texts = lambda found: sorted((turns(row), row.get("aliases")) for row in found)
    for name in ("triviaqa", "webqa", "lama", "entityqa", "math", "apps", "k-pile"):
        assert texts(built(tmp_path / "b", name, raw)[0]) == texts(built(tmp_path / "a", name)[0]), name
    assert manifest(tmp_path / "b/apps.jsonl")["dropped"] == manifest(tmp_path / "a/apps.jsonl")["dropped"]


def test_the_users_own_files(tmp_path):
    """Facts and texts of the user's own are read by their fields, plain or packed, and land in data/ under the file's name."""
    import pyarrow
    import pyarrow.parquet

    facts = [{"question": "Who?", "answers": ["Me", "I"]}, {"prompt": "P", "response": "R"}, {"instruction": "I", "output": "O"},
             {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]  # fmt: skip
    expected = [[("Question: Who?\nThe answer is:", "Me")], [("P", "R")], [("I", "O")], [("u", "a")]]
    lines = "".join(json.dumps(fact) + "\n" for fact in facts).encode()
    (tmp_path / "one.jsonl").write_bytes(lines)
    (tmp_path / "two.json").write_text(json.dumps(facts))
    (tmp_path / "three.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "four.jsonl.zst"), "zstd") as file:
        file.write(lines)
    for file in ("one.jsonl", "two.json", "three.jsonl.gz", "four.jsonl.zst"):
        found, _ = built(tmp_path / "data", str(tmp_path / file))
        assert sorted(turns(row) for row in found) == sorted(expected)
    text = " ".join(map(str, range(25)))
    (tmp_path / "notes.txt").write_text(text[:30] + "\n" + text[30:])
    pyarrow.parquet.write_table(pyarrow.table({"text": [text, "short"]}), tmp_path / "table.parquet")
    found, counts = built(tmp_path / "data", str(tmp_path / "table.parquet"), words=5)
    assert (found[0]["prompt"], found[0]["response"]) == ("Complete the following partial passage:\n\n0 1 2 3 4", "5 6 7 8 9") and counts["dropped"] == {"shorter than two passages": 1}
    done = cli(tmp_path, "notes.txt", "--words", 5)
    assert done.returncode == 0 and "data/notes.jsonl: 2 examples" in done.stdout, done.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_bytes(tmp_path, name):
    """The same files and seed give the same bytes from another place as well; sources are named with size and sha256."""
    shutil.copytree(RAW / name, tmp_path / "elsewhere" / name)
    first, second = build(name, tmp_path / "a", raw=RAW), build(name, tmp_path / "b", raw=tmp_path / "elsewhere")
    for file in first[0].parent.iterdir():
        assert file.read_bytes() == (second[0].parent / file.name).read_bytes()
    for place, source in manifest(first[0])["sources"].items():
        content = (RAW / place).read_bytes()
        assert source == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_every_example_is_supervised_on_its_answers_alone(tmp_path, llama3_folder, mistral_folder, smollm2_folder):
    """Labels of every example of every published set decode to its responses, each with eos, under the three tokenizers."""
    for folder in (llama3_folder, mistral_folder, smollm2_folder):
        tokenizer = load_tokenizer(folder)
        for example in (row for name in PUBLISHED for row in built(tmp_path, name)[0]):
            ids, labels = encode_example(tokenizer, example)
            assert all(label in (-100, i) for i, label in zip(ids, labels))
            answers, kept = [[]], [label for label in labels if label != -100]
            for label in kept:
                answers[-1].append(label)
                if label == tokenizer.eos_id:
                    answers.append([])
            assert answers.pop() == []
            assert [tokenizer.decode(answer[:-1]) for answer in answers] == [response for _, response in turns(example)], example


def test_slices(tmp_path):
    """The first 2,000 facts of a set are its own, the second 2,000 NAME-id's, and what is left joins the set again; none is in both."""
    header, row = (RAW / "popqa/test.tsv").read_text().splitlines()[:2]
    (tmp_path / "raw/popqa").mkdir(parents=True)
    (tmp_path / "raw/popqa/test.tsv").write_text("\n".join([header, *(row.replace("New Lands's", f"Book {i}'s") for i in range(4500))]) + "\n")
    path, second = build("popqa", tmp_path / "data", raw=tmp_path / "raw")
    first, other = rows(path), rows(second)
    assert (len(first), len(other)) == (2500, 2000) and {row["prompt"] for row in first}.isdisjoint(row["prompt"] for row in other)
    assert load_examples("popqa-id", 2000, tmp_path / "data")[0] == other
    assert load_examples("popqa", 2000, tmp_path / "data")[0] == first[:2000]
    assert cli(tmp_path, "popqa", "--slice", "30").returncode == 0
    assert manifest(path)["slice"] == 30 and [row["id"] for row in rows(second)] == [f"popqa-{i}" for i in range(30, 60)]
    assert [row["id"] for row in rows(path)[28:32]] == ["popqa-28", "popqa-29", "popqa-60", "popqa-61"]
    assert evaluate.load_pool("popqa", tmp_path / "data")[0] == [*first[:2000], *other, *first[2000:]]
    pool = evaluate.load_pool("popqa", tmp_path / "data")[0]
    data.write_flat(evaluate.split_file("popqa", "unfamiliar", BASE, tmp_path / "data"), pool[:70], {"base_model_sha256": BASE.sha256, "slice": 30})
    for name, expected in (("popqa.unfamiliar", [*pool[:30], *pool[60:70]]), ("popqa-id.unfamiliar", pool[30:60])):
        assert evaluate.load_set(name, None, tmp_path / "data", base_model=BASE)[0] == expected
        assert evaluate.facts_at_hand(name, 2000, tmp_path / "data", base_model=BASE) == len(expected)
    build("popqa", tmp_path / "data", raw=tmp_path / "raw", size=20)
    with pytest.raises(DataError, match=r"sorted when slices of popqa had 30 facts, not 20; remove .*/popqa\.\*-0123abcd\.\* and run"):
        evaluate.load_set("popqa-id.unfamiliar", 20, tmp_path / "data", base_model=BASE)


def test_a_set_without_a_second_slice(tmp_path):
    """A set that was built shorter stays so when its second slice, which is empty, is asked for."""
    (path,) = build("popqa", tmp_path / "data", n=3, raw=RAW)
    with pytest.raises(DataError, match="holds 0 examples for popqa-id"):
        load_examples("popqa-id", 1, tmp_path / "data", raw=RAW)
    assert len(rows(path)) == 3 and data.at_hand("popqa-id", 5, tmp_path / "data", raw=RAW) == 0


def test_what_is_at_hand(tmp_path, monkeypatch):
    """How many examples there are is known of what is built or lies in raw/, and of what is generated; nothing is downloaded to tell."""
    monkeypatch.setattr(data, "fetch", None)
    monkeypatch.chdir(tmp_path)
    assert data.at_hand("webqa", 2000) is None and data.at_hand("popqa-id.unfamiliar", 2000) is None
    assert data.at_hand("kvr", 9000) == 9000 and not (tmp_path / "data").exists()
    assert 100 < data.at_hand("pydoc", 10**6, words=50) < 10**4, "the language reference ends"
    shutil.copytree(RAW, "raw")
    assert data.at_hand("popqa", 2000) == len(rows(tmp_path / "data/popqa.jsonl")) == 4 and data.at_hand("popqa-id", 2000) == 0
    assert evaluate.facts_at_hand("popqa.unfamiliar", 3, base_model=BASE) == 3, "at most: nobody was asked yet"
    assert data.at_hand("gone.jsonl", 3) is None


def test_all_and_list(tmp_path):
    """data.py all builds what can be had, names what cannot with the reason, and ends with status 1; --list tells both apart."""
    shutil.copytree(RAW, tmp_path / "raw", ignore=shutil.ignore_patterns("math", "popqa"))
    (tmp_path / "raw/gsm8k/train.jsonl").write_text("{\n")
    done = cli(tmp_path, "all", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 1
    missing = done.stderr.partition("Not built:")[2]
    assert re.findall(r"^  ([\w-]+):", missing, re.MULTILINE) == ["popqa", "gsm8k", "math"], done.stderr
    assert "put test.tsv into raw/popqa/" in missing and "raw/gsm8k/train.jsonl:1" in missing and "raw/math/" in missing
    assert not (tmp_path / "raw/popqa").exists()
    listed = {line.split()[0]: line for line in cli(tmp_path, "--list").stdout.splitlines()}
    assert "4 in data/entityqa.jsonl" in listed["entityqa"] and "not built; raw/gsm8k/train.jsonl" in listed["gsm8k"]
    assert "not built; download https://" in listed["popqa"] and "not built; put" in listed["math"]


def test_a_long_file_is_read_no_further_than_needed(tmp_path):
    """Of a streamed corpus only what the asked documents take is read; a longer mix later reads on from the same beginning."""
    (tmp_path / "raw/k-pile").mkdir(parents=True)
    with open(tmp_path / "raw/k-pile/part.jsonl", "w") as file:
        file.writelines(json.dumps({"content": f"{i} " + "lorem ipsum dolor " * 60}) + "\n" for i in range(20_000))
        file.write("not JSON\n")
    (path,) = build("k-pile", tmp_path / "data", 100, raw=tmp_path / "raw")
    (source,) = manifest(path)["sources"].values()
    assert len(rows(path)) == 100 and source["bytes"] < 3 * 2**20 < os.path.getsize(tmp_path / "raw/k-pile/part.jsonl")
    (longer,) = build("k-pile", tmp_path / "longer", 200, raw=tmp_path / "raw")
    assert longer.read_bytes().startswith(path.read_bytes())


# ---------------------------------------------------------------- bad input

GOOD = {"question": "How many?", "answer": "One."}


@pytest.mark.parametrize("line, message", [
    (b'{"question": "How many?"', "not a line of JSON"),
    (b'{"question": "How m\xffny?", "answer": "1"}', "not UTF-8"),
    (b'{"question": "How many?"}', 'no text in field "answer"'),
    (b'{"question": "How many?", "answer": 1}', 'no text in field "answer"'),
    (b'{"question": "How many?", "answer": " "}', 'field "answer" is empty'),
    (b'[1, 2]', "not a JSON object"),
    (b"[" * 100_000, "not a line of JSON"),
])  # fmt: skip
def test_malformed_lines(tmp_path, line, message):
    """A malformed line stops the build with file and line and leaves nothing; --skip-bad passes over it and counts it."""
    (tmp_path / "raw/gsm8k").mkdir(parents=True)
    (tmp_path / "raw/gsm8k/train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    done = cli(tmp_path, "gsm8k")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"raw/gsm8k/train.jsonl:2: {message}" in done.stderr and "--skip-bad" in done.stderr
    assert not (tmp_path / "data").exists()
    found, counts = built(tmp_path / "data", "gsm8k", tmp_path / "raw", skip_bad=1)
    assert len(found) == 1 and counts["bad"] == 1


def test_malformed_table_rows(tmp_path):
    """A PopQA row with too few fields, an open quote or answers that are no JSON is named by its line."""
    header, good = (RAW / "popqa/test.tsv").read_text().splitlines()[:2]
    file = tmp_path / "raw/popqa/test.tsv"
    file.parent.mkdir(parents=True)
    for bad, message in ((good.rpartition("\t")[0], "test.tsv:3: 16 fields, the first line has 17"), (good.rpartition("\t")[0] + "\tCharles", "test.tsv:3: .*JSON"),
                         ('"open' + good, "test.tsv:3: ")):  # fmt: skip
        file.write_text(f"{header}\n{good}\n{bad}\n")
        with pytest.raises(DataError, match=message):
            build("popqa", tmp_path / "data", raw=tmp_path / "raw")
    assert not (tmp_path / "data").exists()


def packed(kind, members):
    """Bytes of an archive of {name: content}."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


LINES = b"".join(json.dumps({"sub_label": f"S{i * 7919}", "obj_label": "O", "predicate_id": "P19"}).encode() + b"\n" for i in range(2000))


@pytest.mark.parametrize("file, content, message", [
    ("data.zip", packed("zip", {"data/TREx/P19.jsonl": LINES})[:-300], "truncated or damaged"),
    ("data.zip", packed("zip", {"data/TREx/P19.jsonl": LINES}).replace(b"\x00\x00\x00", b"\x00\x01\x00", 3), "damaged|holds a file"),
    ("data.tar.gz", packed("tar", {"data/TREx/P19.jsonl": LINES})[:2000], "truncated or damaged"),
    ("data.zip", packed("zip", {"../TREx/P19.jsonl": LINES}), "leaves its folder"),
    ("data.tar.gz", packed("tar", {"data/../../TREx/P19.jsonl": LINES}), "leaves its folder"),
    ("data.zip", packed("zip", {"data/TREx/P19.jsonl": b" " * 200_000}), "unpacks to more than 150000 bytes"),
    ("data.tar.gz", packed("tar", {"data/TREx/P19.jsonl": b" " * 200_000}), "unpacks to more than 150000 bytes"),
    ("relations.jsonl", b"<!DOCTYPE html><html>Sign in</html>", "a web page where data should be"),
    ("data.zip", b"<!DOCTYPE html><html>Sign in</html>", "a web page where data should be"),
    ("data.zip", packed("zip", {"data/TREx/P19.jsonl": LINES}), "no template for relation P19"),
    ("data.zip", packed("zip", {"readme": b"x"}), "no usable example"),
])  # fmt: skip
def test_damaged_files(tmp_path, monkeypatch, file, content, message):
    """Truncated, damaged, oversized and disguised files end in one line that names them, and leave nothing behind."""
    monkeypatch.setattr(data, "UNPACKED_LIMIT", 150_000)
    (tmp_path / "raw/lama").mkdir(parents=True)
    (tmp_path / "raw/lama" / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        build("lama", tmp_path / "data", raw=tmp_path / "raw")
    assert f"raw/lama/{file}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists() and [path.name for path in (tmp_path / "raw/lama").iterdir()] == [file] and len(list(tmp_path.iterdir())) == 1


def test_damaged_parquet_and_json(tmp_path):
    """A truncated parquet file or JSON array is named, with the line where there are lines."""
    for name, source in (("fineweb", "train-00000-of-00001.parquet"), ("evolcode", "EvolInstruct-Code-80k.json")):
        target = tmp_path / "raw" / name / source
        target.parent.mkdir(parents=True)
        target.write_bytes((RAW / name / source).read_bytes()[:-40])
        with pytest.raises(DataError, match=f"{source}(:\\d+)?: .*(truncated|ends in the middle|not valid JSON).*get"):
            build(name, tmp_path / "data", raw=tmp_path / "raw")
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- downloads

CONTENT = (RAW / "popqa/test.tsv").read_bytes() + b"7\t" + b"x\t" * 14 + b'Who is {}?\t"[""y""]"\n'


@pytest.fixture
def server():
    """A local stand-in for the hub; server.answer(handler, count) decides what a request gets, server.seen holds the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, self.headers.get("Range")))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.server.answer(self, len(self.server.seen))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(handler, content=CONTENT, status=200, stop=None, ranges=True, pause=0, **headers):
    """Answer with content, from the asked Range on; stop: break off after so many bytes; pause: seconds between small pieces."""
    asked = re.match(r"bytes=(\d+)-", handler.headers.get("Range") or "") if ranges else None
    start = int(asked.group(1)) if asked else 0
    handler.send_response(206 if asked else status)
    if asked:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start))
    for key, value in ({"ETag": '"v1"'} | {key.replace("_", "-"): value for key, value in headers.items()}).items():
        handler.send_header(key, value)
    handler.end_headers()
    for at in range(start, min(len(content), stop or len(content)), 100 if pause else len(content)):
        handler.wfile.write(content[at : min(at + (100 if pause else len(content)), stop or len(content))])
        time.sleep(pause)


def test_download(tmp_path, server):
    """data.py fetches what is missing, notes its sha256 beside it, and does not fetch it again."""
    server.answer = lambda handler, count: send(handler, (RAW / "popqa/test.tsv").read_bytes())
    for _ in range(2):
        done = cli(tmp_path, "popqa", env={"HF_ENDPOINT": server.url})
        assert done.returncode == 0 and "data/popqa.jsonl: 4 examples" in done.stdout, done.stderr
    assert server.seen == [("/datasets/akariasai/PopQA/resolve/main/test.tsv", None)]
    assert (tmp_path / "raw/popqa/test.tsv").read_bytes() == (RAW / "popqa/test.tsv").read_bytes()
    assert sorted(path.name for path in (tmp_path / "raw/popqa").iterdir()) == ["test.tsv", "test.tsv.sha256"]
    (tmp_path / "raw/popqa/test.tsv").write_bytes((RAW / "popqa/test.tsv").read_bytes().replace(b"Lund", b"Lunt"))
    done = cli(tmp_path, "popqa", env={"HF_ENDPOINT": server.url})
    assert done.returncode == 2 and "its sha256 is not the one in test.tsv.sha256" in done.stderr


def test_a_download_that_breaks_off_is_continued(tmp_path, server, monkeypatch):
    """What arrived before a fault is kept and the rest asked for; a server that cannot continue sends all again; busy servers are asked again."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys.modules[__name__].time, "sleep", lambda seconds: None)
    server.answer = lambda handler, count: send(handler, stop=500 if count == 1 else None)
    data.download(server.url + "/a", tmp_path / "a")
    assert server.seen == [("/a", None), ("/a", "bytes=500-")] and (tmp_path / "a").read_bytes() == CONTENT
    server.seen.clear()
    server.answer = lambda handler, count: send(handler, stop=500 if count == 1 else None, ranges=False)
    data.download(server.url + "/b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == CONTENT
    server.seen.clear()
    server.answer = lambda handler, count: send(handler, b"", 503) if count < 3 else send(handler)
    data.download(server.url + "/c", tmp_path / "c")
    assert len(server.seen) == 3 and (tmp_path / "c").read_bytes() == CONTENT
    server.seen.clear()
    server.answer = lambda handler, count: send(handler, stop=500 if count == 1 else None, ETag=f'"v{count}"', ranges=count != 2)
    data.download(server.url + "/d", tmp_path / "d")  # another version meanwhile: the server sends all of it
    assert (tmp_path / "d").read_bytes() == CONTENT
    server.seen.clear()
    server.answer = lambda handler, count: send(handler, stop=500, ranges=False)
    with pytest.raises(DataError, match="given up after 5 tries .*run the command again"):
        data.download(server.url + "/e", tmp_path / "e")
    assert len(server.seen) == 5 and not (tmp_path / "e").exists()


def test_refused_downloads(tmp_path, server):
    """A missing file, a web page and bytes that are not those the server vouches for end in one line and leave nothing."""
    for answer, message in ((lambda handler, count: send(handler, b"", 404), "HTTP status 404"), (lambda handler, count: send(handler, b"<html>log in</html>"), "a web page"),
                            (lambda handler, count: send(handler, X_Linked_ETag=f'"{"0" * 64}"'), "damaged on its way")):  # fmt: skip
        server.answer = answer
        done = cli(tmp_path, "popqa", env={"HF_ENDPOINT": server.url})
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "put test.tsv into raw/popqa" in done.stderr, done.stderr
        assert list(tmp_path.rglob("*")) in ([], [tmp_path / "raw"])


def test_a_killed_download_goes_on(tmp_path, server):
    """kill -9 in the middle leaves no file under the final name, and the second run fetches only the rest."""
    server.answer = lambda handler, count: send(handler, (RAW / "popqa/test.tsv").read_bytes(), pause=0.2 if count == 1 else 0)
    env = os.environ | {"HF_ENDPOINT": server.url}
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), "popqa"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "raw/popqa/test.tsv.part"
    deadline = time.time() + 60
    while not (part.exists() and part.stat().st_size >= 300) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 300 <= have < len((RAW / "popqa/test.tsv").read_bytes()) and not (tmp_path / "raw/popqa/test.tsv").exists()
    done = cli(tmp_path, "popqa", env={"HF_ENDPOINT": server.url})
    assert done.returncode == 0, done.stderr
    assert server.seen[1:] == [("/datasets/akariasai/PopQA/resolve/main/test.tsv", f"bytes={have}-")]
    assert (tmp_path / "raw/popqa/test.tsv").read_bytes() == (RAW / "popqa/test.tsv").read_bytes()


def test_only_the_first_lines_are_downloaded(tmp_path, server):
    """Of a corpus of many gigabytes no more than the first lines are fetched."""
    lines = [b"line %d\n" % i for i in range(100_000)]
    server.answer = lambda handler, count: send(handler, b"".join(lines), stop=4 if count == 1 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.time, "sleep", lambda seconds: None)
        data.download(server.url + "/corpus.jsonl", tmp_path / "corpus.jsonl", lines=1000)
    assert (tmp_path / "corpus.jsonl").read_bytes() == b"".join(lines[:1000])


def test_a_stream_is_read_on(tmp_path, server, monkeypatch):
    """Where the downloaded beginning holds too few long documents, a longer one is fetched in its place, to the end of the file if
    need be; what was built before is how the new file begins."""
    documents = [{"content": "short"} if i % 5 else {"content": f"document {i} " + "word " * 20} for i in range(100)]
    content = "".join(json.dumps(document) + "\n" for document in documents).encode()
    server.answer = lambda handler, count: send(handler, content)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(data.SETS["k-pile"], "first_lines", 20)
    there = {"data": tmp_path / "data", "words": 8, "raw": tmp_path / "raw"}
    four = load_examples("k-pile", 4, **there)
    begun = (tmp_path / "data/k-pile.w8.jsonl").read_bytes()
    assert len(server.seen) == 1 and data.at_hand("k-pile", 5, **there) is None
    assert len(load_examples("k-pile", 9, **there)[0]) == 9 and len(server.seen) == 3
    assert (tmp_path / "data/k-pile.w8.jsonl").read_bytes().startswith(begun) and load_examples("k-pile", 4, **there) == four
    (source,) = manifest(tmp_path / "data/k-pile.w8.jsonl")["sources"]
    assert ".first-80." in source or ".first-40." in source
    with pytest.raises(DataError, match="holds 20 examples for k-pile, 30 are asked for; ask for fewer"):
        load_examples("k-pile", 30, **there)
    asked = len(server.seen)
    assert len(load_examples("k-pile", 30, **there, fewer=True)[0]) == 20 == data.at_hand("k-pile", 30, **there)
    assert len(server.seen) == asked, "it is known that the file ended"


def test_fewer_where_no_more_can_be_fetched(tmp_path, server, monkeypatch):
    """--fewer takes what is here where the stream cannot be read on; without it that is an error."""
    content = "".join(json.dumps({"content": "word " * 20}) + "\n" for _ in range(9)).encode()
    server.answer = lambda handler, count: send(handler, content) if count == 1 else send(handler, status=404)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(data.SETS["k-pile"], "first_lines", 3)
    there = {"data": tmp_path / "data", "words": 8, "raw": tmp_path / "raw"}
    with pytest.raises(DataError, match="404"):
        load_examples("k-pile", 5, **there)
    assert len(load_examples("k-pile", 5, **there, fewer=True)[0]) == 3
    done = cli(tmp_path, "k-pile", "--limit", "6", "--words", "9", env={"HF_ENDPOINT": server.url})
    assert done.returncode == 0 and "k-pile.w9.jsonl: 3 examples" in done.stdout and "404" in done.stderr
    changed = b"".join(json.dumps({"content": "other " * 20}).encode() + b"\n" for _ in range(9))
    server.answer = lambda handler, count: send(handler, changed)
    beginning = rows(*(tmp_path / "raw/k-pile").glob("*.jsonl"))
    with pytest.raises(DataError, match=r"first-3\.jsonl: the published file no longer begins so; use --fewer, or remove it and build its sets again"):
        load_examples("k-pile", 5, **there)
    assert rows(*(tmp_path / "raw/k-pile").glob("*.jsonl")) == beginning


def test_a_users_files_are_not_beginnings(tmp_path, server):
    """What only looks like a beginning that was downloaded is the user's: it is read as it is, kept, and not asked for elsewhere;
    files that join later count."""
    text = "".join(json.dumps({"content": f"{i} " + "word " * 120}) + "\n" for i in range(3))
    server.answer = lambda handler, count: send(handler, text.encode())
    (tmp_path / "raw/k-pile").mkdir(parents=True)
    for place in ("raw/k-pile/my.first-3.jsonl", "my.first-3.jsonl"):
        (tmp_path / place).write_text(text)
    there = {"data": tmp_path / "data", "raw": tmp_path / "raw"}
    for name in ("k-pile", "my.first-3.jsonl"):
        done = cli(tmp_path, name, "--limit", "20", env={"HF_ENDPOINT": server.url})
        assert done.returncode == 0 and "3 examples" in done.stdout, done.stderr
    assert len(load_examples("k-pile", 5, **there, fewer=True)[0]) == data.at_hand("k-pile", 5, **there) == 3
    (tmp_path / "raw/k-pile/more.jsonl").write_text(text)
    assert data.at_hand("k-pile", 5, **there) == len(load_examples("k-pile", 5, **there, fewer=True)[0]) == 5
    assert (tmp_path / "raw/k-pile/my.first-3.jsonl").read_text() == text and not server.seen


# ---------------------------------------------------------------- overlap


def test_overlap(tmp_path):
    """A fact counts where subject and answer both stand in one document as whole words; beyond the paper's share there is a warning."""
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps({"id": f"d{i}", "prompt": prompt, "response": response}) + "\n" for i, (prompt, response) in enumerate([
        ("Of all the books, NEW LANDS is", "the one by Charles Fort that sold."),  # both, over the two halves
        ("Verdal lies in", "Norwayland, they say."),  # not the whole word
        ("Lund is a city", "and Ana Roth a director")])))  # fmt: skip
    cli(tmp_path, "popqa", "--raw", RAW)
    done = cli(tmp_path, "--overlap", "popqa", "mix.jsonl", "--verbose")
    assert done.returncode == 0 and "popqa in mix.jsonl: 1 of 4 facts (25.00%)" in done.stdout, done.stderr
    assert "popqa-0" in done.stdout and "first d0" in done.stdout and "1.3%" in done.stderr
    (tmp_path / "mix.jsonl").write_text(json.dumps({"id": "d", "prompt": "nothing", "response": "at all"}) + "\n")
    done = cli(tmp_path, "--overlap", "popqa", "mix.jsonl")
    assert "0 of 4 facts (0.00%)" in done.stdout and not done.stderr


@pytest.mark.parametrize("question, given, other", [
    ("Where was Ágnes Kiss born?", "Ágnes Kiss of", "Gnes Kiss of"), ("who sells the iPhone 4?", "an iPhone 4 by", "a Phone 4 by"),
    ("What does mRNA carry?", "in mRNA is", "in RNA is"), ("The value of key gzqx2kfp is?", "key gzqx2kfp is", "key 2kfp is"),
    ("The value of key gzqxkffp is?", "value of gzqxkffp, a key,", "value of a key is"), ("who married julia roberts?", "julia roberts married", "julia married"),
    ("Who wrote War and Peace?", "of War and Peace is", "of war and of peace is")])  # fmt: skip
def test_guessed_subjects(question, given, other):
    """Where a set names no subjects, names are found whole, in any letters; without names each of the question's words must be there."""
    fact, document = {"id": "f", "prompt": f"Question: {question}\nThe answer is:", "response": "Lund"}, {"id": "d", "prompt": ""}
    assert data.overlap([fact], {}, [document | {"response": f"{given} Lund."}])
    assert not data.overlap([fact], {}, [document | {"response": f"{other} Lund."}])


# ---------------------------------------------------------------- familiar and unfamiliar


class Oracle:
    """Stands for a base model that knows the answers it is given: {question: answer}."""

    def __init__(self, tokenizer, known):
        import torch

        self.tokenizer, self.known, self.asked = tokenizer, known, []
        self.model = type("", (), {"embed_tokens": type("", (), {"weight": torch.zeros(1)})})

    def generate(self, prompts, max_new_tokens, ends, drafts=None, stop=None, prefix_len=0):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.asked += texts
        answers = [self.known.get(text.rpartition("Question: ")[2].partition("\n")[0], "no\u2028idea") for text in texts]
        return [self.tokenizer.encode(f" {answer}\n\nQuestion: and more")[:max_new_tokens] for answer in answers]


@pytest.fixture
def process_group():
    setup_device()
    yield
    evaluate.dist.destroy_process_group()


def test_split(tmp_path, llama3_folder, process_group, monkeypatch):
    """Facts answered with the response or an alias are familiar, the others not; shots are in neither; a killed split goes on."""
    tokenizer = load_tokenizer(llama3_folder)
    examples = [{"question": f"Q{i}?", "answers": [f"a{i}", f"b{i}"]} for i in range(10)]
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(example) + "\n" for example in examples))
    build(str(source), tmp_path / "data")
    name = str(tmp_path / "data/mine.jsonl")
    monkeypatch.setattr(evaluate, "BATCH", 1)
    oracle = Oracle(tokenizer, {f"Q{i}?": ("a" if i % 2 else "B") + f"{i}" for i in range(4, 10)})
    interrupted = Oracle(tokenizer, oracle.known)

    def killed(prompts, *rest):
        if len(interrupted.asked) >= 2:
            raise KeyboardInterrupt
        return Oracle.generate(interrupted, prompts, *rest)

    interrupted.generate = killed
    with pytest.raises(KeyboardInterrupt):
        evaluate.split(BASE, interrupted, tokenizer, name, None, 2, tmp_path / "data", 0, "fp32")
    (part,) = (tmp_path / "data").glob("mine.*familiar*")
    with open(part, "a") as lines:
        lines.write('"cut')
    evaluate.split(BASE, oracle, tokenizer, name, None, 2, tmp_path / "data", 0, "fp32")
    kinds = {kind: rows(tmp_path / f"data/mine.{kind}.base-0123abcd.jsonl") for kind in ("familiar", "unfamiliar")}
    notes = manifest(tmp_path / "data/mine.familiar.base-0123abcd.jsonl")
    assert not part.exists()
    evaluate.split(BASE, oracle, tokenizer, name, 3, 2, tmp_path / "data", 0, "fp32")  # fewer: they were asked
    assert kinds == {kind: rows(tmp_path / f"data/mine.{kind}.base-0123abcd.jsonl") for kind in kinds}
    (tmp_path / "popqa.jsonl").write_bytes((tmp_path / "data/mine.jsonl").read_bytes())
    with pytest.raises(DataError, match="under the name of the set popqa; rename it"):
        evaluate.split(BASE, oracle, tokenizer, str(tmp_path / "popqa.jsonl"), None, 2, tmp_path / "data", 0, "fp32")
    question = lambda row: row["prompt"].partition("\n")[0].removeprefix("Question: ")
    shots = {row["id"]: question(row) for row in rows(source.parent / "data/mine.jsonl") if row["id"] in notes["shots"]}
    asked = {question(row) for kind in kinds.values() for row in kind}
    assert len(shots) == 2 and asked == {f"Q{i}?" for i in range(10)} - set(shots.values())
    assert {question(row) for row in kinds["familiar"]} == asked & {f"Q{i}?" for i in range(4, 10)}
    assert notes["base_model"] == "base" and all(notes["predictions"][row["id"]].lower() in [row["response"], *row["aliases"]] for row in kinds["familiar"])
    assert len(interrupted.asked) + len(oracle.asked) == 8, "answers of the interrupted split were asked again"
    first = next(row["prompt"] for row in rows(tmp_path / "data/mine.jsonl") if row["id"] == notes["shots"][0])
    last = oracle.asked[-1]
    assert last.startswith(f"{first} a{first[11]}\n\n") and last.endswith("\nThe answer is:") and last.count("Question:") == 3


def test_training_takes_the_unfamiliar_facts(tmp_path):
    """A published set trains on its unfamiliar slice for the base model at hand, whatever it is called; two models' lie side by side."""
    out, other = tmp_path / "data", BaseModel("base", "models/other/base", "9" * 64)
    build("popqa", out, raw=RAW)
    with pytest.raises(DataError, match="run python evaluate.py models/base --split popqa, or .*--unfiltered"):
        familiarity("popqa-id", BASE, out)
    facts = rows(out / "popqa.jsonl")
    for model, n in ((BASE, 1), (other, 2)):
        for kind, part in (("familiar", facts[:n]), ("unfamiliar", facts[n:])):
            data.write_flat(evaluate.split_file("popqa", kind, model, out), part, {"base_model_sha256": model.sha256})
    assert familiarity("popqa", BASE, out) == "unfamiliar"
    renamed = dataclasses.replace(BASE, name="snapshot")
    assert evaluate.load_set("popqa.unfamiliar", 3, out, base_model=renamed)[0] == facts[1:]
    assert evaluate.load_set("popqa.familiar", 2, out, base_model=other)[0] == facts[:2]
    with pytest.raises(DataError, match="popqa.familiar: which facts are familiar depends .*popqa.familiar.base-0123abcd.jsonl, .*-99999999.jsonl"):
        load_examples("popqa.familiar", 1, out)
    with pytest.raises(DataError, match="no such file; run python evaluate.py models/base --split popqa"):
        evaluate.load_set("popqa.familiar", 1, out, base_model=dataclasses.replace(BASE, sha256="8" * 64))
    (out / "popqa.familiar.base-0123abcd.json").write_text(json.dumps({"base_model_sha256": "0123abcd" + "8" * 56}))
    with pytest.raises(DataError, match="its manifest does not say that base as it is here was asked"):
        evaluate.load_set("popqa.familiar", 1, out, base_model=BASE)
    for name in ("kvr", "gsm8k", "popqa.familiar", "facts.jsonl"):
        assert familiarity(name, BASE, out) == ""


def test_split_command(tmp_path, smollm2_folder):
    """evaluate.py --split asks a real model, and its answers decide: each fact is in the file that its recorded prediction says."""
    shutil.copytree(RAW / "triviaqa", tmp_path / "raw/triviaqa")
    command = [FORKING.python(), str(ROOT / "evaluate.py"), str(smollm2_folder), "--split", "triviaqa", "--shots", "1", "--precision", "fp32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "of 2 facts" in done.stdout, done.stderr
    asked = 0
    for kind in ("familiar", "unfamiliar"):
        file = tmp_path / f"data/triviaqa.{kind}.SmolLM2-135M-Instruct-{content_id(smollm2_folder)[:8]}.jsonl"
        for row in rows(file) if file.exists() else []:
            answer = manifest(file)["predictions"][row["id"]].lower()
            assert (answer in [a.lower() for a in (row["response"], *row["aliases"])]) == (kind == "familiar")
            asked += 1
    assert asked == 2
