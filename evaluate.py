"""What a checkpoint still knows: exact match on the facts of each of its stages, and tables of finished runs.

    python evaluate.py runs/SmolLM2-135M-Instruct/kvr-s0     # every factoid stage behind it, and what was forgotten
    python evaluate.py CKPT --lost                           # all the facts that were forgotten, asked before or not
    python evaluate.py CKPT --text pydoc                     # and what else it cost: the loss on other text
    python evaluate.py models/Meta-Llama-3-8B --data bios    # any model on any set
    python evaluate.py models/Meta-Llama-3-8B --split popqa  # which facts the base model knows: familiar, unfamiliar
    torchrun --nproc_per_node 8 evaluate.py CKPT             # facts are shared out over the ranks
    python evaluate.py --overlap runs/paper                  # which facts stand in what the runs were trained on
    python evaluate.py --tables runs/paper                   # tables, claims and figures of the runs below a folder

Writes CKPT/eval.json, CKPT/predictions.NAME.jsonl and CKPT/text.NAME.json; --split writes
data/NAME.familiar.MODEL-ID.jsonl and NAME.unfamiliar.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports take their seconds, Ctrl-C has nothing to save

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
import torch.distributed as dist

from data import (
    DEFAULT_WORDS, OVERLAP_LIMIT, PASSAGE, SETS, SLICE, DataError, Parser, at_hand, begin_command, encode_example,
    examples_of, flat_file, is_name_of_set, json_line, load_examples, load_tokenizer, overlap, progress_bar, read_lines,
    read_manifest, relative_path, resolve, slice_of, start_ids, subjects_of, write_file, write_flat,
)
from model import (
    PRECISIONS, CheckpointError, Config, all_gather, compute_dtype, content_id, end_process_group, fail,
    faster_precision, load_model, model_name, setup_device, temporary_name, unreadable,
)

BATCH = 128  # prompts that generate together
MOST = 2000  # facts of a set that no stage learned, unless told otherwise: the paper's size


def check_vocabulary(tokenizer, config, path):
    """A DataError unless every id that a text can have is a row of the model's embedding."""
    if tokenizer.largest_id >= config.vocab_size:
        raise DataError(f"{path}: its tokenizer has ids up to {tokenizer.largest_id} "
                        f"(bos {tokenizer.bos_id}, eos {tokenizer.eos_id}), its model's vocabulary "
                        f"{config.vocab_size}; copy both from one model")  # fmt: skip


def predict(model, tokenizer, examples, progress=False, finish=True):
    """Greedy answers, a text for each example; under torch.distributed every rank calls it with the same examples.

    The prompt is exactly what was trained on; an answer may be a few tokens longer than the longest right one.
    finish: also what can no longer be right is written to its end.
    """
    prompts, answers, most = questions(tokenizer, examples)
    responses = None if finish else [spelled(tokenizer, example["response"]) for example in examples]
    return ask(model, tokenizer, prompts, most, tokenizer.eos_id, progress, answers, responses)


def exact_matches(model, tokenizer, examples):
    """For each example whether its greedy answer is correct; called as predict is, and sooner done."""
    answers = predict(model, tokenizer, examples, finish=False)
    rights = [spelled(tokenizer, example["response"]) for example in examples]
    return list(map(is_correct, answers, rights))


def questions(tokenizer, examples):
    """(ids of each prompt, ids of each right answer with its eos, most tokens that a model's answer may have)."""
    prompts, answers = [], []
    for example in examples:
        ids, labels = encode_example(tokenizer, example, sys.maxsize)  # training may have had another --max-length
        start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
        prompts.append(ids[:start])
        answers.append(ids[start:])
    return prompts, answers, max(map(len, answers)) + 4


def ask(model, tokenizer, prompts, max_new_tokens, ends, progress=False, drafts=None, responses=None):
    """Greedy continuations of prompts (lists of ids) as texts, shared out over the ranks.

    ends: the id or ids that end one.
    drafts: the likeliest answers, which only save time (see Transformer.generate).
    responses: the right texts as spelled; a continuation that can no longer be its prompt's breaks off.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prefix_len = common_prefix_len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = by_length[rank::world]
    # Each rank fills its own rows; their sum is the whole. Every rank generates equally often, the last time perhaps
    # nothing.
    new_ids = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=model.model.embed_tokens.weight.device)
    quiet = not progress or rank > 0
    for start in progress_bar(range(0, len(by_length[::world]), BATCH), desc="asking", disable=quiet):
        rows = mine[start : start + BATCH]
        guesses = drafts and [drafts[i] for i in rows]
        stop = responses and (lambda k, ids, rows=rows: is_wrong(tokenizer.decode(ids), responses[rows[k]]))
        asked = [prompts[i] for i in rows]
        for row, ids in zip(rows, model.generate(asked, max_new_tokens, ends, guesses, stop, prefix_len)):
            new_ids[row, : len(ids)] = torch.tensor(ids, device=new_ids.device) + 1  # 0 means no token
    if world > 1:
        dist.all_reduce(new_ids)
    return [tokenizer.decode([i - 1 for i in row if i]) for row in new_ids.tolist()]


def common_prefix_len(prompts):
    """How many ids all prompts begin with, but for the last of the shortest."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts), default=1) - 1)


def spelled(tokenizer, answer):
    """A right answer as a model can write it: a normalizer may have composed its characters, a vocabulary lack some."""
    return tokenizer.decode(tokenizer.encode(answer, continues=True))


def is_correct(prediction, response):
    """Exact match as the paper scores it (section 2.2)."""
    return folded(prediction) == folded(response)


def folded(text):
    """A text as answers are compared: white space stripped, lower case."""
    return text.strip().lower()


def is_wrong(beginning, response):
    """Whether no text that begins so, but for a last character of which some bytes are still to come, is correct."""
    # The lower case of a capital sigma alone depends on what follows it.
    fold = lambda text: text.strip().lower().casefold()
    return not fold(response).startswith(fold(beginning.rstrip("\ufffd")))


def resolve_precision(asked, path, lineage, device_type):
    """--precision as bf16-mixed, bf16 or fp32.

    auto is what path's last stage was trained in, and what is faster here for a base model.
    """
    if asked != "auto":
        return asked
    if lineage:
        return lineage[-1]["precision"]
    # Rank 0 decides, while the others wait: two machines may differ, and two ranks that measure slow each other down.
    config = Config.from_folder(path)
    decides = not dist.is_initialized() or dist.get_rank() == 0
    return all_gather(faster_precision(config, device_type) if decides else None)[0]


@dataclass
class FactSet:
    """Facts to be asked, and what eval.json says of them beside the answers."""

    name: str  # of its row in eval.json, its predictions and its probe
    facts: list
    data: str  # the set's label
    of: int  # facts that its stage learned, or that the set has, the first 2,000 of it
    data_sha256: str  # of the facts' lines


def stage_sets(lineage, data):
    """A FactSet for each stage that learned facts, all of them."""
    sets = {}
    for name, entry in zip(set_names(lineage), lineage):
        if name not in sets and (facts := stage_facts(entry, data)):
            sets[name] = FactSet(name, facts, set_label(entry["data"]), len(facts), entry["data_sha256"])
    return list(sets.values())


def named_sets(names, n, path, lineage, data, fewer=False, out=None):
    """FactSets of --data's names: of a stage's set what it learned, of others the first 2,000.

    n: only so many, or more; fewer: or what there is. A question about fewer facts, or about others under a name that
    is taken in folder `out` (path, unless told otherwise), gets a name of its own.
    """
    kept = {"data": data, "base_model": base_of(path, lineage) if lineage or any(map(is_split, names)) else None}
    sets, taken, of_stages = {}, asked_before(out or path), {}
    for name, entry in zip(set_names(lineage), lineage):
        taken[name] = entry["data_sha256"]
        of_stages.setdefault(entry["data_sha256"], name)
    for asked in names:
        if fewer and is_familiar(asked) and facts_at_hand(asked, 1, **kept) == 0:
            print(f"{asked}: {kept['base_model'].name} knows no such fact; left out", file=sys.stderr)
            continue
        learned = next((entry for entry in lineage if same_set(asked, entry["data"])), None)
        source = stage_set(learned) if learned else asked
        if learned and (n is None or n <= learned["num_examples"]):
            stage_facts(learned, data)  # refuses what is no longer what it learned
            whole = learned["num_examples"]
            facts, sha256 = load_set(source, n or whole, **kept)
        else:
            facts, sha256 = load_set(source, n or MOST, **kept, fewer=fewer or n is None)
            whole = len(load_set(source, MOST, **kept, fewer=True)[0])
        if any("messages" in fact for fact in facts):
            raise DataError(f"{asked}: holds chats, which have no single right answer; name sets of facts")
        name = set_label(asked) + (f".first{n}" if n and len(facts) != whole else "")
        if sha256 in of_stages:
            name = of_stages[sha256]
        elif taken.get(name, sha256) != sha256:
            name += f".{sha256[:8]}"
        taken[name] = sha256
        sets[name] = FactSet(name, facts, set_label(asked), max(whole, len(facts)), sha256)
    if not sets:
        raise DataError(f"{path}: no facts to ask, as {kept['base_model'].name} knows none of {', '.join(names)}")
    return list(sets.values())


def asked_before(path):
    """{name: data_sha256} of what a folder's model was asked and probed on."""
    taken = {name: row["data_sha256"] for name, row in read_run(path).scores.items()}
    for file in Path(path).glob("probe.*.json"):
        result = read_rows(file)
        if not wrong_fields(result, {"data_sha256": str}):
            taken.setdefault(file.name.removeprefix("probe.").removesuffix(".json"), result["data_sha256"])
    return taken


def same_set(asked, data):
    """Whether a data name or path means the set of a stage."""
    are_files = asked.endswith(".jsonl") and data.endswith(".jsonl")
    return asked == data or (are_files and Path(asked).resolve() == Path(data).resolve())


def evaluate(path, model, tokenizer, sets, precision, rank=0, base_model=None):
    """Ask the model every fact of some FactSets, and return its rows {name: row}.

    eval.json and the predictions are written into folder path; the rows of a base_model, which no run.json beside them
    names, do so themselves.
    """
    results = {}
    for asked in sets:
        rows, answers = [], predict(model, tokenizer, asked.facts, progress=True)
        for fact, answer in zip(asked.facts, answers):
            right = spelled(tokenizer, fact["response"])
            row = {"id": fact["id"], "prompt": fact["prompt"], "response": fact["response"], "prediction": answer,
                   "correct": is_correct(answer, right)}  # fmt: skip
            rows.append(row | ({"spelled": right} if folded(right) != folded(fact["response"]) else {}))
        correct = sum(row["correct"] for row in rows)
        results[asked.name] = {"accuracy": 100 * correct / len(rows), "correct": correct, "total": len(rows),
                               "of": asked.of, "precision": precision, "data": asked.data,
                               "data_sha256": asked.data_sha256} | named(base_model)  # fmt: skip
        if rank == 0:
            write_lines(Path(path) / f"predictions.{asked.name}.jsonl", rows)
    if rank == 0:
        write_file(Path(path) / "eval.json", json.dumps(read_run(path).scores | results, indent=2) + "\n")
    return results


def named(base_model):
    """What a result says of the BaseModel that it is of, where no run.json beside it does."""
    return {"base_model_name": base_model.name, "base_model_sha256": base_model.sha256} if base_model else {}


# ---------------------------------------------------------------- other text

PASSAGES = 100  # whose loss --text gives
SHARED_WORDS = 8  # in a row, that tell a passage which was trained on
MAX_TOKENS = 2048  # of a passage


@dataclass
class Text:
    """Passages that no stage of a checkpoint was trained on."""

    name: str  # of its file text.NAME.json
    passages: list
    data_sha256: str  # of them


def other_text(name, lineage, data):
    """The Text of a set: its last 100 examples that share no 8 words in a row with an example of a set or a mix of the
    lineage's stages, nor are themselves one of fewer words.

    A mix of weight 0 counts too, so that a control is asked what its mixed run is.
    """
    seen = set()
    for texts in itertools.chain(map(learned_by, lineage), map(mixed_by, filter(is_mixed, lineage))):
        for example in texts.load(data):
            seen.update(word_runs(plain_text(example)))
    passages = []
    for example in reversed(load_examples(name, None, data)[0]):
        text = plain_text(example)
        if seen.isdisjoint(word_runs(text)):
            passages.append(text)
        if len(passages) == PASSAGES:
            break
    if not passages:
        raise DataError(f"{name}: all of it shares words with what a stage was trained on; name another set with "
                        "--text")  # fmt: skip
    return Text(set_label(name), passages, hashlib.sha256(json.dumps(passages).encode()).hexdigest())


def plain_text(example):
    """What an example says, without the words that ask for it."""
    if "messages" in example:
        return "\n".join(message["content"] for message in example["messages"])
    return f"{example['prompt'].removeprefix(PASSAGE)} {example['response']}"


def word_runs(text):
    """All runs of 8 of a text's words; of a shorter text itself, as few words of it are ordinary phrases."""
    words = text.lower().split()
    starts = range(max(1, len(words) - SHARED_WORDS + 1))
    return {tuple(words[start : start + SHARED_WORDS]) for start in starts}


def text_loss(model, tokenizer, texts):
    """(mean loss of a token in nats, how many tokens) of texts, each by itself behind bos, if any; under
    torch.distributed every rank calls it with the same texts."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.model.embed_tokens.weight.device
    # Each rank holds all weights and sums over its own texts, so the ranks meet in their sums alone.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for text in texts[rank::world]:  # one at a time: the longest may fill a GPU
        ids = torch.tensor([[*start_ids(tokenizer), *tokenizer.encode(text)][:MAX_TOKENS]], device=device)
        labels = ids.clone()
        labels[:, 0] = -100  # nothing predicts a first token
        with torch.no_grad():
            loss_sum, n_tokens = model(ids, labels=labels)
        sums += torch.tensor([float(loss_sum), float(n_tokens)], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(sums)
    summed, n_tokens = sums.tolist()
    return summed / n_tokens, round(n_tokens)


def measure_text(path, model, tokenizer, text, precision, rank=0, base_model=None):
    """Write the loss on a Text into text.NAME.json in folder path, and return the row."""
    loss, n_tokens = text_loss(model, tokenizer, text.passages)
    row = {"loss": loss, "tokens": n_tokens, "passages": len(text.passages), "precision": precision, "data": text.name,
           "data_sha256": text.data_sha256} | named(base_model)  # fmt: skip
    if rank == 0:
        write_file(Path(path) / f"text.{text.name}.json", json.dumps(row, indent=2) + "\n")
    return row


# ---------------------------------------------------------------- familiar and unfamiliar


@dataclass(frozen=True)
class BaseModel:
    """The untouched model that facts are familiar or unfamiliar to."""

    name: str  # a label: model.model_name of the path
    path: str
    sha256: str  # what it is: model.content_id

    @classmethod
    def of(cls, entry):
        """The model that a stage, an entry of a lineage, goes back to."""
        return cls(entry["base_model_name"], entry["base_model"], entry["base_model_sha256"])


def is_split(name):
    """Whether a data name's facts depend on what a base model knows: those of a published set."""
    if name.endswith(".jsonl"):
        return False
    base, _, _ = resolve(name)
    return SETS[base].sliced


def is_part(name):
    """Whether a data name means the familiar or the unfamiliar facts of a set."""
    return not name.endswith(".jsonl") and resolve(name)[2] != ""


def familiarity(name, base_model, data="data"):
    """Which facts of a set are learned: "unfamiliar" of one that is split; "" where the name says so, or it is not."""
    if not is_split(name) or is_part(name):
        return ""
    base = resolve(name)[0]
    if not split_file(base, "unfamiliar", base_model, data).exists():
        raise DataError(f"{name}: not split into what {base_model.name} knows and what not: run python evaluate.py "
                        f"{base_model.path} "
                        f"--split {base}, or take all facts with --unfiltered")  # fmt: skip
    return "unfamiliar"


def slice_size(path):
    """Facts of a slice of the set in a flat file, as the manifest beside it says."""
    return read_manifest(path).get("slice", SLICE)


def split_file(stem, kind, base_model, data="data"):
    """Where a base model's "familiar" or "unfamiliar" facts of a set lie: by what the model is, not its name."""
    digits = base_model.sha256[:8]
    found = sorted(Path(data).glob(f"{glob.escape(stem)}.{kind}.*-{digits}.jsonl"))
    return found[0] if found else Path(data) / f"{stem}.{kind}.{base_model.name}-{digits}.jsonl"


def split_files(stem, base_model, data="data"):
    """All that sorting a set for a base model leaves, as a shell pattern: what to remove to sort it anew."""
    return f"{data}/{stem}.*-{base_model.sha256[:8]}.*"


def was_sorted(name, base_model, data="data"):
    """Whether a base model was asked a set: one of its two files is there; the other is not where it knew all or
    nothing."""
    base, _, _ = resolve(name)
    return any(split_file(base, kind, base_model, data).exists() for kind in ("familiar", "unfamiliar"))


def check_split(path, stem, base_model):
    """A DataError unless a file of familiar or unfamiliar facts was made by asking this base model."""
    remedy = f"run python evaluate.py {base_model.path} --split {stem}"
    if not path.exists() and was_sorted(stem, base_model, path.parent):
        raise DataError(f"{path}: no such file, as {base_model.name} has no such facts; leave out {stem}")
    if not path.exists():
        raise DataError(f"{path}: no such file; {remedy}, which makes it where {base_model.name} has such facts")
    if read_manifest(path, f"remove it and {remedy}").get("base_model_sha256") != base_model.sha256:
        raise DataError(f"{path}: its manifest does not say that {base_model.name} as it is here was asked; remove "
                        f"both and {remedy}")  # fmt: skip
    whole = flat_file(stem, path.parent)
    if whole.exists() and slice_size(whole) != slice_size(path):
        raise DataError(f"{path}: was sorted when slices of {stem} had {slice_size(path)} facts, not "
                        f"{slice_size(whole)}; remove {split_files(stem, base_model, path.parent)} and "
                        f"{remedy}")  # fmt: skip


def load_set(name, n=None, data="data", words=DEFAULT_WORDS, base_model=None, fewer=False):
    """As load_examples, where a name such as popqa-id.unfamiliar means the facts that base_model does not know."""
    if not base_model or not is_part(name):
        return load_examples(name, n, data, words, fewer=fewer)
    base, second, kind = resolve(name)
    path = split_file(base, kind, base_model, data)
    check_split(path, base, base_model)
    lines = slice_of(read_lines(path, None), slice_size(path), second)[:n]
    return examples_of(lines, path, name, n, fewer)


def facts_at_hand(name, n, data="data", words=DEFAULT_WORDS, base_model=None):
    """As at_hand; of a part such as popqa.familiar how many facts it holds, or may hold before the model was asked."""
    if not base_model or not is_part(name) or not was_sorted(name, base_model, data):
        return at_hand(name, n, data, words)
    base, second, kind = resolve(name)
    split, whole = split_file(base, kind, base_model, data), flat_file(base, data)
    if not split.exists():
        return 0
    check_split(split, base, base_model)
    asked = read_manifest(split).get("data_sha256")
    if asked and whole.exists() and asked != load_pool(base, data)[1]:
        raise DataError(f"{split}: made by asking other facts than {whole} now holds; remove "
                        f"{split_files(base, base_model, data)} to ask these")  # fmt: skip
    return len(slice_of(read_lines(split, None), slice_size(split), second)[:n])


def load_pool(name, data="data", raw="raw"):
    """(all facts of a set, both slices, in the order in which it was built, sha256 of their lines)."""
    if name.endswith(".jsonl"):
        return load_examples(name, None, data)
    if not is_split(name):
        raise DataError(f"{name}: not a published set of facts; --split sorts {', '.join(filter(is_split, SETS))}")
    base, _, _ = resolve(name)
    facts, sha256 = load_examples(base, None, data, raw=raw)
    if flat_file(f"{base}-id", data).exists():
        second, second_sha256 = load_examples(f"{base}-id", None, data)
        size = slice_size(flat_file(base, data))
        facts = facts[:size] + second + facts[size:]
        sha256 = hashlib.sha256((sha256 + second_sha256).encode()).hexdigest()
    return facts, sha256


SHOTS = 5


@dataclass
class Sorting:
    """What sorting a set's facts for a base model takes, and leaves."""

    name: str  # of the set
    facts: list  # to be asked
    shots: list  # facts shown before each question
    header: dict  # what the files that come of it say of it
    target: dict  # {"familiar" or "unfamiliar": flat file}

    @classmethod
    def of(cls, base_model, name, n, n_shots, data):
        base = resolve(name)[0] if not name.endswith(".jsonl") else set_label(name)
        if name.endswith(".jsonl") and is_name_of_set(base):
            raise DataError(f"{name}: its facts would be kept under the name of the set {base}; rename it")
        pool, sha256 = load_pool(name, data)
        if len(pool) <= n_shots:
            raise DataError(f"{name}: holds {len(pool)} facts, not more than the {n_shots} shots; take fewer with "
                            "--shots")  # fmt: skip
        shots = random.Random(f"shots {base}").sample(range(len(pool)), n_shots)
        facts = [fact for i, fact in enumerate(pool) if i not in shots][:n]
        header = {"base_model": base_model.name, "base_model_sha256": base_model.sha256, "name": base,
                  "data_sha256": sha256, "shots": [pool[i]["id"] for i in shots]}  # fmt: skip
        if is_name_of_set(base):
            header["slice"] = slice_size(flat_file(base, data))
        target = {kind: split_file(base, kind, base_model, data) for kind in ("familiar", "unfamiliar")}
        sorting = cls(base, facts, [pool[i] for i in shots], header, target)
        for file, before in sorting.manifests().items():
            if before.get("data_sha256") != sha256:
                raise DataError(f"{file}: made by asking {before['asked']} other facts, or facts in slices of another "
                                f"size; remove {split_files(base, base_model, data)} to ask these")  # fmt: skip
        return sorting

    def manifests(self):
        """{flat file: its manifest} of the files that are there; one without facts is not."""
        found = {}
        for file in self.target.values():
            beside = file.with_suffix(".json")
            if file.exists() and beside.exists():
                manifest = read_rows(beside)
                whole = not wrong_fields(manifest, {"kept": int, "asked": int})
                if whole and len(read_rows(file)) == manifest["kept"]:  # a kill may come between the two
                    found[file] = manifest
        return found

    @property
    def done(self):
        """Whether all these facts were asked before, and sorted to the end."""
        before = list(self.manifests().values())
        for manifest in before:
            known = {"slice": SLICE} | manifest  # which earlier versions did not name
            if any(known.get(key) != value for key, value in self.header.items()):
                return False
        asked = {manifest["asked"] for manifest in before}
        return len(asked) == 1 and sum(manifest["kept"] for manifest in before) == min(asked) >= len(self.facts)

    def say(self):
        """Print how many of the facts the base model knows."""
        made = self.manifests()
        known = made.get(self.target["familiar"], {"kept": 0})["kept"]
        asked = next(iter(made.values()))["asked"]
        print(f"{self.name}: {self.header['base_model']} knows {known} of {asked} facts -> "
              f"{self.target['familiar']}, {self.target['unfamiliar']}")  # fmt: skip


def split(base_model, model, tokenizer, name, n, n_shots, data, rank, precision):
    """Ask a BaseModel each fact of a set, few-shot, and write those it knows and those it does not (sections 2.1, 2.2).

    The shots are drawn from the set, stand in its own form before each question, and are excluded. A fact is familiar
    if the answer's first line is the response or one of its aliases. What was answered is kept as it comes, so a killed
    run goes on.
    """
    work = Sorting.of(base_model, name, n, n_shots, data)
    if all_gather(work.done)[0]:  # rank 0 says so: what it has just written others may find, or not yet
        return work.say() if rank == 0 else None
    base, target, facts = work.name, work.target, work.facts
    header = work.header | {"precision": precision}
    part = target["familiar"].with_suffix(".part")
    answers = kept_rows(part, header, lambda row: isinstance(row, str))[: len(facts)]
    shown = "".join(f"{shot['prompt']} {shot['response']}\n\n" for shot in work.shots)
    accepted = [[fact["response"], *fact.get("aliases", [])] for fact in facts]
    longest = max(len(tokenizer.encode(" " + answer)) for answers_ in accepted for answer in answers_)
    line_ends = {i for i in range(tokenizer.vocab_size) if "\n" in (text := tokenizer.decode([i])) and not text.strip()}
    bar = progress_bar(total=len(facts), initial=len(answers), desc=f"asking {base}", unit=" facts", disable=rank > 0)
    stride = 2 * BATCH * dist.get_world_size()
    for start in range(len(answers), len(facts), stride):
        chunk = facts[start : start + stride]
        prompts = [[*start_ids(tokenizer), *tokenizer.encode(shown + fact["prompt"])] for fact in chunk]
        texts = ask(model, tokenizer, prompts, longest + 2, line_ends | {tokenizer.eos_id})
        new = [text.strip().partition("\n")[0].strip() for text in texts]
        answers += new
        if rank == 0:
            with open(part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in new)
        bar.update(len(chunk))
    bar.close()

    known = []
    for answer, rights in zip(answers, accepted):
        known.append(any(is_correct(answer, spelled(tokenizer, right)) for right in rights))
    for kind in target:
        rows = [(fact, answer) for fact, answer, k in zip(facts, answers, known) if k == (kind == "familiar")]
        if rank == 0:
            said = {fact["id"]: answer for fact, answer in rows}
            manifest = {**header, "asked": len(facts), "kept": len(rows), "predictions": said}
            write_flat(target[kind], [fact for fact, _ in rows], manifest)
    if rank == 0:
        part.unlink(missing_ok=True)
        work.say()


def kept_rows(part, header, fits):
    """The JSON lines that interrupted work with the same header left in file part, the same on every rank.

    From here on part holds the header and just those. fits(row): whether this work writes such a row.
    """
    rows = []
    if dist.get_rank() == 0:
        # What follows the last line break was cut by a kill.
        lines = part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if part.exists() else []
        if lines and lines[0] == json.dumps(header):
            try:
                rows = [json.loads(line) for line in lines[1:]]
            except ValueError:
                rows = [None]
            if not all(map(fits, rows)):
                raise DataError(f"{part}: damaged; remove it to ask again what it kept")
        write_file(part, "".join(json.dumps(row) + "\n" for row in [header, *rows]))
    box = [rows]
    dist.broadcast_object_list(box)
    return box[0]


# ---------------------------------------------------------------- records

# Of an entry of run.json: folders, in the file relative to its own; how a run came out; what it was done with; what
# decides its log alone. All else are settings.
PATHS = ("base_model", "checkpoint")
OUTCOMES = ("steps", "updates", "tokens", "seconds", "final_loss", "losses", "stopped_by")
DONE_WITH = ("commit", "clean", "python", "torch", "device", "ranks", "micro_tokens", "compile", "deterministic",
             "resumed_from")  # fmt: skip
LOGGING = ("eval_every", "eval_facts")
NO_SETTINGS = {"seed", "base_model_name", *PATHS, *OUTCOMES, *DONE_WITH, *LOGGING}
MIX_SETTINGS = {"mix_ratio", "mix_words", "mix_weight", "equal_weight"}  # decide nothing without a mix
# What is read of what a run or a part of it was made with, of an entry, and of a row of eval.json.
PART_FIELDS = {**dict.fromkeys(["python", "torch", "device"], str), "commit": (str, type(None)), "clean": object,
               "ranks": int}  # fmt: skip
STAGE_FIELDS = {
    **dict.fromkeys(["data", "mix", "tag", "precision", "data_sha256", "base_model_name", "base_model_sha256",
                     "stopped_by"], str),
    **dict.fromkeys(PATHS, str),
    **dict.fromkeys(["stage", "num_examples", "seed", "mix_words", "steps", "ranks", "batch_size"], int),
    **dict.fromkeys(["mix_ratio", "mix_weight", "replay", "lr"], (int, float)), **dict.fromkeys(DONE_WITH, object),
    **dict.fromkeys(["num_mix", "num_replay", "num_cut", "epochs"], int),
    **PART_FIELDS, "familiarity": str, "losses": dict, "resumed_from": list,
}  # fmt: skip
SCORE_FIELDS = {
    **dict.fromkeys(["data", "precision", "data_sha256"], str), **dict.fromkeys(["correct", "total", "of"], int),
    "accuracy": (int, float),
}  # fmt: skip
TEXT_FIELDS = {"loss": float, **dict.fromkeys(["tokens", "passages"], int),
               **dict.fromkeys(["precision", "data", "data_sha256"], str)}  # fmt: skip
ANSWER_FIELDS = {**dict.fromkeys(["id", "prompt", "response", "prediction", "spelled"], str), "correct": bool}
OPTIONAL = ("num_mix", "num_replay", "num_cut", "epochs", "spelled")  # of these fields
# Of a step's row in metrics.jsonl.
STEP_FIELDS = {**dict.fromkeys(["step", "epoch", "tokens"], int), **dict.fromkeys(["lr", "seconds"], (int, float)),
               **dict.fromkeys(["loss", "grad_norm"], object)}  # fmt: skip


def read_rows(path, fields=()):
    """The value in a JSON file, or the list of those in a JSON-lines file, which must have the fields {name: type}."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_bytes())
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(unreadable(path, f"not readable ({error})", "train or evaluate that run again"))) from None
    for number, row in enumerate(rows, 1):
        if wrong := wrong_fields(row, dict(fields)):
            raise DataError(f"{path}:{number}: has not what this version of the code writes as {', '.join(wrong)}; "
                            "train or evaluate that run again")  # fmt: skip
    return rows


def wrong_fields(row, fields):
    """The names of those fields {name: type} that a row lacks, unless they are OPTIONAL, or has of another type."""
    if not isinstance(row, dict):
        return list(fields)
    fits = lambda name, kind: isinstance(row[name], kind) if name in row else name in OPTIONAL
    return [name for name, kind in fields.items() if not fits(name, kind)]


def is_own_log(file):
    """Whether a metrics.jsonl is train.py's, by its first line: other programs call their logs so too."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(file, encoding="utf-8-sig") as rows:
        first = rows.readline()
        if first.endswith("\n"):
            return not wrong_fields(json.loads(first), STEP_FIELDS)
        # Cut by a kill, or of a run that has made no step: without a model beside it.
        return '{"step": '.startswith(first[:9]) and not (file.parent / "config.json").exists()
    return False


def is_foreign(folder):
    """Whether run.json in a folder is another program's: no list, as ours is, and nothing beside it is of a run."""
    file = Path(folder) / "run.json"
    begins = file.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")[:1] if file.is_file() else b""
    if begins != b"{" or is_own_log(file.with_name("metrics.jsonl")):
        return False
    return all("base_model_sha256" in row for row in own_scores(file.with_name("eval.json")))


def has_run(folder):
    """Whether a folder is a run's, finished or not, by its run.json or its log."""
    folder = Path(folder)
    return (folder / "run.json").exists() and not is_foreign(folder) or is_own_log(folder / "metrics.jsonl")


def own_scores(file):
    """The rows of an eval.json that evaluate.py wrote."""
    content = read_rows(file) if file.exists() else {}
    rows = content.values() if isinstance(content, dict) else []
    return [row for row in rows if isinstance(row, dict) and "data" in row]


def read_lineage(path):
    """The stages of a checkpoint, as its run.json lists them; none for a base model.

    Paths are as they are from here.
    """
    check_folder(path)
    file = Path(path) / "run.json"
    if not file.exists() and is_own_log(file.with_name("metrics.jsonl")):
        raise DataError(f"{path}: an unfinished run, without run.json; finish it with train.py --resume")
    if not file.exists() or is_foreign(path):
        return []
    lineage = read_rows(file)
    stages = isinstance(lineage, list) and all(isinstance(entry, dict) and "stage" in entry for entry in lineage)
    if not stages or not lineage:
        raise DataError(f"{file}: not a lineage of stages; restore it, or move it elsewhere if it is another program's")
    for number, entry in enumerate(lineage, 1):
        if wrong := wrong_in_stage(entry):
            raise DataError(f"{file}: stage {number} has not what this version of the code writes as "
                            f"{', '.join(wrong)}; read it with the version that wrote it, or train it "
                            "again")  # fmt: skip
    return [with_paths(entry, lambda stored: path_from(path, stored)) for entry in lineage]


def wrong_in_stage(entry):
    """As wrong_fields, of an entry of run.json and of what is in its fields."""
    wrong = wrong_fields(entry, STAGE_FIELDS)
    if not wrong and wrong_fields(entry["losses"], dict.fromkeys(entry["losses"], (int, float))):
        return ["losses"]
    if not wrong and not math.isfinite(entry["mix_ratio"]):
        return ["mix_ratio"]
    if not wrong and any(wrong_fields(part, PART_FIELDS) for part in entry["resumed_from"]):
        return ["resumed_from"]
    try:
        for name in (entry["data"], entry["mix"]) if not wrong else ():
            if name != "none" and not name.endswith(".jsonl"):
                resolve(name)
    except DataError:
        return ["data", "mix"]
    return wrong


def path_from(folder, stored):
    """The path that relative_path wrote into a file in `folder`."""
    return os.path.normpath(Path(folder).resolve() / stored)


def with_paths(entry, change):
    """An entry of a lineage whose paths are changed: its folders, and its sets where they are files."""
    files = [key for key in ("data", "mix") if entry[key].endswith(".jsonl")]
    return entry | {key: change(entry[key]) for key in (*PATHS, *files)}


def relative_lineage(lineage, folder):
    """A lineage as run.json in `folder` holds it."""
    return [with_paths(entry, lambda path: relative_path(path, folder)) for entry in lineage]


def without_paths(entry):
    """An entry of a lineage as it stays wherever folders go: sets that are files by their labels."""
    kept = {key: value for key, value in entry.items() if key not in PATHS}
    return kept | {"data": set_label(entry["data"]), "mix": set_label(entry["mix"])}


def settings_of(entry):
    """{name: value} of all that decides a stage's result, but for its seed."""
    unused = MIX_SETTINGS if entry["mix"] == "none" else set()
    return {key: value for key, value in without_paths(entry).items() if key not in NO_SETTINGS | unused}


def record(lineage):
    """A lineage as a text: two checkpoints with one record are one run."""
    return json.dumps([without_paths(entry) for entry in lineage], sort_keys=True)


def said(value):
    """A setting's value in a message, of one that is not there or null too."""
    return "unset" if value is None else str(value)


def set_label(name):
    """A data name as files and tables show it: that of a path without folder and .jsonl."""
    return Path(name).stem if name.endswith(".jsonl") else name


def set_names(lineage):
    """A name for each stage's set: its label.

    Behind it stand digits of its hash where an earlier stage learned others of that label.
    """
    first, names = {}, []
    for entry in lineage:
        label, sha256 = set_label(entry["data"]), entry["data_sha256"]
        names.append(label if first.setdefault(label, sha256) == sha256 else f"{label}.{sha256[:8]}")
    return names


def stage_set(entry):
    """The data name of what a stage, an entry of a lineage, was trained on."""
    return f"{entry['data']}.{entry['familiarity']}" if entry.get("familiarity") else entry["data"]


def stage_facts(entry, data="data"):
    """The facts that a stage, an entry of a lineage, was trained on; none for a set whose answers are no facts."""
    name = stage_set(entry)
    if entry["data"] in SETS and SETS[entry["data"]].kind != "factoid":
        return []
    examples, sha256 = load_set(name, entry["num_examples"], data, base_model=BaseModel.of(entry))
    if sha256 != entry["data_sha256"]:
        where, remedy = f"{name} in {data}/", "give the folder that holds them with --data-dir"
        if name.endswith(".jsonl"):
            where, remedy = name, "restore them"
        raise DataError(f"{where}: its first {entry['num_examples']} lines are not those that stage {entry['stage']} "
                        f"was trained on; {remedy}")  # fmt: skip
    return [example for example in examples if "messages" not in example]


def base_of(path, lineage):
    """The BaseModel that a checkpoint goes back to: of an untouched model itself."""
    return BaseModel.of(lineage[0]) if lineage else BaseModel(model_name(path), str(path), content_id(path))


def shown_weight(settings):
    """--mix-weight as a user would write it, of a stage's settings."""
    return "equal" if settings.get("equal_weight") else f"{settings.get('mix_weight', 1):.3g}"


@dataclass(frozen=True, order=True)
class Stage:
    """What sets a stage apart from others in a table. In all other settings the runs of one cell agree."""

    data: str = ""
    mix: str = "none"
    mix_weight: str = "1"  # of "equal" the number follows from the examples, replayed ones too
    replay: float = 0.0
    tag: str = ""
    varied: tuple = ()  # (value,) of the setting whose name the tag is, if it is one's and has a value

    @classmethod
    def of(cls, entry):
        known = settings_of(entry)
        value = known.get(entry["tag"])
        varied = (value,) if isinstance(value, (str, int, float)) else ()  # None has no place in an order
        return cls(known["data"], known["mix"], shown_weight(known), entry["replay"], entry["tag"], varied)


@dataclass
class Run:
    """A finished run."""

    folder: Path
    lineage: list  # its stages, entries of run.json
    scores: dict  # eval.json: {name: row}
    texts: dict  # {name: text.NAME.json}
    after: list = dataclasses.field(default_factory=list, repr=False)  # of each stage the Run that ended with it

    @functools.cached_property
    def stages(self):
        return tuple(Stage.of(entry) for entry in self.lineage)

    @functools.cached_property
    def own_accuracies(self):
        """Of each stage the accuracy on its own facts right after it, in %; None where it was not asked them."""
        found = []
        for name, after in zip(set_names(self.lineage), self.after):
            score = after.score(name) if after else None
            found.append(score[1]["accuracy"] if score else None)
        return found

    @property
    def seeds(self):
        """Of each stage."""
        return tuple(entry["seed"] for entry in self.lineage)

    def score(self, data):
        """(name, row) of the question that was asked about a set.

        It is a stage's own, or else about as many facts as a stage has.
        """
        for name, entry in zip(set_names(self.lineage), self.lineage):
            if name == data:
                row = self.scores.get(data)
                return (data, row) if row and row["data_sha256"] == entry["data_sha256"] else None
        n = self.lineage[-1]["num_examples"]
        enough = {name: row for name, row in self.scores.items()
                  if row["data"] == data and row["total"] >= min(n, row["of"])}  # fmt: skip
        return min(enough.items(), key=lambda item: item[1]["total"], default=None)


@dataclass
class Grid:
    """The runs of one base model, by cells."""

    name: str
    cells: dict  # {a tuple of Stages: {the stages' seeds: Run}}
    untrained: list = dataclasses.field(default_factory=list)  # rows of eval.json of the base model itself

    @property
    def runs(self):
        found = []
        for cell in self.cells.values():
            found += cell.values()
        return found

    @functools.cached_property
    def generic(self):
        """The generic text of its mixes: pydoc where it was trained with that for want of k-pile."""
        mixes = {stage.mix for stages in self.cells for stage in stages}
        return "pydoc" if "pydoc" in mixes and "k-pile" not in mixes else "k-pile"

    def own(self, row):
        """A row of a table with the model's own generic text in K-Pile's place."""
        return row.replace("k-pile", self.generic)

    @functools.cached_property
    def usual_texts(self):
        """{name: data_sha256 of the passages of that text (--text) that most runs were asked}."""
        asked = {}
        for run in self.runs:
            for name, row in run.texts.items():
                asked.setdefault(name, Counter())[row["data_sha256"]] += 1
        return {name: counts.most_common(1)[0][0] for name, counts in sorted(asked.items())}


def read_runs(folder):
    """Every finished run below a folder, in an order that does not depend on folders' names."""
    check_folder(folder)
    runs = [read_run(run) for run in folders_with(["run.json"], folder) if not is_foreign(run)]
    if not runs:
        raise DataError(f"{folder}: no finished run below it; train some, and run evaluate.py on each")
    return linked(sorted(runs, key=lambda run: record(run.lineage)))


def linked(runs):
    """Runs, each of which knows which of them its stages ended with."""
    by_record = {record(run.lineage): run for run in runs}
    for run in runs:
        run.after = [by_record.get(record(run.lineage[:k])) for k in range(1, len(run.lineage) + 1)]
    return runs


def folders_with(patterns, folder):
    """The folders below one, itself included, that hold a file of one of some names or patterns; behind links too, but
    each once."""
    found = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in found:
            folders.clear()  # a link that leads back
        fits = any(fnmatch.filter(files, pattern) for pattern in patterns)
        found.setdefault(real, Path(place) if fits else None)
        folders.sort()
    return [place for place in found.values() if place]


def read_untrained(folder):
    """{base_model_sha256: [row]} of base models themselves: of each eval.json and text.NAME.json below a folder that
    has no run.json beside it and names one."""
    found = {}
    for place in folders_with(["eval.json", "text.*.json"], folder):
        if has_run(place):
            continue
        rows = []
        for file in [*place.glob("eval.json"), *place.glob("text.*.json")]:
            content = read_rows(file)
            rows += content.values() if isinstance(content, dict) and file.name == "eval.json" else [content]
        if any(isinstance(row, dict) and "base_model_sha256" in row for row in rows):  # else some other program's
            run = read_run(place)
            for row in [*run.scores.values(), *run.texts.values()]:
                found.setdefault(row.get("base_model_sha256"), []).append(row)
    return found


def read_run(folder):
    """The Run in a folder, also of one that has not been asked anything."""
    folder = Path(folder)
    lineage = read_lineage(folder) if folder.is_dir() else []
    scores = read_rows(folder / "eval.json") if (folder / "eval.json").exists() else {}
    if not lineage and not own_scores(folder / "eval.json"):
        scores = {}  # another program's
    rows = scores.values() if isinstance(scores, dict) else [None]
    for row in rows:
        fits = not wrong_fields(row, SCORE_FIELDS) and row["total"] > 0
        if not fits or row["accuracy"] != 100 * row["correct"] / row["total"]:
            raise DataError(f"{folder / 'eval.json'}: not as this version of the code writes it; move it elsewhere "
                            "and run evaluate.py again")  # fmt: skip
    return Run(folder, lineage, scores, read_texts(folder))


def read_texts(folder):
    """{name: row} of a folder's text.NAME.json."""
    texts = {}
    for file in sorted(folder.glob("text.*.json")):
        row = read_rows(file)
        if not isinstance(row, dict) or "passages" not in row:
            continue  # another program's
        if wrong_fields(row, TEXT_FIELDS) or not math.isfinite(row["loss"]):
            raise DataError(f"{file}: not as this version of the code writes it; move it elsewhere and run "
                            "evaluate.py --text again")  # fmt: skip
        texts[row["data"]] = row
    return texts


def grids_of(runs, untrained):
    """A Grid for each base model, told apart by what they are; untrained: as read_untrained gives it.

    A DataError where runs of a cell do not belong together.
    """
    by_model = {}
    for run in runs:
        by_model.setdefault(run.lineage[0]["base_model_sha256"], []).append(run)
    names = {}
    for sha256, of_model in by_model.items():
        called = {run.lineage[0]["base_model_name"] for run in of_model}
        names[sha256] = min(called, key=lambda name: (name not in PAPERS_MODELS, name))
    grids = []
    for sha256, of_model in by_model.items():
        namesakes = list(names.values()).count(names[sha256]) > 1
        name = names[sha256] + (f"-{sha256[:8]}" if namesakes else "")
        grids.append(Grid(name, cells_of(of_model), untrained.get(sha256, [])))
    return sorted(grids, key=lambda grid: grid.name)


def cells_of(runs):
    """{stages: {seeds: Run}} of one base model's runs."""
    cells = {}
    for run in runs:
        cell = cells.setdefault(run.stages, {})
        others = list(cell.values())
        if others:
            check_agreement(others[0], run)
        if run.seeds in cell:
            raise DataError(f"{both(cell[run.seeds], run)}: equal settings and seed; remove one of them, or move it "
                            "elsewhere")  # fmt: skip
        cell[run.seeds] = run
    return cells


def check_agreement(one, two):
    """A DataError where two runs of a cell differ in more than the seed."""
    (one, two), differing = sorted([one, two], key=lambda run: str(run.folder)), []
    for stage, (first, second) in enumerate(zip(one.lineage, two.lineage), 1):
        # Numbers that follow from another setting: as many steps as a run's, and the weight that makes two sources
        # equal.
        reasons = (("epochs", "step_matched"), ("mix_weight", "equal_weight"))
        follow = [key for key, why in reasons if first.get(why) and second.get(why)]
        first, second = settings_of(first), settings_of(second)
        keys = [key for key in first | second if first.get(key) != second.get(key) and key not in follow]
        keys.sort(key=lambda key: (key.endswith("sha256"), key))
        differing += [f"{key} of stage {stage} is {said(first.get(key))[:20]} and {said(second.get(key))[:20]}"
                      for key in keys]  # fmt: skip
    if differing:
        raise DataError(f"{both(one, two)}: runs of one cell ({label_of(one.stages)}), but {'; '.join(differing)}; "
                        "give one of them a --tag, or name a folder that holds but one of them")  # fmt: skip


def both(one, two):
    return " and ".join(sorted([str(one.folder), str(two.folder)]))


def accuracies(grid, stages, data):
    """{seeds: accuracy in %} of a cell's runs on a set; a DataError where they were not asked the same."""
    found = {}
    for seeds, run in sorted(grid.cells.get(stages, {}).items()):
        if score := run.score(data):
            found[seeds] = (run, score[1])
    by_folder = sorted(found.values(), key=lambda item: str(item[0].folder))
    for run, row in by_folder:
        first, expected = by_folder[0]
        for key in ("total", "of", "precision", "data_sha256"):
            if row[key] != expected[key]:
                raise DataError(f"{both(first, run)}: runs of one cell ({label_of(run.stages)}), but {key} of {data} "
                                f"in their eval.json is {expected[key]} and {row[key]}; run evaluate.py on both "
                                "alike")  # fmt: skip
    return {seeds: row["accuracy"] for seeds, (_, row) in found.items()}


def label_of(stages):
    """The paper's label for a run's stages: "Random / K-Pile" names the mix of each, "-" is none."""
    mixes = [mix_name(stage) or "-" for stage in stages]
    label = "No Mixing" if set(mixes) == {"-"} else " / ".join(mixes)
    tags = [" ".join(map(str, (stage.tag, *stage.varied))) or "-" for stage in stages]
    label += f" ({' / '.join(tags)})" if set(tags) != {"-"} else ""
    return label + "".join(f", replay {stage.replay}" for stage in stages if stage.replay)


def mix_name(stage):
    """A stage's D_M as tables show it, with its weight in the loss where that is not 1; None without one."""
    if stage.mix == "none":
        return None
    return stage.mix + {"1": "", "equal": " of equal weight"}.get(stage.mix_weight, f" of weight {stage.mix_weight}")


def predictions(folder, name):
    """The rows of predictions.NAME.jsonl, or None where there is none."""
    file = Path(folder) / f"predictions.{name}.jsonl"
    return read_rows(file, ANSWER_FIELDS) if file.exists() else None


def right_answers(run, data):
    """Whether each fact of a set was answered right, in the set's order, from a run's predictions alone."""
    name, score = run.score(data)
    file = run.folder / f"predictions.{name}.jsonl"
    right = [row["correct"] for row in read_rows(file, ANSWER_FIELDS)]
    if (len(right), sum(right)) != (score["total"], score["correct"]):
        raise DataError(f"{file}: not the answers that eval.json beside it counts; run evaluate.py again")
    return right


# ---------------------------------------------------------------- what was forgotten

# What stands in the place of a lost fact: the first of these that fits.
IN_PLACE = ("a right answer of a later stage", "the answer of another fact of the set",
            "a near miss of up to two characters", "something else")  # fmt: skip


@dataclass
class Lost:
    """A fact that was right after the stage that learned it, and is wrong now."""

    place: int  # in its set
    prompt: str
    response: str
    prediction: str
    in_place: str  # one of IN_PLACE


def lost_facts(now, then, later):
    """The Lost of a set, from rows of predictions.

    now: the run's; then: of the stage that learned it (None: all count as right); later: of later stages' sets.
    """
    were_right = [row["correct"] for row in then] if then else [True] * len(now)
    right_of = lambda row: folded(row.get("spelled", row["response"]))
    of_later, of_set = (set(map(right_of, rows)) for rows in (later, now))
    lost = []
    for place, (row, was_right) in enumerate(zip(now, were_right)):
        if row["correct"] or not was_right:
            continue
        said, right = folded(row["prediction"]), right_of(row)
        fits = [said in of_later, said in of_set, is_near(said, right), True]
        lost.append(Lost(place, row["prompt"], row["response"], row["prediction"], IN_PLACE[fits.index(True)]))
    return lost


def is_near(one, two, most=2):
    """Whether at most so many characters put in, left out or replaced make one text of the other (Levenshtein)."""
    if abs(len(one) - len(two)) > most:
        return False
    distances = list(range(len(two) + 1))  # of the part of `one` before its next character from each beginning of `two`
    for i, a in enumerate(one, 1):
        above, distances[0] = distances[0], i
        for j, b in enumerate(two, 1):
            above, distances[j] = distances[j], min(distances[j] + 1, distances[j - 1] + 1, above + (a != b))
    return distances[-1] <= most


@dataclass
class Forgotten:
    """What a run has lost of an earlier stage's set."""

    name: str
    stage: int  # that learned it
    known: int  # facts that were right after that stage
    compared: bool  # whether its predictions say so; else all count as right
    lost: list


def forgotten(run, folder_of):
    """[Forgotten] of each earlier set that a run was asked.

    folder_of(k): the folder of its stage k, or None where it is not there.
    """
    found, names = [], set_names(run.lineage)
    for stage, name in enumerate(names[:-1], 1):
        now = predictions(run.folder, name)
        if name in names[: stage - 1] or not run.score(name) or not now:
            continue
        folder = folder_of(stage)
        then = predictions(folder, name) if folder else None
        if then and [row["id"] for row in then] != [row["id"] for row in now]:
            then = None  # about other facts
        later = []
        for other in dict.fromkeys(names[stage:]):
            if other != name:
                later += predictions(run.folder, other) or []
        known = sum(row["correct"] for row in then) if then else len(now)
        found.append(Forgotten(name, stage, known, bool(then), lost_facts(now, then, later)))
    return found


def folder_of_stage(lineage, stage):
    """Where a stage's checkpoint lies, if what lies there is still that one."""
    folder = Path(lineage[stage - 1]["checkpoint"])
    there = (folder / "run.json").exists() and record(read_lineage(folder)) == record(lineage[:stage])
    return folder if there else None


def say_forgotten(found, all_of_them):
    """Print a Forgotten: how many facts, what stands in their place, and five of them or all."""
    had = "had right" if found.compared else "learned (its own answers are not there)"
    more = ". In their place:" if found.lost else ""
    print(f"\n{found.name}: {len(found.lost)} of {found.known} facts that stage {found.stage} {had} are lost{more}")
    for kind, count in Counter(fact.in_place for fact in found.lost).most_common():
        print(f"{count:6}  {kind}")
    one_line = lambda text: " ".join(text.encode(errors="replace").decode().split())
    for fact in found.lost if all_of_them else found.lost[:5]:
        print(f"  {one_line(fact.prompt)} | right: {one_line(fact.response)} | now: {one_line(fact.prediction)}")
    if len(found.lost) > 5 and not all_of_them:
        print(f"  and {len(found.lost) - 5} more: --lost prints all")


# ---------------------------------------------------------------- statistics

FEWEST = 3  # seeds behind an interval


@dataclass(frozen=True)
class Mean:
    """Of some values, one a seed."""

    value: float
    deviation: float  # standard deviation; 0 of one value


def mean_of(values):
    """The Mean of values; None of none."""
    if not values:
        return None
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def show(values, paper=None, underlined=False, digits=1):
    """A cell's text: mean ± standard deviation over seeds, and the paper's figure small."""
    text = ""
    if mean := mean_of(values):
        text = f"{mean.value:.{digits}f}" + (f" ± {mean.deviation:.{digits}f}" if len(values) > 1 else "")
    text = f"<u>{text}</u>" if underlined and text else text
    return (text + ("" if paper is None else f" <sub>{paper:.1f}</sub>")).strip()


def average(cells):
    """{seeds: mean over cells} of cells [{seeds: accuracy}] for the seeds that all of them have."""
    found = {}
    for seeds in sorted(set.intersection(*map(set, cells))) if cells else ():
        found[seeds] = statistics.mean(cell[seeds] for cell in cells)
    return found


@dataclass(frozen=True)
class Interval:
    """Where the mean over all seeds may lie."""

    low: float
    high: float

    def text(self, digits=1):
        return f"[{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def t_interval(values, confidence):
    """The Interval of the mean of values, one a seed, by Student's t with as many degrees of freedom but one.

    None of fewer than FEWEST. What a value is made of (facts, paired within the seed) counts as given: the interval
    is about other seeds, not about other facts.
    """
    if len(values) < FEWEST:
        return None
    mean = mean_of(values)
    reach = t_quantile((1 + confidence) / 2, len(values) - 1) * mean.deviation / math.sqrt(len(values))
    return Interval(mean.value - reach, mean.value + reach)


@functools.cache
def t_quantile(share, df):
    """The value below which a share of Student's t distribution lies, of 1/2 or more; df: its degrees of freedom."""
    low, high = 0.0, 1.0
    while t_share(high, df) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, df) < share else (low, middle)
    return high


def t_share(t, df):
    """The share of Student's t distribution below t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    term, start = (math.cos(angle), 3) if df % 2 else (1.0, 2)
    summed = term if df > 1 else 0.0
    for k in range(start, df - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        summed += term
    within = 2 / math.pi * (angle + math.sin(angle) * summed) if df % 2 else math.sin(angle) * summed
    return (1 + within) / 2


# ---------------------------------------------------------------- tables

LABELS = {"kvr": "Key-Value Recall", "popqa": "PopQA", "triviaqa": "TriviaQA", "id": "ID", "lama": "LAMA",
          "entityqa": "EntityQA", "webqa": "WebQA", "gsm8k": "GSM8K", "math": "MATH", "evolcode": "EvolCode",
          "apps": "APPS", "ultrachat": "UltraChat", "none": "No Mixing", "random": "Random", "k-pile": "K-Pile",
          "a-pile": "A-Pile", "fineweb": "FineWeb"}  # fmt: skip
MIXES = ["none", "random/-", "k-pile/-", "-/random", "-/k-pile", "random/k-pile"]
LADDER = {  # rows of ours: {row: that which it takes its steps from}
    "random.m0/-": "random/-", "random.equal/-": "random/-", "long": "random/-", "k-pile.m0/-": "k-pile/-",
    "-/k-pile.m0": "-/k-pile", "random.m0/k-pile.m0": "random/k-pile"}  # fmt: skip
OURS = " *(not in the paper)*"
WEIGHTS = {"m0": ("0", "control"), "equal": ("equal", "equal")}  # of a mix's loss in our rows, and the runs' tag
REPLAYS = {"none": 0.0, "replay0.01": 0.01, "replay0.05": 0.05, "replay0.1": 0.1}
SOURCES = ["none", "k-pile", "a-pile", "random", "fineweb"]
LLAMAS = ["random/-", "k-pile/-", "-/k-pile"]  # rows that the paper has of Llama-3-8B alone


def markdown(above, titles, rows, numbers=None):
    """A table under a text as lines of Markdown; numbers: the columns to the right, all but the first if not given."""
    aligned = ["---:" if i in (numbers or range(1, len(titles))) else "---" for i in range(len(titles))]
    lines = ["", above, ""]
    for texts in (titles, aligned, *rows):
        escaped = [text.replace("|", r"\|") for text in texts]
        lines.append(f"| {' | '.join(escaped)} |")
    return lines


@dataclass(frozen=True)
class Table:
    caption: str
    rows: list
    with_id: bool = False  # does ID stand among the columns
    averaged: bool = False
    lowest: str = ""  # underlined in each "row" or "column"


TABLES = {
    "table1": Table("Forgetting in continual memorization, no mixing", ["none"], with_id=True, averaged=True,
                    lowest="row"),
    "table2": Table("REMIX", [*MIXES, *LADDER], with_id=True, averaged=True),
    "table3": Table("REMIX, the rows of Mistral-7B-v0.3", ["none", "random/k-pile", *LLAMAS, *LADDER], averaged=True),
    "table4": Table("Replay", list(REPLAYS), lowest="column"),
    "table5": Table("Familiar facts after one stage", SOURCES),
    "table6": Table("Familiar facts after one stage, as for Mistral-7B-v0.3", SOURCES),
}  # fmt: skip
FAMILIAR = ("table5", "table6")  # one stage on D_B, then familiar facts are asked
PAPERS_MODELS = {"Meta-Llama-3-8B": ["table1", "table2", "table4", "table5"], "Mistral-7B-v0.3": ["table3", "table6"]}


@dataclass
class Paper:
    """The paper's printed figures."""

    cells: dict  # {(table, D_A, row, D_B): accuracy}
    averages: dict  # {(table, D_A, row, "factoid" or "non-factoid"): as printed}
    columns: dict  # {(table, D_A): (factoid D_B, non-factoid D_B)}


@functools.cache
def paper_figures():
    paper = Paper({}, {}, {})
    for line in PAPER.strip().split("\n"):
        row, colon, figures = line.partition(": ")
        if not colon:
            block, _, names = line.partition(" | ")
            table, a = block.split()
            groups = [group.split() for group in names.split("; ")]
            paper.columns[table, a] = groups
            continue
        for group, names, part in zip(("factoid", "non-factoid"), groups, figures.split("; ")):
            numbers, _, printed = part.partition(" | ")
            for b, number in zip(names, numbers.split(), strict=True):
                paper.cells[table, a, row, b] = float(number)
            if printed:
                paper.averages[table, a, row, group] = float(printed)
    for (table, a, row, b), value in list(paper.cells.items()):
        if table == "table2" and row == "none":
            paper.cells["table1", a, row, b] = value
    return paper


@dataclass(frozen=True)
class Misprint:
    """An average of the paper that is no rounding of the mean of its printed cells."""

    table: str
    a: str
    row: str
    group: str
    printed: float
    mean: float

    def text(self):
        where = f"{self.table}, {LABELS[self.a]}, {row_label(self.row)}, {self.group}"
        return f"{where}: printed {self.printed}, mean {self.mean:.2f}"


def misprinted():
    """[Misprint] of the paper."""
    paper, wrong = paper_figures(), []
    for (table, a, row, group), printed in paper.averages.items():
        names = paper.columns[table, a][group == "non-factoid"]
        mean = statistics.mean(paper.cells[table, a, row, b] for b in names)
        if abs(mean - printed) > 0.0500001:
            wrong.append(Misprint(table, a, row, group, printed, mean))
    return wrong


def chain(a, row, b):
    """The Stages behind a cell of tables 1 to 4: D_A, then D_B, as a row has them.

    row: "none", "random/-" and so on, one of LADDER, a replay. b: a set, "id", or the later two of three stages,
    "webqa/math": of those the factoid ones are mixed (figure 8).
    """
    first, later = Stage(a), Stage()
    if row in REPLAYS:
        later = Stage(replay=REPLAYS[row])
    elif row == "long":
        first = Stage(a, tag="long")
    else:
        first, later = map(mixed_stage, row.split("/"))
        first = dataclasses.replace(first, data=a)
    stages, names = [first], (f"{a}-id" if b == "id" else b).split("/")
    for name in names:
        plain = len(names) > 1 and not is_factoid(name)
        stages.append(dataclasses.replace(Stage() if plain else later, data=name))
    return tuple(stages)


def mixed_stage(part):
    """The Stage that a part of a row's name means: "-", "random", of another weight in the loss "random.m0", of another
    value of a setting "random.mix_words=100"."""
    mix, _, how = part.partition(".")
    setting, _, value = how.partition("=")
    if value:
        return Stage(mix=mix, tag=setting, varied=(float(value),))
    weight, tag = WEIGHTS.get(how, ("1", ""))
    return Stage(mix="none" if mix == "-" else mix, mix_weight=weight, tag=tag)


def varied_rows(grid, a, setting, stage, mix, alike=False):
    """{value: row} of the rows that differ in the setting of a mix at a stage alone, in order; the plain row is one.

    alike: of those alone that learned the facts of D_A that most cells did.
    """
    found, facts = {}, {}
    for stages, cell in grid.cells.items():
        if len(stages) != 2 or stages[0].data != a:
            continue
        mixed, other = stages[stage - 1], stages[2 - stage]
        alone = other == Stage(other.data) and mixed == Stage(mixed.data, mix, tag=mixed.tag, varied=mixed.varied)
        if alone and mixed.tag in ("", setting):
            value = next(iter(cell.values())).lineage[stage - 1][setting]
            part = f"{mix}.{setting}={value!r}" if mixed.tag else mix
            found.setdefault(value, f"{part}/-" if stage == 1 else f"-/{part}")
            facts[value] = next(iter(cell.values())).lineage[0]["data_sha256"]
    return {value: row for value, row in sorted(found.items()) if not alike or facts[value] == usual_facts(grid, a)}


def usual_facts(grid, a):
    """The data_sha256 of the facts of a D_A that most cells of two stages learned."""
    counts = Counter()
    for stages, cell in grid.cells.items():
        if len(stages) == 2 and stages[0].data == a:
            counts[next(iter(cell.values())).lineage[0]["data_sha256"]] += 1
    return counts.most_common(1)[0][0]


def is_column(a, b):
    """Whether a D_B is one of a D_A's: not that itself, and its own second slice as "id"."""
    return b not in (a, f"{a}-id")


def behind(table, a, row, b):
    """(the Stages of the run behind a cell, the set that it was asked)."""
    if table in FAMILIAR:
        return (Stage(b, row, tag="familiar"),), f"{a}.familiar"
    return chain(a, row, b), a


def is_familiar(name):
    """Whether a set's label means what a base model knows of a published set; a user's own may end so too."""
    base = name.removesuffix(".familiar")
    return base != name and base in SETS and is_split(base)


def is_factoid(name):
    """Of a set's label; a user's own set is one of facts."""
    base = name.removesuffix("-id")
    return base not in SETS or SETS[base].kind == "factoid"


def cell_of(grid, table, a, row, b):
    """{seeds: accuracy} behind a cell."""
    return accuracies(grid, *behind(table, a, row, b))


def ladder_of(grid):
    """LADDER in a model's own rows."""
    return {grid.own(row): grid.own(like) for row, like in LADDER.items()}


@dataclass
class Layout:
    """The sets of a model's tables: the paper's, and those that it was trained on."""

    first: list  # D_A, in the order of SETS
    factoid: list  # D_B without ID
    other: list
    familiar: list  # D_A of tables 5 and 6
    two: list  # of the first D_A the second and third of three stages, as "webqa/math"
    grid: Grid = None  # of the paper's own tables none

    @property
    def with_id(self):
        return ["id", *self.factoid]

    def own(self, row):
        """As Grid.own."""
        return self.grid.own(row) if self.grid else row

    def varied(self, a, setting, stage, mix):
        """As varied_rows, of rows that can be compared."""
        return varied_rows(self.grid, a, setting, stage, self.own(mix), alike=True) if self.grid else {}

    def firsts(self, table):
        """The D_A of a table."""
        return self.familiar if table in FAMILIAR else self.first


def layout_of(grid):
    """The Layout of a model's tables.

    What followed one D_A makes a table if it is several sets; else a list of chains shows it.
    """
    of_paper = grid.name in PAPERS_MODELS
    followed, ablated, later, familiar, two = {}, set(), set(), set(), {}
    for stages, cell in grid.cells.items():
        data = [stage.data for stage in stages]
        if len(stages) == 2:
            followed.setdefault(data[0], set()).add("id" if data[1] == f"{data[0]}-id" else data[1])
            if any(stage.tag in {*MIX_SETTINGS, "epochs", "control"} for stage in stages):
                ablated.add(data[0])  # for figures 6 and 7, the dose, the ladder
        elif len(stages) == 3 and not any(stage.tag for stage in stages):
            if is_column(data[0], data[1]) and is_column(data[0], data[2]):
                two.setdefault(data[0], set()).add("/".join(data[1:]))
        elif stages[0].tag == "familiar":
            later.add(data[0])
            asked = {row["data"] for run in cell.values() for row in run.scores.values()}
            familiar |= {name.removesuffix(".familiar") for name in asked if is_familiar(name)}
    first = {a for a, sets in followed.items() if of_paper or len(sets) > 1 or a in ablated}
    for a in first:
        later |= followed[a] - {"id"}
    if of_paper:
        for (table, a), (factoid, other) in paper_figures().columns.items():
            if table in PAPERS_MODELS[grid.name]:
                (familiar if table in FAMILIAR else first).add(a)
                later |= {*factoid, *other} - {"id"}
    factoid = {b for b in later if is_factoid(b)}
    three = sorted(two.get(in_order(first)[0], ())) if first else []
    return Layout(in_order(first), in_order(factoid), in_order(later - factoid), in_order(familiar), three, grid)


def in_order(names):
    """ID, then sets as SETS has them, then others by name; of several stages' sets by the first."""
    known = {name: place for place, name in enumerate(["id", *SETS])}
    return sorted(names, key=lambda name: (known.get(name.partition("/")[0], len(known)), name))


def row_label(row):
    if REPLAYS.get(row):
        return f"Replay (r = {REPLAYS[row]})"
    if row == "long":
        return f"No Mixing, steps of Random / -{OURS}"
    parts, ours = [], False
    for part in row.split("/"):
        mix, _, how = part.partition(".")
        setting, _, value = how.partition("=")
        value = f"{float(value):g}" if value else ""
        said = {"m0": " of weight 0", "equal": " of equal weight", "mix_words": f" of {value} words",
                "mix_ratio": f" of ratio {value}", "": ""}[setting]  # fmt: skip
        parts.append(LABELS.get(mix, mix) + said)
        ours = ours or how in WEIGHTS
    return " / ".join(parts) + (OURS if ours else "")


@dataclass
class Cell:
    """A cell of a table: the runs behind it, and what they keep of D_A."""

    runs: dict  # {seeds: Run}
    accuracy: dict  # {seeds: exact match on D_A in %}
    printed: float  # the paper's, or None
    examples: tuple = ()  # (facts of D_A asked, examples of D_B learned)
    notes: list = dataclasses.field(default_factory=list)  # what a reader must know of it
    lowest: bool = False  # of its rivals


@dataclass
class Row:
    """A row of a table: what one way of training keeps of one D_A."""

    a: str
    label: str
    cells: dict  # {D_B: Cell}

    @property
    def runs(self):
        found = []
        for cell in self.cells.values():
            found += cell.runs.values()
        return found


def columns_of(name, layout):
    """The D_B of a table's columns: (factoid, other)."""
    return (layout.with_id if TABLES[name].with_id else layout.factoid), layout.other


def table_rows(name, grid, layout):
    """[Row] of a table, D_A after D_A; of a cell that has not been run the paper's figure alone."""
    table, found = TABLES[name], []
    printed = paper_figures().cells if grid.name in PAPERS_MODELS else {}
    for a in layout.firsts(name):
        rows = []
        for row in map(grid.own, table.rows):
            cells = {}
            for b in itertools.chain(*columns_of(name, layout)):
                if is_column(a, b):
                    cells[b] = table_cell(grid, name, a, row, b)
                    cells[b].printed = printed.get((name, a, row, b))
            label = LABELS.get(a, a) if name == "table1" else row_label(row)
            label += OURS if name == "table3" and row in map(grid.own, LLAMAS) else ""
            rows.append(Row(a, label, cells))
        mark_lowest(rows, table.lowest)
        found += rows
    return found


def table_cell(grid, name, a, row, b):
    """The Cell of a table."""
    stages, asked = behind(name, a, row, b)
    runs, accuracy = grid.cells.get(stages, {}), accuracies(grid, stages, asked)
    cell = Cell({seeds: run for seeds, run in runs.items() if seeds in accuracy}, accuracy, None)
    for run in cell.runs.values():
        cell.examples = (run.score(asked)[1]["total"], run.lineage[-1]["num_examples"])
        cell.notes = few_passages(run.lineage)
    if cell.runs:
        cell.notes += other_steps(grid, a, row, b) + not_learned(list(cell.runs.values()))
    return cell


def mark_lowest(rows, of):
    """Mark the cells that keep least of their "row" or "column"; of those that print alike, all."""
    groups = {}
    for row in rows:
        for b, cell in row.cells.items():
            if cell.accuracy and of:
                groups.setdefault(row.label if of == "row" else b, []).append(cell)
    for cells in groups.values():
        least = min(mean_of(cell.accuracy.values()).value for cell in cells)
        for cell in cells:
            cell.lowest = mean_of(cell.accuracy.values()).value == least


def few_passages(lineage):
    """For each stage whose mix was shorter than its ratio asks for, how many passages it had."""
    few = []
    for entry in lineage:
        wanted = round(entry["mix_ratio"] * entry["num_examples"]) if is_mixed(entry) else 0
        if entry.get("num_mix", wanted) < wanted:
            few.append(f"{entry['num_mix']} passages of {entry['mix']}")
    return few


def other_steps(grid, a, row, b):
    """[the note] of a cell of ours that has not the steps of that which it is compared with: whose, and how many."""
    like = ladder_of(grid).get(row)
    cell, expected = (grid.cells.get(chain(a, of, b), {}) if like else {} for of in (row, like))
    for seeds in sorted(cell.keys() & expected.keys()):
        steps, other = (" + ".join(map(str, learned([runs[seeds]]).steps)) for runs in (cell, expected))
        if steps != other:
            return [f"seed {seeds[0]}: {steps} steps, not {other}"]
    return []


LEARNED = 99.0  # % of its own facts that a stage is to know at its end; the paper trains to 100 (table 1)
LEARNED_LOSS = 0.1  # nats a token of its own answers that a stage is to end below, if it was asked no facts


def not_learned(runs):
    """[notes] on stages of a cell's runs that did not learn their own set: what learned less takes less, and has less
    to lose."""
    notes = []
    for stage in range(min(len(run.lineage) for run in runs) if runs else 0):
        known, losses = [], []
        for run in runs:
            accuracy, loss = run.own_accuracies[stage], run.lineage[stage]["losses"].get("own")
            known += [accuracy] if accuracy is not None else []
            losses += [loss] if accuracy is None and loss is not None else []
        if known and min(known) < LEARNED:
            notes.append(f"stage {stage + 1} learned {min(known):.1f}%")
        elif losses and max(losses) > LEARNED_LOSS:
            notes.append(f"stage {stage + 1} ended at a loss of {max(losses):.2f}")
    return notes


@dataclass
class Learned:
    """What stands beside a row: whether its runs learned what they were to learn, and how."""

    first: list  # accuracies on D_A after stage 1 in %, one a first stage
    last: list  # on the facts of D_B at the end, the mean over D_B, one a seed
    steps: list  # of each stage, the mean over runs
    losses: list  # of a token of each stage's own answers in its last epoch, likewise; None where no record has it
    ended: list  # of each stage {what ended it, all epochs or its loss: of how many runs}

    TITLES = ("D_A after stage 1", "D_B at the end", "steps", "loss of own answers", "ended by")

    def texts(self):
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in self.losses]
        ended = []
        for counts in self.ended:
            counted = [f"{why} {count}" for why, count in sorted(counts.items())]
            ended.append(", ".join(counted if len(counts) > 1 else counts))
        steps = " + ".join(map(str, self.steps))
        return [show(self.first), show(self.last), steps, " / ".join(losses), " / ".join(ended)]


def learned(runs):
    """The Learned of some runs of as many stages each."""
    first, last, found = {}, {}, Learned([], [], [], [], [])
    for run in runs:
        own = run.own_accuracies
        if len(own) > 1 and own[0] is not None:
            first[record(run.lineage[:1])] = own[0]  # runs that share a first stage have one figure of it
        if own[-1] is not None:
            last.setdefault(run.stages, {})[run.seeds] = own[-1]
    found.first, found.last = list(first.values()), list(average(list(last.values())).values())
    for entries in zip(*[run.lineage for run in runs]):
        losses = [entry["losses"]["own"] for entry in entries if "own" in entry["losses"]]
        found.steps.append(round(statistics.mean(entry["steps"] for entry in entries)))
        found.losses.append(statistics.mean(losses) if losses else None)
        found.ended.append(Counter(entry["stopped_by"] for entry in entries))
    return found


def usual_examples(rows):
    """(facts of D_A, examples of D_B) that most cells have; None where there are none."""
    counts = Counter()
    for row in rows:
        counts.update(cell.examples for cell in row.cells.values() if cell.examples)
    return counts.most_common(1)[0][0] if counts else None


def table_lines(name, grid, layout, rows):
    """A table as lines of Markdown, laid out as in the paper; behind its columns what its rows learned and cost."""
    table, usual, groups = TABLES[name], usual_examples(rows), columns_of(name, layout)
    stages = 1 if name in FAMILIAR else 2
    costs = list(itertools.product(grid.usual_texts, range(1, stages + 1)))
    titles, lines = [""], []
    for group in groups:
        titles += [LABELS.get(b, b) for b in group] + ["Avg"] * bool(table.averaged and group)
    titles += [*Learned.TITLES, *[f"{text} after stage {stage}" for text, stage in costs]]
    for a in layout.firsts(name):
        if name != "table1":
            lines.append([f"**{LABELS.get(a, a)}**"] + [""] * (len(titles) - 1))
        of_a = [row for row in rows if row.a == a]
        for row in of_a:
            texts = accuracy_texts(row, groups, table.averaged, usual)
            texts += learned(row.runs).texts() if row.runs else [""] * len(Learned.TITLES)
            lines.append([row.label, *texts, *[cost_of(grid, row.runs, text, stage) for text, stage in costs]])
        if name in FAMILIAR and (texts := untrained_texts(grid, a, of_a, groups, usual)):
            lines.append([UNTRAINED, *texts] + [""] * (len(titles) - len(texts) - 1))
    usually = ""
    if usual:
        usually = f"; {usual[0]} facts of D_A, {usual[1]} examples of D_B where a cell says no other number"
    caption = (f"({grid.name}: exact match on D_A in %, mean ± standard deviation over seeds{usually}"
               f"{costs_caption(grid)})")  # fmt: skip
    return markdown(f"**Table {name[-1]}. {table.caption}** {caption}", titles, lines)


def accuracy_texts(row, groups, averaged, usual):
    """The texts of a row's cells, and of their averages."""
    texts = []
    for group in groups:
        cells = [row.cells.get(b) for b in group]
        texts += [cell_text(cell, usual) if cell else "" for cell in cells]
        if averaged and group:
            there = [cell for cell in cells if cell]
            printed = [cell.printed for cell in there if cell.printed is not None]
            own = average([cell.accuracy for cell in there])
            apart = " (no seed in common)" if there and not own and all(cell.accuracy for cell in there) else ""
            texts.append(show(list(own.values()), statistics.mean(printed) if printed else None) + apart)
    return texts


def cell_text(cell, usual):
    """A cell's text; usual: (facts of D_A, examples of D_B) of the others."""
    notes = []
    if cell.examples and cell.examples != usual:
        asked, learned_ = cell.examples
        notes += [f"{asked} facts"] * (asked != usual[0]) + [f"D_B {learned_}"] * (learned_ != usual[1])
    notes += cell.notes
    return show(list(cell.accuracy.values()), cell.printed, cell.lowest) + (f" ({', '.join(notes)})" if notes else "")


def costs_caption(grid):
    """What a table's caption says of the losses on other text, with the base model's own."""
    said = ""
    for name in grid.usual_texts:
        of_base = [f"{row['loss']:.2f}" for row in grid.untrained if "loss" in row and row["data"] == name]
        said += f"; {name}: loss on it in nats a token, mean over D_B"
        said += f", of the base model {' and '.join(dict.fromkeys(of_base))}" if of_base else ""
    return said


def cost_of(grid, runs, name, stage):
    """The loss on a text after a stage, as a text: the mean over the D_B of some runs of a row, then over seeds."""
    found, asked = {}, set()  # found: {Stages: {seeds: loss}}
    for run in runs:
        after = run.after[stage - 1]
        row = after.texts.get(name) if after else None
        if row:
            found.setdefault(run.stages, {})[run.seeds] = row["loss"]
            asked.add(row["data_sha256"])
    others = " (other passages)" if asked - {grid.usual_texts[name]} else ""
    return show(list(average(list(found.values())).values()), digits=2) + others


UNTRAINED = f"The base model itself, asked alike{OURS}"


def untrained_texts(grid, a, rows, groups, usual):
    """The texts of the row of tables 5 and 6 on what the base model itself knows; none where it was not asked."""
    score = untrained_score(grid, a, rows)
    if not score:
        return []
    text = f"{score['accuracy']:.1f}" + (f" ({score['total']} facts)" if usual and score["total"] != usual[0] else "")
    shown = set()
    for row in rows:
        shown |= {b for b, cell in row.cells.items() if cell.runs}
    return [text if b in shown else "" for b in itertools.chain(*groups)]


def untrained_score(grid, a, rows):
    """The row of eval.json of the base model itself on the facts of tables 5 and 6; None where it was not asked them.

    rows: the table's on that D_A. A DataError where it was asked others than the runs.
    """
    name = f"{a}.familiar"
    of_base, asked = [row for row in grid.untrained if row["data"] == name and "correct" in row], None
    for run in itertools.chain(*[row.runs for row in rows]) if of_base else []:
        asked, score = asked or run, run.score(name)[1]
        for mine in of_base:
            if all(mine[key] == score[key] for key in ("data_sha256", "precision")):
                return mine
    if asked:
        raise DataError(f"{asked.folder}: was asked other facts of {name}, or in another precision, than the base "
                        "model itself; run evaluate.py on both alike")  # fmt: skip
    return None


def chains_table(grid, cells):
    """Lines of Markdown of chains of stages whatever they are, a row each; cells: of the grid, those to show."""
    found, texts = {}, grid.usual_texts  # found: {(heading, titles): rows}
    for stages, cell in sorted(cells.items(), key=lambda item: ([stage.data for stage in item[0]], item[0])):
        runs = [run for _, run in sorted(cell.items())]
        names = set_names(runs[0].lineage)
        first, last = names[0], names[-1]
        sizes = [f"{name} ({entry['num_examples']})" for name, entry in zip(names, runs[0].lineage)]
        heading = f"{grid.name}, {', then '.join(sizes)}: exact match in %".replace("|", r"\|")
        numbers = " / ".join(str(stage) for stage in range(1, len(stages) + 1))
        costs = [f"{text}, nats a token, after stage {numbers}" for text in texts]
        titles = (f"mix at stage {numbers}", "steps", f"loss at stage {numbers}", f"{first} after stage 1",
                  f"{first} at the end", f"{last} at the end", *costs, "ended by", "runs")  # fmt: skip
        before, _, steps, losses, ended = learned(runs).texts()
        row = [steps, losses, before]
        row += [show(list(accuracies(grid, stages, name).values())) for name in (first, last)]
        for text in texts:
            after = [cost_of(grid, runs, text, stage) for stage in range(1, len(stages) + 1)]
            row.append(" / ".join(cost or "-" for cost in after))
        few, notes = few_passages(runs[0].lineage), not_learned(runs)
        label = label_of(stages) + (f" ({', '.join(few)})" if few else "")
        ended += f" ({', '.join(notes)})" if notes else ""
        found.setdefault((heading, titles), []).append([label, *row, ended, str(len(runs))])
    lines = []
    for (heading, titles), rows in found.items():
        lines += markdown(heading, titles, rows)
    return lines


def controls(grid):
    """A line for each chain of which there is the control too: the same batches with the mix's rows taken out.

    It compares what the two rows of the table show.
    """
    lines = []
    for stages, cell in sorted(grid.cells.items()):
        mixed = tuple(dataclasses.replace(stage, mix_weight="1") for stage in stages)
        if len(stages) == 1 or mixed == stages or {stage.mix_weight for stage in stages} - {"0", "1"}:
            continue
        name = set_names(next(iter(cell.values())).lineage)[0]
        found = [accuracies(grid, row, name) for row in (mixed, stages)]
        if found[0] and found[0].keys() == found[1].keys():
            kept, without = (round(statistics.mean(scores.values()), 1) for scores in found)
            points = f"{abs(kept - without):.1f} points {'more' if kept > without else 'less'}"
            lines.append(f"{label_of(mixed)} keeps {kept}% of {name}, its control {label_of(stages)} {without}%: "
                         f"{points if kept != without else 'as much'}.")  # fmt: skip
    return lines


def done_with(runs):
    """What runs were made with, a line of Markdown: one where all agree, else each with how many runs it made."""
    counts = Counter()
    for run in runs:
        entry = run.lineage[-1]
        parts = [said_of_part(part) for part in [*entry["resumed_from"], entry]]
        counts[", then ".join(dict.fromkeys(parts))] += 1
    of = lambda count: f" ({count} of {len(runs)} runs)" if len(counts) > 1 else ""
    made = [text + of(count) for text, count in sorted(counts.items())]
    return f"Trained with {'; '.join(made)}."


def said_of_part(part):
    """What a run or a part of it was made with."""
    tree = ", changed since" if part["clean"] is False else ""
    ranks = f"{part['ranks']} x " if part["ranks"] > 1 else ""
    commit = (part["commit"] or "unknown")[:10] + tree
    return f"commit {commit}, Python {part['python']}, torch {part['torch']}, {ranks}{part['device']}"


def tables(folder):
    """The paper's tables, claims and figures from the finished runs below a folder.

    Every chain that these do not show has a row of its own. What a run is says its record, run.json, not its folder's
    name. Kept as TABLES.md; beside it the figures, each cell's folders (cells.jsonl) and what became of every fact
    (facts.jsonl). Reads no weights.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    say_unasked(runs)
    lines, laid_out, compared = [], False, []
    for grid in grids_of(runs, read_untrained(folder)):
        layout = layout_of(grid)
        laid_out = laid_out or bool(layout.first or layout.familiar)
        lines += grid_lines(grid, layout, folder)
        compared += controls(grid)
    if not any(lines):
        raise DataError(f"{folder}: no evaluated run of two stages or more below it; train and evaluate some")
    if laid_out:
        lines += ["", *legend()]
    text = "\n".join([*lines[1:], "", done_with(runs), *[f"\n{line}" for line in compared]]) + "\n"
    # Before anything is written: they read on.
    facts, kept = list(map(json_line, ledger(runs, folder))), list(places(runs, folder))
    write_file(folder / "TABLES.md", text)
    write_lines(folder / "cells.jsonl", kept)
    write_file(folder / "facts.jsonl", "".join(facts))
    return text


def legend():
    """What tables are to be read with, as lines of Markdown."""
    wrong = "; ".join(misprint.text() for misprint in misprinted())
    return [
        "Small: the paper's own figure; its averages are means of its printed cells. Printed averages that are not: "
        f"{wrong}.",
        "",
        "Behind the columns what a row's runs learned, means over D_B; D_B at the end: of factoid ones. A cell names "
        f"stages that ended with less than {LEARNED:.0f}% of their own facts, or, asked none, at a loss of their own "
        f"answers above {LEARNED_LOSS} nats a token, with the worst run's figure: what learned less takes less.",
    ]


def grid_lines(grid, layout, folder):
    """One model's tables, verdicts and chains as lines of Markdown, with links to its figures, which are drawn."""
    lines, shown, images = [], set(), []
    if layout.first or layout.familiar:
        for name in PAPERS_MODELS.get(grid.name, TABLES):
            rows = table_rows(name, grid, layout)
            lines += table_lines(name, grid, layout, rows) if rows else []
            for row in rows:
                shown |= {run.stages for run in row.runs}
        lines += rung_lines(grid, rungs(grid, layout))
        lines += claim_lines(grid, judge(grid, layout))
        images += figures(grid, layout, folder)
    images += lens_figures(grid, folder)
    rest = {}  # cells that no table shows
    for stages, cell in grid.cells.items():
        asked = {seeds: run for seeds, run in cell.items() if run.scores}
        if asked and len(stages) > 1 and stages not in shown:
            rest[stages] = asked
    lines += chains_table(grid, rest) + overlap_tables(grid, folder)
    if rest and not layout.first and (panel := over_last_stage(rest)).shows:
        images.append(f"retention-{grid.name}.png")
        draw_panels([panel], folder / images[-1])
    return [*lines, "", *[f"![{name.removesuffix('.png')}]({quote(name)})" for name in images]]


def say_unasked(runs):
    """Print which runs no figure is of, or none on the facts of their first stage."""
    unasked = []
    for run in runs:
        learned_facts = run.own_accuracies[0] is not None
        if not run.scores or learned_facts and not run.score(set_names(run.lineage)[0]):
            unasked.append(str(run.folder))
    if unasked:
        print(f"runs that were not asked what their first stage learned, and are left out there: {len(unasked)}, first "
              f"{min(unasked)}; run evaluate.py on them", file=sys.stderr)  # fmt: skip


def write_lines(path, rows):
    write_file(path, "".join(map(json_line, rows)))


def places(runs, folder):
    """Where the figures come from: each run's folder with its cell, seeds and answers."""
    for run in runs:
        accuracy = {name: row["accuracy"] for name, row in run.scores.items()}
        yield {"run": relative_path(run.folder, folder), "base_model": run.lineage[0]["base_model_name"],
               "stages": set_names(run.lineage), "cell": label_of(run.stages), "seeds": run.seeds,
               "accuracy": accuracy}  # fmt: skip


def ledger(runs, folder):
    """A row for each fact of each earlier stage's set of each chain, from the predictions of the stages that have them.

    memorized: the first stage after which it was right; lost: the first after that at which it was wrong; null where
    there is none. Of a fact that its stage had right and the last one has not: what the model says now, and which of
    IN_PLACE that is.
    """
    for run in runs:
        where = relative_path(run.folder, folder)
        folder_of = lambda k, after=run.after: after[k - 1].folder if after[k - 1] else None
        for found in forgotten(run, folder_of):
            asked = {}  # stage -> was each fact right after it
            for stage, at in enumerate(run.after, 1):
                if stage >= found.stage and at and at.score(found.name) and predictions(at.folder, found.name):
                    asked[stage] = right_answers(at, found.name)
            lost_ones = {fact.place: fact for fact in found.lost}
            for place, fact in enumerate(predictions(run.folder, found.name)):
                right = [stage for stage in asked if asked[stage][place]]
                wrong = [stage for stage in asked if right and stage > right[0] and not asked[stage][place]]
                row = {"run": where, "data": found.name, "id": fact["id"],
                       "memorized": right[0] if right else None, "lost": wrong[0] if wrong else None}  # fmt: skip
                if place in lost_ones:
                    row |= {"prediction": fact["prediction"], "in_place": lost_ones[place].in_place}
                yield row


# ---------------------------------------------------------------- overlap


@dataclass(frozen=True)
class Texts:
    """Examples that runs were trained on or asked, as their records name them."""

    name: str  # a data name
    n: int  # its first n
    words: int  # of a passage, where they are passages
    sha256: str
    base_model: BaseModel = dataclasses.field(compare=False)  # None of passages

    def load(self, data):
        examples, sha256 = load_set(self.name, self.n, data, self.words, self.base_model)
        if sha256 != self.sha256:
            raise DataError(f"{self.name} in {data}/: its first {self.n} lines are not those that the runs were "
                            "trained on; give the folder that holds them with --data-dir")  # fmt: skip
        return examples

    @property
    def label(self):
        mixing = self.name in SETS and SETS[self.name].kind == "mixing"
        return set_label(self.name) + (f" of {self.words} words" if mixing else "") + f" ({self.n})"


def by_name(texts):
    """The place of Texts in a table."""
    return set_label(texts.name), texts.words, texts.n, texts.sha256


def learned_by(entry):
    """The Texts of a stage's own set."""
    return Texts(stage_set(entry), entry["num_examples"], DEFAULT_WORDS, entry["data_sha256"], BaseModel.of(entry))


def is_mixed(entry):
    return entry["mix"] != "none"


def mixed_by(entry):
    """The Texts of a stage's mix."""
    return Texts(entry["mix"], entry["num_mix"], entry["mix_words"], entry["mix_sha256"], None)


def overlap_pairs(runs):
    """[(facts, texts)] to be compared of some runs of one base model: every set of facts that was learned, or asked as
    familiar, with every mix that was trained on; and each D_A with what came after it."""
    facts, mixes, chains = {}, {}, {}
    for run in runs:
        for entry in run.lineage:
            if is_factoid(set_label(entry["data"])):
                facts.setdefault(entry["data_sha256"], learned_by(entry))
            if is_mixed(entry) and entry["mix_weight"]:
                mix = mixed_by(entry)
                mixes.setdefault(mix.sha256, mix)
        for row in run.scores.values():
            if is_familiar(row["data"]):
                base_model = BaseModel.of(run.lineage[0])
                asked = Texts(row["data"], row["total"], DEFAULT_WORDS, row["data_sha256"], base_model)
                facts.setdefault(asked.sha256, asked)
                for entry in run.lineage:
                    chains[asked.sha256, entry["data_sha256"]] = (asked, learned_by(entry))
        first, *later = run.lineage
        for entry in later if is_factoid(set_label(first["data"])) else []:
            chains[first["data_sha256"], entry["data_sha256"]] = (learned_by(first), learned_by(entry))
    pairs = list(itertools.product(sorted(facts.values(), key=by_name), sorted(mixes.values(), key=by_name)))
    return [*pairs, *sorted(chains.values(), key=lambda pair: (by_name(pair[0]), by_name(pair[1])))]


def counted_overlap(folder):
    """{(facts' sha256, texts' sha256): row} of overlap.jsonl; none where it is damaged: it can be made again."""
    file, counted = Path(folder) / "overlap.jsonl", {}
    try:
        for row in read_rows(file) if file.exists() else []:
            if wrong := wrong_fields(row, OVERLAP_FIELDS):
                raise DataError(f"{file}: a row lacks {', '.join(wrong)}")
            counted[row["facts_sha256"], row["texts_sha256"]] = row
    except DataError:
        print(f"{file}: damaged, so it is not used; make it again with evaluate.py --overlap {folder}", file=sys.stderr)
        return {}
    return counted


OVERLAP_FIELDS = {"facts": str, "texts": str, "facts_sha256": str, "texts_sha256": str, "n_facts": int, "n_texts": int,
                  "found": list}  # fmt: skip


def keep_overlap(folder, data):
    """Count for each pair which facts have subject and answer in one of the texts (appendix B.6); kept as overlap.jsonl
    in folder, where --tables finds it. What was counted before is not counted again."""
    file, rows, before = Path(folder) / "overlap.jsonl", [], counted_overlap(folder)
    load, pairs = functools.cache(Texts.load), []
    for grid in grids_of(read_runs(folder), {}):
        pairs += overlap_pairs(grid.runs)
    for facts, texts in progress_bar(list(dict.fromkeys(pairs)), desc="overlap", unit=" pairs"):
        row = before.get((facts.sha256, texts.sha256))
        if not row:
            asked = [fact for fact in load(facts, data) if "messages" not in fact]
            found = overlap(asked, subjects_of(facts.name, data), load(texts, data))
            row = {"facts": facts.label, "n_facts": len(asked), "texts": texts.label, "n_texts": texts.n,
                   "facts_sha256": facts.sha256, "texts_sha256": texts.sha256,
                   "found": [fact["id"] for fact, _, _ in found]}  # fmt: skip
        rows.append(row)
    write_lines(file, rows)
    print(f"{file}: {len(rows)} pairs of facts and texts")


def overlap_tables(grid, folder):
    """Lines of Markdown of the overlap between what a model's runs were trained on, as far as it was counted."""
    counted, shares, lines = counted_overlap(folder), {}, []
    for facts, texts in overlap_pairs(grid.runs) if counted else []:
        if row := counted.get((facts.sha256, texts.sha256)):
            passages = texts.base_model is None
            share = 100 * len(row["found"]) / row["n_facts"] if row["n_facts"] else 0.0
            text = f"{share:.2f}" if share <= 100 * OVERLAP_LIMIT else f"**{share:.2f}**"
            shares.setdefault(passages, {}).setdefault(facts, {})[texts] = text
    for passages, rows in sorted(shares.items(), reverse=True):
        what = "a passage of D_M" if passages else "an example of what came after it"
        columns = sorted(set(itertools.chain(*rows.values())), key=by_name)
        above = (f"**Overlap** ({grid.name}: % of the facts that were trained on or asked whose subject and answer "
                 f"stand in {what}, appendix B.6; bold above the paper's {100 * OVERLAP_LIMIT:.1f})")  # fmt: skip
        shown = []
        for facts, row in rows.items():
            shown.append([facts.label, *[row.get(texts, "") for texts in columns]])
        lines += markdown(above, ["", *[texts.label for texts in columns]], shown)
    return lines


# ---------------------------------------------------------------- verdicts

HOLDS, REVERSED, UNDECIDED, NOT_RUN = "HOLDS", "REVERSED", "UNDECIDED", "NOT RUN"
EQUAL = 10.0  # points within which two sides are called equal
FAR = 10.0  # points that "far", "significantly", "fully" and "drastically" are read as


@dataclass(frozen=True)
class Verdict:
    """What values, one a seed, say of a claim."""

    word: str  # HOLDS, REVERSED, UNDECIDED
    interval: Interval = None  # that decided it; None below FEWEST seeds

    def text(self, digits=1):
        return f"{self.word} {self.interval.text(digits) if self.interval else f'(fewer than {FEWEST} seeds)'}"


def is_more(values, least=0.0):
    """The Verdict on a mean that is to lie above a number: by its 95% interval."""
    interval = t_interval(values, 0.95)
    if not interval:
        return Verdict(UNDECIDED)
    word = HOLDS if interval.low > least else REVERSED if interval.high < least else UNDECIDED
    return Verdict(word, interval)


def is_equal(values, margin=EQUAL):
    """The Verdict on a mean that is to be no different from 0.

    It holds with the 90% interval inside the margin (two one-sided tests of 5%), and is reversed with the 95% interval
    wholly outside.
    """
    inner, outer = t_interval(values, 0.90), t_interval(values, 0.95)
    if not inner:
        return Verdict(UNDECIDED)
    if -margin < inner.low and inner.high < margin:
        return Verdict(HOLDS, inner)
    return Verdict(REVERSED, outer) if outer.low > margin or outer.high < -margin else Verdict(UNDECIDED, inner)


def word_of_all(words):
    """The word on a claim that is made of each of several comparisons."""
    if set(words) <= {NOT_RUN}:
        return NOT_RUN
    return REVERSED if REVERSED in words else HOLDS if set(words) == {HOLDS} else UNDECIDED


def word_of_most(words):
    """The word on a claim that is made of more than half of several comparisons."""
    if set(words) <= {NOT_RUN}:
        return NOT_RUN
    for word in (HOLDS, REVERSED):
        if 2 * words.count(word) > len(words):
            return word
    return UNDECIDED


# ---------------------------------------------------------------- claims

# What is measured of a run: what is left of D_A; what was there after stage 1, in %; and of the logit lens (section 5)
# the mean layer of first occurrence, in % of the depth, and the entropy over layers, in nats.
LEFT, BEFORE, FIRST_LAYER, LAYERS = "left", "after stage 1", "first layer", "layers"


@dataclass(frozen=True)
class Side:
    """One side of a claim's comparisons: a row, as TABLES names it, with generic text as "k-pile"."""

    row: str
    less: str = ""  # a row whose figure is taken off it
    after: str = ""  # a group of D_B, where that is not the comparison's
    of: str = ""  # a D_A, likewise
    times: float = 1.0
    measure: str = LEFT

    def text(self, layout):
        text = row_label(layout.own(self.row))
        text = f"({text} less {row_label(layout.own(self.less))})" if self.less else text
        text = f"{self.times:g} x {text}" if self.times != 1 else text
        groups = {"factoid": "factoid D_B", "two factoid": "two factoid D_B"}
        text += f" of {LABELS[self.of]}" if self.of else ""
        text += f" after {groups.get(self.after) or LABELS[self.after]}" if self.after else ""
        return text + (" after stage 1" if self.measure == BEFORE else "")


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, in our words, and what it is made of: of each D_A, part of D_B and pair of Sides the
    first is to exceed the second."""

    section: str
    says: str
    table: str  # whose rows it is about, and so of which model the paper says it
    pairs: object  # [(row or Side, row or Side)], or a function of (Layout, D_A) that gives them
    after: tuple  # groups of D_B, a part each; "each GROUP": a part for each of its D_B
    of: tuple = ()  # D_A; none: all of the table's
    least: float = 0.0  # by how much the first is to exceed the second
    margin: float = None  # of a claim of no difference, within which that is to lie
    most: bool = False  # whether it is about more than half of the comparisons, not about each
    digits: int = 1  # of its figures

    def verdict(self, differences):
        """The Verdict on one comparison, from its differences, one a seed."""
        return is_more(differences, self.least) if self.margin is None else is_equal(differences, self.margin)

    def fits(self, difference):
        """Whether a difference of means, as printed, is what is claimed."""
        return difference > self.least if self.margin is None else abs(difference) < self.margin

    def word(self, words):
        """The verdict on it, from those on its comparisons."""
        return word_of_most(words) if self.most else word_of_all(words)


def columns_in(layout, table, group):
    """The D_B of a group, as claims call it, or the one that a name is."""
    factoid, _ = columns_of(table, layout)
    two_factoid = [two for two in layout.two if all(map(is_factoid, two.split("/")))]  # the later two of three stages
    groups = {"factoid": factoid, "other": layout.other, "all": [*factoid, *layout.other], "no id": layout.factoid,
              "no id or other": [*layout.factoid, *layout.other], "two": layout.two, "two factoid": two_factoid,
              "two with other": [two for two in layout.two if two not in two_factoid]}  # fmt: skip
    return groups.get(group, [group])


def extremes(setting, stage, *mixes):
    """Of each mix at a stage the rows with the least and the greatest value of a setting that was run."""

    def pairs(layout, a):
        found = []
        for mix in mixes:
            rows = list(layout.varied(a, setting, stage, mix).values())
            found += [(rows[0], rows[-1])] if rows and rows[0] != rows[-1] else []
        return found

    return pairs


def longer_than(words, mix, stage):
    """Of a mix at a stage each length above so many words, and that many."""

    def pairs(layout, a):
        rows = layout.varied(a, "mix_words", stage, mix)
        return [(row, rows[words]) for n, row in rows.items() if n > words and words in rows]

    return pairs


def ratio_slopes(layout, a):
    """Of each mix what its greatest ratio that both stages had keeps more than the least, at stage 1 and at stage 2."""
    found = []
    for mix in ("random", "k-pile"):
        first, second = (layout.varied(a, "mix_ratio", stage, mix) for stage in (1, 2))
        ratios = [ratio for ratio in first if ratio in second]
        if len(ratios) > 1:
            found.append([Side(rows[ratios[-1]], less=rows[ratios[0]]) for rows in (first, second)])
    return found


NONE, BOTH = "none", "random/k-pile"
SINGLE = ["random/-", "k-pile/-", "-/random", "-/k-pile"]
REPLAY = "replay0.1"
KVR, OTHERS, PROBED = ("kvr",), ("popqa", "triviaqa"), ("kvr", "triviaqa")  # PROBED: in figure 4
GROUPS = ("factoid", "other")
NARROW = 5.0  # % of the depth
CLAIMS = [
    Claim("1, 2.1", "without a mix every D_B makes facts be forgotten", "table2",
          [(Side(NONE, measure=BEFORE), NONE)], ("each all",)),
    Claim("3.1", "factoid D_B make more be forgotten than non-factoid ones", "table2",
          [(NONE, Side(NONE, after="factoid"))], ("other",)),
    Claim("3.1", f"after LAMA far less is left than after any non-factoid D_B: by {FAR:.0f} points", "table2",
          [(NONE, Side(NONE, after="lama"))], ("each other",), least=FAR),
    Claim("3.1", f"GSM8K, though not factoid, costs significantly: {FAR:.0f} points", "table2",
          [(Side(NONE, measure=BEFORE), NONE)], ("gsm8k",), least=FAR),
    Claim("3.2, B.2", "replay reduces forgetting across the board: at every ratio, after every D_B", "table4",
          [(row, NONE) for row in REPLAYS if row != NONE], ("each all",)),
    Claim("B.2", "replay does so the more, the greater its ratio", "table4",
          [("replay0.05", "replay0.01"), (REPLAY, "replay0.05")], GROUPS),
    Claim("3.2, B.2", "replay of 0.1 is less successful with factoid than with non-factoid D_B", "table4",
          [(REPLAY, Side(REPLAY, after="factoid"))], ("other",)),
    Claim("3.2", f"replay of 0.1 does not fully prevent forgetting with factoid D_B: {FAR:.0f} points are lost",
          "table4", [(Side(REPLAY, measure=BEFORE), REPLAY)], ("factoid",), least=FAR),
    Claim("4.1", "replay of 0.1 keeps more of KVR with non-factoid D_B (83.9% instead of 40.1)", "table4",
          [(REPLAY, NONE)], ("other",), KVR),
    Claim("4.2", "random words at stage 1 prevent forgetting with factoid D_B, on average for every D_A", "table2",
          [("random/-", NONE)], ("factoid",)),
    Claim("4.2", "they do so across the board: after every factoid D_B", "table2",
          [("random/-", NONE)], ("each factoid",)),
    Claim("4.2", "K-Pile at stage 1 hurts with factoid D_B", "table2", [(NONE, "k-pile/-")], ("factoid",)),
    Claim("4.2", f"K-Pile at stage 2 is drastically better with factoid D_B: by {FAR:.0f} points", "table2",
          [("-/k-pile", NONE)], ("factoid",), least=FAR),
    Claim("4.2", "random words at stage 2 exacerbate forgetting with factoid D_B", "table2",
          [(NONE, "-/random")], ("factoid",)),
    Claim("4.2", "with factoid D_B random words are the better mix at stage 1, K-Pile at stage 2", "table2",
          [("random/-", "k-pile/-"), ("-/k-pile", "-/random")], ("factoid",)),
    Claim("4.2", "K-Pile at stage 2 helps most where forgetting is severe: with factoid over non-factoid D_B", "table2",
          [(Side("-/k-pile", less=NONE, after="factoid"), Side("-/k-pile", less=NONE))], ("other",)),
    Claim("4.2", "a mix at stage 1 is better than at stage 2 across the board with non-factoid D_B", "table2",
          [("random/-", "-/random"), ("k-pile/-", "-/k-pile")], ("each other",)),
    Claim("4.2", "with non-factoid D_B, KVR benefits most from random words at stage 1", "table2",
          [("random/-", row) for row in (NONE, *SINGLE) if row != "random/-"], ("other",), KVR),
    Claim("4.2", "with non-factoid D_B, PopQA and TriviaQA benefit most from K-Pile at stage 1", "table2",
          [("k-pile/-", row) for row in (NONE, *SINGLE) if row != "k-pile/-"], ("other",), OTHERS),
    Claim("4.2", "random words at stage 1 with K-Pile at stage 2 outperform either alone", "table2",
          [(BOTH, "random/-"), (BOTH, "-/k-pile")], GROUPS),
    Claim("1", "REMIX (both) helps consistently: after every factoid and non-factoid D_B", "table2",
          [(BOTH, NONE)], ("each all",)),
    Claim("1", "REMIX makes it as much as three times: KVR, factoid D_B", "table2",
          [(BOTH, Side(NONE, times=3.0))], ("factoid",), KVR),
    Claim("1", "REMIX keeps more of KVR with factoid D_B than replay of 0.1; here both without ID", "table2",
          [(BOTH, REPLAY)], ("no id",), KVR),
    Claim("abstract", "REMIX often outperforms replay of 0.1: after more than half of the D_B", "table2",
          [(BOTH, REPLAY)], ("each no id or other",), most=True),
    Claim("7", "REMIX outperforms replay of 0.1, with factoid and with non-factoid D_B", "table2",
          [(BOTH, REPLAY)], ("no id", "other")),
    Claim("4.2", "Mistral: REMIX prevents forgetting of KVR, with factoid and with non-factoid D_B", "table3",
          [(BOTH, NONE)], GROUPS, KVR),
    Claim("4.2", "Mistral: without a mix more is left of PopQA and TriviaQA than of KVR", "table3",
          [(NONE, Side(NONE, of="kvr"))], GROUPS, OTHERS),
    Claim("4.2", "Mistral: REMIX gains less on PopQA and TriviaQA than on KVR", "table3",
          [(Side(BOTH, less=NONE, of="kvr"), Side(BOTH, less=NONE))], GROUPS, OTHERS),
    Claim("5, fig. 4", "with REMIX facts are first read in earlier layers than without (mean, % of depth)", "table2",
          [(Side(NONE, measure=FIRST_LAYER), Side(BOTH, measure=FIRST_LAYER))], ("no id or other",), PROBED),
    Claim("5, fig. 4", f"K-Pile at stage 1 does not change where: within {NARROW:.0f}% of the depth", "table2",
          [(Side("k-pile/-", measure=FIRST_LAYER), Side(NONE, measure=FIRST_LAYER))], ("no id or other",), PROBED,
          margin=NARROW),
    Claim("5, fig. 4", "with REMIX facts are read in more layers than without (entropy over layers, nats)", "table2",
          [(Side(BOTH, measure=LAYERS), Side(NONE, measure=LAYERS))], ("no id or other",), PROBED, digits=2),
    Claim("5, fig. 5", f"it makes no difference which generic text is mixed in: within {EQUAL:.0f} points", "table2",
          [("-/a-pile", "-/k-pile"), ("-/fineweb", "-/k-pile"), ("random/a-pile", BOTH), ("random/fineweb", BOTH)],
          ("each factoid",), KVR, margin=EQUAL),
    Claim("5, fig. 6", "longer random words at stage 1 hurt: the shortest over the longest", "table2",
          extremes("mix_words", 1, "random"), ("no id",), KVR),
    Claim("5, fig. 6", f"K-Pile at stage 2 saturates after 50 words: longer is within {EQUAL:.0f} points", "table2",
          longer_than(50, "k-pile", 2), ("no id",), KVR, margin=EQUAL),
    Claim("5, fig. 7", "at stage 2 a greater ratio costs: the least over the greatest", "table2",
          extremes("mix_ratio", 2, "random", "k-pile"), ("all",), KVR),
    Claim("5, fig. 7", "at stage 1 a greater ratio costs less than at stage 2, or pays", "table2",
          ratio_slopes, ("all",), KVR),
    Claim("5, fig. 8", "REMIX leads by at least 30 points over three stages, across the board", "table2",
          [(BOTH, NONE)], ("each two",), KVR, least=30.0),
    Claim("5, fig. 8", "without a mix least is left where both later stages are factoid", "table2",
          [(NONE, Side(NONE, after="two factoid"))], ("each two with other",), KVR),
    Claim("B.3", "K-Pile, A-Pile and FineWeb each keep familiar facts with factoid D_B", "table5",
          [(text, NONE) for text in ("k-pile", "a-pile", "fineweb")], ("factoid",)),
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A cell of a table or figure, and what of it is measured."""

    table: str
    a: str
    row: str
    b: str
    measure: str = LEFT


@dataclass(frozen=True)
class Term:
    """The mean over some places, so many times."""

    places: tuple
    after: str  # the group of D_B that its Side names; those of one group are compared over the same D_B
    times: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """One of those that a claim is made of: the sum of some terms is to exceed that of others, or to equal it."""

    a: str
    says: str
    more: tuple  # of Terms
    less: tuple

    @property
    def terms(self):
        return (*self.more, *self.less)

    @property
    def places(self):
        return list(itertools.chain(*[term.places for term in self.terms]))

    @property
    def columns(self):
        """The D_B."""
        return in_order({place.b for place in self.places})

    def of(self, keeps):
        """The Comparison of those places that a function of (Term, Place) keeps."""
        sides = []
        for side in (self.more, self.less):
            terms = []
            for term in side:
                kept = tuple(place for place in term.places if keeps(term, place))
                terms.append(dataclasses.replace(term, places=kept))
            sides.append(tuple(terms))
        return Comparison(self.a, self.says, *sides)

    @property
    def is_whole(self):
        return all(term.places for term in self.terms)


def comparisons_of(claim, layout):
    """[Comparison] of a claim on a model's sets, or on the paper's."""
    found, parts = [], []
    for group in claim.after:
        columns = columns_in(layout, claim.table, group.removeprefix("each "))
        parts += [[b] for b in columns] if group.startswith("each ") else [columns]
    for a, columns in itertools.product(layout.firsts(claim.table), parts):
        if claim.of and a not in claim.of:
            continue
        for pair in claim.pairs(layout, a) if callable(claim.pairs) else claim.pairs:
            sides = [side if isinstance(side, Side) else Side(side) for side in pair]
            says = " over ".join(side.text(layout) for side in sides)
            found.append(Comparison(a, says, *[terms_of(side, claim.table, layout, a, columns) for side in sides]))
    return found


def terms_of(side, table, layout, a, columns):
    """The Terms of a Side, for a D_A and D_B."""
    a, columns = side.of or a, columns_in(layout, table, side.after) if side.after else columns
    terms = []
    for row, times in ((side.row, side.times), (side.less, -side.times)):
        of_table = "table4" if row.startswith("replay") else table
        places = [Place(of_table, a, layout.own(row), b, side.measure) for b in columns if is_column(a, b)]
        terms += [Term(tuple(places), side.after, times)] if row else []
    return tuple(terms)


def marks(unlearned, unlike):
    """What is said behind a verdict of what it rests on: as Compared has it."""
    return " †" * unlearned + (f" (not alike in {', '.join(unlike)})" if unlike else "")


@dataclass
class Compared:
    """A Comparison as some runs have it."""

    comparison: Comparison  # of the places that were compared
    wanted: list  # the D_B that it is about
    more: dict  # {seed of stage 1: value}
    less: dict
    unlearned: bool  # whether a stage behind it did not learn its own set
    unlike: list  # settings in which its sides differ, beside the mix
    verdict: Verdict = None

    @property
    def differences(self):
        """One a seed, without what floating point makes of equal ones."""
        return [round(self.more[seed] - self.less[seed], 9) for seed in self.more]

    @property
    def marks(self):
        return marks(self.unlearned, self.unlike)

    @property
    def part(self):
        """How many of the D_B were compared, where not all; the lens is read after one (figure 4)."""
        columns, probed = self.comparison.columns, self.comparison.places[0].measure in (FIRST_LAYER, LAYERS)
        return f"{len(columns)} of {len(self.wanted)}" if columns != self.wanted and not probed else ""


@dataclass
class Judged:
    """A Claim as some runs have it."""

    number: int  # its place in CLAIMS
    claim: Claim
    found: list  # Compared
    n: int  # comparisons that it is made of

    @property
    def words(self):
        return [one.verdict.word for one in self.found] + [NOT_RUN] * (self.n - len(self.found))

    @property
    def word(self):
        return self.claim.word(self.words)

    def text(self):
        """The verdict, and what it rests on where that is less than it says."""
        parts = dict.fromkeys(one.part for one in self.found if one.part)
        on = f" (on {', '.join(parts)} D_B)" if parts else ""
        settings = dict.fromkeys(itertools.chain(*[one.unlike for one in self.found]))
        return self.word + on + marks(any(one.unlearned for one in self.found), settings)


def claims_of(grid):
    """{number: Claim} of those that the paper makes of a model; of a model that it has not, those on Llama-3-8B."""
    of_model, found = PAPERS_MODELS.get(grid.name, PAPERS_MODELS["Meta-Llama-3-8B"]), {}
    for number, claim in enumerate(CLAIMS, 1):
        if claim.table == "table5" and "table6" in of_model:
            claim = dataclasses.replace(claim, table="table6")  # the same is said of both models
        if claim.table in of_model:
            found[number] = claim
    return found


def judge(grid, layout):
    """[Judged] of a model's claims."""
    judged = []
    for number, claim in claims_of(grid).items():
        comparisons, found = comparisons_of(claim, layout), []
        for comparison in comparisons:
            if compared := compare(grid, comparison):
                compared.verdict = claim.verdict(compared.differences)
                found.append(compared)
        judged.append(Judged(number, claim, found, len(comparisons)))
    return judged


def compare(grid, comparison):
    """The Compared, over the D_B that all sides have; None where some side has none."""
    there = {}  # Place: {seeds: value}
    for place in comparison.places:
        if values := measured(grid, place):
            there[place] = values
    found = with_shared_seeds(like_with_like(comparison, there), there)
    if not found.is_whole:
        return None
    runs, seeds = [], shared_seeds(found, there)
    for place in found.places:
        cell = grid.cells[behind(place.table, place.a, place.row, place.b)[0]]
        runs += [cell[seed] for seed in seeds]
    check_claim(grid, found.places)
    more, less = (side_of(terms, there, seeds) for terms in (found.more, found.less))
    wanted = like_with_like(comparison, dict.fromkeys(comparison.places)).columns
    return Compared(found, wanted, more, less, bool(not_learned(runs)), unlike(runs))


def unlike(runs):
    """[settings] in which runs differ that learned a set at the same stage: more than the mix sets them apart."""
    found, first = {}, {}  # found: {setting: None}
    for run in runs:
        for entry in run.lineage:
            other = first.setdefault((entry["stage"], stage_set(entry)), entry)
            for setting in ("data_sha256", "num_examples", "lr", "batch_size", "precision"):
                if entry[setting] != other[setting]:
                    found[setting] = None
    return list(found)


def measured(grid, place):
    """{seeds: value} of what a Place is about."""
    stages, asked = behind(place.table, place.a, place.row, place.b)
    if place.measure == LEFT:
        return accuracies(grid, stages, asked)
    found = {}
    for seeds, run in grid.cells.get(stages, {}).items():
        if place.measure == BEFORE:
            found[seeds] = run.own_accuracies[0]
        elif lens := lens_of(run, place.a):
            of_layers = place.measure == LAYERS
            found[seeds] = layer_entropy(lens) if of_layers else mean_first_layer(lens, lens["layers"])
    return {seeds: value for seeds, value in found.items() if value is not None}


def like_with_like(comparison, there):
    """The Comparison over those D_B that every term of a group has."""
    shared = {}  # {group: its D_B}
    for term in comparison.terms:
        columns = {place.b for place in term.places if place in there}
        shared[term.after] = shared.get(term.after, columns) & columns
    return comparison.of(lambda term, place: place in there and place.b in shared[term.after])


def with_shared_seeds(comparison, there):
    """The Comparison without those D_B, as few as possible, that keep the others from sharing FEWEST seeds of stage 1;
    the whole where leaving out does not help."""
    if len(comparison.columns) < 2:
        return comparison
    seeds_of, best = {}, {}  # seeds_of: {D_B: the seeds that all its places have}
    for place in comparison.places:
        seeds_of[place.b] = seeds_of.get(place.b, there[place].keys()) & there[place].keys()
    for few in itertools.combinations(sorted(set().union(*seeds_of.values())), FEWEST):
        kept = {b for b, seeds in seeds_of.items() if seeds >= set(few)}
        enough = len({seeds[0] for seeds in few}) == FEWEST and len(kept) > len(best)
        if enough and comparison.of(lambda term, place, kept=kept: place.b in kept).is_whole:
            best = kept
    return comparison.of(lambda term, place: place.b in best) if best else comparison


def shared_seeds(comparison, there):
    """The seeds that all places of a Comparison have, in order."""
    return sorted(set.intersection(*[set(there[place]) for place in comparison.places])) if comparison.places else []


def side_of(terms, there, seeds):
    """{seed of stage 1: the sum of a side's terms}; there: {Place: {seeds: value}}.

    Runs that share a first stage share what it did and count as one: the mean over the later stages' seeds.
    """
    found = {}
    for of_stages in seeds:
        value = 0.0
        for term in terms:
            value += term.times * statistics.mean(there[place][of_stages] for place in term.places)
        found.setdefault(of_stages[0], []).append(value)
    return {seed: statistics.mean(values) for seed, values in found.items()}


def check_claim(grid, places):
    """A DataError unless the runs of a comparison were asked the same facts of each D_A, and probed alike."""
    first, probed = {}, {}  # the set that was asked: a run, and its lens
    for place in places:
        stages, asked = behind(place.table, place.a, place.row, place.b)
        for run in grid.cells[stages].values():
            if score := run.score(asked):
                other = first.setdefault(asked, run)
                if other.score(asked)[1]["data_sha256"] != score[1]["data_sha256"]:
                    raise DataError(f"{both(other, run)}: runs of one claim, but other facts of {asked} by the "
                                    "data_sha256 in their eval.json; name a folder that holds but one of "
                                    "them")  # fmt: skip
            lens = lens_of(run, place.a) if place.measure in (FIRST_LAYER, LAYERS) else None
            other = probed.setdefault(asked, lens) if lens else None
            for key in ("data_sha256", "first_token", "top_k", "layers") if lens else ():
                if key in lens and key in other and lens[key] != other[key]:
                    raise DataError(f"{run.folder}/probe.{place.a}.json: other {key} than in other runs of one claim; "
                                    "run probe.py on them alike")  # fmt: skip


def paper_layout():
    """The Layout of the paper's own tables, whose ID is that of table 2."""
    columns = paper_figures().columns
    factoid, other = columns["table4", "kvr"]
    firsts = {a for table, a in columns if table not in FAMILIAR}
    familiar = {a for table, a in columns if table in FAMILIAR}
    return Layout(in_order(firsts), in_order(factoid), in_order(other), in_order(familiar), [])


def printed_sides(comparison):
    """(more, less) by the paper's printed cells; None where it does not print one of them."""
    printed, there = paper_figures().cells, {}
    for place in comparison.places:
        value = printed.get((place.table, place.a, place.row, place.b)) if place.measure == LEFT else None
        value = 100.0 if place.measure == BEFORE else value  # "trained to 100% accuracy", table 1
        if value is None:
            return None
        there[place] = {(None,): value}
    if not comparison.is_whole:
        return None
    return tuple(side_of(terms, there, [(None,)])[None] for terms in (comparison.more, comparison.less))


def said_column(b):
    return " then ".join(LABELS.get(name, name) for name in b.split("/"))


def said_columns(columns):
    return ", ".join(map(said_column, columns)) or "-"


def said_by_cells(claim):
    """What the paper's own printed cells say of a claim: how many of its comparisons fit, and which do not."""
    n, against = 0, []
    for comparison in comparisons_of(claim, paper_layout()):
        if sides := printed_sides(comparison):
            n += 1
            if not claim.fits(sides[0] - sides[1]):
                columns = [place.b for place in comparison.more[0].places]
                pooled = "factoid D_B" if is_factoid(columns[0]) else "non-factoid D_B"
                where = pooled if len(columns) > 1 else said_columns(columns)
                text = f"{LABELS[comparison.a]}, {where}: {comparison.says} {sides[0] - sides[1]:+.1f}"
                against.append((sides[0] - sides[1], text))
    if not n:
        return "not printed"
    worst = [text for _, text in sorted(against)[:3]]
    text = f"{n - len(against)} of {n} fit" + (f"; not {'; '.join(worst)}" if worst else "")
    return text + (f"; nor {len(against) - len(worst)} more" if len(against) > len(worst) else "")


def claim_lines(grid, judged):
    """The claims as lines of Markdown, and what was compared for them."""
    n, n_judged, rows = 0, 0, []
    for one in judged:
        counts = Counter(one.words)
        words = ", ".join(f"{counts[word]} {word}" for word in (HOLDS, REVERSED, UNDECIDED, NOT_RUN) if counts[word])
        rows.append([str(one.number), one.claim.section, one.claim.says, one.text(), words or "none",
                     said_by_cells(one.claim)])  # fmt: skip
        with_interval = [found for found in one.found if found.verdict.interval]
        n, n_judged = n + len(with_interval), n_judged + bool(with_interval)
    above = (
        f"**Claims** ({grid.name}). Claims judged at once: {n_judged} of {len(judged)}; comparisons for them: {n}, "
        "each by Student's t over the paired differences of seeds: about other seeds, not other facts. HOLDS: the 95% "
        "interval of every comparison (where a claim says so, of more than half) lies above what is claimed; REVERSED: "
        f"that of one (more than half) lies below; else UNDECIDED, as with fewer than {FEWEST} seeds. Of no "
        "difference: the 90% interval lies within the margin; the 95% interval lies wholly outside. Where nothing "
        "differs, chance alone makes one comparison in 40 hold and one in 40 be reversed: "
        f"of {n} about {n / 40:.1f} each. †: a stage did not learn its own set.")  # fmt: skip
    titles = ["", "section", "claim", "verdict", "its comparisons", "by the paper's own cells"]
    return markdown(above, titles, rows, numbers=[0]) + comparison_lines(grid, judged)


def comparison_lines(grid, judged):
    """What was compared for claims as lines of Markdown, in points where a claim names no other unit."""
    rows = []
    for one in judged:
        digits = one.claim.digits
        for found in one.found:
            comparison, difference = found.comparison, mean_of(found.differences)
            sides = printed_sides(comparison)
            columns = said_columns(comparison.columns) + (f" ({found.part})" if found.part else "")
            means = [mean_of(side.values()) for side in (found.more, found.less)]
            rows.append([str(one.number), LABELS.get(comparison.a, comparison.a), comparison.says, columns,
                         str(len(found.more)), *[f"{mean.value:.{digits}f}" if mean else "" for mean in means],
                         f"{difference.value:+.{digits}f}" if difference else "",
                         found.verdict.text(digits) + found.marks,
                         f"{sides[0] - sides[1]:+.1f}" if sides else ""])  # fmt: skip
    above = f"What was compared ({grid.name}; the claim's number; means over D_B and seeds):"
    titles = ["", "D_A", "comparison", "D_B", "seeds", "of the first", "of the second", "difference", "verdict",
              "in the paper"]  # fmt: skip
    return markdown(above, titles, rows, numbers=[0, 4, 5, 6, 7, 9]) if rows else []


# ---------------------------------------------------------------- the mix or its steps


@dataclass
class Rung:
    """What a mix keeps more than a control of it, after one D_B."""

    b: str
    mixed: str  # rows
    control: str
    found: Compared
    notes: list  # on the control's steps


def rungs(grid, layout):
    """[Rung] of the rows of LADDER, on each D_A after each D_B that both rows have."""
    rungs_, columns = [], [*layout.with_id, *layout.other]
    for a, (control, mixed), b in itertools.product(layout.first, ladder_of(grid).items(), columns):
        sides = [(Term((Place("table2", a, row, b),), ""),) for row in (mixed, control)]
        found = compare(grid, Comparison(a, "", *sides)) if is_column(a, b) else None
        if found and found.more:
            rungs_.append(Rung(b, mixed, control, found, other_steps(grid, a, control, b)))
    return rungs_


def rung_lines(grid, found):
    """Rungs as lines of Markdown: whether the mix keeps more than its control, and whether the two are equal."""
    if not found:
        return []
    above = (f"**The mix or its steps?** ({grid.name}; not in the paper). Points that a row keeps more than another, "
             f"by Student's t over the seeds' paired differences: {2 * len(found)} verdicts at once, each as on "
             "claims.")  # fmt: skip
    titles = ["D_A", "D_B", "row", "compared with", "seeds", "difference", "keeps more (95%)",
              f"equal, within {EQUAL:.0f} points (90%)"]  # fmt: skip
    rows = []
    for rung in found:
        a, differences = rung.found.comparison.a, rung.found.differences
        notes = f" ({', '.join(rung.notes)})" if rung.notes else ""
        rows.append([LABELS.get(a, a), LABELS.get(rung.b, rung.b), row_label(rung.mixed),
                     row_label(rung.control).removesuffix(OURS) + notes, str(len(differences)),
                     f"{mean_of(differences).value:+.1f}" + rung.found.marks,
                     is_more(differences).text(), is_equal(differences).text()])  # fmt: skip
    return markdown(above, titles, rows, numbers=[4, 5])


# ---------------------------------------------------------------- figures


@dataclass
class Curve:
    """What a panel shows under one label: a line, or bars of one color."""

    label: str  # if empty, none in the legend
    points: list  # [(x, Mean over seeds)]
    style: str = "o-"  # as matplotlib has it, of a line
    color: str = ""  # if empty, the label's

    @classmethod
    def of(cls, label, found, style="o-"):
        """Of [(x, values over seeds)]: in the order of x, without those of no value."""
        points = [(x, mean_of(values)) for x, values in found if values]
        return cls(label, sorted(points, key=lambda point: point[0]), style)


@dataclass
class Panel:
    title: str
    xlabel: str
    curves: list  # of Curves, empty ones too
    ylabel: str = "exact match on D_A, %"
    ylim: tuple = (-3, 103)
    ticks: list = ()  # what x = 0, 1, ... are: with them curves are bars
    log_x: bool = False
    least: int = 1  # points of a curve, or curves of bars, without which it shows nothing of its subject

    @property
    def drawn(self):
        return [curve for curve in self.curves if curve.points]

    @property
    def shows(self):
        most = max((len(curve.points) for curve in self.drawn), default=0)
        return (len(self.drawn) if self.ticks else most) >= self.least

    @property
    def labels(self):
        return list(dict.fromkeys(curve.label for curve in self.drawn if curve.label))


def figures(grid, layout, folder):
    """Draw the paper's figures for one model, as far as there is something to draw; returns the files' names."""
    drawn = []
    for name, panels in panels_of(grid, layout).items() if layout.first else ():
        shown = [panel for panel in panels if panel.shows]
        panels = panels if name == "figure7" else shown  # one column a mix and stage, run or not
        if shown:
            drawn.append(f"{name}-{grid.name}.png")
            draw_panels(panels, folder / drawn[-1], {"figure7": 4, "dose": 2}.get(name, 3))
    return drawn


def panels_of(grid, layout):
    """{figure: its Panels} of one model."""
    firsts, with_id, other = layout.first, layout.with_id, layout.other
    ablated = firsts[0]  # Key-Value Recall where it was trained on: the set of figures 5 to 8
    rows, sources = list(map(grid.own, MIXES)), [grid.generic, "a-pile", "fineweb"]
    mixed = [f"{mix}/{source}" for mix in ("-", "random") for source in sources]
    lengths = ((1, "random"), (2, grid.generic))
    return {
        "figure2": [replayed(grid, firsts, [*layout.factoid, *other])],
        "figure5": [bars(grid, ablated, ["none", *mixed], with_id)],
        "figure6": [varied(grid, ablated, "mix_words", stage, mix, layout.factoid) for stage, mix in lengths],
        "figure7": by_ratio(grid, ablated, {"factoid D_B": with_id, "non-factoid D_B": other}),
        "figure8": [bars(grid, ablated, ["none", f"random/{grid.generic}"], layout.two)],
        "figure9": [bars(grid, a, rows, with_id) for a in firsts],
        "figure10": [bars(grid, a, rows, other) for a in firsts],
        "forgetting": [over_time(grid, a, rows, [*with_id, *other]) for a in firsts],
        "dose": [dose(grid, a, measure) for a, measure in itertools.product(firsts, (passes, first_loss))],
    }


def replayed(grid, firsts, columns):
    """Figure 2: accuracy against the replay ratio, a curve a D_A: the mean over those D_B that all its ratios have."""
    curves = []
    for a in firsts:
        cells, points = {}, []  # cells: {row: {D_B: {seeds: accuracy}}}
        for row, b in itertools.product(REPLAYS, columns):
            if is_column(a, b) and (cell := cell_of(grid, "table4", a, row, b)):
                cells.setdefault(row, {})[b] = cell
        shared = set.intersection(*map(set, cells.values())) if cells else ()
        for row, found in cells.items():
            points.append((REPLAYS[row], list(average([found[b] for b in shared]).values())))
        curves.append(Curve.of(LABELS.get(a, a), points))
    return Panel("Replay", "replay ratio", curves, "exact match on D_A, %, mean over D_B", least=2)


def by_ratio(grid, a, groups):
    """Figure 7: a row of panels for each group {name: D_B} that has runs; left stage 2, right stage 1."""
    panels = []
    for name, columns in groups.items():
        row = []
        for stage, mix in itertools.product((2, 1), ("random", grid.generic)):
            row.append(varied(grid, a, "mix_ratio", stage, mix, columns, f": {name}"))
        panels += row if any(panel.shows for panel in row) else []
    return panels


def varied(grid, a, setting, stage, mix, columns, said=""):
    """Figures 6 and 7: accuracy against the mix's length or ratio at a stage, a curve a D_B.

    The runs' tag is the setting's name.
    """
    curves = []
    for b in [b for b in columns if is_column(a, b)]:
        points = []
        for value, row in varied_rows(grid, a, setting, stage, mix).items():
            if cell := cell_of(grid, "table2", a, row, b):
                points.append((value, list(cell.values())))
        if points and setting == "mix_ratio":
            points.append((0.0, list(cell_of(grid, "table2", a, "none", b).values())))
        curves.append(Curve.of(LABELS.get(b, b), points))
    xlabel = {"mix_words": "words of a passage", "mix_ratio": "mixing ratio"}[setting]
    least = 3 if any(x == 0 for curve in curves for x, _ in curve.points) else 2  # the ratio 0 is no mix
    title, ylabel = f"{LABELS.get(mix, mix)}, stage {stage}{said}", f"exact match on {LABELS.get(a, a)}, %"
    return Panel(title, xlabel, curves, ylabel, least=least)


def doses(grid, a):
    """{(D_B, mix of stage 1): [cell]} of runs that differ in the passes of stage 1 alone."""
    found, numbers = {}, {}
    for stages, cell in grid.cells.items():
        first, *later = stages
        plain = first.data == a and first.mix_weight == "1" and first.tag in ("", "long", "epochs")
        if plain and not first.replay and len(later) == 1 and later[0] == Stage(later[0].data):
            key = (later[0].data, first.mix)
            found.setdefault(key, []).append(cell)
            numbers.setdefault(key, set()).add(passes(next(iter(cell.values())).lineage[0]))
    return {key: cells for key, cells in found.items() if len(numbers[key]) > 1}


def dose(grid, a, measure):
    """What is left of D_A against what stage 1 was: of each D_B and mix a curve over its number of passes.

    measure: passes or first_loss, of an entry of run.json.
    """
    curves = []
    for (b, mix), cells in sorted(doses(grid, a).items()):
        points = []
        for cell in cells:
            runs = [run for run in cell.values() if run.score(a) and not math.isnan(measure(run.lineage[0]))]
            if runs:
                x = mean_of([measure(run.lineage[0]) for run in runs]).value
                points.append((x, [run.score(a)[1]["accuracy"] for run in runs]))
        curves.append(Curve.of(f"{LABELS.get(mix, mix)}, then {LABELS.get(b, b)}", points))
    xs = [x for curve in curves for x, _ in curve.points]
    log_x = measure is first_loss and any(x > 0 for x in xs)
    return Panel(LABELS.get(a, a), measure.__doc__, curves, log_x=log_x)


def passes(entry):
    """passes over the facts at stage 1"""
    n = entry["num_examples"] + sum(entry.get(key, 0) for key in ("num_mix", "num_replay")) - entry.get("num_cut", 0)
    return entry["steps"] / math.ceil(n / entry["batch_size"])


def first_loss(entry):
    """loss of a fact's answer token at the end of stage 1"""
    return entry["losses"].get("own", math.nan)


def bars(grid, a, rows, columns):
    """Figures 5 and 8 to 10: accuracy on D_A, a group of bars for each D_B, in it one for each row of table 2."""
    columns = [b for b in columns if is_column(a, b)]
    curves = []
    for row in rows:
        found = [(i, list(cell_of(grid, "table2", a, row, b).values())) for i, b in enumerate(columns)]
        curves.append(Curve.of(row_label(row).replace("*", ""), found))
    below = lambda b: "\n".join(LABELS.get(part, part) for part in b.split("/"))
    xlabel = "D_B, then D_C" if any("/" in b for b in columns) else "D_B"
    return Panel(LABELS.get(a, a), xlabel, curves, ylim=(0, 103), ticks=list(map(below, columns)), least=2)


def over_time(grid, a, rows, columns):
    """What is left of D_A while stage 2 trains, a curve a run, by the rows of table 2 over every D_B."""
    curves = []
    for row, b in itertools.product([*rows, "long"], [b for b in columns if is_column(a, b)]):
        for _, run in sorted(grid.cells.get(chain(a, row, b), {}).items()):
            curves.append(Curve.of(row_label(row).replace("*", ""), retention(run), ".-"))
    return Panel(LABELS.get(a, a), "% of the last stage's steps", curves, least=2)


def retention(run):
    """[(% of the last stage's steps, [accuracy on the first stage's facts])]: of two stages at 0 what the first left,
    then the checks in metrics.jsonl."""
    name, steps = set_names(run.lineage)[0], run.lineage[-1]["steps"]
    before = run.own_accuracies[0] if len(run.lineage) == 2 else None
    file = run.folder / "metrics.jsonl"
    checks = [row for row in read_rows(file) if row.get("data") == name] if file.exists() else []
    if any(wrong_fields(row, {"step": int, "accuracy": (int, float)}) for row in checks):
        raise DataError(f"{file}: a check of {name} has no step or accuracy; restore it, or train that run again")
    return [(0, [before])] * (before is not None) + [(100 * row["step"] / steps, [row["accuracy"]]) for row in checks]


def over_last_stage(cells):
    """What was left of the first stage's facts while the last stage trained, of chains whatever they are.

    The checks ask the first --eval-facts of them.
    """
    curves, firsts = [], {stages[0].data for stages in cells}
    for stages, cell in sorted(cells.items()):
        runs = [run for _, run in sorted(cell.items())]
        data = "" if len(firsts) == 1 else f"{stages[0].data}: "
        steps = " + ".join(map(str, learned(runs).steps))
        label = f"{data}{label_of(stages)}, then {stages[-1].data} ({steps} steps)"
        curves += [Curve.of(label, retention(run), ".-") for run in runs]
    return Panel(None, "% of the last stage's steps", curves, "exact match on the first stage's facts, %", least=2)


# ---------------------------------------------------------------- figures of the lens

LENS_LISTS = ["hits", "first_hits", "frequency"]  # a number a layer, of which the first is the embedding: L + 1
LENS_FIELDS = {**dict.fromkeys(["layers", "top_k", "total"], int), **dict.fromkeys(LENS_LISTS, list),
               "accuracy": (int, float), "floor": dict}  # fmt: skip
LENS_FIGURES = {"kvr": "figure11", "triviaqa": "figure12"}


@dataclass
class Lens:
    """What the lens found of a set in checkpoints that differ in their seeds alone."""

    data: str
    label: str
    results: dict  # {seed or seeds as a text: content of probe.NAME.json}

    @property
    def by_seed(self):
        return [Lens(self.data, f"seed {seed}", {seed: result}) for seed, result in self.results.items()]


def lens_of(run, a):
    """The checked content of a run's probe.NAME.json of a set; None where it was not probed."""
    file = run.folder / f"probe.{a}.json"
    if not file.exists():
        return None
    result = read_rows(file)
    if wrong := wrong_in_lens(result):
        raise DataError(f"{file}: has not what probe.py writes as {', '.join(wrong)}; run probe.py again")
    return result


def wrong_in_lens(result):
    """As wrong_fields, of a probe.NAME.json and of what is drawn of its floor: all numbers from 0 on, one a layer."""
    if wrong := wrong_fields(result, LENS_FIELDS):
        return wrong
    n, floor, whole = result["layers"] + 1, result["floor"], [*LENS_LISTS, "accuracy"]
    parts = [(result, whole), (floor.get("shuffled"), ["frequency"]), (floor.get("base_model", result), whole)]
    for part, names in parts:
        wrong = wrong_fields(part, {name: LENS_FIELDS[name] for name in names})
        for name in names if not wrong else ():
            values = part[name] if name in LENS_LISTS else [part[name]] * n
            fit = all(isinstance(value, (int, float)) and 0 <= value < 1e15 for value in values)
            wrong += [] if fit and len(values) == n > 1 else [name]
        if wrong:
            return wrong if part is result else ["floor"]
    return []


def first_share(counts):
    """[share] of each layer: first occurrences of right tokens there, of all occurrences at any layer (section 5).

    counts: {"hits": [L + 1 counts], "first_hits": [L + 1 counts]}.
    """
    return [first / max(1, sum(counts["hits"])) for first in counts["first_hits"]]


def mean_first_layer(counts, layers):
    """Where right tokens occur first (section 5: REMIX learns in earlier layers): the mean layer in % of the depth.

    0 is the embedding, 100 the last block. None where none ever occurs.
    """
    found = sum(counts["first_hits"])
    weighted = sum(layer * first for layer, first in enumerate(counts["first_hits"]))
    return 100 * weighted / found / layers if found else None


def layer_entropy(counts):
    """How many layers respond (section 5: REMIX diversifies them): entropy in nats of the layers of all occurrences.

    0 where one layer has them all, log(L + 1) where each has as many. None where none ever occurs.
    """
    total = sum(counts["hits"])
    shares = [hits / total for hits in counts["hits"] if hits]
    return sum(share * math.log(1 / share) for share in shares) if total else None


def lens_figures(grid, folder):
    """Draw figures 4, 11 and 12 from what probe.py left of chains; returns the files' names."""
    drawn, lenses = [], lenses_of(grid)
    compared = [lens for a, found in lenses.items() for lens in strategies(grid, a, found)]
    if compared:
        drawn.append(f"figure4-{grid.name}.png")
        draw_figure4(compared, folder / drawn[-1])
    for a, name in LENS_FIGURES.items():
        if a in lenses:
            drawn.append(f"{name}-{grid.name}.png")
            panels = [lens_panel(lens.label, lens.by_seed) for lens in lenses[a].values()]
            draw_panels(panels, folder / drawn[-1], own_legends=True)
    return drawn


def lenses_of(grid):
    """{D_A: {Stages: Lens}} of all chains that were probed for their first stage's facts."""
    found, n_layers = {}, None
    for stages, cell in sorted(grid.cells.items()):
        a, results = stages[0].data, {}
        for seeds, run in sorted(cell.items()) if len(stages) > 1 else ():
            if result := lens_of(run, a):
                n_layers = n_layers or result["layers"]
                if result["layers"] != n_layers:
                    raise DataError(f"{run.folder}/probe.{a}.json: of {result['layers']} layers, others of its base "
                                    f"model of {n_layers}; run probe.py again")  # fmt: skip
                results[" / ".join(map(str, seeds if len(set(seeds)) > 1 else seeds[:1]))] = result
        if results:
            found.setdefault(a, {})[stages] = Lens(a, f"{label_of(stages)}, after {stages[-1].data}", results)
    return found


def strategies(grid, a, lenses):
    """Of a D_A's {Stages: Lens} those that figure 4 compares; all where there are none of these."""
    found = []
    for row in map(grid.own, ["none", "random/k-pile", "k-pile/-"]):
        found += [lens for stages, lens in lenses.items() if stages == chain(a, row, stages[-1].data)]
    return found or list(lenses.values())


def draw_figure4(lenses, path):
    """A row of two panels a set, in each a line a Lens."""
    panels = []
    for data in dict.fromkeys(lens.data for lens in lenses):
        mine = [lens for lens in lenses if lens.data == data]
        panels += [lens_panel(LABELS.get(data, data), mine, first) for first in (False, True)]
    draw_panels(panels, path, 2, own_legends=True)


def lens_panel(title, lenses, first=False):
    """How often right tokens are read at each layer, or for the first time: a color a Lens, means over its seeds.

    Dashed is the base model, dotted how often those of other facts are. Figures 11 and 12 show how far seeds differ.
    """
    def over_layers(parts):
        rows = [first_share(part) if first else part["frequency"] for part in parts]
        return [(layer, Mean(mean_of(values).value, 0.0)) for layer, values in enumerate(zip(*rows))]

    curves, bases, style, top_k = [], [], ".-" if first else "-", 0
    for i, lens in enumerate(lenses):
        results = list(lens.results.values())
        seeds, top_k = f", {len(results)} seeds" if len(results) > 1 else "", results[0]["top_k"]
        label = "" if first else f"{lens.label} ({show([result['accuracy'] for result in results])}%{seeds})"
        curves.append(Curve(label, over_layers(results), style, f"C{i}"))
        if not first:
            curves.append(Curve("", over_layers([result["floor"]["shuffled"] for result in results]), ":", f"C{i}"))
        bases += [result["floor"]["base_model"] for result in results if "base_model" in result["floor"]]
    if bases:  # one model, the same in all
        label = "" if first else f"base model ({bases[0]['accuracy']:.1f}%)"
        curves.append(Curve(label, over_layers(bases[:1]), "--", "gray"))
    if first:
        return Panel(title, "layer", curves, "first occurrences at the layer\n/ occurrences at all layers", (0, None))
    ylabel = f"right tokens in the top {top_k}\n/ all answer tokens"
    return Panel(title, "layer (dotted: shuffled answers)", curves, ylabel, (-0.03, 1.03))


# ---------------------------------------------------------------- drawing


def picture(rows=1, columns=1, size=(6.5, 4)):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save(figure, path):
    """Write a picture in one step, as data.write_file does a text."""
    from matplotlib import pyplot

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
    pyplot.close(figure)


def draw_panels(panels, path, per_row=3, own_legends=False):
    """One file of Panels. A label has one color in all, and stands once below them, or below each panel that has it."""
    columns = min(len(panels), per_row)
    rows, width = -(-len(panels) // columns), max(6.5, 4.6 * columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.labels))
    letters = 13 * width / (columns if own_legends else 1)  # 13 an inch
    ncols = max(1, int(letters / (8 + max(map(len, labels), default=0))))
    most = max(len(panel.labels) for panel in panels) if own_legends else len(labels)
    lines = -(-most // ncols) * (rows if own_legends else 1)
    figure, grid = picture(rows, columns, (width, 3.6 * rows + 0.2 * lines))
    handles, colors = {}, {label: f"C{i}" for i, label in enumerate(labels)}
    for axes, panel in zip(grid.flat, panels):
        draw_panel(axes, panel, colors)
        found = axes.get_legend_handles_labels()
        handles |= dict(zip(found[1], found[0]))
        if own_legends and found[1]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=ncols, fontsize="small")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    if handles and not own_legends:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols, fontsize="small")
    save(figure, path)


def draw_panel(axes, panel, colors):
    """A Panel's lines or bars with standard deviations; colors: {label: color}."""
    width = 0.8 / max(1, len(panel.drawn))  # of a bar
    for i, curve in enumerate(panel.drawn):
        xs, means = zip(*curve.points)
        heights, spread = [mean.value for mean in means], [mean.deviation for mean in means]
        look = {"label": curve.label, "color": curve.color or colors.get(curve.label)}
        look["yerr"] = spread if any(spread) else None
        if panel.ticks:
            axes.bar([x + (i - (len(panel.drawn) - 1) / 2) * width for x in xs], heights, width, **look)
        else:
            axes.errorbar(xs, heights, fmt=curve.style, capsize=2, linewidth=1, markersize=4, **look)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)
    axes.set_title(panel.title, fontsize="medium")
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize="small")
        axes.set_xlim(-0.6, len(panel.ticks) - 0.4)
    if panel.log_x:
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="both", labelsize="x-small", rotation=30)


# ---------------------------------------------------------------- command line


def parse_args():
    parser = Parser(description="Exact match of a checkpoint on the facts of its stages.")
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="folder of a model or of a finished stage")
    parser.add_argument("--data", nargs="+", metavar="NAME",
                        help="sets or .jsonl files to ask instead of those of its stages")  # fmt: skip
    parser.add_argument("--lost", action="store_true",
                        help="print all facts of earlier stages that were forgotten; asks only what was not asked "
                             "before")  # fmt: skip
    parser.add_argument("--text", metavar="NAME",
                        help=f"give the loss (nats a token) on {PASSAGES} passages of a set, or a .jsonl file, that no "
                             f"stage was trained on, of each its first {MAX_TOKENS} tokens; without --data facts that "
                             "were asked before are not asked again")  # fmt: skip
    parser.add_argument("--split", metavar="NAME", nargs="+",
                        help="sort sets' facts into those that the base model CKPT knows and those it does "
                             "not")  # fmt: skip
    parser.add_argument("--shots", type=int, default=SHOTS,
                        help=f"with --split: facts shown before each question (default: {SHOTS})")  # fmt: skip
    parser.add_argument("--num-examples", type=int, metavar="N",
                        help="only the first N of each set, kept under a name of its own (default: all that its stage "
                             f"learned, of others {MOST}); with --split: only the first N")  # fmt: skip
    parser.add_argument("--fewer", action="store_true", help="with --num-examples: or as many as there are")
    parser.add_argument("--data-dir", default="data", help="folder of flat files (default: data)")
    parser.add_argument("--out", metavar="DIR", help="folder for eval.json and the predictions (default: CKPT)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="of the arithmetic; auto: as CKPT was trained, for a base model the faster type on this "
                             "machine (default: auto)")  # fmt: skip
    parser.add_argument("--tables", metavar="RUNS",
                        help="print the tables of the finished runs below this folder, draw the figures")  # fmt: skip
    parser.add_argument("--overlap", metavar="RUNS",
                        help="count which of their facts stand in a text that the finished runs below this folder were "
                             "trained on (appendix B.6), for their tables")  # fmt: skip
    return parser.parse_args()


def main():
    args = parse_args()
    check_folder(args.data_dir, may_be_made=True)
    for folder in filter(None, (args.overlap, args.tables)):
        check_folder(folder)
        check_writable(folder, "copy the runs to where files can be written")
    if args.overlap or args.tables:
        if args.overlap:
            keep_overlap(args.overlap, args.data_dir)
        if args.tables:
            print(tables(args.tables))
        return None
    check_options(args)
    lineage = read_lineage(args.checkpoint)
    if args.text and args.text.endswith(".jsonl"):
        load_examples(args.text, 1)  # the user's own file is there, or nothing is asked
    if args.split:
        if lineage:
            raise DataError(f"{args.checkpoint}: has been trained; --split asks an untouched base model")
        if args.out or args.fewer or args.data or args.text:
            raise DataError("--split sorts what there is, into --data-dir; leave out --out, --fewer, --data and --text")
        return split_all(args)
    if args.out:
        check_out(args, lineage)
    sets = chosen_sets(args, lineage)
    if args.out and not lineage:
        sets = still_to_ask(args, sets)
    elif args.lost or args.text and not args.data:
        sets = not_asked(args, sets)
    rank, opened, out = int(os.environ.get("RANK", 0)), None, args.out or args.checkpoint
    base_model = None if lineage else base_of(args.checkpoint, lineage)
    if sets:
        answers = {f"predictions.{asked.name}.jsonl": ANSWER_FIELDS for asked in sets}
        check_place(out, {"eval.json": SCORE_FIELDS, **answers})
        opened = tokenizer, model, rank = open_checkpoint(args, lineage)
        results = evaluate(out, model, tokenizer, sets, args.precision, rank, base_model)
        if rank == 0:
            say_results(results, args.precision)
    # After the facts, so that text which cannot be had does not cost their answers.
    if args.text and (text := text_to_measure(args, lineage)):
        check_place(out, {f"text.{text.name}.json": TEXT_FIELDS})
        opened = tokenizer, model, rank = opened or open_checkpoint(args, lineage)
        row = measure_text(out, model, tokenizer, text, args.precision, rank, base_model)
        if rank == 0:
            say_text(row)
    if opened:
        end_process_group()
    if rank == 0 and lineage and not args.data and not args.num_examples and not args.out:
        found = forgotten(read_run(args.checkpoint), lambda stage: folder_of_stage(lineage, stage))
        for of_set in found:
            say_forgotten(of_set, args.lost)
        if args.lost and not found:
            print(f"{args.checkpoint}: no stage before its last learned facts, so none are forgotten")


def check_options(args):
    """A DataError where options do not go together."""
    if not args.checkpoint:
        raise DataError("name a checkpoint folder, or give --tables RUNS")
    if args.num_examples is not None and args.num_examples < 1 or args.shots < 0:
        raise DataError("--num-examples must be at least 1, --shots at least 0")
    if args.lost and (args.data or args.split or args.num_examples or args.out):
        raise DataError("--lost is about all facts of a checkpoint's stages; leave out --data, --split, --out and "
                        "--num-examples")  # fmt: skip
    if args.fewer and not args.num_examples:
        raise DataError("--fewer goes with --num-examples: how many there should be")


def check_out(args, lineage):
    """A DataError where --out holds the answers of another model."""
    out = Path(args.out)
    if out.resolve() == Path(args.checkpoint).resolve():
        return
    run = read_run(out)
    others = [*run.scores.values(), *run.texts.values()]
    if not lineage:  # else a row does not say of which training it is
        sha256 = base_of(args.checkpoint, []).sha256
        others = [row for row in others if row.get("base_model_sha256") != sha256]
    if others or has_run(out) or (out / "config.json").exists():
        raise DataError(f"--out {args.out}: holds the answers of another model, or of this one after other training, "
                        "or a model itself; give another folder")  # fmt: skip


def check_folder(path, may_be_made=False):
    """A DataError unless a folder is there."""
    if not os.path.isdir(path) and not (may_be_made and not os.path.lexists(path)):
        but = ", but a file" if os.path.isfile(path) else ""
        raise DataError(f"{path}: no such folder{but}; name one that is there")


def check_writable(folder, remedy):
    """A DataError unless files can be made in a folder, or where it would be made itself."""
    folder = Path(os.path.abspath(folder))
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise DataError(f"{there}: cannot be written to ({error.strerror.lower()}); {remedy}") from None


def check_place(folder, files, remedy="name another folder for the answers with --out DIR"):
    """A DataError unless files {name: fields of their rows} can be written into a folder, in place of our own alone."""
    check_writable(folder, remedy)
    for file, fields in ((Path(folder) / name, fields) for name, fields in files.items()):
        rows = read_rows(file) if file.exists() else []
        if isinstance(rows, dict):
            rows = list(rows.values()) if file.name == "eval.json" else [rows]
        if not isinstance(rows, list) or rows and wrong_fields(rows[0], fields):
            raise DataError(f"{file}: not as this version of the code writes it, perhaps another program's; {remedy}")


def still_to_ask(args, sets):
    """Those FactSets whose answers by a base model are not in --out yet; says which are."""
    kept, left, rank = read_run(args.out).scores, [], int(os.environ.get("RANK", 0))
    for wanted in sets:
        row = kept.get(wanted.name, {})
        alike = (row.get("data_sha256"), row.get("precision")) == (wanted.data_sha256, args.precision)
        if alike and (Path(args.out) / f"predictions.{wanted.name}.jsonl").exists():
            if rank == 0:
                print(f"{wanted.name}: was asked before, {row['accuracy']:.1f}%")
        else:
            left.append(wanted)
    return left


def text_to_measure(args, lineage):
    """The Text of --text; None where --out has the loss of a base model on it; says that."""
    text = other_text(args.text, lineage, args.data_dir)
    row = read_run(args.out).texts.get(text.name, {}) if args.out and not lineage else {}
    if (row.get("data_sha256"), row.get("precision")) != (text.data_sha256, args.precision):
        return text
    if int(os.environ.get("RANK", 0)) == 0:
        say_text(row)
    return None


def not_asked(args, sets):
    """Those FactSets whose answers by a checkpoint are not there yet."""
    run = read_run(args.checkpoint)
    answers = {wanted.name: predictions(args.checkpoint, wanted.name) or [] for wanted in sets}
    return [wanted for wanted in sets if not run.score(wanted.name) or len(answers[wanted.name]) < wanted.of]


def split_all(args):
    """--split: sort the sets' facts; the model is loaded only where some were not sorted before."""
    base_model, works, names = base_of(args.checkpoint, []), {}, []
    for name in args.split:
        work = Sorting.of(base_model, name, args.num_examples, args.shots, args.data_dir)
        if work.name not in works:  # popqa and popqa-id are parts of one set
            works[work.name] = work
            names.append(name)
        elif works[work.name].header != work.header:
            raise DataError(f"{name}: its facts would be kept where those of another set called {work.name} are; "
                            "rename it")  # fmt: skip
    to_do = not all(work.done for work in works.values())
    if to_do:
        check_writable(args.data_dir, "name another folder for the sorted facts with --data-dir")
    tokenizer, model, rank = open_checkpoint(args, []) if to_do else (None, None, int(os.environ.get("RANK", 0)))
    for name in names:
        split(base_model, model, tokenizer, name, args.num_examples, args.shots, args.data_dir, rank, args.precision)
    if to_do:
        end_process_group()


def chosen_sets(args, lineage):
    """The FactSets that the command line means; with --text perhaps none."""
    if args.data:
        return named_sets(args.data, args.num_examples, args.checkpoint, lineage, args.data_dir, args.fewer, args.out)
    sets = stage_sets(lineage, args.data_dir)
    if not sets and args.text:
        return []
    if not lineage:
        raise DataError(f"{args.checkpoint}: no run.json, so no stages to ask about; name sets with --data")
    if not sets:
        raise DataError(f"{args.checkpoint}: no stage of it learned facts; name sets with --data")
    if args.num_examples:
        learned = {kept.name for kept in sets}
        names = [entry["data"] for entry, name in zip(lineage, set_names(lineage)) if name in learned]
        return named_sets(names, args.num_examples, args.checkpoint, lineage, args.data_dir, args.fewer, args.out)
    return sets


def say_results(results, precision):
    print(f"{'set':20} {'facts':>6} {'correct':>8} {'accuracy':>9}  in {precision}")
    for name, row in results.items():
        part = f"  the first {row['total']} of {row['of']}" if row["total"] < row["of"] else ""
        print(f"{name:20} {row['total']:6} {row['correct']:8} {row['accuracy']:8.1f}%{part}")


def say_text(row):
    print(f"{row['data']}: {row['loss']:.4f} nats a token, of {row['tokens']} in {row['passages']} passages that no "
          f"stage was trained on, in {row['precision']}")  # fmt: skip


def open_checkpoint(args, lineage):
    """(tokenizer, model, rank), with the process group set up and args.precision resolved."""
    tokenizer = load_tokenizer(args.checkpoint)
    device, rank, _ = setup_device()
    args.precision = resolve_precision(args.precision, args.checkpoint, lineage, device.type)
    model = load_model(args.checkpoint, compute_dtype(args.precision), device)
    check_vocabulary(tokenizer, model.config, args.checkpoint)
    return tokenizer, model, rank


# ---------------------------------------------------------------- the paper's figures

# Of each table and D_A: the D_B of its columns, then row: cells. Averages, after "|", only serve to name those that
# are not their cells' mean. In table 6 the paper prints the same non-factoid figures for all four mixes.
PAPER = """
table2 kvr | id lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 0.5 2.1 17.4 33.8 | 13.5; 24.4 27.3 49.5 26.7 66.6 | 38.9
random/-: 8.9 2.5 42.5 61.4 | 28.8; 64.1 75.9 85.3 75.0 89.1 | 77.9
k-pile/-: 0.1 0.0 3.2 30.1 | 8.4; 47.3 58.4 62.2 19.0 74.3 | 52.2
-/random: 0.2 0.1 2.9 5.3 | 2.1; 15.1 11.7 33.8 16.5 66.8 | 28.8
-/k-pile: 0.8 40.0 36.4 33.9 | 27.8; 12.8 8.8 40.5 16.8 70.2 | 29.8
random/k-pile: 10.6 62.4 69.5 70.2 | 53.2; 45.8 45.4 74.7 51.2 86.8 | 60.8
table2 popqa | id lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 49.8 7.7 57.8 72.5 | 47.0; 19.0 92.4 77.0 55.1 48.5 | 58.4
random/-: 62.0 17.7 69.3 65.8 | 53.7; 51.4 89.3 82.7 81.8 66.0 | 72.2
k-pile/-: 24.0 2.8 11.3 31.8 | 17.5; 46.4 92.7 94.0 87.2 90.9 | 82.2
-/random: 35.7 5.2 38.1 45.9 | 31.2; 16.8 93.5 87.5 59.3 70.7 | 65.6
-/k-pile: 86.6 90.8 93.9 74.4 | 86.4; 25.9 94.0 92.4 73.9 74.7 | 72.2
random/k-pile: 82.6 85.8 90.7 80.5 | 84.9; 38.5 88.7 88.3 79.2 74.4 | 73.8
table2 triviaqa | id lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 45.6 4.3 40.5 68.6 | 39.8; 9.4 87.6 54.4 70.4 67.6 | 57.9
random/-: 64.9 8.1 60.0 70.8 | 51.0; 27.1 84.9 71.2 87.3 70.8 | 68.3
k-pile/-: 9.4 0.9 3.8 21.0 | 8.8; 31.9 82.9 93.5 90.7 90.1 | 77.8
-/random: 25.0 5.5 19.9 38.8 | 22.3; 4.1 81.0 84.0 62.2 71.6 | 60.6
-/k-pile: 90.8 90.1 91.5 89.8 | 90.6; 2.8 79.1 75.9 53.7 69.8 | 56.3
random/k-pile: 90.2 89.2 89.6 86.5 | 88.9; 12.5 81.8 71.2 74.6 70.0 | 62.0
table3 kvr | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 0.1 15.4 29.6 | 15.0; 4.8 1.5 12.7 13.1 51.9 | 16.8
random/k-pile: 47.5 44.1 39.0 | 43.5; 60.1 39.1 52.9 54.8 81.0 | 57.0
table3 popqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 66.9 92.3 89.6 | 82.9; 96.9 96.8 96.9 96.9 96.7 | 96.8
random/k-pile: 90.5 92.3 89.0 | 90.6; 91.7 91.6 91.8 91.9 91.3 | 91.7
table3 triviaqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 71.6 86.4 91.5 | 83.2; 4.8 99.0 95.9 79.9 97.0 | 75.3
random/k-pile: 77.0 81.5 83.1 | 80.5; 1.6 91.1 95.3 97.7 90.7 | 75.3
table4 kvr | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 2.2 17.5 34.1; 26.4 27.5 50.0 30.0 66.7
replay0.01: 13.7 37.1 54.2; 71.0 69.7 73.2 73.8 81.9
replay0.05: 6.3 45.8 72.6; 77.0 75.9 76.7 80.1 88.9
replay0.1: 13.2 33.3 78.2; 80.3 85.0 76.5 86.7 91.1
table4 popqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 15.7 64.3 78.6; 33.6 93.5 80.5 63.2 53.7
replay0.01: 12.0 66.0 75.3; 94.4 95.1 95.7 90.8 87.6
replay0.05: 27.4 64.4 84.5; 95.9 95.2 95.4 95.9 95.3
replay0.1: 46.6 64.0 83.8; 96.1 96.0 95.7 96.3 95.7
table4 triviaqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 7.8 48.4 76.8; 57.6 91.0 59.5 75.6 73.5
replay0.01: 7.5 51.8 72.0; 66.8 90.6 93.3 74.2 84.0
replay0.05: 25.7 57.0 77.8; 88.9 94.0 93.7 94.4 92.0
replay0.1: 34.9 57.9 80.7; 93.0 95.5 95.4 95.2 93.0
table5 popqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 27.3 24.4 39.1; 13.0 18.3 36.3 7.4 46.9
k-pile: 56.0 52.1 46.6; 4.1 4.8 19.5 10.3 15.8
a-pile: 65.1 60.4 52.7; 9.2 3.2 26.5 21.8 19.3
random: 24.9 27.9 29.1; 7.5 6.0 25.4 2.8 18.4
fineweb: 54.9 54.4 51.3; 6.6 5.2 29.1 30.0 18.4
table5 triviaqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 16.5 20.7 40.4; 24.7 26.7 52.9 21.9 56.6
k-pile: 55.9 57.5 50.3; 11.0 6.8 28.4 20.9 23.4
a-pile: 66.4 65.9 56.6; 13.0 2.8 34.8 33.5 25.8
random: 14.4 26.5 26.5; 14.0 7.5 21.8 13.4 27.5
fineweb: 56.6 57.6 52.6; 13.0 6.0 38.9 56.9 17.7
table6 popqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 55.5 47.1 68.0; 14.5 42.8 25.9 18.4 38.9
k-pile: 75.8 77.1 76.1; 28.1 20.9 19.9 18.3 14.2
a-pile: 78.2 79.0 77.6; 28.1 20.9 19.9 18.3 14.2
random: 52.7 53.8 62.6; 28.1 20.9 19.9 18.3 14.2
fineweb: 75.0 74.4 75.1; 28.1 20.9 19.9 18.3 14.2
table6 triviaqa | lama entityqa webqa; gsm8k math evolcode apps ultrachat
none: 61.6 56.9 69.3; 19.6 54.3 36.7 21.2 18.6
k-pile: 79.1 79.6 73.9; 29.3 20.8 20.6 20.7 18.6
a-pile: 81.3 81.8 76.3; 29.3 20.8 20.6 20.7 18.6
random: 60.8 58.0 64.0; 29.3 20.8 20.6 20.7 18.6
fineweb: 78.8 80.0 73.7; 29.3 20.8 20.6 20.7 18.6
"""


if __name__ == "__main__":
    begin_command("give the same command again")
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except BrokenPipeError:  # who reads along, head for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        fail(error, 1)
