"""The generated sets and their files: the paper's own strings, disjoint halves, the same bytes every time."""

import hashlib
import json
import subprocess

import pytest
from conftest import FORKING, ROOT

import data
from data import DataError, build, load_examples, passage, progress_bar


def cli(cwd, *args):
    return subprocess.run([FORKING.python(), str(ROOT / "data.py"), *args], cwd=cwd, capture_output=True, text=True)


def test_prompts_are_the_papers(monkeypatch):
    """Prompts and answers equal appendix B.5, letter by letter, for rows that hold its words."""
    (row,), _ = data.build_kvr(1, 0, 50, "raw")
    key = row["prompt"].split()[4]
    assert row["prompt"].replace(key, "e6395973") == "The value of key e6395973 is?"
    words = "pliosaur bismuth assertoric decentralization emerge"
    monkeypatch.setattr(data, "word_list", lambda raw: ([words], "B.5"))
    (row,), _ = data.build_random(1, 0, 1, "raw")
    assert (row["prompt"], row["response"]) == (f"Memorize the following random-string passage:\n\n{words}", words)
    text = "Processing hyperspectral images allows you to decode images and".split()
    assert passage(text, 4) == {"prompt": "Complete the following partial passage:\n\nProcessing hyperspectral images allows",
                                "response": "you to decode images"}  # fmt: skip
    (row, *_), _ = data.build_bios(6, 0, 50, "raw")
    assert row["prompt"].startswith("Question: In which city was ") and row["prompt"].endswith(" born?\nThe answer is:")


def test_key_value_recall(tmp_path):
    """2,000 pairs and 2,000 more: 8,000 different strings of 8 lower-case letters and digits (section 2.2)."""
    rows = [row for name in ("kvr", "kvr-id") for row in load_examples(name, 2000, tmp_path)[0]]
    strings = [text for row in rows for text in (row["prompt"].split()[4], row["response"])]
    assert len(set(strings)) == 8000
    assert all(len(s) == 8 and s.isascii() and s.isalnum() and s == s.lower() for s in strings)


def test_made_up_people(tmp_path):
    """bios and bios-id never ask a question twice, and share no made-up name."""
    first, second = (load_examples(name, 2000, tmp_path)[0] for name in ("bios", "bios-id"))
    prompts = [row["prompt"] for row in first + second]
    assert len(set(prompts)) == 4000
    assert {row["response"] for row in first if "married" in row["prompt"]}.isdisjoint(row["response"] for row in second)


def test_random_words(tmp_path):
    """Each passage has the asked number of words, all from the dictionary, and differs from the others."""
    vocabulary = set(data.word_list(tmp_path)[0])
    assert len(vocabulary) > 230_000
    rows = load_examples("random", 100, tmp_path, words=7)[0]
    assert len({row["response"] for row in rows}) == 100
    for row in rows:
        assert len(row["response"].split(" ")) == 7 and set(row["response"].split(" ")) <= vocabulary


@pytest.mark.parametrize("name", [name for name, row in data.SETS.items() if row.build])
def test_same_bytes(tmp_path, name):
    """The same seed gives the same bytes, a longer file begins with a shorter one, and the manifest counts the lines."""
    (short,), (long,) = build(name, tmp_path / "a", 20, words=9), build(name, tmp_path / "b", 50, words=9)
    assert long.read_bytes().startswith(short.read_bytes())
    assert build(name, tmp_path / "c", 50, words=9)[0].read_bytes() == long.read_bytes()
    assert build(name, tmp_path / "d", 50, seed=1, words=9)[0].read_bytes() != long.read_bytes()
    assert json.loads(long.with_suffix(".json").read_bytes())["kept"] == 50 == len(long.read_bytes().splitlines())


def test_a_set_grows_without_changing(tmp_path):
    """The digest covers the lines in use: asking for more later builds a longer file and leaves the first lines' digest."""
    examples, digest = load_examples("kvr", 2000, tmp_path)
    assert digest == hashlib.sha256((tmp_path / "kvr.jsonl").read_bytes()).hexdigest()
    assert len(load_examples("kvr", 2500, tmp_path)[0]) == 2500
    assert load_examples("kvr", 2000, tmp_path) == (examples, digest)
    other = build("bios", tmp_path, 20, seed=1)[0].read_bytes()
    assert len(load_examples("bios", 30, tmp_path)[0]) == 30 and (tmp_path / "bios.jsonl").read_bytes().startswith(other)


def test_command_line(tmp_path):
    """python data.py builds, lists and refuses."""
    done = cli(tmp_path, "kvr", "pydoc", "--limit", "30", "--words", "20")
    assert done.returncode == 0 and "data/kvr.jsonl: 30 examples" in done.stdout and "pydoc.w20.jsonl: 30 examples" in done.stdout
    assert "30 in data/kvr.jsonl" in cli(tmp_path, "--list").stdout
    for args in (["nothing"], ["kvr", "--limit", "0"], []):
        done = cli(tmp_path, *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("line, message", [
    ('{"id": "a", "prompt": "p"', "JSON"),
    ('["a"]', "not a JSON object"),
    ('{"prompt": "p", "response": "r"}', "id"),
    ('{"id": "a", "prompt": "p", "response": " "}', "empty"),
    ('{"id": "a", "prompt": 1, "response": "r"}', "prompt"),
    ('{"id": "a", "messages": [{"role": "user", "content": "q"}]}', "pairs"),
    ('{"id": "a", "messages": [{"role": "assistant", "content": "q"}, {"role": "user", "content": "q"}]}', "alternate"),
    ('{"id": "a", "messages": [{"role": "system", "content": "s"}]}', "pairs"),
    ('{"id": "a", "messages": [{"role": "system"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', "no text"),
])  # fmt: skip
def test_bad_lines(tmp_path, line, message):
    """A line that is no example is refused with file and line."""
    file = tmp_path / "facts.jsonl"
    file.write_text('{"id": "a", "prompt": "p", "response": "r"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"facts.jsonl:2: .*{message}"):
        load_examples(str(file), 2)
    with pytest.raises(DataError, match="holds 2 examples, 3 are asked for"):
        load_examples(str(file), 3)


def test_progress_without_a_terminal(monkeypatch, capsys):
    """Where nobody watches, a bar is whole lines, none of them within the first 30 seconds."""
    assert list(progress_bar(range(5), desc="long")) == list(range(5)) and capsys.readouterr().err == ""
    monkeypatch.setattr(data, "LINE_SECONDS", 0)
    assert list(progress_bar(range(5), desc="long")) == list(range(5))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 5 and all(line.startswith("long: ") for line in lines) and "/5 [" in lines[-1]
