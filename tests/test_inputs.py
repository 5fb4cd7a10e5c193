"""What people really have: a user's own rows, several files of one set, other encodings; what cannot be used is named in one line."""

import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, run

import data
from data import DataError, build, load_examples, turns

RAW = ROOT / "tests" / "raw"


def own(tmp_path, *rows, name="mine.jsonl", text=None, **options):
    """(examples, manifest) of a user's file of such rows, or of such a text or bytes."""
    content = text if text is not None else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (path,) = build(str(tmp_path / name), tmp_path / "data", **options)
    return load_examples(str(path))[0], json.loads(path.with_suffix(".json").read_bytes())


def refused(tmp_path, message, *args):
    """data.py ends with status 2 and one line, and no file is there that was not before."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run(tmp_path, "data.py", *args, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- a user's own rows

PAIR = {"instruction": "Reword this", "output": "O"}


@pytest.mark.parametrize("row, expected, unread", [
    (PAIR | {"input": "She was brave"}, [("Reword this\n\nShe was brave", "O")], []),
    (PAIR | {"input": "", "text": None}, [("Reword this", "O")], []),
    (PAIR | {"context": "C"}, [("C\n\nReword this", "O")], []),
    (PAIR | {"input": "x", "text": "### Reword this\n### x\n### O"}, [("Reword this\n\nx", "O")], ["text"]),
    (PAIR | {"category": "open", "id": 3}, [("Reword this", "O")], ["category"]),
    (PAIR | {"label": True}, [("Reword this", "O")], []),
    ({"instruction": "I", "context": "", "response": "R"}, [("I", "R")], []),
    ({"prompt": "P", "completion": "C"}, [("P", "C")], []),
    ({"Context": "I feel", "Response": "R"}, [("I feel", "R")], []),
    ({"input": "I", "output": "O"}, [("I", "O")], []),
    ({"question": "Who?", "answer": ["Me", "I"]}, [("Question: Who?\nThe answer is:", "Me")], []),
    ({"question": "Who?", "golden_answers": ["Me"], "answer": None}, [("Question: Who?\nThe answer is:", "Me")], []),
    ({"question": "Who?", "context": "It is me.", "answer": "Me"}, [("It is me.\n\nQuestion: Who?\nThe answer is:", "Me")], []),
    ({"question": "Why?", "response": "So."}, [("Why?", "So.")], []),
    ({"problem": "1 + 1?", "solution": "It is 2.", "answer": "2"}, [("1 + 1?", "It is 2.")], ["answer"]),
    ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "name": "x"}], "prompt": "u"},
     [("u", "a")], ["name", "prompt"]),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, [("u", "a")], []),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u "}, {"type": "text", "text": "v"}]},
                   {"role": "assistant", "content": "a", "tool_calls": None, "weight": 1}]}, [("u v", "a")], []),
    (PAIR | {"messages": [{"role": "user", "content": "Reword this"}, {"role": "assistant", "content": "O"}]}, [("Reword this", "O")], ["messages"]),
    ({"data": ["u", "a"], "system": ""}, [("u", "a")], []),
    (PAIR | {"history": [["q", "a"], ["q2", "a2"]]}, [("q", "a"), ("q2", "a2"), ("Reword this", "O")], []),
])  # fmt: skip
def test_forms(tmp_path, row, expected, unread):
    """What a row says becomes the example, and the names of what is not read are told."""
    (example,), manifest = own(tmp_path, row)
    assert turns(example) == expected and list(manifest.get("unread", [])) == unread


def test_half_a_character(tmp_path):
    """A lone surrogate in a row, or in a set's subject, is kept as it came, in files that are UTF-8."""
    (example,), _ = own(tmp_path, {"prompt": "Say \ud83d", "response": "R \udc00"})
    assert (example["prompt"], example["response"]) == ("Say \ud83d", "R \udc00")
    (tmp_path / "raw/webqa").mkdir(parents=True)
    (tmp_path / "raw/webqa/x.json").write_text(json.dumps([{"question": "who\ud800?", "answers": ["me"], "url": "en/x\ud83d"}]))
    build("webqa", tmp_path / "data", raw=tmp_path / "raw")
    assert data.subjects_of("webqa", tmp_path / "data") == {"webqa-0": "x\ud83d"} and (tmp_path / "data/webqa.jsonl").read_bytes().decode()


def test_answers(tmp_path):
    """Further right answers are accepted, under whatever name."""
    rows = [{"question": "1?", "answer": "a", "answers": ["a", "b"]}, {"question": "1?", "answers": ["a", "b"]},
            {"question": "1?", "golden_answers": ["a", "b"]}, {"prompt": "1?", "response": ["a", "b"]}]  # fmt: skip
    examples, _ = own(tmp_path, *rows)
    assert all((example["response"], example["aliases"]) == ("a", ["a", "b"]) for example in examples)


def test_what_a_chat_begins_with(tmp_path):
    """The system's words are kept, beside a chat, a question or in front of the messages; a last question is left off and counted."""
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    expected = [{"role": "system", "content": "s"}, *chat]
    rows = [{"messages": expected}, {"messages": chat, "system": "s"}, {"prompt": "u", "response": "a", "system": "s"},
            {"system_prompt": "s", "question": "u", "response": "a"},
            {"messages": [{"role": "system", "content": ""}, *chat], "system": "s"},
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "and?"}]}]  # fmt: skip
    examples, manifest = own(tmp_path, *rows)
    assert all(example["messages"] == expected for example in examples) and len(examples) == 6
    assert manifest["dropped"] == {"last question of a chat, without an answer": 1}


@pytest.mark.parametrize("row, message", [
    (PAIR | {"text": "Another text."}, '"text" is not read beside instruction, output'),
    ({"question": "Which?", "choices": ["a", "b"], "answer": "a"}, '"choices" is not read'),
    ({"question": "Which?", "images": ["a.png"], "answer": "a"}, '"images" is not read'),
    ({"prompt": "P", "response": "R", "question": "Q", "answer": "A"}, '"answer" is not read beside'),
    ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "tools": [{}, 1]}, '"tools" is not read'),
    ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "tool_calls": [1]}]}, '"tool_calls" is not'),
    ({"messages": [{"role": "user", "content": "u"}, {"role": "tool", "content": "t"}]}, "a message of role 'tool'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is no text: {'type': 'image_url'}"),
    ({"messages": [["user", "u"]]}, "no object of role and content"),
    (PAIR | {"history": "Hello!"}, '"history" is no list of pairs'), (PAIR | {"history": [["a"]]}, '"history" is no list of pairs'),
    ({"question": "Which is larger, 3 or 5?", "solution": "3", "answer": "5"}, '"answer" is not read beside'),
    ({"messages": [{"role": "user", "content": "u"}], "response": "a"}, '"response" is not read beside messages'),
    ({"text": "short", "completion": "A"}, '"completion" is not read beside text'),
    ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}, "weight 0"),
    ({"messages": {"role": "user"}}, "no list of messages"),
    ({"text": "long " * 200, "question": "Q"}, '"question" is not read beside text'),
    ({"prompt": "P"}, 'no answer beside "prompt"'),
    ({"prompt": "P", "response": {"a": 1}}, '"response" is no text'),
    ({"prompt": "P", "Prompt": "Q", "response": "R"}, "capitals alone"),
    ({"speaker": "P"}, "no example: questions are prompt, "), ({"prompt": "", "response": "R"}, 'no question beside "response"'),
])  # fmt: skip
def test_rows_that_would_say_something_else(tmp_path, row, message):
    """A row that cannot be read whole is refused with its line, and nothing is left behind."""
    (tmp_path / "mine.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(row) + "\n")
    refused(tmp_path, message, "mine.jsonl")
    with pytest.raises(DataError, match="mine.jsonl:2: "):
        build(str(tmp_path / "mine.jsonl"), tmp_path / "data")


def test_wrong_answers_are_left_out(tmp_path):
    """A row whose label says that its answer is wrong is not learned, and counted."""
    examples, manifest = own(tmp_path, PAIR, PAIR | {"label": False}, PAIR | {"label": 0}, {"text": "w " * 20, "label": 0}, words=5)
    assert len(examples) == 2 and manifest["dropped"] == {'"label" is false': 2} and manifest["unread"] == {"label": 1}
    examples, manifest = own(tmp_path, PAIR | {"label": 1.0}, PAIR | {"correct": "TRUE "}, PAIR | {"label": "science"}, name="more.jsonl")
    assert len(examples) == 3 and manifest["unread"] == {"label": 1}


def test_input_of_published_instructions(tmp_path):
    """EvolCode's "input" is part of the prompt; a field that would change what a published row says is refused."""
    (tmp_path / "raw/evolcode").mkdir(parents=True)
    file = tmp_path / "raw/evolcode/EvolInstruct-Code-80k.json"
    file.write_text(json.dumps([PAIR | {"input": "She was brave"}]))
    (path,) = build("evolcode", tmp_path / "data", raw=tmp_path / "raw")
    assert load_examples(str(path))[0][0]["prompt"] == "Reword this\n\nShe was brave"
    for other in ({"system": "Be brief."}, {"images": ["a"]}):
        file.write_text(json.dumps([PAIR | other]))
        with pytest.raises(DataError, match=r"json:1: .*is not read beside"):
            build("evolcode", tmp_path / "data", raw=tmp_path / "raw")


@pytest.mark.parametrize("name, row", [
    ("triviaqa", {"question": "Who?", "answer": "Me"}), ("triviaqa", {"Question": "Who?", "Answer": {"Value": "Me", "Aliases": 3}}),
    ("webqa", {"question": "who?", "answers": ["me"], "url": 3}), ("entityqa", {"question": "Who?", "answers": [None]}),
    ("lama", {"masked_sentences": [1], "obj_label": "x"}), ("lama", {"predicate_id": [1], "obj_label": "x"}), ("popqa", None),
    ("apps", {"difficulty": "interview", "solutions": 1}), ("ultrachat", {"data": [{"a": 1}]}), ("k-pile", {"text": ["a"]}),
    ("gsm8k", {"question": "How many?", "answer": {"value": 1}}), ("math", {"problem": ["x"], "solution": "y"}),
])  # fmt: skip
def test_rows_of_other_types(tmp_path, name, row):
    """A published row whose fields have other types than the set's is a malformed row, named with file and line."""
    shutil.copytree(RAW / name, tmp_path / "raw" / name)
    for file in (path for path in (tmp_path / "raw" / name).rglob("*") if path.is_file()):
        if row is None:
            file.write_text("\n".join([file.read_text().splitlines()[0], "1" + "\t" * 16]) + "\n")
        elif file.name != "relations.jsonl":
            file.write_text(json.dumps([row] if file.name.startswith(("unf", "web", "P")) else row) + "\n")
    with pytest.raises(DataError, match=r":\d+: .*--skip-bad"):
        build(name, tmp_path / "data", raw=tmp_path / "raw")
    assert not (tmp_path / "data").exists()


def test_null(tmp_path):
    """What is null in a row is not there: no subject None, no text of that name."""
    (tmp_path / "raw/webqa").mkdir(parents=True)
    (tmp_path / "raw/webqa/train.json").write_text(json.dumps([{"question": "who?", "answers": ["me"], "url": None}]))
    build("webqa", tmp_path / "data", raw=tmp_path / "raw")
    assert json.loads((tmp_path / "data/webqa.subjects.json").read_text()) == {"webqa-0": None}
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": "p", "response": "r", "messages": None},
                                       {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}])  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "union.parquet")
    (path,) = build(str(tmp_path / "union.parquet"), tmp_path / "data")
    assert [turns(example) for example in load_examples(str(path))[0]] == [[("p", "r")]] * 2


# ---------------------------------------------------------------- kinds of files


def test_kinds_of_files(tmp_path):
    """Tables, lines and packed files give the same examples under any spelling of their kind, also with a BOM."""
    facts = [{"prompt": f"P{i}, \"quoted\"\nü", "response": f"R{i}"} for i in range(9)]
    lines = "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts)
    with open(tmp_path / "table.txt", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(facts)
    table = (tmp_path / "table.txt").read_text()
    contents = {"a.ndjson": lines.encode(), "a.JSONL": lines.encode(), "a.jsonl": b"\xef\xbb\xbf" + lines.encode(),
                "a.jsonl.xz": lzma.compress(lines.encode()), "a.csv": table.encode(), "a.CSV": b"\xef\xbb\xbf" + table.encode(),
                "a.json": b"\xef\xbb\xbf" + json.dumps(facts).encode()}  # fmt: skip
    found = [own(tmp_path / f"{i}", name=name, text=content) for i, (name, content) in enumerate(contents.items()) if not (tmp_path / f"{i}").mkdir()]
    assert all(examples == found[0][0] for examples, _ in found) and len(found[0][0]) == 9
    assert sorted(turns(example)[0] for example in found[0][0]) == sorted((f["prompt"], f["response"]) for f in facts)
    text = "\ufeff" + " ".join(f"w{i}" for i in range(10))
    (example,), _ = own(tmp_path, name="notes.TXT", text=text, words=5)
    assert example["prompt"].endswith("\n\nw0 w1 w2 w3 w4")
    header, *table_rows = (RAW / "popqa/test.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "raw/popqa").mkdir(parents=True)
    (tmp_path / "raw/popqa/test.tsv.xz").write_bytes(lzma.compress(("\ufeff" + header + "".join(table_rows)).encode()))
    build("popqa", tmp_path / "x", raw=tmp_path / "raw"), build("popqa", tmp_path / "y", raw=RAW)
    assert (tmp_path / "x/popqa.jsonl").read_bytes() == (tmp_path / "y/popqa.jsonl").read_bytes()
    flat = tmp_path / "flat.jsonl"
    flat.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "p", "response": "r"}\n')
    assert load_examples(str(flat))[0] == [{"id": "a", "prompt": "p", "response": "r"}]


def test_spreadsheets(tmp_path):
    """Empty lines and columns of a spreadsheet are passed over; what stands in a column without a name is not."""
    (example,), _ = own(tmp_path, name="a.csv", text="\nprompt,response,,\nP,R,,\n\n")
    assert turns(example) == [("P", "R")]
    for text, message in (("prompt,response,\nP,R,x\n", "a.csv:2: a value in a column without a name"), ("prompt,prompt\nP,R\n", "names column 'prompt' twice"),
                          ("prompt,response\nP,R,x\n", "a.csv:2: 3 fields, the first line has 2")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            own(tmp_path, name="a.csv", text=text)


@pytest.mark.parametrize("content", ['{"a":1} [{"a":2},{"a":3}]', '[{"a":1}] [{"a":2},\n{"a":3}]', '{"Data": [{"a":1}], "V": 1.0}\n{"Data":[{"a":2},{"a":3}]}',
                                     '[{"a":1}]\ufeff{"a":2}{"a":3}', '{"a":1},\n{"a":2},\n[{"a":3}],', '{"Data" : [{"a":1},{"a":2}], "Domain": "x", "OK": true}{"a":3}'])  # fmt: skip
def test_values_one_after_another(content):
    """Arrays and objects that follow one another, as in concatenated files, are read to the end."""
    import io

    assert [row["a"] for _, row in data.rows("x.json", io.BytesIO(content.encode()))] == [1, 2, 3]


@pytest.mark.parametrize("content", ['{"Data": [{"a":1}], "Other": [{"a":2}]}', '[{"a":1}', '[{"a":1}] x', '[{"a":1}]]'])
def test_values_that_would_be_dropped(content):
    """Whatever else stands in the file is an error, not passed over."""
    import io

    with pytest.raises(DataError, match="x.json:1: "):
        list(data.rows("x.json", io.BytesIO(content.encode())))


def test_a_field_twice(tmp_path):
    """A field that an object names twice, of which JSON's reader would keep the last, is named with its line."""
    row, twice = json.dumps(PAIR), '{"prompt": "P", "prompt": "Q", "response": "R"}'
    for name, text in (("a.jsonl", f"{row}\n{twice}\n"), ("a.json", f"[{row},\n{twice}]"), ("b.json", f"{row}\n{twice}")):
        with pytest.raises(DataError, match=rf"{name}:2: .*a field twice in one object"):
            own(tmp_path, name=name, text=text)


def test_long_lines(tmp_path, monkeypatch):
    """A line, a value or a field beyond the limit is named with the limit."""
    monkeypatch.setattr(data, "LINE_LIMIT", 2**20)
    long = "x" * 2**21
    for name, content in (("a.jsonl", json.dumps({"text": long})), ("a.txt", long), ("a.json", json.dumps([{"text": long}])), ("a.csv", f"text\n{long}\n")):
        with pytest.raises(DataError, match=rf"{name}:\d: .*(more than 1 MiB|limit \(1048576\))"):
            own(tmp_path, name=name, text=content)


def test_order_is_the_files_own(tmp_path):
    """However its path is written, and packed or not, a file gives the same bytes."""
    lines = "".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(50))
    (tmp_path / "facts.jsonl").write_text(lines)
    (tmp_path / "sub").mkdir()
    found = set()
    for i, name in enumerate(("facts.jsonl", "./facts.jsonl", tmp_path / "facts.jsonl", "sub/../facts.jsonl")):
        run(tmp_path, "data.py", name, "--out", f"d{i}")
        found.add(((tmp_path / f"d{i}/facts.jsonl").read_bytes(), (tmp_path / f"d{i}/facts.json").read_bytes()))
    assert len(found) == 1


# ---------------------------------------------------------------- nothing written over


@pytest.mark.parametrize("source", ["data/facts.json", "data/facts.jsonl", "data/facts.x.json", "link.json"])
def test_a_source_is_not_written_over(tmp_path, source):
    """A file whose flat file or manifest would be itself is refused, a link to it as well."""
    (tmp_path / "data").mkdir()
    place = tmp_path / ("data/link.jsonl" if source == "link.json" else source)
    place.write_text(json.dumps(PAIR))
    if source == "link.json":
        (tmp_path / source).symlink_to(place)
    refused(tmp_path, "rename the file, or give another --out", source)


@pytest.mark.parametrize("place", ["data/facts.json", "data/facts.jsonl", "data/popqa.json", "data/popqa.jsonl", "data/popqa-id.jsonl"])
def test_other_files_are_not_written_over(tmp_path, place):
    """Nor is a file in the place of a set or manifest that was not written here."""
    shutil.copytree(RAW / "popqa", tmp_path / "raw/popqa")
    (tmp_path / "facts.txt").write_text("word " * 200)
    (tmp_path / "data").mkdir()
    (tmp_path / place).write_text(json.dumps({"mine": 1}))
    before = (tmp_path / place).read_bytes()
    done = run(tmp_path, "data.py", "popqa" if "popqa" in place else "facts.txt", ok=False)
    assert done.returncode == 2 and "not written by data.py" in done.stderr.splitlines()[-1], done.stderr
    assert (tmp_path / place).read_bytes() == before and [path.name for path in (tmp_path / "data").iterdir()] == [os.path.basename(place)]


def test_raw_files_in_the_place_of_sets(tmp_path):
    """With one folder for published files and for sets, a set is not built over what it is made of."""
    (tmp_path / "d").mkdir()
    shutil.copy(RAW / "evolcode/EvolInstruct-Code-80k.json", tmp_path / "d/evolcode.json")
    before = (tmp_path / "d/evolcode.json").read_bytes()
    done = run(tmp_path, "data.py", "evolcode", "--raw", "d", "--out", "d", ok=False)
    assert done.returncode == 2 and "is where the set would be written" in done.stderr
    assert (tmp_path / "d/evolcode.json").read_bytes() == before


# ---------------------------------------------------------------- several files of one set


def prompts(tmp_path, name, out="data"):
    (path, *_) = build(name, tmp_path / out, raw=tmp_path / "raw")
    return sorted(json.dumps(turns(example)) for example in load_examples(str(path))[0])


def add(tmp_path, name, places, source=None):
    """Put a set's file, or another text, into places below raw/NAME."""
    for place in places:
        target = tmp_path / "raw" / name / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source if source is not None else next(path for path in (RAW / name).rglob("*") if path.is_file()).read_bytes())


def test_other_variants_and_splits_are_passed_over(tmp_path):
    """GSM8K's socratic variant, other splits of a set and what a hub clone has beside the data are not in it."""
    other = json.dumps({"question": "Other?", "answer": "1", "utterance": "other", "targetValue": "(description X)"}).encode()
    add(tmp_path, "gsm8k", ["train.jsonl"])
    add(tmp_path, "gsm8k", ["train_socratic.jsonl", "test.jsonl", "socratic/train.jsonl", "example_model_solutions.jsonl"], other + b"\n")
    add(tmp_path, "webqa", ["webquestions.examples.train.json"])
    add(tmp_path, "webqa", ["webquestions.examples.test.json", "dev/x.json", "dataset_infos.json", ".cache/train.json"], b"[" + other + b"]")
    for name in ("gsm8k", "webqa"):
        (reference, *_) = build(name, tmp_path / "reference", raw=RAW)
        assert build(name, tmp_path / "data", raw=tmp_path / "raw")[0].read_bytes() == reference.read_bytes()


def test_an_archive_beside_its_folder(tmp_path, capsys):
    """A set that lies there as an archive and unpacked, or twice under one name, is read once, to the same bytes."""
    for name, archive in (("lama", "data.zip"), ("math", "MATH.tar"), ("gsm8k", "copy/train.jsonl")):
        (reference, *_) = build(name, tmp_path / "reference", raw=RAW)
        shutil.copytree(RAW / name, tmp_path / "raw" / name)
        target = tmp_path / "raw" / name / archive
        if archive.endswith("zip"):
            with zipfile.ZipFile(target, "w") as packed:
                for file in RAW.glob("lama/data/**/*.jsonl"):
                    packed.write(file, file.relative_to(RAW / "lama"))
        elif archive.endswith("tar"):
            with tarfile.open(target, "w") as packed:
                packed.add(RAW / "math/MATH", "./MATH")
        else:
            add(tmp_path, name, [archive])
        capsys.readouterr()
        assert build(name, tmp_path / "data", raw=tmp_path / "raw")[0].read_bytes() == reference.read_bytes()
        assert "passed over" in capsys.readouterr().err


@pytest.mark.parametrize("name, other", [("popqa", "popQA.tsv"), ("gsm8k", "train-00000-of-00001.parquet"), ("webqa", "old.json"),
                                         ("apps", "APPS/train/0001/question.txt"), ("evolcode", "data.json")])  # fmt: skip
def test_one_set_in_two_forms(tmp_path, name, other):
    """A set that is there in two forms is refused: which of the two is meant nobody can say."""
    shutil.copytree(RAW / name, tmp_path / "raw" / name)
    add(tmp_path, name, [other])
    refused(tmp_path, "the set once more", name)


def test_one_name_for_two_files(tmp_path):
    """Two files of one name and different content are not the same set twice."""
    for place in ("a", "b"):
        add(tmp_path, "gsm8k", [f"{place}/train.jsonl"], json.dumps({"question": f"{place}?", "answer": "1"}).encode())
    refused(tmp_path, "b/train.jsonl: the set once more", "gsm8k")


def test_a_build_that_was_cut_short(tmp_path):
    """What a killed build left, a set's subjects without its facts, does not stand in the way of the next one."""
    (path,) = build("popqa", tmp_path / "data", raw=RAW)
    content = path.read_bytes()
    path.unlink(), path.with_suffix(".json").unlink()
    assert build("popqa", tmp_path / "data", raw=RAW) == [path] and path.read_bytes() == content


def test_shards_are_one_set(tmp_path):
    """The numbered shards of one file belong together."""
    rows = (RAW / "gsm8k/train.jsonl").read_bytes().splitlines(keepends=True)
    for i, row in enumerate(rows):
        add(tmp_path, "gsm8k", [f"train-{i:05}-of-00002.jsonl"], row)
    shutil.copytree(RAW / "gsm8k", tmp_path / "other/gsm8k")
    (whole,) = build("gsm8k", tmp_path / "whole", raw=RAW)
    assert prompts(tmp_path, "gsm8k") == sorted(json.dumps(turns(example)) for example in load_examples(str(whole))[0])


def test_published_sizes(tmp_path, capsys):
    """Another number of rows than the published set has is told, with both numbers."""
    add(tmp_path, "gsm8k", ["train.jsonl"], b"".join(json.dumps({"question": f"{i}?", "answer": "1"}).encode() + b"\n" for i in range(7473)))
    build("gsm8k", tmp_path / "data", raw=tmp_path / "raw")
    assert "7473" not in capsys.readouterr().err
    build("popqa", tmp_path / "data", raw=RAW)
    assert "6 rows in" in (err := capsys.readouterr().err) and "14267" in err


def test_what_is_not_read(tmp_path):
    """Files in a set's folder that are not what is read are named, before anything is downloaded."""
    import pyarrow
    import pyarrow.parquet

    add(tmp_path, "popqa", ["popqa.json"], b"[]")
    for name in ("math", "ultrachat"):
        (tmp_path / "raw" / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"problem": ["x"], "solution": ["y"]}), tmp_path / "raw" / name / "train-00000.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        for name, file in (("popqa", "popqa.json"), ("ultrachat", "train-00000.parquet")):
            first, last = run(tmp_path, "data.py", name, ok=False).stderr.splitlines()
            assert f"raw/{name}/{file}: not read" in first and "not reached" in last
    refused(tmp_path, "raw/math/train-00000.parquet: not read", "math")


@pytest.mark.parametrize("content, message", [(b"", "holds no sha256"), (b"SHA256 of nothing\n", "holds no sha256"), (b"\xff\xfe\x00", "UTF-16"),
                                              (b"0" * 64 + b"  train.jsonl\n", "its sha256 is not the one")])  # fmt: skip
def test_stated_sha256(tmp_path, content, message):
    """An empty or foreign FILE.sha256 is named; other programs' lines with the right digest are fine."""
    add(tmp_path, "gsm8k", ["train.jsonl"])
    digest = data._sha256(tmp_path / "raw/gsm8k/train.jsonl")
    add(tmp_path, "gsm8k", ["train.jsonl.sha256"], f"SHA256 (train.jsonl) = {digest.upper()}\n".encode())
    assert len(prompts(tmp_path, "gsm8k")) == 2
    add(tmp_path, "gsm8k", ["train.jsonl.sha256"], content)
    refused(tmp_path, message, "gsm8k")


# ---------------------------------------------------------------- what stands in a file's place

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_git_lfs_pointers(tmp_path):
    """A pointer of Git LFS in the place of data or a tokenizer is named, with what brings the file."""
    add(tmp_path, "gsm8k", ["train.jsonl"], POINTER)
    add(tmp_path, "fineweb", ["x.parquet"], POINTER)
    add(tmp_path, "lama", ["data.zip"], POINTER)
    (tmp_path / "mine.jsonl").write_bytes(POINTER)
    for name in ("gsm8k", "fineweb", "lama", "mine.jsonl"):
        refused(tmp_path, "git lfs pull", name)
    with pytest.raises(DataError, match="git lfs pull"):
        load_examples(str(tmp_path / "mine.jsonl"))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(DataError, match="git lfs pull"):
            data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, message", [("facts.jsonl", "no such file"), ("C:\\data\\facts.jsonl", "no such file"), ("sub/facts", "no such file"),
                                           ("C:\\data\\facts", "no such file"), ("folder.jsonl", "a folder"), ("table.xlsx", "no file of a kind that is read"), ("./.jsonl", "no such file"),
                                           ("facts", "no data set")])  # fmt: skip
def test_paths(tmp_path, name, message):
    """A path that leads nowhere is called that."""
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    refused(tmp_path, message, name)


def test_names_that_cannot_be_shown(tmp_path):
    """Where standard output is ASCII, names are escaped; a name that is not UTF-8 comes back from the manifest as it was."""
    names = ["Fakten ü.jsonl", os.fsdecode(b"Fakten \xfc.jsonl")]
    for name in names:
        (tmp_path / name).write_text(json.dumps(PAIR))
        command = [sys.executable, ROOT / "data.py", name, "--out", "out"]
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
        assert b"1 examples" in done.stdout and done.stdout.isascii()
        manifest = json.loads((tmp_path / "out" / name).with_suffix(".json").read_bytes())
        assert list(manifest["sources"]) == [f"../{name}"]


def test_systems_without_locks(tmp_path, capsys, monkeypatch):
    """Where the file system has no locks a warning says so once, and the set is built; a system without fcntl is told."""
    import errno

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    data._warn_of_no_locks.cache_clear()
    with data.alone_at(tmp_path / "data/x.jsonl"), data.alone_at(tmp_path / "data/y.jsonl"):
        pass
    assert capsys.readouterr().err.count("no locks") == 1
    (tmp_path / "fcntl.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        done = subprocess.run([sys.executable, str(ROOT / "data.py"), "kvr"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "no file locks" in done.stderr and done.stderr.count("\n") == 1
