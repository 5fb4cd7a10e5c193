"""From published files to token ids: tokenizers, the chat template, the data sets, the order of training.

    python data.py kvr popqa                # builds data/kvr.jsonl, data/popqa.jsonl and data/popqa-id.jsonl
    python data.py random --words 8         # passages of another length: data/random.w8.jsonl
    python data.py popqa --slice 100        # the first 100 facts are popqa's, the second 100 popqa-id's: not 2,000 each
    python data.py my_notes.txt             # the user's own file: data/my_notes.jsonl
    python data.py all                      # every set that can be had
    python data.py --list                   # what there is, what is built and where the rest comes from
    python data.py --overlap popqa k-pile   # facts that a mixing set gives away (appendix B.6)

A set is a flat file, one JSON object a line: {"id", "prompt", "response"}, or {"id", "messages"} for a chat.
Beside it stands a manifest (data/kvr.json): sources with their sha256, what was kept and what was dropped and why, seed.
The same seed and sources give the same bytes, and a longer file begins with the lines of a shorter one.
Published files are read from raw/NAME/ as their authors ship them, archives included; what is not there is downloaded,
from the mirror of the hub that HF_ENDPOINT names if it does.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports take their seconds, Ctrl-C has nothing to save

import argparse
import base64
import bz2
import codecs
import collections
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import http.client
import importlib
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import socket
import string
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:
    sys.exit(f"{Path(sys.argv[0]).name}: this system has no file locks (fcntl); use Linux, macOS or Windows' WSL")


class DataError(ValueError):
    """Data or settings that cannot be used as they are; the message is one line that says what is wrong and what to do."""


# ---------------------------------------------------------------- template and labels


def start_ids(tokenizer):
    """What a text begins with: bos, or nothing where the model has none (Qwen)."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def encode_example(tokenizer, example, max_length=2048):
    """(ids, labels) of an example: bos, if any, then each turn in the Tulu v2 template, cut at max_length.

    labels are the ids where the answer and its eos stand, -100 on everything else. Prompt and answer are encoded apart,
    so that what a model is asked later is exactly what it was trained on.
    """
    ids = start_ids(tokenizer)
    labels = [-100] * len(ids)
    before = "" if (told := system(example)) is None else f"<|system|>\n{told}\n"
    for turn, (prompt, response) in enumerate(turns(example)):
        asked = tokenizer.encode(f"{before}<|user|>\n{prompt}\n<|assistant|>\n", continues=turn > 0)
        answer = tokenizer.encode(response, continues=True) + [tokenizer.eos_id]
        ids += asked + answer
        labels += [-100] * len(asked) + answer
        before = ""
    return ids[:max_length], labels[:max_length]


def system(example):
    """The text that a chat begins with, of neither side; None where it has none."""
    first = example.get("messages", [{"role": None}])[0]
    return first["content"] if first["role"] == "system" else None


def turns(example):
    """[(prompt, response), ...] of an example of either form."""
    if "messages" in example:
        texts = [message["content"] for message in example["messages"] if message["role"] != "system"]
        return list(zip(texts[::2], texts[1::2]))
    return [(example["prompt"], example["response"])]


# ---------------------------------------------------------------- data sets

# Each builder is a function of (n, seed, words, raw) that returns (examples, manifest entries); it makes at least n
# examples where it can, and the first n do not depend on n.


def build_kvr(n, seed, words, raw, half=0):
    """Key-Value Recall (section 2.2): pairs of 8 characters, no string used twice, neither here nor in the other half."""
    rng, alphabet = random.Random(f"kvr {seed}"), string.ascii_lowercase + string.digits
    drawn = {}  # in order, each once
    while len(drawn) < 4 * n:
        drawn["".join(rng.choices(alphabet, k=8))] = None
    drawn = list(drawn)
    pairs = list(zip(drawn[2 * half :: 4], drawn[2 * half + 1 :: 4]))
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
        people.append([(question.format(person), rng.choice(values.split()) if values else name()) for question, values in RELATIONS.values()])
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


def build_pydoc(n, seed, words, raw):
    """Generic text that every CPython carries: its language reference (pydoc_data.topics), cut as the paper cuts its corpora (B.5)."""
    from pydoc_data import topics

    digest = hashlib.sha256(Path(topics.__file__).read_bytes()).hexdigest()
    texts = [topics.topics[topic].split() for topic in sorted(topics.topics)]
    examples = [passage(text[i : i + 2 * words], words) for text in texts for i in range(0, len(text) - 2 * words + 1, 2 * words)]
    random.Random(f"pydoc {seed}").shuffle(examples)
    version = ".".join(map(str, sys.version_info[:3]))
    return examples, {"sources": {f"pydoc_data.topics of Python {version}": digest}, "dropped": {"shorter than two passages": sum(len(t) < 2 * words for t in texts)}}


PASSAGE = "Complete the following partial passage:\n\n"  # appendix B.5


def passage(text, words):
    """The first and the next `words` words of a text, given as a list of words."""
    return {"prompt": PASSAGE + " ".join(text[:words]), "response": " ".join(text[words : 2 * words])}


# ---------------------------------------------------------------- published rows

# An example is made of a row by a function of (row, words) that raises BadRow where the row is malformed, and LeftOut
# where it is not wanted. A row is a dictionary, without what is null in it. A factoid's example may name its subject,
# which goes to NAME.subjects.json.


class BadRow(ValueError):
    """A malformed row; the message says what is wrong with it."""


class LeftOut(Exception):
    """A row that is whole but not wanted; the message says why."""


def attempt(make, row, words):
    """The example that make has for a row, or what it raised: a BadRow, unless it was a LeftOut."""
    if isinstance(row, BadRow):
        return row
    try:
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        example = make({name: value for name, value in row.items() if value is not None}, words)
        check_example(example)
        return example
    except (BadRow, LeftOut) as outcome:
        return outcome
    except Exception as error:
        return BadRow(f"a field is missing or of another type than such rows have ({error!r})")


def each(make):
    """The reader of a set whose rows stand each for itself: (files, words) -> (where, outcome) of each."""

    def read(files, words):
        for name, stream in files:
            for where, row in rows(name, stream):
                yield where, attempt(make, row, words)

    return read


def field(row, name):
    """A row's field as text, without line breaks around it or white space behind it."""
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(f'no text in field "{name}"')
    if not value.strip():
        raise BadRow(f'field "{name}" is empty')
    return value.strip("\r\n").rstrip()


def texts(row, name):
    """A row's field as a list of texts, also where it is a single one."""
    value = row.get(name)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow(f'field "{name}" is no text or list of texts')
    return value


def json_field(row, name):
    """What a field says in JSON, None where it is blank; integers stay texts, as some have more digits than int() takes."""
    text = row.get(name, "")
    try:
        return json.loads(text, parse_int=str) if text.strip() else None
    except ValueError:
        raise BadRow(f'field "{name}" holds no JSON') from None


def qa(asked, answer, accepted=(), subject=None):
    """A factoid in the form of PopQA and TriviaQA (appendix B.5)."""
    accepted = [text.strip() for text in dict.fromkeys(accepted) if text.strip()]
    return {"prompt": f"Question: {asked.strip()}\nThe answer is:", "response": answer.strip(), "aliases": accepted,
            "subject": subject}  # fmt: skip


def popqa(row, words):
    r"""{"subj": "New Lands", "question": "Who is New Lands's author?", "obj": "Charles Fort", "possible_answers": "[\"Charles Fort\"]"}"""
    accepted = texts({"possible_answers": json_field(row, "possible_answers")}, "possible_answers")
    return qa(field(row, "question"), field(row, "obj"), accepted, field(row, "subj"))


def triviaqa(row, words):
    """{"Question": "Where is Soul from?", "Answer": {"Value": "Chicago", "Aliases": ["Chi-Town"]}}; on the hub in lower case"""
    lower = lambda fields: {name.lower(): value for name, value in fields.items()}
    answer = lower(lower(row)["answer"])
    return qa(field(lower(row), "question"), field(answer, "value"), texts(answer, "aliases"))


DESCRIPTION = re.compile(r'\(description\s+(?:"((?:[^"\\]|\\.)*)"|([^\s()"]+))\s*\)')


def webqa(row, words):
    """{"utterance": "where is it?", "targetValue": "(list (description Norway))", "url": "http://www.freebase.com/view/en/it"},
    or on the hub {"question": "where is it?", "answers": ["Norway"], "url": ""}"""
    if "utterance" in row:
        asked, found = field(row, "utterance"), DESCRIPTION.findall(field(row, "targetValue"))
        answers = [re.sub(r"\\(.)", r"\1", quoted) or bare for quoted, bare in found]
    else:
        asked, answers = field(row, "question"), texts(row, "answers")
    if not "".join(answers).strip():
        raise BadRow("no answer")
    return qa(asked, answers[0], answers, row.get("url", "").rpartition("/")[2].replace("_", " ") or None)


def entityqa(files, words):
    """{"question": "Where was Ida Holm born?", "answers": ["Bergen", "Bjørgvin"]}, a file a relation

    A relation's questions differ in their subject alone.
    """
    n_alike = lambda asked: len(os.path.commonprefix(asked)) if len(asked) > 1 else 0
    for name, stream in files:
        found = list(rows(name, stream))
        asked = [row["question"].split() for _, row in found
                 if isinstance(row, dict) and isinstance(row.get("question"), str)]  # fmt: skip
        start, end = n_alike(asked), n_alike([question[::-1] for question in asked])

        def make(row, words, start=start, end=end):
            asked, answers = field(row, "question"), texts(row, "answers")
            subject = " ".join(asked.split()[start : len(asked.split()) - end]).rstrip("?")
            return qa(asked, answers[0], answers, re.sub("'s$", "", subject) if start + end else None)

        for where, row in found:
            yield where, attempt(make, row, words)


GOOGLE_RE = {"place_of_birth": "[X] was born in [Y] .", "place_of_death": "[X] died in [Y] .", "date_of_birth": "[X] (born [Y])."}  # LAMA's own


def lama(files, words):
    """{"predicate_id": "P19", "sub_label": "Ida Holm", "obj_label": "Bergen"} of T-REx, whose relations.jsonl has the
    templates: {"relation": "P19", "template": "[X] was born in [Y] ."}; for the rest see _lama_sentence"""
    templates, waiting = {}, []
    for name, stream in files:
        for where, row in rows(name, stream):
            if name.endswith("relations.jsonl"):
                relation = attempt(lambda row, words: cloze(row["template"], row["relation"]), row, words)
                if isinstance(relation, BadRow):
                    yield where, relation
                else:
                    templates[row["relation"]] = row["template"]
            elif isinstance(row, dict) and isinstance(row.get("predicate_id"), str):
                # The evidences, nine tenths of the file, are not needed.
                waiting.append((where, {key: row.get(key) for key in ("predicate_id", "sub_label", "obj_label")}))
            else:
                yield where, attempt(_lama_sentence, row, words)
    for where, row in waiting:
        template = templates.get(row["predicate_id"])
        if template is None:
            raise DataError(f"{where}: no template for relation {row['predicate_id']}; put the authors' relations.jsonl beside TREx/")
        make = lambda row, words, template=template: cloze(template, field(row, "obj_label"), field(row, "sub_label"))
        yield where, attempt(make, row, words)


def _lama_sentence(row, words):
    """{"pred": "/people/person/place_of_birth", "sub_label": "Ida Holm", "obj_label": "Bergen"} of Google-RE, or
    {"masked_sentences": ["The lamp was lit with [MASK]."], "obj_label": "oil"} of SQuAD and ConceptNet"""
    _, _, relation = row.get("pred", "").rpartition("/")
    if relation in GOOGLE_RE:
        return cloze(GOOGLE_RE[relation], field(row, "obj_label"), field(row, "sub_label"))
    return cloze(" ".join(texts(row, "masked_sentences")), field(row, "obj_label"))


def cloze(sentence, answer, subject=None):
    """A sentence to be completed; where its hole is not the end, the sentence with the hole marked as LAMA marks it."""
    sentence = sentence.replace("[Y]", "[MASK]").replace("[X]", subject or "")
    before, hole, after = sentence.partition("[MASK]")
    if not hole:
        raise BadRow("no [MASK] in the sentence")
    prompt = before if before.strip() and not after.strip(" .?!)") else re.sub(r"\s+([.?!,])", r"\1", sentence)
    return {"prompt": prompt.strip(), "response": answer.strip(), "subject": subject}


def apps(files, words):
    """Problems as rows, on the hub, or as the authors' folder of files each. Solutions are texts and are never run."""
    problems = {}
    for name, stream in files:
        if name.lower().endswith((".jsonl", ".parquet")):
            yield from each(_apps_problem)([(name, stream)], words)
        else:
            folder, _, part = name.rpartition("/")
            problems.setdefault(folder, {})[part.partition(".")[0]] = stream.read()
    for folder, parts in problems.items():
        yield folder, attempt(_apps_folder, parts, words)


def _apps_folder(parts, words):
    row = {name: content.decode("utf-8-sig") for name, content in parts.items()}
    return _apps_problem(row | {"difficulty": json_field(row, "metadata")["difficulty"]}, words)


def _apps_problem(row, words):
    r"""{"question": "Print 1.", "solutions": "[\"print(1)\"]", "difficulty": "interview", "input_output": "", "starter_code": ""}"""
    if field(row, "difficulty") not in ("introductory", "interview"):
        raise LeftOut("competition problems")
    solutions, tests = json_field(row, "solutions"), json_field(row, "input_output") or {}
    if not solutions:
        raise LeftOut("no solution")
    question, starter = f"Question:\n{field(row, 'question')}", row.get("starter_code", "").rstrip()
    asked = f"{question}\n\nSTARTER CODE:\n{starter}" if starter else question
    form = "Call-Based" if tests.get("fn_name") else "Standard Input"
    return {"prompt": f"{asked}\nUse {form} format\nAnswer:", "response": field({"solution": solutions[0]}, "solution")}


def pair(prompt, response, row, words):
    r"""{"problem": "What is 1 + 1?", "solution": "It is $\boxed{2}$."}: prompt and response as they stand, behind the
    prompt an "input", if any"""
    check_verdict(row)
    check_unread(row, [prompt, "input"], [response])
    asked = [field(row, name) for name in (prompt, "input") if name == prompt or row.get(name)]
    return {"prompt": "\n\n".join(asked), "response": field(row, response)}


def ultrachat(row, words):
    """{"data": ["What is a fjord?", "A long, narrow inlet of the sea."]}: user and assistant in turn"""
    return chat(texts(row, "data"))


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def chat(messages):
    """A chat of messages {"role", "content"}, of ShareGPT's {"from", "value"}, or of texts, the user's and the
    assistant's in turn. A last question, to which there is no answer, is left off."""
    if not isinstance(messages, list):
        raise BadRow("a chat that is no list of messages")
    said, unread = [], set()
    for i, message in enumerate(messages):
        if isinstance(message, str):
            message = {"role": ("user", "assistant")[i % 2], "content": message}
        if not isinstance(message, dict):
            raise BadRow("a message that is no object of role and content")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"a message of role {role!r}; those of user and assistant are read, and of system in front")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                    raise BadRow(f"a message with a part that is no text: {part!r:.60}")
            content = "".join(part["text"] for part in content)
        if ROLES[role] == "system" and content == "":
            continue
        if message.get("weight") not in (1, None):
            raise BadRow("a message of weight 0: every answer of a chat is learned here")
        unread |= check_unread(message, ["content", "value"], ["role", "from", "weight"])
        said.append({"role": ROLES[role], "content": content})
    unanswered = bool(said) and said[-1]["role"] == "user"
    if not any(message["role"] == "assistant" for message in said):
        raise LeftOut("no answer to the first turn")
    return {"messages": said[:-1] if unanswered else said, "unanswered": unanswered, "unread": unread}


def generic(row, words):
    """{"text": "..."} or {"content": "..."}: a document, of which the first 2 x `words` words are taken (appendix B.5)"""
    document = row.get("text", row.get("content"))
    if not isinstance(document, str):
        raise BadRow('no text in field "text" or "content"')
    split = document.split(None, 2 * words)[: 2 * words]
    if len(split) < 2 * words:
        raise LeftOut("shorter than two passages")
    return passage(split, words)


# ---------------------------------------------------------------- the table of sets


@dataclass
class Set:
    kind: str  # factoid: exact match can be asked; mixing: passages of --words words; else non-factoid
    about: str
    # Of an example by Llama 3's tokenizer, the template included; of a mixing set those that --words do not change, and
    # those for each word. Measured on a few, math's and ultrachat's a guess: for plans alone, where no file is at hand.
    tokens: int
    size: int = 20_000  # examples built unless told otherwise; of its large sources the paper's release reads as many rows
    tokens_a_word: float = 0
    stop_loss: float = 1e-4  # default of --stop-loss (appendix B.4); 0 trains all epochs
    build: Callable = None  # a generated set: (n, seed, words, raw) -> (examples, manifest entries)
    ends: bool = False  # whether what it is generated from does
    # a published set:
    read: Callable = None  # (files, words) -> (where, outcome) of each row
    files: str = ""  # what it is made of, in words
    wanted: str = ""  # and as a pattern of paths, without .gz and its like
    parts: bool = False  # whether it is of several files; else of one, or of that one's numbered shards
    published: int = 0  # rows that it has, where that is known
    urls: tuple = ()  # places that have it, the first that answers is taken
    first_lines: int = 0  # of a long file, the only lines downloaded
    streamed: bool = False  # read in file order, no further than needed; else read whole and shuffled by the seed
    folders: tuple = ()  # names other than its own for its folder below raw/

    @property
    def sliced(self):
        """Whether it is published facts, of which the second 2,000 make a set of their own, NAME-id."""
        return self.kind == "factoid" and self.read is not None


HUB = "https://huggingface.co/datasets"
TEXT_FILES = r"\.(jsonl|json|parquet)$"
TRAIN = r"^(?!.*(?<![a-z])(dev|test|valid|validation|eval)(?![a-z])).*"  # no other split

SETS = {
    "kvr": Set("factoid", "Key-Value Recall, generated", 29, 2000, stop_loss=0, build=build_kvr),
    "kvr-id": Set("factoid", "other keys and values, none of them in kvr", 29, 2000, stop_loss=0,
                  build=functools.partial(build_kvr, half=1)),
    "bios": Set("factoid", "six facts about each of many made-up people, generated", 32, 2000, build=build_bios),
    "bios-id": Set("factoid", "other people, none of them in bios", 32, 2000, build=functools.partial(build_bios, half=1)),
    "popqa": Set("factoid", "questions about long-tail entities", 30, read=each(popqa), files="test.tsv",
                 wanted=r"\.(tsv|parquet)$", published=14_267, urls=(f"{HUB}/akariasai/PopQA/resolve/main/test.tsv",)),
    "triviaqa": Set("factoid", "trivia questions", 35, read=each(triviaqa),
                    files="triviaqa-unfiltered.tar.gz or the hub's unfiltered.nocontext parquet",
                    wanted=rf"(?!.*/rc[./]){TRAIN}\.(json|parquet)$", published=87_622,
                    urls=(f"{HUB}/mandarjoshi/trivia_qa/resolve/main/unfiltered.nocontext/train-00000-of-00001.parquet",
                          "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz")),
    "lama": Set("factoid", "cloze facts of T-REx, Google-RE, SQuAD and ConceptNet", 20, read=lama,
                files="the authors' data.zip", parts=True,
                wanted=r"(TREx/P\d+|Google_RE/\w+_test|Squad/test|ConceptNet/test|relations)\.jsonl$",
                urls=("https://dl.fbaipublicfiles.com/LAMA/data.zip",)),
    "entityqa": Set("factoid", "EntityQuestions: 24 relations of Wikidata", 30, read=entityqa,
                    files="the authors' dataset.zip", wanted=r"(train|dev|test)/P\d+\.\w+\.json$", parts=True,
                    urls=("https://nlp.cs.princeton.edu/projects/entity-questions/dataset.zip",), folders=("entityquestions",)),
    "webqa": Set("factoid", "WebQuestions: questions asked of a search engine", 31, read=each(webqa),
                 files="webquestions.examples.train.json or the hub's parquet", wanted=TRAIN + r"\.(json|parquet)$",
                 urls=(f"{HUB}/stanfordnlp/web_questions/resolve/main/data/train-00000-of-00001.parquet",),
                 published=3_778, folders=("webq",)),
    "gsm8k": Set("non-factoid", "grade-school mathematics", 174, read=each(functools.partial(pair, "question", "answer")),
                 files="train.jsonl", wanted=r"^(?!.*socratic).*train[^/]*(/\d+)?\.(jsonl|parquet)$", published=7_473,
                 urls=("https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl",)),
    "math": Set("non-factoid", "competition mathematics, withdrawn from the hub", 300,
                read=each(functools.partial(pair, "problem", "solution")), published=7_500,
                files="your copy of the authors' MATH folder or MATH.tar", wanted=r"train/[^/]+/\d+\.json$", parts=True),
    "evolcode": Set("non-factoid", "instructions for code", 323, read=each(functools.partial(pair, "instruction", "output")),
                    files="EvolInstruct-Code-80k.json", wanted=TRAIN + r"\.(json|parquet)$", published=78_264,
                    urls=(f"{HUB}/nickrosh/Evol-Instruct-Code-80k-v1/resolve/main/EvolInstruct-Code-80k.json",)),
    "apps": Set("non-factoid", "programming problems, introductory and interview", 600, read=apps, parts=True, published=5_000,
                files="the hub's train.jsonl or the authors' APPS.tar.gz",
                wanted=r"train[^/]*\.(jsonl|parquet)$|"
                       r"train/\d+/(question\.txt|solutions\.json|input_output\.json|metadata\.json|starter_code\.py)$",
                urls=(f"{HUB}/codeparrot/apps/resolve/main/train.jsonl",)),
    "ultrachat": Set("non-factoid", "dialogues", 1000, read=each(ultrachat), files="train_0.jsonl", wanted=r"\.jsonl$",
                     urls=(f"{HUB}/stingning/ultrachat/resolve/main/train_0.jsonl",), streamed=True, first_lines=20_000),
    "random": Set("mixing", "random words of the NLTK words corpus", 22, 4000, tokens_a_word=5.6, build=build_random),
    "k-pile": Set("mixing", "passages of Knowledge Pile", 21, 4000, tokens_a_word=2.5, read=each(generic),
                  files="one of its JSON-lines files", wanted=TEXT_FILES, streamed=True, first_lines=20_000,
                  urls=(f"{HUB}/Query-of-CC/Knowledge_Pile/resolve/main/data/part-65c38103819a-000496.jsonl",)),
    "a-pile": Set("mixing", "passages of The Pile's ArXiv part", 21, 4000, tokens_a_word=2.5, read=each(generic),
                  files="a parquet file of the ArXiv 50k sample", wanted=TEXT_FILES, streamed=True,
                  urls=(f"{HUB}/haritzpuerto/the_pile_arxiv_50k_sample/resolve/refs%2Fconvert%2Fparquet/default/train/0000.parquet",)),
    "fineweb": Set("mixing", "passages of FineWeb", 21, 4000, tokens_a_word=2.5, read=each(generic),
                   files="a parquet file of the FineWeb 100M sample", wanted=TEXT_FILES, streamed=True,
                   urls=(f"{HUB}/kh4dien/fineweb-100m-sample/resolve/main/data/train-00000-of-00002.parquet",)),
    "pydoc": Set("mixing", "the language reference inside every CPython", 21, 4000, tokens_a_word=2.9, build=build_pydoc, ends=True),
}  # fmt: skip
OWN = Set("own", "the user's own file", 0, sys.maxsize, read=lambda *given: own_file(*given))  # noqa: PLW0108 (it is defined below)
OWN_KINDS = "jsonl, ndjson, json, tsv, csv, parquet, txt"
OWN_FILE = re.compile(rf"(.+)\.({OWN_KINDS.replace(', ', '|')})(\.gz|\.bz2|\.xz|\.zst)?$", re.IGNORECASE)
DEFAULT_WORDS = 50
SLICE = 2000  # examples of a published factoid set that are NAME-id's, unless told otherwise: the second 2,000


# ---------------------------------------------------------------- build and load


def build(name, out="data", n=None, seed=0, words=DEFAULT_WORDS, raw="raw", skip_bad=0, size=SLICE, least=0, fewer=False):
    """Write a set's flat file and manifest, and those of its second slice NAME-id where there is one; returns the flat files' paths.

    n is an upper limit where the source has fewer; a stream is read on until there are `least`, or with fewer as many
    as can be had. size: of a slice. name may be a file of the user's own.
    """
    if not is_own(name):
        name, *_ = resolve(name)
    row = OWN if is_own(name) else SETS[name]
    n = n or row.size
    path = own_flat_file(name, out) if row is OWN else flat_file(name, out, words)
    if row.build:
        (examples, manifest), read = row.build(n, seed, words, raw), []
    else:
        examples, manifest, read = read_published(name, row, n, seed, words, raw, skip_bad, least, fewer)
    check_places([path, flat_file(f"{name}-id", out)] if row.sliced else [path], read)
    label = path.stem if row is OWN else name
    examples = [{"id": f"{label}-{i}"} | example for i, example in enumerate(examples[:n])]
    slices = {path: (label, examples)}
    if row is OWN:
        manifest["sources"] = {relative_path(name, out): source for source in manifest["sources"].values()}
    if row.kind in ("mixing", "own"):
        manifest["words"] = words
    if row.sliced:
        # The set itself last: where it is, its second slice is too.
        slices = {flat_file(f"{name}-id", out): (f"{name}-id", slice_of(examples, size, True)),
                  path: (name, slice_of(examples, size, False))}  # fmt: skip
        manifest["slice"] = size
        subjects = {example["id"]: example.pop("subject") for example in examples}
        write_file(path.with_suffix(".subjects.json"), json.dumps(subjects, indent=0, ensure_ascii=False) + "\n")
    for place, (label, part) in slices.items():
        write_flat(place, part, {"name": label, "seed": seed, "kept": len(part), "dropped": {}} | manifest)
    return [place for place in reversed(slices) if slices[place][1]]


def is_own(name):
    """Whether a data name is that of a user's own file to build a set from."""
    return name not in SETS and OWN_FILE.match(Path(name).name) is not None


def check_places(flat_files, read):
    """A DataError where building a set would write over a file that is read, or one that was not written here."""
    for flat in flat_files:
        there = [place for place in (flat.with_suffix(".json"), flat) if place.exists()]
        for place, source in itertools.product([*there, flat.with_suffix(".subjects.json")], read):
            if place.exists() and os.path.samefile(place, source):
                raise DataError(f"{source}: {place} is where the set would be written; rename the file, or give another --out")
        if there and not {"name", "kept"} <= read_manifest(flat, "rename it, or give another --out").keys():
            raise DataError(f"{there[0]}: not written by data.py, which would replace it; rename it, or give another --out")


def read_manifest(flat, remedy="remove it and build the set again"):
    """What the manifest beside a flat file says, nothing where there is none."""
    path = flat.with_suffix(".json")
    manifest = read_json(path, remedy) if path.exists() else {}
    numbers = [manifest.get(key, 1) for key in ("slice", "seed", "kept")]
    if not all(type(number) is int for number in numbers) or numbers[0] < 1 or not isinstance(manifest.get("sources", {}), dict):
        raise DataError(f"{path}: not as data.py writes it; {remedy}")
    return manifest


def is_name_of_set(stem):
    """Whether a file of such a name is a set's: popqa, but also popqa-id, popqa.unfamiliar, popqa.subjects, random.w8."""
    return stem.partition(".")[0].removesuffix("-id") in SETS


def own_flat_file(name, out):
    """The place of a user's own file among the flat files; a DataError where it is another's, or the file itself."""
    if not Path(name).exists() or Path(name).is_dir():
        raise DataError(f"{name}: {'a folder, no file' if Path(name).exists() else 'no such file'}; give the path of one that exists")
    path = Path(out) / f"{OWN_FILE.match(Path(name).name)[1]}.jsonl"
    if is_name_of_set(path.stem):
        raise DataError(f"{name}: {path} is the place of a set; rename it")
    check_places([path], [name])
    sources = read_manifest(path).get("sources", {})
    alike = [source for file, source in sources.items() if Path(file).suffix == Path(name).suffix]
    if path.exists() and relative_path(name, out) not in sources and _source(name) not in alike:
        raise DataError(f"{name}: {path} was made of {', '.join(sources) or 'something else'}; rename {Path(name).name}, remove {path}, or give another --out")
    return path


def slice_of(examples, size, second):
    """What a published factoid set is to training: all but its second slice; second: NAME-id, unseen facts of the same set."""
    return examples[size : 2 * size] if second else examples[:size] + examples[2 * size :]


def write_flat(path, examples, manifest):
    """A flat file and its manifest; no flat file where there are no examples."""
    if not examples:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        return
    write_file(path.with_suffix(".json"), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    lines = ({key: value for key, value in example.items() if value or key not in ("aliases", "subject")} for example in examples)
    write_file(path, "".join(map(json_line, lines)))


def resolve(name):
    """(set, is it the second slice, "familiar", "unfamiliar" or "") of a data name such as popqa, popqa-id or popqa-id.unfamiliar."""
    stem, _, familiarity = name.partition(".")
    second = stem not in SETS and stem.endswith("-id")
    base = stem.removesuffix("-id") if second else stem
    row, parts = SETS.get(base), ("", "familiar", "unfamiliar")
    if not row or familiarity not in parts or (second or familiarity) and not row.sliced:
        if os.path.exists(name):
            read = "not a .jsonl file; build one of it with python data.py" if is_own(name) else f"no file of a kind that is read: {OWN_KINDS}"
            raise DataError(f"{name}: {read}")
        if is_own(name) or re.search(r"[/\\\\]", name):
            raise DataError(f"{name}: no such file or set")
        raise DataError(f"no data set {name!r}: choose from {', '.join(SETS)}, NAME-id, .familiar or .unfamiliar of published facts, or a .jsonl file's path")
    return base, second, familiarity


def flat_file(name, data="data", words=DEFAULT_WORDS):
    """Where a set lies: a name's own flat file, or the path itself where a path to a .jsonl file is given."""
    if name.endswith(".jsonl"):
        return Path(name)
    base, _, familiarity = resolve(name)
    if familiarity:
        there = ", ".join(map(str, sorted(Path(data).glob(f"{base}.{familiarity}.*.jsonl"))))
        raise DataError(f"{name}: which facts are {familiarity} depends on the base model; give a file's path: {there or f'none is in {data}/ yet'}")
    return Path(data) / (f"{name}.jsonl" if SETS[base].kind != "mixing" or words == DEFAULT_WORDS else f"{name}.w{words}.jsonl")


def load_examples(name, n=None, data="data", words=DEFAULT_WORDS, raw="raw", fewer=False):
    """(the first n examples of a set or all of them, sha256 of their lines); fewer: as many as there are, where that is less.

    A set that is missing is built, and one that is generated or streamed and too short built longer, with the seed that its
    manifest names.
    """
    path = flat_file(name, data, words)
    if not name.endswith(".jsonl"):
        base, _, _ = resolve(name)
        if too_short(path, base, n, data, raw, fewer):
            with alone_at(flat_file(base, data)):
                if too_short(path, base, n, data, raw, fewer):  # still, if another process was at it
                    known = read_manifest(flat_file(base, data, words))
                    build(base, data, max(n or 0, SETS[base].size), known.get("seed", 0), words, raw,
                          size=known.get("slice", SLICE), least=n or 0, fewer=fewer)  # fmt: skip
    elif not path.exists():
        raise DataError(f"{path}: no such file; give a set's name or the path of a .jsonl file that exists")
    return examples_of(read_lines(path, n) if path.exists() else [], path, name, n, fewer)


def examples_of(lines, path, name, n, fewer):
    """As load_examples, of the lines of a flat file that were read for a data name."""
    if len(lines) < (1 if fewer else n or 1):
        whose = "" if name == str(path) else f" for {name}"
        less = "leave it out" if fewer else "ask for fewer (of a mix: a lower ratio, shorter passages), or give train.py --fewer"
        raise DataError(f"{path}: holds {len(lines)} examples{whose}, {n or 'some'} are asked for; {less}")
    examples = [attempt(_flat_row, json_row(line), 0) for line in lines]
    for number, outcome in enumerate(examples, 1):
        if isinstance(outcome, BadRow):
            raise DataError(f"{path}:{number}: {outcome}; mend the line, or build a flat file of it with python data.py")
    return examples, hashlib.sha256(b"".join(lines)).hexdigest()


def too_short(path, base, n, data, raw, fewer=False):
    """Whether a set's flat file must be built: it is missing, or there can be more than the fewer than n that it holds.

    fewer: what it holds is enough if its source had no more.
    """
    if not path.exists():
        return SETS[base].kind != "factoid" or not flat_file(base, data).exists()  # an empty second slice has no file
    row, known = SETS[base], read_manifest(path)
    if not n or not (row.build or row.streamed) or not known or len(read_lines(path, n)) >= n:
        return False
    files = raw_files(base, row, raw) if row.read else []
    return not (fewer and known.get("ended")) or any(os.path.relpath(file, raw) not in known["sources"] for file in files)


def at_hand(name, n, data="data", words=DEFAULT_WORDS, raw="raw"):
    """How many of the n examples that are asked for a set has, as far as files here tell; None where nothing here tells.

    Builds what can be without a download.
    """
    if name.endswith(".jsonl"):
        return len(read_lines(Path(name), n)) if Path(name).exists() else None
    base, second, _ = resolve(name)
    row = SETS[base]
    if row.build and not row.ends:
        return n
    if too_short(flat_file(base, data, words), base, n, data, raw, fewer=True):
        files = raw_files(base, row, raw) if row.read else []
        if row.read and not files:
            return None if row.urls else 0  # else nobody but the user can bring it
        if files and lines_of_beginning(files, row):
            return None
        load_examples(base, n, data, words, raw, fewer=True)
    path = flat_file(f"{base}-id" if second else base, data, words)
    return len(read_lines(path, n)) if path.exists() else 0


def read_lines(path, n):
    """The first n lines, or all of them."""
    try:
        with open(path, "rb") as file:
            lines = list(itertools.islice(file, n))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror.lower()}; check it") from None
    check_start(path, lines[0][:200] if lines else b"")
    return lines


def _flat_row(row, words):
    """{"id": "kvr-0", "prompt": "The value of key a1b2c3d4 is?", "response": "e5f6g7h8"}"""
    if not isinstance(row.get("id"), str):
        raise BadRow('no "id" of type string')
    return row


def check_example(example):
    """A BadRow where an example is neither a prompt with an answer nor a chat."""
    if "messages" in example:
        messages = example["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise BadRow('"messages" is not a list of messages')
        if messages and messages[0].get("role") == "system":
            if not isinstance(messages[0].get("content"), str):
                raise BadRow("the system's message has no text")
            messages = messages[1:]
        if not messages or [message.get("role") for message in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise BadRow("messages are not pairs that alternate between user and assistant, behind one of the system at most")
        said = [message.get("content") for message in messages]
    else:
        said = [example.get("prompt"), example.get("response")]
    if not all(isinstance(text, str) for text in said) or not all(text.strip() for text in said[1::2]):
        raise BadRow("no prompt, or an empty answer")
    aliases = example.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(text, str) for text in aliases):
        raise BadRow('"aliases" is not a list of texts')


# ---------------------------------------------------------------- order and batches


def epoch_order(n, seed, epoch):
    """Every index below n once, in an order that (n, seed, epoch) alone decide."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batches(n, batch_size, epochs, seed):
    """(epoch, indices) of each step: every example once an epoch, the last batch as small as it comes."""
    for epoch in range(epochs):
        order = epoch_order(n, seed, epoch)
        for start in range(0, n, batch_size):
            yield epoch, order[start : start + batch_size]


# ---------------------------------------------------------------- overlap

OVERLAP_LIMIT = 0.013  # appendix B.6: the paper's sets stay below
CAPITALIZED = r"[\w\p{N}'.-]*[\p{Uppercase}\p{N}][\w\p{N}'.-]*"  # a word with a capital or a digit: Ágnes, iPhone, 4
NAME = rf"(?<![\w\p{{N}}'.-]){CAPITALIZED}(?:\s+(?:(?:of|the|and|de|la|van|von)\s+)*{CAPITALIZED})*"
COMMON = set("a an the of in on at to for by and or is was were are did does do what which who whom whose where when how why name".split())


def word_text(text):
    """A text's words in lower case, with a space around each: a phrase is in it where its own word_text is."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


def subjects_of(name, data="data"):
    """{id: subject} of a set that names them, whatever slice or part of it a data name means."""
    stem = Path(name).name.removesuffix(".jsonl").partition(".")[0].removesuffix("-id")
    sidecar = Path(data) / f"{stem}.subjects.json"
    subjects = read_json(sidecar, "build the set again") if sidecar.exists() else {}
    if not all(isinstance(subject, (str, type(None))) for subject in subjects.values()):
        raise DataError(f"{sidecar}: a subject that is no text; build the set again")
    return subjects


def guess_subject(prompt):
    """The phrases that name what a question is about: its longest run of words with capitals or digits, small words between
    them included, the question word in front not; or else each of its words that is not common."""
    import regex  # re knows no letters by case

    asked, names = prompt.removeprefix("Question: ").removesuffix("\nThe answer is:"), []
    for name in regex.findall(NAME, asked):
        words = name.split()
        words = words[1:] if words[0].lower() in COMMON - {"the", "a", "an"} else words
        if len(words) > 1 or words and words[0].lower() not in COMMON:
            names.append(" ".join(words))
    return [max(names, key=len)] if names else [word for word in word_text(asked).split() if word not in COMMON]


def overlap(facts, subjects, documents):
    """[(fact, number of documents, one of them), ...] where subject and answer stand in the same document (appendix B.6).

    subjects: {id: subject} where the set names them; else they are guessed from the question.
    """
    wanted = []  # of each fact, the phrases that must stand in a document
    for fact in facts:
        subject = subjects.get(fact["id"])
        phrases = [*([subject] if subject else guess_subject(fact["prompt"])), fact["response"]]
        wanted.append([word_text(phrase) for phrase in phrases])
    needed = {word for phrases in wanted for word in "".join(phrases).split()}
    texts, index = [], collections.defaultdict(set)
    for i, document in enumerate(documents):
        texts.append(word_text(" ".join(text for turn in turns(document) for text in turn)))
        for word in needed.intersection(texts[-1].split()):
            index[word].add(i)
    found = []
    for fact, phrases in zip(facts, wanted):
        if len(phrases) == 1 or not all(phrase.strip() for phrase in phrases):
            continue  # a question or an answer without a word
        candidates = sorted((index[word] for word in set("".join(phrases).split())), key=len)
        together = [i for i in set.intersection(*candidates) if all(phrase in texts[i] for phrase in phrases)]
        if together:
            found.append((fact, len(together), documents[min(together)]))
    return found


# ---------------------------------------------------------------- a user's own rows

# What they are read by. "input" and "context" may also stand beside another question.
ASKED = ("prompt", "instruction", "problem", "question", "input", "context")
ANSWERED = ("response", "completion", "output", "solution", "answer", "answers", "golden_answers")
CHATS = ("messages", "conversations", "data")
DOCUMENTS = ("text", "content")
# What else says what a row means: a row that has it and is read without it would be another.
DECISIVE = {*ASKED, *ANSWERED, *CHATS, *DOCUMENTS, "system", "system_prompt", "history", "choices", "options", "image", "images", "audio",
            "audios", "video", "videos", "tools", "functions", "tool_calls", "function_call", "documents", "passage", "passages", "article",
            "paragraph", "reasoning_content", "thinking"}  # fmt: skip
VERDICTS = ("label", "correct", "is_correct")  # whether the answer of a row is right


def own(row, words):
    """{"prompt": "P", "response": "R"}, or other names of ASKED and ANSWERED; a chat under one of CHATS; one of DOCUMENTS"""
    names = [name.strip().lower() for name in row]
    if len({*names}) < len(names):
        raise BadRow("two fields whose names differ in capitals alone")
    row = {name: value for name, value in zip(names, row.values()) if value not in ("", [], {}) or name in DOCUMENTS}
    asked, answered, chats, documents = ([name for name in form if name in row] for form in (ASKED, ANSWERED, CHATS, DOCUMENTS))
    told = [name for name in ("system", "system_prompt") if name in row][:1]
    if asked and answered:
        others = [name for name in ("aliases", *answered[1:]) if name in row and (name == "aliases" or answered[0] == "answer")]
        unread = check_unread(row, [asked[0], "context", "input", *told, "history"], [answered[0], *others])
        example = _own_pair(row, asked, answered[0], others)
        if told or "history" in row:
            unread |= {"aliases"} if example["aliases"] else set()
            example = chat([*_history(row), example["prompt"], example["response"]])
    elif chats:
        unread = check_unread(row, [*told, chats[0]])
        example = chat(row[chats[0]])
    elif documents:
        unread = check_unread(row, documents[:1])
        return generic(row, words) | {"unread": unread}
    else:
        lacks = f'no answer beside "{asked[0]}"' if asked else f'no question beside "{answered[0]}"' if answered else "no example"
        raise BadRow(f"{lacks}: questions are {', '.join(ASKED)}, answers {', '.join(ANSWERED)}; or {', '.join(CHATS + DOCUMENTS)}")
    check_verdict(row)
    if told:
        example["messages"].insert(0, {"role": "system", "content": field(row, told[0])})
    return example | {"unread": unread | example.get("unread", set())}


def _own_pair(row, asked, answer, others):
    """The example of a user's row with fields that ask, one that answers, and others with more right answers."""
    answers = texts(row, answer)
    more = [answer, *others] if isinstance(row[answer], list) else others
    accepted = [text for name in more for text in texts(row, name)]
    question = field(row, asked[0])
    if asked[0] == "question" and answer.endswith(("answer", "answers")):
        example = qa(question, answers[0], accepted)
    else:
        example = {"prompt": question, "response": field({answer: answers[0]}, answer), "aliases": accepted}
    before, behind = ([field(row, name)] if name in asked[1:] else [] for name in ("context", "input"))
    return example | {"prompt": "\n\n".join([*before, example["prompt"], *behind])}


def _history(row):
    """The texts of a row's earlier turns, [[question, answer], ...]."""
    turns = row.get("history", [])
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRow('"history" is no list of pairs of texts')
    return [text for turn in turns for text in texts({"history": turn}, "history")]


def check_verdict(row):
    """LeftOut where a row says itself that its answer is wrong."""
    for name in VERDICTS:
        if str(row.get(name, True)).strip().lower() in ("false", "0", "0.0", "no"):
            raise LeftOut(f'"{name}" is false')


def check_unread(row, asked, answered=()):
    """The names of a row's fields beside those that are read; a BadRow where one of them says what the row means.

    What repeats what is read (an answer the answer), or a text that holds all of it (Alpaca's "text"), says nothing new.
    """
    right = row.keys() - {name for name in VERDICTS if str(row.get(name)).strip().lower() in ("true", "1", "1.0", "yes")}
    unread = {name for name in right - {*asked, *answered, "id"} if row[name] not in (None, "", [], {})}
    answers = [text for name in answered for text in strings(row.get(name))]
    said = answers + [text for name in asked for text in strings(row.get(name))]
    for name in sorted(unread & DECISIVE):
        new = [text for text in strings(row[name]) if text not in ROLES]
        repeated = all(any(text in other for other in (answers if name in ANSWERED and answered else said)) for text in new)
        holds = isinstance(row[name], str) and all(text in row[name] for text in said)
        if name not in ASKED + ANSWERED + CHATS + DOCUMENTS or not (new and repeated or holds):
            beside = ", ".join(sorted(row.keys() & {*asked, *answered}))
            raise BadRow(f'"{name}" is not read beside {beside}, but may change their meaning; put it into them, or take it out')
    return unread


def strings(value):
    """All texts in a value of JSON."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings(part)]


def own_file(files, words):
    """A user's file: rows, or a text of which every 2 x `words` words make a passage."""
    for name, stream in files:
        if not name.lower().endswith(".txt"):
            yield from each(own)([(name, stream)], words)
            continue
        split = []
        for number, line in lines_of(name, stream):
            try:
                split += line.decode().removeprefix("\ufeff").split()
            except UnicodeDecodeError:
                yield f"{name}:{number}", BadRow("not UTF-8")
            while len(split) >= 2 * words:
                yield f"{name}:{number}", passage(split, words)
                del split[: 2 * words]


# ---------------------------------------------------------------- published files

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
          ".zst": lambda path: importlib.import_module("pyarrow").input_stream(str(path), compression="zstd")}  # fmt: skip
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
UNPACKED_LIMIT = 20 * 10**9  # bytes that one compressed file may hold; TriviaQA's largest has some 3e9
LINE_LIMIT = 64 * 2**20  # bytes of one line or JSON value
NO_DATA = re.compile(r"(^|/)(\..*|dataset_infos?\.json|dataset_dict\.json|state\.json|README\.md|.*\.(part|part\.json|sha256|tmp))$")


@contextlib.contextmanager
def intact(path):
    """Turns what the readers raise over a damaged file into one line."""
    try:
        yield
    except PermissionError:
        raise DataError(f"{path}: permission denied; give yourself the right to read it") from None
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{path}: truncated or damaged ({error or type(error).__name__}); remove it and get it again") from None


def check_start(path, start):
    """A DataError where a file's first bytes are those of something that often stands in the place of data."""
    if re.match(rb"\s*<(!doctype\s+html|html)", start, re.IGNORECASE):
        raise DataError(f"{path}: a web page where data should be; remove it and get the file itself")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(f"{path}: a pointer of Git LFS, not the file; run git lfs pull where it was cloned, or download it")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: UTF-16; save it as UTF-8")


class Bounded(io.RawIOBase):
    """A binary stream that names its file when it is damaged or unpacks past the limit, and hashes what is read."""

    def __init__(self, stream, path, limit):
        self.stream, self.path, self.limit, self.n_read, self.sha256 = stream, path, limit, 0, hashlib.sha256()

    def readable(self):
        return True

    def readinto(self, buffer):
        with intact(self.path):
            piece = self.stream.read(len(buffer))
        self.n_read += len(piece)
        if self.limit and self.n_read > self.limit:
            raise DataError(f"{self.path}: unpacks to more than {self.limit} bytes; remove it and get it again from its authors")
        self.sha256.update(piece)
        buffer[: len(piece)] = piece
        return len(piece)


def identity(row, path):
    """What a file of a set is known by wherever it lies, so that it is read once; None for one that is not the set's."""
    path = re.sub(r"\.(gz|bz2|xz|zst)$", "", path, flags=re.IGNORECASE)
    found = re.search(row.wanted, path, re.IGNORECASE)
    if row.wanted and (NO_DATA.search(path) or not found):
        return None
    return path if row.streamed else found.group() if row.parts else os.path.basename(path)


def form(row, identity):
    """The same for files that may lie side by side, each another part of the set."""
    if row.parts:
        return os.path.splitext(identity)[1] if identity.endswith((".jsonl", ".parquet")) else "a folder"
    return None if row.streamed else re.sub(r"\d+(?=(-of-\d+)?\.\w+$)", "#", identity, count=1)


class Walk:
    """A set's files, each once: iterating gives (name, binary stream), each to be read before the next is asked for.

    Archives are read in place, member by member, and never unpacked to disk. raw: the folder from which on names count,
    None for a user's own file.
    """

    def __init__(self, row, files, raw):
        self.row, self.files = row, {path: os.path.relpath(path, raw) if raw else path.name for path in files}
        self.opened = []  # the Bounded streams so far
        self.places = {}  # {identity: the file or archive that it is read from}
        self.copies = []  # what was passed over

    def __iter__(self):
        # What lies there unpacked comes before what is in archives.
        plain = {path for path, name in self.files.items() if not ARCHIVE.search(path.name) and self._takes(name, path)}
        for path, name in self.files.items():
            with intact(path):
                with open(path, "rb") as file:
                    check_start(path, file.read(200))
                packed = PACKED.get(path.suffix.lower())
                if path in plain:
                    with packed(path) if packed else open(path, "rb") as stream:
                        yield str(path.with_suffix("") if packed else path), self._bounded(stream, path, UNPACKED_LIMIT if packed else None)
                for member, content in _members(path):
                    if member.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member):
                        raise DataError(f"{path}: holds a file named {member!r}, which leaves its folder; get the archive from its authors")
                    if self._takes(f"{os.path.dirname(name)}/{os.path.normpath(member)}", path, member):
                        yield f"{path}/{member}", self._bounded(content(), f"{path}/{member}", UNPACKED_LIMIT)

    def _bounded(self, stream, path, limit):
        self.opened.append(Bounded(stream, path, limit))
        return io.BufferedReader(self.opened[-1], 2**20)

    def _takes(self, name, path, member=None):
        """Whether a file, or a member of the archive at path, is the set's and the first of its identity.

        A DataError where those before it are the set in another form, or where the first one is not the same file.
        """
        key, shown = identity(self.row, name), f"{path}/{member}" if member else path
        if key is None:
            return False
        first = next(iter(self.places), key)
        other = key in self.places and not member and _sha256(path) != _sha256(self.places[key])
        if other or form(self.row, first) != form(self.row, key):
            place = self.places[key if other else first]
            raise DataError(f"{shown}: the set once more, as {place} is; keep one of the two there")
        if key in self.places:
            self.copies.append(shown)
            return False
        self.places[key] = path
        return True


def _members(path):
    """(name, function that opens it) of each file in an archive."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                yield name, functools.partial(archive.open, name)
    elif ARCHIVE.search(path.name):
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, functools.partial(archive.extractfile, member)


def rows(name, stream):
    """(where, row) of each row of a table or JSON file; a malformed row is a BadRow in its place."""
    kind = Path(name).suffix.lower()
    if kind == ".parquet":
        yield from _parquet_rows(name, stream)
    elif kind == ".json":
        yield from ((f"{name}:{number}", row) for number, row in _json_values(name, stream))
    elif kind in (".tsv", ".csv"):
        yield from ((f"{name}:{number}", row) for number, row in _table_rows(name, stream, "\t" if kind == ".tsv" else ","))
    else:
        for number, line in lines_of(name, stream):
            if line.strip():
                yield f"{name}:{number}", json_row(line)


def _object(pairs):
    """A JSON object; a BadRow where it names a field twice, as one of the two values would be dropped."""
    if len(dict(pairs)) < len(pairs):
        raise BadRow("a field twice in one object")
    return dict(pairs)


def json_row(line):
    """What a line of JSON says, or a BadRow."""
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not a line of JSON ({getattr(error, 'msg', error)})")


def lines_of(name, stream):
    """(number, line) of each line of a binary stream."""
    for number, line in enumerate(iter(lambda: stream.readline(LINE_LIMIT + 1), b""), 1):
        if len(line) > LINE_LIMIT:
            raise DataError(f"{name}:{number}: a line of more than {LINE_LIMIT >> 20} MiB; break it into shorter ones")
        yield number, line


def _table_rows(name, stream, delimiter):
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRow(str(error))
            continue
        if not values:  # an empty line
            continue
        if any(re.search("[\udc80-\udcff]", value) for value in values):
            yield number, BadRow("not UTF-8")
        elif header is None:
            header = values
            twice = [column for column in header if column and header.count(column) > 1]
            if twice:
                raise DataError(f"{name}:{number}: names column {twice[0]!r} twice; rename one")
        elif len(values) != len(header):
            yield number, BadRow(f"{len(values)} fields, the first line has {len(header)}")
        elif any(value.strip() for column, value in zip(header, values) if not column):
            yield number, BadRow("a value in a column without a name")
        else:
            yield number, {column: value for column, value in zip(header, values) if column}


def _parquet_rows(name, stream):
    import pyarrow.parquet

    # The format needs a file that can be sought in; one inside an archive is small enough to hold.
    source = name if Path(name).is_file() else io.BytesIO(stream.read())
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(source)
        if len({*file.schema_arrow.names}) < len(file.schema_arrow.names):
            raise ValueError("two columns of one name")
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: truncated or damaged behind row {number} ({why}); remove it and get it again") from None


# What may stand before the next row in a file, in its array, and in TriviaQA's array under "Data", behind which stand
# fields that are no rows. A name in it is where the row after it stands.
AROUND_ROWS = {
    "file": re.compile(r'[\s,\ufeff]*(?:(?P<array>\[)|(?P<data>\{\s*"Data"\s*:\s*\[))?'),
    "array": re.compile(r"[\s,\ufeff]*(?P<file>\])?"),
    "data": re.compile(r'[\s,\ufeff]*(?P<file>\](?:\s*,\s*"[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+))*\s*\})?'),
}
LONGEST_AROUND = 2**12  # characters


def _json_values(name, stream):
    """(line number, value) of JSON values one after another; of an array, also that under "Data", each of its values.

    A file of any size is read piece by piece. A malformed value ends it: where the next one begins nobody can say.
    """
    decoder, utf8 = json.JSONDecoder(object_pairs_hook=_object), codecs.getincrementaldecoder("utf-8")()
    text, at, line, place, needed, ended = "", 0, 1, "file", LONGEST_AROUND, False
    while True:
        if len(text) - at < needed and not ended:
            piece = stream.read(2**20)
            ended = not piece
            try:
                text, at = text[at:] + utf8.decode(piece, final=ended), 0
            except UnicodeDecodeError as error:
                fault = line + text.count("\n", at) + piece[: error.start].count(10)
                raise DataError(f"{name}:{fault}: not UTF-8; get the file again") from None
            continue
        around = AROUND_ROWS[place].match(text, at)
        line, at, place = line + around[0].count("\n"), around.end(), around.lastgroup or place
        if around.lastgroup or len(text) - at < needed and not ended:
            continue  # there may be more of it
        if place == "file" and at == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            short = len(text) - at < LINE_LIMIT
            if short and not ended and not isinstance(error, BadRow):
                needed = len(text) - at + 1
                continue
            fault = line + text.count("\n", at, getattr(error, "pos", at))
            why = f"not valid JSON ({getattr(error, 'msg', error)})"
            why = "ends in the middle" if ended and getattr(error, "pos", 0) >= len(text) else why
            why = why if short else f"a value of more than {LINE_LIMIT >> 20} MiB"
            raise DataError(f"{name}:{fault}: {why}; mend it or get the file again") from None
        yield line, value
        line, at, needed = line + text.count("\n", at, end), end, LONGEST_AROUND


class Usable:
    """What published files hold."""

    def __init__(self, walk):
        self.walk, self.examples = walk, []
        self.n_rows = self.bad = 0  # rows, usable or not; malformed ones passed over
        self.dropped, self.unread = collections.Counter(), collections.Counter()  # {reason: rows}, {field that is not read: rows}


def read_usable(name, row, files, n, words, raw, skip_bad):
    """The Usable of a set's files, as few rows read as n examples take where the set is streamed."""
    usable = Usable(Walk(row, files, raw if row.wanted else None))
    found = row.read(usable.walk, words)
    for where, outcome in progress_bar(found, desc=f"reading {Path(name).name}", unit=" rows"):
        usable.n_rows += 1
        if isinstance(outcome, dict):
            usable.unread.update(outcome.pop("unread", ()))
            if outcome.pop("unanswered", False):
                usable.dropped["last question of a chat, without an answer"] += 1
            usable.examples.append(outcome)
            if row.streamed and len(usable.examples) == n:
                break
        elif isinstance(outcome, LeftOut):
            usable.dropped[str(outcome)] += 1
        else:
            usable.bad += 1
            if usable.bad > skip_bad:
                raise DataError(f"{where}: {outcome}; mend it, or pass over up to N such rows with --skip-bad N")
    found.close()
    if usable.walk.copies:
        print(f"{some(usable.walk.copies)}: passed over, as a file of that name was read from another place", file=sys.stderr)
    if row.published not in (0, usable.n_rows):
        print(f"{name}: {usable.n_rows} rows in {os.path.commonpath(files)}, the published set has {row.published}; see that "
              "it is the whole set and nothing else", file=sys.stderr)  # fmt: skip
    return usable


def read_published(name, row, n, seed, words, raw, skip_bad, least, fewer):
    """(examples, manifest entries, files that were read) of a published set, at most n.

    least: where a stream's first lines, which are all that was downloaded, hold fewer, it is read on, with fewer if it can.
    """
    files = raw_files(name, row, raw) if row.wanted else [Path(name)]
    if not files:
        files = [fetch(name, row, raw, row.first_lines)]
    for path in files:
        check_stated_sha256(path, row)
    usable = read_usable(name, row, files, n, words, raw, skip_bad)
    while len(usable.examples) < least and (lines := lines_of_beginning(files, row)):
        try:
            files = [read_on(files[0], lines, name, row, raw)]
        except DataError as error:
            if not fewer:
                raise
            print(f"{error}; going on with what is here", file=sys.stderr)
            break
        usable = read_usable(name, row, files, n, words, raw, skip_bad)
    examples, dropped = usable.examples, usable.dropped
    if row.kind == "factoid":
        examples = _without_conflicts(examples, dropped)
    # Paths as seen from raw/, so that a manifest does not depend on where that lies.
    place = (lambda path: os.path.relpath(path, raw)) if row.wanted else (lambda path: Path(path).name)
    if row.streamed:
        # Of what is read piece by piece just those bytes; parquet is read here and there, so all of the file.
        sources = {place(b.path): {"bytes": b.n_read, "sha256": b.sha256.hexdigest()} if b.n_read else _source(b.path) for b in usable.walk.opened}
    else:
        # By the file's name alone, so that the order does not depend on how a user writes its path.
        label = name if row.wanted else OWN_FILE.match(Path(name).name)[1]
        random.Random(os.fsencode(f"{label} {seed}")).shuffle(examples)
        read = {*usable.walk.places.values()}
        sources = {place(path): _source(path) for path in files if path in read}
        if len(sources) > 50:
            listing = "".join(f"{source['sha256']}  {path}\n" for path, source in sources.items())
            total = {"bytes": sum(source["bytes"] for source in sources.values()), "sha256": hashlib.sha256(listing.encode()).hexdigest()}
            sources = {f"{len(sources)} files below {place(os.path.commonpath(files))}": total}
    if not examples:
        remedy = "see that it is the published file" if row.wanted else f"give it rows with other fields, or longer texts than {2 * words} words"
        raise DataError(f"{files[0]}: no usable example in it (dropped: {dict(dropped)}); {remedy}")
    entries = {"sources": sources, "dropped": dict(dropped), "bad": usable.bad, "beyond_limit": max(0, len(examples) - n)}
    if usable.unread:
        entries["unread"] = dict(sorted(usable.unread.items()))
    if row.streamed and len(examples) < n and not lines_of_beginning(files, row):
        entries["ended"] = True
    return examples, entries, files


def check_stated_sha256(path, row):
    """A DataError where FILE.sha256 beside a file that is read whole does not hold its sha256."""
    beside = path.with_name(path.name + ".sha256")
    if row.streamed or not beside.exists():
        return
    stated = re.findall(rb"\b[0-9a-f]{64}\b", read_file(beside, "remove it").lower())
    if not stated:
        raise DataError(f"{beside}: holds no sha256; remove it, or put that of {path.name} there")
    if _sha256(path).encode() not in stated:
        raise DataError(f"{path}: its sha256 is not the one in {beside.name}; remove both and get it again")


def _source(path):
    return {"bytes": os.path.getsize(path), "sha256": _sha256(path)}


def _sha256(path):
    with intact(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_conflicts(examples, dropped):
    """Each question once, and none that is asked with different answers: those cannot all be memorized."""
    answers = {}
    for example in examples:
        answers.setdefault(example["prompt"], set()).add(example["response"].lower())
    kept = {e["prompt"]: e for e in reversed(examples) if len(answers[e["prompt"]]) == 1}
    conflicting = sum(len(answers[e["prompt"]]) > 1 for e in examples)
    for reason, count in (("question repeats with another answer", conflicting), ("question repeats", len(examples) - conflicting - len(kept))):
        if count:
            dropped[reason] = count
    return list(reversed(kept.values()))


def some(paths):
    """The first of several things and how many more there are, for a line."""
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def raw_files(name, row, raw):
    """The published files of a set that are at hand, in order of their names: all below raw/NAME/, or raw/NAME.*"""
    longest = {}  # of a file and its beginnings the one that holds the others
    for path in sorted(_beside(name, row, raw), key=_lines_by_name):
        if ARCHIVE.search(path.name) or identity(row, os.path.relpath(path, raw)):
            longest[BEGINNING.sub(".", str(path))] = path
    return sorted(longest.values())


def _beside(name, row, raw):
    """All files in the places of a set below raw/ but those that are never data, in order of their names."""
    folders = [Path(raw) / folder for folder in (name, *row.folders)]
    found = [path for folder in folders for path in folder.rglob("*")] + list(Path(raw).glob(f"{name}.*"))
    return sorted(path for path in found if path.is_file() and not NO_DATA.search(os.path.relpath(path, raw)))


BEGINNING = re.compile(r"\.first-(\d+)\.")  # in the name of a file of which only so many lines were downloaded


def _lines_by_name(path):
    """How many lines of a file were downloaded, as its name says; of a whole one infinitely many."""
    found = BEGINNING.search(path.name)
    return int(found[1]) if found else math.inf


def lines_of_beginning(files, row):
    """How many lines of a longer file were downloaded, if such a beginning is all there is; else 0."""
    lines = _lines_by_name(files[0]) if len(files) == 1 and row.first_lines else math.inf
    ours = lines < math.inf and BEGINNING.sub(".", files[0].name) in [Path(url).name for url in row.urls]
    return lines if ours and _count_lines(files[0]) == lines else 0


def read_on(shorter, lines, name, row, raw):
    """Download twice the lines of a file's beginning; returns the path of that, which takes the shorter one's place."""
    longer = fetch(name, row, raw, 2 * lines)
    with intact(shorter), open(shorter, "rb") as old, open(longer, "rb") as new:
        alike = all(ours == theirs for ours, theirs in zip(old, new))
    replaced = shorter if alike else longer
    for file in (replaced, replaced.with_name(f"{replaced.name}.sha256")):
        file.unlink(missing_ok=True)
    if not alike:
        raise DataError(f"{shorter}: the published file no longer begins so; use --fewer, or remove it and build its sets again")
    return longer


def fetch(name, row, raw, first_lines=0):
    """Download a set's published file, or its first lines, from the first place that has it; returns its path below raw/."""
    put = f"put {row.files} into {Path(raw) / name}/"
    others = [] if raw_files(name, row, raw) else _beside(name, row, raw)
    unread = f"{some(others)}: not read, as {name} is made of {row.files}" if others else ""
    if not row.urls:
        raise DataError(f"{unread}, and cannot be downloaded; {put}" if unread else f"{name}: cannot be downloaded; {put}")
    if unread:
        print(f"{unread}; downloading that", file=sys.stderr)
    faults = []
    for url in row.urls:
        url = url.replace("https://huggingface.co", os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
        file = Path(url.partition("?")[0])
        target = Path(raw) / name / (f"{file.stem}.first-{first_lines}{file.suffix}" if first_lines else file.name)
        try:
            download(url, target, first_lines)
            return target
        except DataError as error:
            faults.append(str(error))
    raise DataError(f"{name}: {'; '.join(faults)}; try again later, or {put}")


# ---------------------------------------------------------------- downloads

WAITS = (0, 1, 2, 4, 8)  # seconds before each try


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, never from https to http, and keeps the sha256 that the hub states only in its first answer."""

    sha256 = None

    def keep(self, headers):
        tag = (headers.get("X-Linked-ETag") or "").strip('"')
        self.sha256 = tag if re.fullmatch("[0-9a-f]{64}", tag) else self.sha256

    def redirect_request(self, request, file, code, message, headers, url):
        self.keep(headers)
        if request.full_url.startswith("https:") and not url.startswith("https:"):
            raise DataError(f"{request.full_url}: redirected to {url}, which is not https; download it by hand")
        return super().redirect_request(request, file, code, message, headers, url)


def download(url, target, lines=None):
    """Fetch url into the file target, or only its first `lines` lines.

    Passing faults are retried, and a part left by an earlier try is continued where the server allows it. The file gets its
    name once its size, and its sha256 where the server states one, are right; FILE.sha256 beside it holds its sha256.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with open(part, "ab") as file:
        if not lock(file):
            raise DataError(f"{part}: another process is downloading it; wait for it")
        for wait in WAITS:
            time.sleep(wait)
            try:
                stated = _fetch(url, file, lines)
                break
            except (OSError, http.client.HTTPException) as error:
                status, reason = getattr(error, "code", None), getattr(error, "reason", error)
                fault = f"HTTP status {status} {reason}" if status else str(getattr(reason, "strerror", None) or reason).lower()
                if status == 416:  # what lies here is longer than the file there
                    file.truncate(0)
                elif status and status < 500 and status not in (408, 429):
                    _forget(part)
                    raise DataError(f"{url}: {fault}") from None
                elif isinstance(reason, (socket.gaierror, ConnectionRefusedError)):
                    if not file.tell():
                        _forget(part)
                    raise DataError(f"{url}: not reached ({fault})") from None
        else:
            raise DataError(f"{url}: given up after {len(WAITS)} tries ({fault}); run the command again to go on from {file.tell()} bytes")
        try:
            with open(part, "rb") as done:
                check_start(url, done.read(200))
            sha256 = _sha256(part)
            if stated and sha256 != stated:
                raise DataError(f"{url}: damaged on its way: sha256 {sha256}, stated {stated}")
        except DataError:
            _forget(part)
            raise
        write_file(target.with_name(target.name + ".sha256"), f"{sha256}  {target.name}\n")
        os.replace(part, target)
        _forget(part)


def _forget(part):
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        part.parent.rmdir()  # made for it alone


def _fetch(url, file, lines):
    """One try to complete file from url; returns the sha256 that the server states of the whole file, if it does."""
    note = Path(file.name + ".json")  # which version of what this is a part of
    have = os.fstat(file.fileno()).st_size
    before = json.loads(note.read_bytes()) if have and note.exists() else {}
    request = urllib.request.Request(url, headers={"User-Agent": "continual-memorization"})
    if before.get("url") == url and before.get("version"):
        request.headers |= {"Range": f"bytes={have}-", "If-Range": before["version"]}
    redirects = _Redirects()
    with urllib.request.build_opener(redirects).open(request, timeout=30) as response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
            file.truncate(0)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        # A weak validator cannot vouch for bytes.
        write_file(note, json.dumps({"url": url, "version": None if (version or "").startswith("W/") else version}))
        size = have + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        missing = lines - _count_lines(file.name) if lines else None
        title = f"downloading {Path(file.name).stem}"
        with progress_bar(total=None if lines else size, initial=have, unit="B", unit_scale=True, desc=title) as bar:
            while missing is None or missing > 0:
                piece = response.readline(2**20) if lines else response.read1(2**20)
                if not piece:
                    break
                if lines:
                    missing -= piece.endswith(b"\n")
                file.write(piece)
                file.flush()  # what a kill leaves can be continued
                have += len(piece)
                bar.update(len(piece))
        if missing != 0 and size is not None and have != size:
            raise http.client.HTTPException(f"ended after {have} of {size} bytes")
        redirects.keep(response.headers)
        return None if missing == 0 else redirects.sha256


def _count_lines(path):
    with open(path, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))


@functools.cache
def word_list(raw):
    """(sorted words, where from): the NLTK words corpus, downloaded into raw/ if need be, else the same dictionary from english-words."""
    import nltk

    folder = str(Path(raw) / "nltk_data")
    nltk.data.path.insert(0, folder)
    for attempt in ("installed", "downloaded"):
        with contextlib.suppress(LookupError, zipfile.BadZipFile):
            return sorted(set(nltk.corpus.words.words("en"))), "NLTK words corpus"
        if attempt == "installed":
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(10)  # a machine behind a firewall must not wait for minutes
            try:
                nltk.download("words", download_dir=folder, quiet=True, print_error_to=io.StringIO())
            finally:
                socket.setdefaulttimeout(before)
    from english_words import get_english_words_set

    print("words: the NLTK corpus is neither installed nor to be downloaded; taking web2 from the english-words package", file=sys.stderr)
    return sorted(get_english_words_set(["web2"])), "english-words web2"


# ---------------------------------------------------------------- files and processes

STOPPING = (signal.SIGINT, signal.SIGTERM)
UNFINISHED = set()  # temporary files that are being written


def begin_command(advice):
    """Have Ctrl-C and SIGTERM end this process in one line that ends in the advice, with nothing left half-written.

    Under torchrun its ranks end at once instead, and the launcher says why: one that waited for another could not.
    What a terminal or a log cannot show (its encoding is ASCII, say) is printed as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")

    def end(number, _):
        # No exception: PyTorch turns one that comes in the middle of it into others. No print: it may come in one.
        line = f"{Path(sys.argv[0]).name}: {signal.Signals(number).name}: stopped; {advice}\n"
        os.write(2, ("\n" + line if os.isatty(2) else line).encode())  # below a bar that may stand there
        for path in list(UNFINISHED):
            path.unlink(missing_ok=True)
        end_by(number)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background have it
            signal.signal(number, end if os.environ.get("WORLD_SIZE", "1") == "1" else signal.SIG_DFL)


def end_by(number):
    """End this process with a signal's status; by an interrupt really, for only that ends a shell's loop as well."""
    with contextlib.suppress(RuntimeError, OSError):  # within a print, or nobody reads
        sys.stdout.flush()
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


class _Lines(io.TextIOBase):
    """Where bars go that nobody watches: each time one is drawn, a line of standard error."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


LINE_SECONDS = 30  # between the lines in a bar's place


def progress_bar(*args, **options):
    """A tqdm bar that goes when it is done; where standard error is no terminal, a line every 30 seconds instead.

    PROGRESS in the environment names a terminal for the bars of a process whose output is logged.
    """
    if not sys.stderr.isatty():
        try:
            options["file"] = open(os.environ["PROGRESS"], "w")  # noqa: SIM115 (it lasts as long as the bar)
        except (KeyError, OSError):
            options |= {"file": _Lines(), "mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
    return tqdm(*args, leave=False, **options)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message}; --help lists the options")


def read_file(path, remedy):
    """A text file's bytes, or a DataError that ends in the remedy."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror.lower()}; {remedy}") from None
    check_start(path, content[:200])
    return content


def write_file(path, content):
    """Write a text or bytes to path in one step: a reader sees the old file or the new one, never half of it, also after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    UNFINISHED.add(temporary)
    try:
        with open(temporary, "wb") as file:
            # What UTF-8 has no bytes for, as in a file's name, is written as JSON escapes it.
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # what Python raises on a full disk names nothing
        raise
    finally:
        UNFINISHED.discard(temporary)


@contextlib.contextmanager
def alone_at(path):
    """Be the only process that builds a file; where another is at it, wait."""
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, f"{path}: another process is building it; waiting"):
        try:
            yield
        finally:
            lock.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # made for it alone


def locked(path, waiting):
    """An open file at path that this process alone holds; `waiting` is printed where another has it first."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # its folder or itself was removed by whoever had it
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 (the caller closes it)
            if not lock(file):
                if waiting:
                    print(waiting, file=sys.stderr)
                waiting = ""
                lock(file, wait=True)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # a lock of what is gone keeps nobody out
                return file


def lock(file, wait=False):
    """Take an open file's lock, which ends with the process; returns False where another has it and this does not wait.

    On a file system without locks (ENOLCK) a warning, once, says that nothing keeps two processes apart.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        _warn_of_no_locks(os.path.dirname(file.name) or ".")
    return True


@functools.cache
def _warn_of_no_locks(folder):
    print(f"{folder}: its file system has no locks; see that no other process writes there", file=sys.stderr)


def json_line(row):
    """A row as a line of a JSON-lines file, its letters as they are."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def relative_path(path, folder):
    """A path as a file in `folder` holds it, so that both can move together; its last part stays as the user wrote it."""
    path = Path(os.path.abspath(path))
    return os.path.relpath(path.parent.resolve() / path.name, Path(folder).resolve())


# ---------------------------------------------------------------- tokenizers

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_N_CONTROL = 256  # control tokens behind the text's: the first is bos, the second eos
TOKENIZER_REMEDY = "copy the model's tokenizer files there"


class TiktokenTokenizer:
    """Llama 3's tokenizer.model, byte-level BPE through tiktoken. ranks: {bytes: id}, all the texts' tokens."""

    def __init__(self, ranks):
        import regex
        import tiktoken

        self._bpe = tiktoken.Encoding("bpe", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._bytes = {i: token for token, i in ranks.items()}
        self._pieces = regex.compile(LLAMA3_PATTERN)
        self.vocab_size = len(ranks) + LLAMA3_N_CONTROL
        self.bos_id, self.eos_id = len(ranks), len(ranks) + 1
        self.largest_id = self.eos_id  # that a text, bos or eos can have

    def encode(self, text, continues=False):
        """Ids of a plain text, the same at the beginning of a text and behind other text."""
        text = _without_surrogates(text)
        if len(text) < 900_000:
            return self._bpe.encode_ordinary(text)
        # tiktoken's regex gives up on a run of a million spaces.
        pieces = [match.group().encode("utf-8") for match in self._pieces.finditer(text)]
        return [i for piece in pieces for i in self._bpe._encode_single_piece(piece)]

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
        self.largest_id = self.vocab_size - 1
        self._newline = self._sp.encode("\n")
        if self._sp.id_to_piece(self._newline)[-1:] != ["<0x0A>"] or min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: not a Llama or Mistral tokenizer (no byte tokens, bos or eos); take tokenizer.json")

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


class HubTokenizer:
    """tokenizer.json through the tokenizers library, the reference; the files beside it name bos, if any, and eos."""

    def __init__(self, path):
        try:
            self._read(path)
        except (DataError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever the library stumbles over; its panics are no Exceptions
            raise DataError(f"{path}: not read by the tokenizers library ({error}); {TOKENIZER_REMEDY}") from None

    def _read(self, path):
        self._tokenizer = _open_tokenizer(path)
        self.bos_id, self.eos_id = _control_ids(path, self._tokenizer)
        self._tokenizer.encode_special_tokens = True  # a control token's name in a text is text
        self.begins_with_space = not "".join(self._tokenizer.encode("a", add_special_tokens=False).tokens).startswith("a")
        self._newline = self.encode("\n") if self.begins_with_space else []
        if self.begins_with_space and self._tokenizer.id_to_token(self._newline[-1]) != "<0x0A>":
            raise DataError(f"{path}: begins texts with a space and has no byte tokens; use another model")
        self._check_plain_text(path)

    def _check_plain_text(self, path):
        """Raise DataError if a text can give a control token, or what stands for anything unknown."""
        unknown = getattr(self._tokenizer.model, "unk_token", None) or "<unk>"
        never = {self.bos_id, self.eos_id, self._tokenizer.token_to_id(unknown)} - {None}
        names = map(self._tokenizer.id_to_token, {self.bos_id, self.eos_id} - {None})
        every_byte = "".join(map(chr, [*range(0x800), *range(0x800, 0x110000, 0x800)]))  # that UTF-8 has
        for text, continues in itertools.product([*names, every_byte], [False, True]):
            for token in map(self._tokenizer.id_to_token, never.intersection(self.encode(text, continues))):
                raise DataError(f"{path}: some plain text gives its {token!r}; use another model")

    @functools.cached_property
    def vocab_size(self):
        """The largest id and one more."""
        return 1 + max(self._tokenizer.get_vocab().values())

    @functools.cached_property
    def largest_id(self):
        """Of those that a text, bos or eos can have: no padding token that a fine-tuning tool has added, for one."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} - {self.bos_id, self.eos_id}
        return max(i for i in self._tokenizer.get_vocab().values() if i not in special)

    def encode(self, text, continues=False):
        """Ids of a plain text; some tokenizers begin it with a space, unless it follows a control token or other text."""
        before = "\n" if continues and self._newline else ""  # as in SentencePieceTokenizer
        ids = self._tokenizer.encode(before + _without_surrogates(text), add_special_tokens=False).ids
        return ids[len(self._newline) :] if before else ids

    def decode(self, ids):
        """Text of ids; control tokens have none."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def adds_space_behind_bos(self):
        """Whether the library reads bos and a text, written as one, as bos and what encode makes of the text."""
        self._tokenizer.encode_special_tokens = False
        written = self._tokenizer.encode(self._tokenizer.id_to_token(self.bos_id) + "a", add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        return written == [self.bos_id, *self.encode("a")]


def _open_tokenizer(path):
    """The tokenizers library's Tokenizer of a tokenizer.json, which neither cuts nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(read_file(path, TOKENIZER_REMEDY))
    if getattr(tokenizer.model, "dropout", None):
        raise DataError(f"{path}: dropout, by which a text has other ids each time, is not implemented; set it to null")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


BEGIN_WITH_BOS = ("Llama", "CodeLlama", "Gemma", "GPT2")  # classes of tokenizers that have one though no file names it


def _control_ids(path, tokenizer):
    """(id of bos, or None; id of eos) as the files beside a tokenizer.json name them, which makes them control tokens.

    As in transformers special_tokens_map.json comes first where tokenizer_config.json is of its time, and has no
    added_tokens_decoder. No bos: none is named, or add_bos_token is false.
    """
    config_path, older = path.with_name("tokenizer_config.json"), path.with_name("special_tokens_map.json")
    named = config = read_json(config_path)
    if older.exists() and "added_tokens_decoder" not in config:
        named = config | read_json(older)
    if "bos_token" not in named and str(config.get("tokenizer_class")).startswith(BEGIN_WITH_BOS):
        raise DataError(f"{config_path}: names no bos_token; add the model's, or null where it has none")
    ids = []
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        token = token.get("content", token) if isinstance(token, dict) else token
        if key == "bos_token" and (token is None or config.get("add_bos_token") is False):
            ids.append(None)
            continue
        if token is None:
            raise DataError(f"{config_path}: names no {key}; add the model's")
        found = tokenizer.token_to_id(_without_surrogates(token)) if isinstance(token, str) else None
        if found is None:
            raise DataError(f"{config_path}: {key} {token!r} is not in {path.name}; copy both from one model")
        added = tokenizer.get_added_tokens_decoder().get(found)
        if added is None or not added.special:
            tokenizer.add_special_tokens([token])
        ids.append(found)
    return ids


def _without_surrogates(text):
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder.

    tokenizer.json is taken where tokenizer_config.json stands beside it: transformers and servers read it, and what a
    fine-tuned model has added stands in it alone. Otherwise it is tokenizer.model, tiktoken's or SentencePiece's, which
    needs no other file, there or in original/. Where both are there and give a text other ids, a warning says so.
    """
    path = Path(path)
    spec, models = path / "tokenizer.json", [path / "tokenizer.model", path / "original" / "tokenizer.model"]
    model = next(filter(Path.exists, models), None)
    if spec.exists() and (model is None or (path / "tokenizer_config.json").exists()):
        tokenizer = HubTokenizer(spec)
        if model is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            warn_of_difference(tokenizer, spec, model)
        return tokenizer
    if model is None:
        raise DataError(f"{path}: no tokenizer.model or tokenizer.json; {TOKENIZER_REMEDY}")
    return _load_tokenizer_model(model)


# Digits, white space, contractions, scripts and code: what tokenizers differ in.
PROBE = "The key e6395973, in 1996:\n\n  don't  \tGröße naïve, Ёж 你好。 हिन्दी 🙂 $\\frac{1}{2}$ f(x):\r\n        return x**2"


def warn_of_difference(tokenizer, spec, model):
    """Say where a folder's two tokenizer files do not agree."""
    try:
        agree = _load_tokenizer_model(model).encode(PROBE) == tokenizer.encode(PROBE)
    except DataError as error:
        print(f"{error}; {spec.name} is taken", file=sys.stderr)
        return
    if not agree:
        print(f"{model}: gives other ids than {spec.name}, which is taken; remove the wrong one", file=sys.stderr)


def _load_tokenizer_model(path):
    lines = read_file(path, "copy it again").splitlines()
    try:
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        return SentencePieceTokenizer(path)
    whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
    if not whole:
        raise DataError(f"{path}: truncated or damaged tiktoken file; copy it again")
    return TiktokenTokenizer(ranks)


def read_json(path, remedy=TOKENIZER_REMEDY):
    content = read_file(path, remedy)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not valid JSON; {remedy}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; {remedy}")
    return value


# ---------------------------------------------------------------- command line


def check_facts(name, path, least, most):
    """A DataError unless a set's flat file is so many facts: questions, each with one answer that can be right."""
    examples, _ = load_examples(str(path))
    if not least <= len(examples) <= most:
        raise DataError(f"{name}: holds {len(examples)} facts, {least} to {most} are asked for; add or leave out some")
    asked = {}
    for number, example in enumerate(examples, 1):
        if "messages" in example or example["prompt"].startswith(PASSAGE):
            kind = "chat" if "messages" in example else "passage"
            raise DataError(f"{name}: its example {number} is a {kind}; give questions, each with its answer")
        first, response = asked.setdefault(example["prompt"], (number, example["response"]))
        if example["response"] != response:
            raise DataError(f"{name}: examples {first} and {number} give other answers to {example['prompt']!r}; keep one of them")


def report_overlap(names, args):
    """Print, for each mixing set, how many of the first set's facts stand in it."""
    facts, _ = load_examples(names[0], args.limit, args.out, raw=args.raw)
    subjects = subjects_of(names[0], args.out)
    for name in names[1:]:
        documents, _ = load_examples(name, None, args.out, args.words, args.raw)
        found = overlap(facts, subjects, documents)
        share = len(found) / len(facts)
        print(f"{names[0]} in {name}: {len(found)} of {len(facts)} facts ({share:.2%}) have subject and answer in one of {len(documents)} documents")
        for fact, count, document in found if args.verbose else []:
            print(f"  {fact['id']}: {fact['prompt']!r} {fact['response']!r} in {count}, first {document['id']}")
        if share > OVERLAP_LIMIT:
            print(f"warning: {name} gives away more of {names[0]} than the paper's {OVERLAP_LIMIT:.1%} (appendix B.6)", file=sys.stderr)


def list_sets(args):
    """Print what is built, and of the rest what it would be built from."""
    for name, row in SETS.items():
        path = flat_file(name, args.out, args.words)
        if path.exists():
            second = flat_file(f"{name}-id", args.out) if row.sliced else None
            state = f"{_count_lines(path)} in {path}" + (f", {_count_lines(second)} in {second}" if second and second.exists() else "")
        elif row.build:
            state = "not built; generated"
        elif files := raw_files(name, row, args.raw):
            state = f"not built; {some(files)}"
        elif row.urls:
            state = "not built; download " + " or ".join(row.urls)
        else:
            state = f"not built; put {row.files} into {Path(args.raw) / name}/"
        print(f"{name:10} {row.kind:11} {row.about} ({state})")


def main():
    parser = Parser(description="Build data sets as flat files.", epilog="Sets: " + ", ".join(SETS))
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets to build, files of your own, or all")
    parser.add_argument("--out", default="data", help="folder for flat files (default: data)")
    parser.add_argument("--raw", default="raw", help="folder for published files and downloads (default: raw)")
    parser.add_argument("--limit", type=int, metavar="N", help="most examples (default: the set's own)")
    parser.add_argument("--words", type=int, default=DEFAULT_WORDS, metavar="W", help="words of a mixing passage (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated sets and of the order of published ones (default: 0)")
    parser.add_argument("--slice", type=int, default=SLICE, metavar="N", help=f"facts of a set's second slice (default: {SLICE})")
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="pass over at most N malformed rows of a set (default: 0)")
    parser.add_argument("--facts", type=int, nargs=2, metavar=("LEAST", "MOST"), help="refuse what is not so many facts")
    parser.add_argument("--list", action="store_true", help="list the sets, what is built and where the rest comes from")
    parser.add_argument("--overlap", nargs="+", metavar="NAME", help="a set of facts, then mixing sets: how many of the facts stand in them")
    parser.add_argument("--verbose", action="store_true", help="with --overlap: print the facts")
    args = parser.parse_args()
    if min(args.words, args.slice, 1 if args.limit is None else args.limit) < 1 or args.skip_bad < 0:
        raise DataError("--words, --slice and --limit must be at least 1, --skip-bad at least 0")
    for option, folder in (("--out", args.out), ("--raw", args.raw)):
        if not Path(folder).is_dir() and (Path(folder).exists() or any(parent.is_file() for parent in Path(folder).parents)):
            raise DataError(f"{folder}: no folder, but a file; give another {option}")
    if args.overlap and len(args.overlap) < 2:
        raise DataError("--overlap: name a set of facts and at least one mixing set")
    if not args.names and not args.list and not args.overlap:
        raise DataError("name the sets to build, or give --list or --overlap")

    failures, places = [], {}
    for name in args.names:
        if is_own(name):
            place = own_flat_file(name, args.out)
            other = places.setdefault(place, name)
            if Path(other).resolve() != Path(name).resolve():
                raise DataError(f"{name}: would be written to {place}, as {other} is; rename one of the two, or build it with another --out")
        elif name != "all":
            resolve(name)
    for name in SETS if "all" in args.names else args.names:
        try:
            with alone_at(own_flat_file(name, args.out) if is_own(name) else flat_file(resolve(name)[0], args.out)):
                paths = build(name, args.out, args.limit, args.seed, args.words, args.raw, args.skip_bad, args.slice,
                              least=args.limit or 0, fewer=True)  # fmt: skip
            for path in paths:
                manifest = json.loads(path.with_suffix(".json").read_bytes())
                counts = [f"{count} dropped: {reason}" for reason, count in manifest["dropped"].items()]
                counts += [f"{manifest[key]} {label}" for key, label in (("bad", "malformed rows passed over"), ("beyond_limit", "more usable")) if manifest.get(key)]
                counts += [f"not read: {', '.join(manifest['unread'])}"] if manifest.get("unread") else []
                sources = list(manifest.get("sources", ["generated"]))
                if args.facts:
                    check_facts(name, path, *args.facts)
                print(f"{path}: {manifest['kept']} examples ({'; '.join([f'{some(sources)}, seed {args.seed}', *counts])})", flush=True)
        except DataError as error:
            if "all" not in args.names:
                raise
            failures.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
    if args.list:
        list_sets(args)
    if args.overlap:
        report_overlap(args.overlap, args)
    if failures:
        print("\nNot built:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    begin_command("give the same command again: downloads go on")
    try:
        main()
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what was built is there; who reads along, head for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"data.py: {error}; nothing was left half-written", file=sys.stderr)
        sys.exit(1)
