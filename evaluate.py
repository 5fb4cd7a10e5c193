"""What a checkpoint still knows: exact match on the facts of each of its stages, and tables of finished runs.

    python evaluate.py runs/SmolLM2-135M-Instruct/kvr-s0             # every factoid stage in its lineage
    python evaluate.py models/Meta-Llama-3-8B --data bios            # any model on any set
    python evaluate.py models/Meta-Llama-3-8B --split popqa          # which facts the base model knows: familiar and unfamiliar
    torchrun --nproc_per_node 8 evaluate.py CKPT                     # facts are shared out over the ranks
    python evaluate.py --tables runs/                                # the paper's tables, claims and figures, from what was evaluated before

Writes CKPT/eval.json and CKPT/predictions.NAME.jsonl; --split writes data/NAME.familiar.jsonl and data/NAME.unfamiliar.jsonl.
"""

import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (
    SETS,
    DataError,
    Parser,
    encode_example,
    load_examples,
    load_pool,
    load_tokenizer,
    model_name,
    resolve,
    set_label,
    stage_facts,
    write_file,
    write_flat,
)
from model import (
    PRECISIONS, CheckpointError, Config, all_gather, compute_dtype, end_process_group, fail, faster_precision, load_model,
    setup_device, weights_dtype,
)

BATCH = 128  # prompts that generate together


def check_vocabulary(tokenizer, config, path):
    """A DataError unless every id of the tokenizer is a row of the model's embedding."""
    largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id, tokenizer.eos_id)
    if largest >= config.vocab_size or min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise DataError(f"{path}: its tokenizer has ids up to {largest} (bos {tokenizer.bos_id}, eos {tokenizer.eos_id}), "
                        f"its model's vocabulary {config.vocab_size}; copy both from one model")  # fmt: skip


def predict(model, tokenizer, examples, progress=False, finish=True):
    """Greedy answers, a text for each example; under torch.distributed every rank calls it with the same examples.

    The prompt is exactly what was trained on; an answer may be a few tokens longer than the longest right one.
    finish: also what can no longer be right is written to its end.
    """
    prompts, answers, most = questions(tokenizer, examples)
    responses = None if finish else [example["response"] for example in examples]
    return ask(model, tokenizer, prompts, most, tokenizer.eos_id, progress, answers, responses)


def exact_matches(model, tokenizer, examples):
    """For each example whether its greedy answer is correct; called as predict is, and sooner done."""
    answers = predict(model, tokenizer, examples, finish=False)
    return [is_correct(answer, example["response"]) for answer, example in zip(answers, examples)]


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
    """Greedy continuations of prompts (lists of ids) as texts, shared out over the ranks; ends: the id or ids that end one.

    drafts: the likeliest answers, which only save time (see Transformer.generate).
    responses: the right texts; a continuation that can no longer be its prompt's breaks off.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prefix_len = common_prefix_len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = by_length[rank::world]
    # Each rank fills its own rows; their sum is the whole. Every rank generates equally often, the last time perhaps nothing.
    new_ids = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=model.model.embed_tokens.weight.device)
    for start in tqdm(range(0, len(by_length[::world]), BATCH), desc="asking", disable=not progress or rank > 0):
        rows = mine[start : start + BATCH]
        guesses = drafts and [drafts[i] for i in rows]
        stop = responses and (lambda k, ids, rows=rows: is_wrong(tokenizer.decode(ids), responses[rows[k]]))
        for row, ids in zip(rows, model.generate([prompts[i] for i in rows], max_new_tokens, ends, guesses, stop, prefix_len)):
            new_ids[row, : len(ids)] = torch.tensor(ids, device=new_ids.device) + 1  # 0 means no token
    if world > 1:
        dist.all_reduce(new_ids)
    return [tokenizer.decode([i - 1 for i in row if i]) for row in new_ids.tolist()]


def common_prefix_len(prompts):
    """How many ids all prompts begin with, but for the last of the shortest."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts), default=1) - 1)


def is_correct(prediction, response):
    """Exact match as the paper scores it (section 2.2): white space stripped, lower case."""
    return prediction.strip().lower() == response.strip().lower()


def is_wrong(beginning, response):
    """Whether no text that begins so, but for a last character of which some bytes are still to come, is correct."""
    fold = lambda text: text.strip().lower().casefold()  # the lower case of a capital sigma alone depends on what follows it
    return not fold(response).startswith(fold(beginning.rstrip("\ufffd")))


def read_rows(path):
    """The value in a JSON file, or the list of those in a JSON-lines file."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); train or evaluate that run again") from None


LINEAGE_FIELDS = {"stage", "data", "num_examples", "mix", "steps", "seed", "data_sha256", "base_model"}


def read_lineage(path):
    """The stages of a checkpoint, as its run.json lists them; none for a base model."""
    file = Path(path) / "run.json"
    if not file.exists() and file.with_name("metrics.jsonl").exists():
        raise DataError(f"{path}: an unfinished run, without run.json; finish it with train.py --resume")
    lineage = read_rows(file) if file.exists() else []
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) and entry.keys() >= LINEAGE_FIELDS for entry in lineage):
        raise DataError(f"{file}: not a lineage of stages; remove the folder and train it again")
    return lineage


def resolve_precision(asked, path, lineage, device_type):
    """--precision as bf16-mixed, bf16 or fp32: auto is what path's last stage was trained in, and what is faster here for a base model."""
    if asked != "auto":
        return asked
    if lineage:
        return lineage[-1].get("precision", "bf16-mixed")
    # Rank 0 decides, while the others wait: two machines may differ, and two ranks that measure slow each other down.
    config = Config.from_folder(path)
    decides = not dist.is_initialized() or dist.get_rank() == 0
    return all_gather(faster_precision(config, device_type) if decides else None)[0]


def evaluate(path, model, tokenizer, sets, precision, rank=0):
    """Ask the model every fact of sets {name: examples}, write eval.json and predictions into folder path, return eval.json."""
    results = {}
    for name, examples in sets.items():
        predictions = predict(model, tokenizer, examples, progress=True)
        rows = [{"id": e["id"], "prompt": e["prompt"], "response": e["response"], "prediction": p, "correct": is_correct(p, e["response"])}
                for e, p in zip(examples, predictions)]  # fmt: skip
        correct = sum(row["correct"] for row in rows)
        results[name] = {"accuracy": 100 * correct / len(rows), "correct": correct, "total": len(rows), "precision": precision}
        if rank == 0:
            write_file(Path(path) / f"predictions.{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if rank == 0:
        old = Path(path) / "eval.json"
        before = read_rows(old) if old.exists() else {}
        write_file(old, json.dumps(before | results, indent=2) + "\n")
    return results


# ---------------------------------------------------------------- familiar and unfamiliar

SHOTS = 5


def split(path, model, tokenizer, name, n, n_shots, data, rank, precision):
    """Ask the base model each fact of a set, few-shot, and write those it knows and those it does not (sections 2.1, 2.2).

    The shots are drawn from the set, stand in its own form before each question, and are excluded. A fact is familiar if the
    answer's first line is the response or one of its aliases. What was answered is kept as it comes, so a killed run goes on.
    """
    base = resolve(name)[0] if not name.endswith(".jsonl") else set_label(name)
    target = {kind: Path(data) / f"{base}.{kind}.jsonl" for kind in ("familiar", "unfamiliar")}
    pool, sha256 = load_pool(name, data)
    if len(pool) <= n_shots:
        raise DataError(f"{name}: holds {len(pool)} facts, not more than the {n_shots} shots; take fewer with --shots")
    shots = random.Random(f"shots {base}").sample(range(len(pool)), n_shots)
    facts = [fact for i, fact in enumerate(pool) if i not in shots][:n]
    header = {"base_model": model_name(path), "name": base, "data_sha256": sha256, "shots": [pool[i]["id"] for i in shots],
              "precision": precision}  # fmt: skip
    for file in target.values():
        manifest = file.with_suffix(".json")
        if manifest.exists() and read_rows(manifest)["base_model"] != header["base_model"]:
            raise DataError(f"{file}: made with {read_rows(manifest)['base_model']}; remove it, or give another --data-dir")

    part = Path(data) / f"{base}.split.part"
    answers = kept_rows(part, header)[: len(facts)]
    shown = "".join(f"{pool[i]['prompt']} {pool[i]['response']}\n\n" for i in shots)
    accepted = [[fact["response"], *fact.get("aliases", [])] for fact in facts]
    longest = max(len(tokenizer.encode(" " + answer)) for answers_ in accepted for answer in answers_)
    line_ends = {i for i in range(tokenizer.vocab_size) if "\n" in (text := tokenizer.decode([i])) and not text.strip()}
    bar = tqdm(total=len(facts), initial=len(answers), desc=f"asking {base}", unit=" facts", disable=rank > 0)
    stride = 2 * BATCH * dist.get_world_size()
    for start in range(len(answers), len(facts), stride):
        chunk = facts[start : start + stride]
        prompts = [[tokenizer.bos_id, *tokenizer.encode(shown + fact["prompt"])] for fact in chunk]
        texts = ask(model, tokenizer, prompts, longest + 2, line_ends | {tokenizer.eos_id})
        new = [text.strip().partition("\n")[0].strip() for text in texts]
        answers += new
        if rank == 0:
            with open(part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in new)
        bar.update(len(chunk))
    bar.close()

    known = [any(is_correct(answer, right) for right in rights) for answer, rights in zip(answers, accepted)]
    counts = {}
    for kind in target:
        rows = [(fact, answer) for fact, answer, k in zip(facts, answers, known) if k == (kind == "familiar")]
        counts[kind] = len(rows)
        if rank == 0:
            manifest = {**header, "asked": len(facts), "kept": len(rows), "predictions": {fact["id"]: answer for fact, answer in rows}}
            write_flat(target[kind], [fact for fact, _ in rows], manifest)
    if rank == 0:
        part.unlink(missing_ok=True)
        print(f"{base}: {model_name(path)} knows {counts['familiar']} of {len(facts)} facts -> {target['familiar']}, {target['unfamiliar']}")


def kept_rows(part, header):
    """The JSON lines that interrupted work with the same header left in file part, the same on every rank; from here on part
    holds the header and just those."""
    rows = []
    if dist.get_rank() == 0:
        lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.exists() else []  # what follows the last was cut by a kill
        if lines and lines[0] == json.dumps(header):
            rows = [json.loads(line) for line in lines[1:]]
        write_file(part, "".join(json.dumps(row) + "\n" for row in [header, *rows]))
    box = [rows]
    dist.broadcast_object_list(box)
    return box[0]


# ---------------------------------------------------------------- tables

# The paper's printed figures: a block's D_A, then row: cells. Averages, after "|", only serve to name those that are not their cells' mean.
# In table 6 the paper prints the same non-factoid figures for all four mixes.
PAPER = """
table2 kvr
none: 0.5 2.1 17.4 33.8 | 13.5; 24.4 27.3 49.5 26.7 66.6 | 38.9
random/-: 8.9 2.5 42.5 61.4 | 28.8; 64.1 75.9 85.3 75.0 89.1 | 77.9
k-pile/-: 0.1 0.0 3.2 30.1 | 8.4; 47.3 58.4 62.2 19.0 74.3 | 52.2
-/random: 0.2 0.1 2.9 5.3 | 2.1; 15.1 11.7 33.8 16.5 66.8 | 28.8
-/k-pile: 0.8 40.0 36.4 33.9 | 27.8; 12.8 8.8 40.5 16.8 70.2 | 29.8
random/k-pile: 10.6 62.4 69.5 70.2 | 53.2; 45.8 45.4 74.7 51.2 86.8 | 60.8
table2 popqa
none: 49.8 7.7 57.8 72.5 | 47.0; 19.0 92.4 77.0 55.1 48.5 | 58.4
random/-: 62.0 17.7 69.3 65.8 | 53.7; 51.4 89.3 82.7 81.8 66.0 | 72.2
k-pile/-: 24.0 2.8 11.3 31.8 | 17.5; 46.4 92.7 94.0 87.2 90.9 | 82.2
-/random: 35.7 5.2 38.1 45.9 | 31.2; 16.8 93.5 87.5 59.3 70.7 | 65.6
-/k-pile: 86.6 90.8 93.9 74.4 | 86.4; 25.9 94.0 92.4 73.9 74.7 | 72.2
random/k-pile: 82.6 85.8 90.7 80.5 | 84.9; 38.5 88.7 88.3 79.2 74.4 | 73.8
table2 triviaqa
none: 45.6 4.3 40.5 68.6 | 39.8; 9.4 87.6 54.4 70.4 67.6 | 57.9
random/-: 64.9 8.1 60.0 70.8 | 51.0; 27.1 84.9 71.2 87.3 70.8 | 68.3
k-pile/-: 9.4 0.9 3.8 21.0 | 8.8; 31.9 82.9 93.5 90.7 90.1 | 77.8
-/random: 25.0 5.5 19.9 38.8 | 22.3; 4.1 81.0 84.0 62.2 71.6 | 60.6
-/k-pile: 90.8 90.1 91.5 89.8 | 90.6; 2.8 79.1 75.9 53.7 69.8 | 56.3
random/k-pile: 90.2 89.2 89.6 86.5 | 88.9; 12.5 81.8 71.2 74.6 70.0 | 62.0
table3 kvr
none: 0.1 15.4 29.6 | 15.0; 4.8 1.5 12.7 13.1 51.9 | 16.8
random/k-pile: 47.5 44.1 39.0 | 43.5; 60.1 39.1 52.9 54.8 81.0 | 57.0
table3 popqa
none: 66.9 92.3 89.6 | 82.9; 96.9 96.8 96.9 96.9 96.7 | 96.8
random/k-pile: 90.5 92.3 89.0 | 90.6; 91.7 91.6 91.8 91.9 91.3 | 91.7
table3 triviaqa
none: 71.6 86.4 91.5 | 83.2; 4.8 99.0 95.9 79.9 97.0 | 75.3
random/k-pile: 77.0 81.5 83.1 | 80.5; 1.6 91.1 95.3 97.7 90.7 | 75.3
table4 kvr
none: 2.2 17.5 34.1; 26.4 27.5 50.0 30.0 66.7
replay0.01: 13.7 37.1 54.2; 71.0 69.7 73.2 73.8 81.9
replay0.05: 6.3 45.8 72.6; 77.0 75.9 76.7 80.1 88.9
replay0.1: 13.2 33.3 78.2; 80.3 85.0 76.5 86.7 91.1
table4 popqa
none: 15.7 64.3 78.6; 33.6 93.5 80.5 63.2 53.7
replay0.01: 12.0 66.0 75.3; 94.4 95.1 95.7 90.8 87.6
replay0.05: 27.4 64.4 84.5; 95.9 95.2 95.4 95.9 95.3
replay0.1: 46.6 64.0 83.8; 96.1 96.0 95.7 96.3 95.7
table4 triviaqa
none: 7.8 48.4 76.8; 57.6 91.0 59.5 75.6 73.5
replay0.01: 7.5 51.8 72.0; 66.8 90.6 93.3 74.2 84.0
replay0.05: 25.7 57.0 77.8; 88.9 94.0 93.7 94.4 92.0
replay0.1: 34.9 57.9 80.7; 93.0 95.5 95.4 95.2 93.0
table5 popqa
none: 27.3 24.4 39.1; 13.0 18.3 36.3 7.4 46.9
k-pile: 56.0 52.1 46.6; 4.1 4.8 19.5 10.3 15.8
a-pile: 65.1 60.4 52.7; 9.2 3.2 26.5 21.8 19.3
random: 24.9 27.9 29.1; 7.5 6.0 25.4 2.8 18.4
fineweb: 54.9 54.4 51.3; 6.6 5.2 29.1 30.0 18.4
table5 triviaqa
none: 16.5 20.7 40.4; 24.7 26.7 52.9 21.9 56.6
k-pile: 55.9 57.5 50.3; 11.0 6.8 28.4 20.9 23.4
a-pile: 66.4 65.9 56.6; 13.0 2.8 34.8 33.5 25.8
random: 14.4 26.5 26.5; 14.0 7.5 21.8 13.4 27.5
fineweb: 56.6 57.6 52.6; 13.0 6.0 38.9 56.9 17.7
table6 popqa
none: 55.5 47.1 68.0; 14.5 42.8 25.9 18.4 38.9
k-pile: 75.8 77.1 76.1; 28.1 20.9 19.9 18.3 14.2
a-pile: 78.2 79.0 77.6; 28.1 20.9 19.9 18.3 14.2
random: 52.7 53.8 62.6; 28.1 20.9 19.9 18.3 14.2
fineweb: 75.0 74.4 75.1; 28.1 20.9 19.9 18.3 14.2
table6 triviaqa
none: 61.6 56.9 69.3; 19.6 54.3 36.7 21.2 18.6
k-pile: 79.1 79.6 73.9; 29.3 20.8 20.6 20.7 18.6
a-pile: 81.3 81.8 76.3; 29.3 20.8 20.6 20.7 18.6
random: 60.8 58.0 64.0; 29.3 20.8 20.6 20.7 18.6
fineweb: 78.8 80.0 73.7; 29.3 20.8 20.6 20.7 18.6
"""
FACTOID, OTHER = ["lama", "entityqa", "webqa"], ["gsm8k", "math", "evolcode", "apps", "ultrachat"]
LABELS = {"kvr": "Key-Value Recall", "popqa": "PopQA", "triviaqa": "TriviaQA", "id": "ID", "lama": "LAMA", "entityqa": "EntityQA", "webqa": "WebQA",
          "gsm8k": "GSM8K", "math": "MATH", "evolcode": "EvolCode", "apps": "APPS", "ultrachat": "UltraChat",
          "none": "No Mixing", "random": "Random", "k-pile": "K-Pile", "a-pile": "A-Pile", "fineweb": "FineWeb"}  # fmt: skip
MIXES = ["none", "random/-", "k-pile/-", "-/random", "-/k-pile", "random/k-pile"]
CONTROLS = {"long": "No Mixing, steps of Random / - at stage 1 *(not in the paper)*",
            "long/long": "No Mixing, steps of Random / K-Pile *(not in the paper)*"}  # fmt: skip
REPLAYS = ["none", "replay0.01", "replay0.05", "replay0.1"]
TABLES = {  # rows, does ID stand among the columns, averages, where the lowest is underlined, the caption
    "table1": (["none"], True, True, "row", "Forgetting in continual memorization, no mixing"),
    "table2": ([*MIXES, *CONTROLS], True, True, None, "REMIX"),
    "table3": (["none", "random/k-pile", *CONTROLS], False, True, None, "REMIX, the rows of Mistral-7B-v0.3"),
    "table4": (REPLAYS, False, False, "column", "Replay"),
    "table5": (["none", "k-pile", "a-pile", "random", "fineweb"], False, False, None, "Familiar facts after one stage"),
    "table6": (["none", "k-pile", "a-pile", "random", "fineweb"], False, False, None, "Familiar facts after one stage, as for Mistral-7B-v0.3"),
}
PAPERS_MODELS = {"Meta-Llama-3-8B": ["table1", "table2", "table4", "table5"], "Mistral-7B-v0.3": ["table3", "table6"]}
RESAMPLES = 2000


def paper_figures(text=PAPER):
    """({(table, D_A, row, D_B): accuracy}, {(table, D_A, row, "factoid" or "non-factoid"): printed average})."""
    cells, averages = {}, {}
    for line in text.strip().split("\n"):
        row, colon, figures = line.partition(": ")
        if not colon:
            table, a = line.split()
            continue
        for group, part in zip(("factoid", "non-factoid"), figures.split("; ")):
            numbers, _, average = part.partition(" | ")
            names = OTHER if group == "non-factoid" else (["id"] if table == "table2" else []) + FACTOID
            for b, number in zip(names, numbers.split(), strict=True):
                cells[table, a, row, b] = float(number)
            if average:
                averages[table, a, row, group] = float(average)
    for (table, a, row, b), value in list(cells.items()):
        if table == "table2" and row == "none":
            cells["table1", a, row, b] = value
    return cells, averages


def misprinted():
    """[(table, D_A, row, group, printed, mean of its cells)] of the paper's averages that are no rounding of the mean of their printed cells."""
    cells, averages = paper_figures()
    wrong = []
    for (table, a, row, group), printed in averages.items():
        names = ["id", *FACTOID] if group == "factoid" else OTHER
        mean = statistics.mean(cells[table, a, row, b] for b in names if (table, a, row, b) in cells)
        if abs(mean - printed) > 0.0500001:
            wrong.append((table, a, row, group, printed, mean))
    return wrong


def history(a, row, b):
    """The folders, without seeds, of the run behind a cell of tables 1 to 4: its stages' labels, one inside the other.

    row: "none", "random/-" and so on, "long" and "long/long" for the controls, "replay0.1". b may be the later two of three
    stages, "webqa/math": of those the factoid ones are mixed (figure 8).
    """
    b = f"{a}-id" if b == "id" else b
    if row.startswith("replay"):
        return f"{a}/{b}+{row}"
    first, _, second = row.partition("/")
    suffix = lambda mix: {"none": "", "-": "", "": "", "long": "-long"}.get(mix, f"+{mix}")
    return "/".join([a + suffix(first), *(part + suffix(second if "/" not in b or SETS[part].kind == "factoid" else "-") for part in b.split("/"))])


def read_grid(folder):
    """{model: {history: {seed: {"folder", "lineage", "eval"}}}} of the evaluated runs whose folders are named as run_all.sh names them."""
    grid = {}
    for file in sorted(Path(folder).rglob("eval.json")):
        run = file.parent
        lineage = read_lineage(run) if (run / "run.json").exists() else []
        parts = [re.fullmatch(r"(.+)-s(\d+)", name) for name in run.parts[len(run.parts) - len(lineage) :]]
        if not lineage or not all(parts):
            continue
        for part, entry in zip(parts, lineage):
            data, *others = part[1].removesuffix("+familiar").split("+")
            mix = "+" + others[0].partition(".")[0] if others and not others[0].startswith("replay") else "+none"
            weight = entry.get("mix_weight", 1)  # other than 1 it stands behind the mix, as in random.m0
            named = bool(others) and ".m" in others[0]
            if data.removesuffix("-long") != set_label(entry["data"]) or mix[1:] != set_label(entry["mix"]) or named != (weight != 1) or int(part[2]) != entry["seed"]:
                raise DataError(f"{run}: its name says {part[0]}, its run.json {entry['data']} with mix {entry['mix']} of weight {weight:g} and seed {entry['seed']}; rename the folder")
        name = model_name(lineage[0]["base_model"])
        key = "/".join(part[1] for part in parts)
        grid.setdefault(name, {}).setdefault(key, {})[lineage[-1]["seed"]] = {"folder": run, "lineage": lineage, "eval": read_rows(file)}
    return grid


def accuracies(runs, asked):
    """{seed: accuracy in %} of one setting's runs {seed: run} on a set."""
    return {seed: run["eval"][asked]["accuracy"] for seed, run in runs.items() if asked in run["eval"]}


def behind(table, a, row, b):
    """(the history of the run behind a cell, the set that it was asked)."""
    if table in ("table5", "table6"):
        return b + ("" if row == "none" else f"+{row}") + "+familiar", f"{a}.familiar"
    return history(a, row, b), a


def cell_of(grid, table, a, row, b):
    """{seed: accuracy} behind a cell; grid is one model's."""
    key, asked = behind(table, a, row, b)
    return accuracies(grid.get(key, {}), asked)


def show(values, paper=None, underlined=False):
    """A cell's text: mean ± standard deviation over seeds, and the paper's figure small."""
    text = f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") if values else ""
    text = f"<u>{text}</u>" if underlined and text else text
    return (text + ("" if paper is None else f" <sub>{paper:.1f}</sub>")).strip()


def average(cells):
    """{seed: mean over cells} of cells [{seed: accuracy}] for the seeds that all of them have."""
    seeds = set.intersection(*map(set, cells)) if cells else set()
    return {seed: statistics.mean(cell[seed] for cell in cells) for seed in sorted(seeds)}


def generic(rows, grid):
    """Rows with the model's own generic text in the place of K-Pile, where it was trained with pydoc for want of that."""
    own = any("+pydoc" in key for key in grid) and not any("+k-pile" in key for key in grid)
    return [row.replace("k-pile", "pydoc") if own else row for row in rows]


def sets_of(grid, model):
    """(D_A, factoid D_B without id, other D_B) of a model's tables: the paper's, or for another model those that it was trained on."""
    if model in PAPERS_MODELS:
        return ["kvr", "popqa", "triviaqa"], FACTOID, OTHER
    chains = [[re.split(r"-long|\+", label)[0] for label in key.split("/")] for key in grid]
    found = [chain for chain in chains if len(chain) == 2] + [["", *chain] for chain in chains if len(chain) == 1]
    known = lambda b, kind: b in SETS and SETS[b].kind == kind and not b.endswith("-id")
    names = {b for a, b in found if a or f"{b}+familiar" in grid or known(b, "non-factoid")}
    order = list(SETS)
    return (sorted({a for a, _ in found if a}, key=order.index), sorted((b for b in names if known(b, "factoid")), key=order.index),
            sorted((b for b in names if known(b, "non-factoid")), key=order.index))  # fmt: skip


def later_two(grid):
    """The second and third sets of a model's chains of three stages, as "webqa/math"."""
    return sorted({"/".join(label.partition("+")[0] for label in key.split("/")[1:]) for key in grid if key.count("/") == 2})


def familiar_sets(grid):
    """The sets whose familiar facts were asked: the rows of tables 5 and 6."""
    names = {name for runs in grid.values() for run in runs.values() for name in run["eval"] if name.endswith(".familiar")}
    return sorted((name.removesuffix(".familiar") for name in names), key=list(SETS).index)


def row_label(row):
    return CONTROLS.get(row) or (f"Replay (r = {row[6:]})" if row.startswith("replay") else " / ".join(LABELS.get(mix, mix) for mix in row.split("/")))


def render(table, model, grid):
    """One table as lines of Markdown, laid out as in the paper; grid is one model's runs."""
    rows, with_id, averaged, underline, caption = TABLES[table]
    cells, _ = paper_figures() if model in PAPERS_MODELS else ({}, None)
    data_a, factoid, other = sets_of(grid, model)
    if table in ("table5", "table6"):
        data_a = data_a[1:] if model in PAPERS_MODELS else familiar_sets(grid)
    groups = [(["id"] if with_id else []) + factoid, other]
    columns = [b for group in groups for b in [*group, *(["Avg"] if averaged and group else [])]]
    lines = ["", f"**Table {table[-1]}. {caption}** ({model}: exact match on D_A in %, mean ± standard deviation over seeds)", ""]
    lines += ["| | " + " | ".join(LABELS.get(b, b) for b in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for a in data_a:
        if table != "table1":
            lines.append(f"| **{LABELS.get(a, a)}** |" + " |" * len(columns))
        found = {row: {b: cell_of(grid, table, a, row, b) for group in groups for b in group if b != a} for row in generic(rows, grid)}
        means = {row: {b: statistics.mean(cell.values()) for b, cell in found[row].items() if cell} for row in found}
        for row in found:
            texts = []
            for group in groups:
                for b in group:
                    rivals = means[row].values() if underline == "row" else [means[r][b] for r in means if b in means[r]]
                    lowest = underline and b in means[row] and means[row][b] == min(rivals)
                    texts.append(show(list(found[row].get(b, {}).values()), cells.get((table, a, row, b)), lowest))
                if averaged and group:
                    printed = [cells[table, a, row, b] for b in group if (table, a, row, b) in cells]
                    own = average([found[row][b] for b in group if b in found[row]])
                    texts.append(show(list(own.values()), statistics.mean(printed) if printed else None))
            label = LABELS.get(a, a) if table == "table1" else row_label(row)
            lines.append(f"| {label} | {' | '.join(texts)} |")
    return lines


# ---------------------------------------------------------------- claims

ANY = ["kvr", "popqa", "triviaqa"]
# name: (D_A, rows that keep more, their D_B, rows that keep less, their D_B, the table of the paper's own figures); the paper's text, sections 3 to 5.
CLAIMS = {
    "factoid stage 2 forgets more than non-factoid": (ANY, ["none"], "other", ["none"], "factoid", "table2"),
    "LAMA forgets more than non-factoid": (ANY, ["none"], "other", ["none"], "lama", "table2"),
    "random at stage 1 helps on factoid D_B": (ANY, ["random/-"], "factoid", ["none"], "factoid", "table2"),
    "k-pile at stage 1 hurts on factoid D_B": (ANY, ["none"], "factoid", ["k-pile/-"], "factoid", "table2"),
    "k-pile at stage 2 helps on factoid D_B": (ANY, ["-/k-pile"], "factoid", ["none"], "factoid", "table2"),
    "random at stage 2 hurts on factoid D_B": (ANY, ["none"], "factoid", ["-/random"], "factoid", "table2"),
    "stage 1 mixing beats stage 2 mixing on non-factoid D_B": (ANY, ["random/-", "k-pile/-"], "other", ["-/random", "-/k-pile"], "other", "table2"),
    "random beats k-pile at stage 1 on non-factoid D_B for KVR": (["kvr"], ["random/-"], "other", ["k-pile/-"], "other", "table2"),
    "k-pile beats random at stage 1 on non-factoid D_B for PopQA, TriviaQA": (ANY[1:], ["k-pile/-"], "other", ["random/-"], "other", "table2"),
    "random/k-pile beats -/k-pile on factoid D_B": (ANY, ["random/k-pile"], "factoid", ["-/k-pile"], "factoid", "table2"),
    "random/k-pile beats replay 0.1 on factoid D_B for KVR": (["kvr"], ["random/k-pile"], "no id", ["replay0.1"], "no id", "table2"),
    "replay 0.1 keeps less on factoid than on non-factoid D_B": (ANY, ["replay0.1"], "other", ["replay0.1"], "no id", "table4"),
    "k-pile, a-pile, fineweb keep familiar facts on factoid D_B": (ANY[1:], ["k-pile", "a-pile", "fineweb"], "no id", ["none"], "no id", "table5"),
    "random/k-pile keeps more over three stages": (["kvr"], ["random/k-pile"], "two", ["none"], "two", "figure8"),
    "two factoid stages after the first forget most": (["kvr"], ["none"], "two with other", ["none"], "two factoid", "figure8"),
    "random/- beats its step-matched control (not in the paper)": (ANY, ["random/-"], "all", ["long"], "all", None),
    "random/k-pile beats its step-matched control (not in the paper)": (ANY, ["random/k-pile"], "all", ["long/long"], "all", None),
}


def right_answers(run, name):
    """{fact: was it answered right} from a run's predictions alone."""
    return {row["id"]: bool(row["correct"]) for row in read_rows(run["folder"] / f"predictions.{name}.jsonl")}


def bootstrap(differences, resamples=RESAMPLES):
    """95% interval of the mean of differences (S, F), both seeds and facts drawn anew with replacement.

    An entry is one side's share of right answers less the other's, of the same fact under the same seed: the pairing.
    """
    differences = torch.as_tensor(differences, dtype=torch.float64)
    n_seeds, n_facts = differences.shape
    draw = torch.Generator().manual_seed(0)
    seeds = torch.randint(n_seeds, (resamples, n_seeds), generator=draw)
    means = [differences[s][:, torch.randint(n_facts, (n_facts,), generator=draw)].mean() for s in seeds]
    return tuple(torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def compare(grid, sides, asked):
    """(mean, mean, (lower, upper), seeds, D_B) of two sides [[(history, D_B), ...], ...] in % of a set; None where a side has no run in common seeds."""
    runs = [[(b, {seed: run for seed, run in grid[key].items() if asked in run["eval"]}) for key, b in side if key in grid] for side in sides]
    seeds = sorted(set.intersection(*[set(found) for side in runs for _, found in side])) if all(runs) else []
    if not seeds:
        return None
    shares = []  # of each side, seeds x facts
    facts = sorted(right_answers(runs[0][0][1][seeds[0]], asked))
    for side in runs:
        answers = [[right_answers(found[seed], asked) for seed in seeds] for _, found in side]
        shares.append(torch.tensor([[[row[s][fact] for fact in facts] for s in range(len(seeds))] for row in answers], dtype=torch.float64).mean(0))
    interval = bootstrap(100 * (shares[0] - shares[1]))
    names = sorted({b for side in runs for b, _ in side}, key=lambda b: ["id", *SETS].index(b.partition("/")[0]))
    return 100 * shares[0].mean().item(), 100 * shares[1].mean().item(), interval, seeds, names


def claims(model, grid):
    """The claims as lines of Markdown. One holds if for each D_A the difference's 95% interval lies above 0."""
    cells, _ = paper_figures()
    data_a, factoid, other = sets_of(grid, model)
    groups = {"factoid": ["id", *factoid], "no id": factoid, "other": other, "lama": ["lama"], "all": ["id", *factoid, *other], "two": later_two(grid)}
    groups["two factoid"] = [two for two in groups["two"] if all(SETS[b].kind == "factoid" for b in two.split("/"))]
    groups["two with other"] = [two for two in groups["two"] if two not in groups["two factoid"]]
    lines = ["", f"**Claims** ({model}). PASS: the 95% interval of the difference, by a paired bootstrap over facts and seeds, lies above 0.", "",
             "| claim | verdict | D_A | keeps more | keeps less | difference | D_B, seeds | in the paper |", "| --- | --- | --- | ---: | ---: | ---: | --- | ---: |"]  # fmt: skip
    for name, (wanted, more, more_b, less, less_b, table) in CLAIMS.items():
        if "table3" in PAPERS_MODELS.get(model, []):
            table = "table6" if table == "table5" else table
            if table not in ("table6", None):
                continue  # the paper makes it of Llama-3-8B
        names = wanted + [a for a in data_a if a not in wanted] if wanted is ANY else wanted
        rows = []
        for a in [a for a in names if model in PAPERS_MODELS or a in (familiar_sets(grid) if table == "table5" else data_a)]:
            # Both sides on the same D_B where the claim is about one group of them: a half-run grid compares like with like.
            asked = behind(table, a, "none", "id")[1]
            sides = [[(behind(table, a, row, b)[0], b) for row in generic(rows_, grid) for b in groups[group] if b != a] for rows_, group in ((more, more_b), (less, less_b))]
            if more_b == less_b:
                there = [{b for key, b in side if key in grid} for side in sides]
                sides = [[(key, b) for key, b in side if b in there[0] & there[1]] for side in sides]
            result = compare(grid, sides, asked)
            tables_of = lambda row, table=table: "table4" if row.startswith("replay") else table
            printed = [[cells[key] for row in rows_ for b in groups[group] if (key := (tables_of(row), a, row, b)) in cells] if table else []
                       for rows_, group in ((more, more_b), (less, less_b))]  # fmt: skip
            theirs = f"{statistics.mean(printed[0]) - statistics.mean(printed[1]):+.1f}" if all(printed) else ""
            if result:
                left, right, (low, high), seeds, used = result
                rows.append((low > 0, f"{LABELS.get(a, a)} | {left:.1f} | {right:.1f} | {left - right:+.1f} [{low:+.1f}, {high:+.1f}] | {', '.join(used)}; {len(seeds)} | {theirs}"))
            else:
                rows.append((None, f"{LABELS.get(a, a)} | | | | | {theirs}"))
        held = [held for held, _ in rows]
        verdict = "NOT RUN" if not held or None in held and False not in held else "FAIL" if False in held else "PASS"
        lines += [f"| {name if i == 0 else ''} | {verdict if i == 0 else ''} | {text} |" for i, (_, text) in enumerate(rows or [(None, "| | | | | ")])]
    return lines


# ---------------------------------------------------------------- figures


def bars(grid, a, rows, columns, axes):
    """Bars with error bars: a group for each D_B, in it one for each row; heights are accuracies on D_A in %."""
    for i, row in enumerate(rows):
        found = [list(cell_of(grid, "table2", a, row, b).values()) for b in columns]
        means = [statistics.mean(values) if values else 0 for values in found]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in found]
        at = [k + (i - (len(rows) - 1) / 2) * 0.8 / len(rows) for k in range(len(columns))]
        axes.bar(at, means, 0.8 / len(rows), yerr=spread, label=row_label(row).replace("*", ""))
    axes.set(xticks=range(len(columns)), xticklabels=["\n".join(LABELS.get(part, part) for part in b.split("/")) for b in columns], ylim=(0, 103), title=LABELS.get(a, a))


def lines_over(axes, series, title, xlabel):
    """Curves {label: [(x, [accuracies over seeds])]}, means with standard deviations."""
    for label, points in series.items():
        points = [(x, values) for x, values in sorted(points) if values]
        if points:
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            axes.errorbar([x for x, _ in points], [statistics.mean(values) for _, values in points], spread, marker="o", capsize=2, label=label)
    axes.set(xlabel=xlabel, ylim=(-3, 103), title=title)


def retention(grid, a):
    """{row: [[(share of stage 2's steps in %, accuracy on D_A)]]} from the checks in metrics.jsonl, a curve a run, over every D_B."""
    curves = {}
    for key, runs in grid.items():
        labels = key.split("/")
        if len(labels) != 2 or labels[0].split("+")[0].removesuffix("-long") != a or re.search(r"\.[wxm]|replay", key):
            continue
        row = "/".join(label.partition("+")[2] or ("long" if "-long" in label else "-") for label in labels)
        for run in runs.values():
            start = run["folder"].parent / "eval.json"
            before = [(0, read_rows(start)[a]["accuracy"])] if start.exists() else []
            steps = run["lineage"][-1]["steps"]
            checks = [(100 * line["step"] / steps, line["accuracy"]) for line in read_rows(run["folder"] / "metrics.jsonl") if line.get("data") == a]
            if checks:
                curves.setdefault({"-/-": "none", "long/-": "long"}.get(row, row), []).append(before + checks)
    return curves


def figures(model, grid, folder):
    """Draw the paper's figures 2 and 5 to 10 and forgetting over time for one model; returns the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data_a, factoid, other = sets_of(grid, model)
    with_runs = [a for a in data_a if any(re.match(rf"{a}(-long|\+[^/]*)?/", key) for key in grid)]
    if not with_runs:
        return []
    text = generic(["k-pile"], grid)[0]
    ablated = with_runs[0]  # Key-Value Recall where it was trained on: the set of figures 5 to 8
    with_id = ["id", *factoid]
    drawn = []

    def draw(name, panels, per_row=3):
        """One file: panels are functions of axes."""
        n = len(panels)
        figure, grid_ = pyplot.subplots(-(-n // per_row), min(n, per_row), figsize=(4.6 * min(n, per_row), 3.6 * -(-n // per_row)), squeeze=False, layout="constrained")
        for axes, panel in zip(grid_.flat, panels):
            panel(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize="x-small")
        for axes in grid_.flat[n:]:
            axes.remove()
        drawn.append(f"{name}-{model}.png")
        figure.savefig(Path(folder) / drawn[-1], dpi=110)
        pyplot.close(figure)

    def replayed(names, title):
        series = {LABELS.get(a, a): [(float(row[6:] or 0) if row != "none" else 0.0, list(average([c for b in names if b != a and (c := cell_of(grid, "table4", a, row, b))]).values()))
                                     for row in REPLAYS] for a in with_runs}  # fmt: skip
        return lambda axes: lines_over(axes, series, title, "replay ratio")

    def varied(kind, stage, mix, columns):
        """Accuracy against the mix's length (kind w) or ratio (x) at a stage, a curve a D_B; what the tables' mix has is in its run.json."""
        series = {}
        for b in columns:
            row = f"{mix}/-" if stage == 1 else f"-/{mix}"
            base = history(ablated, row, b)
            points = [(0.0, list(accuracies(grid.get(history(ablated, "none", b), {}), ablated).values()))] if kind == "x" else []
            for key, runs in grid.items():
                if key == base or re.sub(rf"\.{kind}[\d.]+", "", key) == base and f".{kind}" in key:
                    entry = next(iter(runs.values()))["lineage"][stage - 1]
                    points.append((entry["mix_words" if kind == "w" else "mix_ratio"], list(accuracies(runs, ablated).values())))
            series[LABELS.get(b, b)] = points
        return lambda axes: lines_over(axes, series, f"{LABELS.get(mix, mix)}, stage {stage}", "words of a passage" if kind == "w" else "mixing ratio")

    def over_time(a):
        def panel(axes):
            for color, (row, curves) in enumerate(sorted(retention(grid, a).items())):
                for i, curve in enumerate(curves):
                    axes.plot(*zip(*curve), marker=".", linewidth=0.8, color=f"C{color}", label=row_label(row).replace("*", "") if i == 0 else None)
            axes.set(xlabel="% of stage 2's steps", ylabel="exact match on D_A, %", ylim=(-3, 103), title=LABELS.get(a, a))

        return panel

    rows = generic(MIXES, grid)
    draw("figure2", [replayed(factoid, "factoid D_B"), replayed(other, "non-factoid D_B")])
    sources = [text, "a-pile", "fineweb"]
    draw("figure5", [lambda axes: bars(grid, ablated, ["none", *[f"-/{mix}" for mix in sources], *[f"random/{mix}" for mix in sources]], with_id, axes)])
    draw("figure6", [varied("w", 1, "random", factoid), varied("w", 2, text, factoid)])
    draw("figure7", [varied("x", stage, mix, [*with_id, *other]) for stage in (2, 1) for mix in ("random", text)], 4)
    draw("figure8", [lambda axes: bars(grid, ablated, generic(["none", "random/k-pile"], grid), later_two(grid), axes)])
    draw("figure9", [lambda axes, a=a: bars(grid, a, rows, [b for b in with_id if b != a], axes) for a in with_runs])
    draw("figure10", [lambda axes, a=a: bars(grid, a, rows, other, axes) for a in with_runs])
    draw("forgetting", [over_time(a) for a in with_runs])
    lens = {}  # what probe.py left of chains of two stages, a line a history
    for key, runs in sorted(grid.items()):
        run, a = runs[min(runs)], key.partition("/")[0].partition("+")[0]
        if "/" in key and (file := run["folder"] / f"probe.{a}.json").exists():
            lens.setdefault(a, []).append((a, f"{mix_label(run['lineage'])}, after {run['lineage'][-1]['data']}", read_rows(file)))
    for name, results in {"figure4": list(itertools.chain(*lens.values())), **dict(zip(["figure11", "figure12"], lens.values()))}.items():
        if results:
            from probe import draw_figure4

            drawn.append(f"{name}-{model}.png")
            draw_figure4(results, Path(folder) / drawn[-1])
    return drawn


def ledger(grid):
    """{"run", "id", "memorized", "lost"} of each first-stage fact of each chain: the first stage after which it was right, and the first
    after that at which it was wrong, from the predictions of each stage that has them; null where there is none."""
    for model in sorted(grid):
        for _, runs in sorted(grid[model].items()):
            for run in runs.values():
                stages = [*reversed(run["folder"].parents), run["folder"]][-len(run["lineage"]) :]
                name = set_label(run["lineage"][0]["data"])
                asked = {i: right_answers({"folder": s}, name) for i, s in enumerate(stages, 1) if (s / f"predictions.{name}.jsonl").exists()}
                for fact in asked[max(asked)] if len(stages) > 1 and asked else []:
                    known = [i for i in asked if asked[i].get(fact)]
                    lost = [i for i in asked if known and i > known[0] and not asked[i].get(fact)]
                    yield {"run": str(run["folder"]), "id": fact, "memorized": known[0] if known else None, "lost": lost[0] if lost else None}


# ---------------------------------------------------------------- any chains


def mix_name(entry):
    """A stage's D_M as tables show it, with its weight in the loss where that is not 1; None without one."""
    if entry["mix"] == "none":
        return None
    weight = entry.get("mix_weight", 1)
    return set_label(entry["mix"]) + (f" of weight {weight:.3g}" if weight != 1 else "")


def mix_label(lineage):
    """The paper's label for a run: "Random / K-Pile" names the mix of each stage, "-" is none."""
    mixes = [mix_name(entry) or "-" for entry in lineage]
    label = "No Mixing" if set(mixes) == {"-"} else " / ".join(mixes)
    return label + "".join(f", replay {entry['replay']}" for entry in lineage if entry.get("replay"))


OUTCOMES = {"seed", "steps", "updates", "final_loss", "stopped_by", "data_sha256", "mix_sha256"}  # what may differ within one row of a table


def chains_table(folder):
    """Markdown of every evaluated chain of stages below folder whatever its name, mean and standard deviation over seeds.

    Beside it retention.png shows, chain by chain, what was left of the first stage's facts while the last stage trained
    (the checks ask the first --eval-facts of them).
    """
    folder = Path(folder)
    found = {json.dumps(lineage): (lineage, file.parent) for file in sorted(folder.rglob("run.json")) if (lineage := read_lineage(file.parent))}
    chains = {}  # every setting but the seed -> runs
    for lineage, run in found.values():
        _, start = found.get(json.dumps(lineage[:1]), (None, None))
        if len(lineage) < 2 or not start:
            continue
        names = [set_label(entry["data"]) for entry in lineage]
        before, after = (_accuracies(f, {name: entry["num_examples"] for name, entry in zip(names, lineage)}) for f in (start, run))
        if names[0] not in before or names[0] not in after:
            print(f"{run}: left out, its first stage's facts were not asked of it and of {start}; run evaluate.py on both", file=sys.stderr)
            continue
        checks = [(row["step"], row["accuracy"]) for row in read_rows(run / "metrics.jsonl") if row.get("data") == names[0]]
        known = [{"mix_weight": 1.0, **entry} for entry in lineage]  # earlier records lack it
        settings = json.dumps([{key: value for key, value in entry.items() if key not in OUTCOMES} for entry in known], sort_keys=True)
        chains.setdefault(settings, []).append(
            {"lineage": lineage, "before": before[names[0]], "after": after, "checks": [(0, before[names[0]]), *checks]}
        )
    if not chains:
        raise DataError(f"{folder}: no evaluated runs of two stages; train them and run evaluate.py on each first")

    def cell(values):
        values = [value for value in values if value is not None]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" if values else ""

    lines, heading = [], None
    for runs in sorted(chains.values(), key=lambda runs: [(e["base_model"], e["data"]) for e in runs[0]["lineage"]]):
        lineage = runs[0]["lineage"]
        names = [set_label(entry["data"]) for entry in lineage]
        above = f"{Path(lineage[0]['base_model']).name}, {', then '.join(names)}: exact match in %"
        if above != heading:
            heading = above
            lines += ["", heading, "", f"| mix at stage 1 / 2 | steps | {names[0]} after stage 1 | {names[0]} at the end | {names[-1]} at the end | runs |"]
            lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        row = [cell([run["before"] for run in runs])] + [cell([run["after"].get(name) for run in runs]) for name in (names[0], names[-1])]
        lines.append(f"| {mix_label(lineage)} | {_steps(runs)} | {' | '.join(row)} | {len(runs)} |")
    text = "\n".join(lines[1:]) + "\n"
    _draw_retention(chains, folder / "retention.png")
    return text


def _accuracies(folder, sizes):
    """{name: accuracy} of the sets that were asked whole; sizes says how many examples that is."""
    rows = read_rows(folder / "eval.json") if (folder / "eval.json").exists() else {}
    return {name: row["accuracy"] for name, row in rows.items() if row["total"] == sizes.get(name)}


def _steps(runs):
    """Steps of each stage, the mean over seeds."""
    return " + ".join(str(round(statistics.mean(steps))) for steps in zip(*[[entry["steps"] for entry in run["lineage"]] for run in runs]))


def _draw_retention(chains, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for color, runs in enumerate(chains.values()):
        label = f"{mix_label(runs[0]['lineage'])} ({_steps(runs)} steps)"
        for run in runs:
            shares = [(100 * step / run["lineage"][-1]["steps"], accuracy) for step, accuracy in run["checks"]]
            axes.plot(*zip(*shares), marker=".", color=f"C{color}", label=label if run is runs[0] else None)
    axes.set(xlabel="% of the last stage's steps", ylabel="exact match on the first stage's facts, %", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def versions():
    """The commit of this code and the versions it ran with, in a line."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f"Commit {git.stdout.strip() or 'unknown'}, Python {platform.python_version()}, torch {torch.__version__}."


def tables(folder):
    """The paper's tables, claims and figures from the runs that run_all.sh's grid left below folder, or else one table of all chains.

    Kept as TABLES.md with each cell's folders; beside it the figures and facts.jsonl. Reads no weights.
    """
    folder = Path(folder)
    grid = read_grid(folder)
    if not grid:
        text = chains_table(folder)
        write_file(folder / "TABLES.md", text)
        return text
    lines = []
    for model, runs in sorted(grid.items()):
        for table in PAPERS_MODELS.get(model, TABLES):
            lines += render(table, model, runs)
        lines += claims(model, runs)
        lines += ["", *[f"![{Path(name).stem}]({name})" for name in figures(model, runs, folder)]]
        lines += ["", f"<details><summary>Folders of {model}'s cells</summary>", ""]
        lines += [f"- `{key}`: " + ", ".join(f"`{run['folder'].relative_to(folder)}`" for _, run in sorted(found.items())) for key, found in sorted(runs.items())]
        lines += ["", "</details>"]
    wrong = [f"{table}, {LABELS[a]}, {row_label(row)}, {group}: printed {printed}, mean {mean:.2f}" for table, a, row, group, printed, mean in misprinted()]
    lines += ["", "Small: the paper's own figure; its averages are means of its printed cells. Printed averages that are not: " + "; ".join(wrong) + ".", "", versions()]
    text = "\n".join(lines[1:]) + "\n"
    write_file(folder / "TABLES.md", text)
    write_file(folder / "facts.jsonl", "".join(json.dumps(row) + "\n" for row in ledger(grid)))
    return text


def plan_of(lines):
    """What run_all.sh's plan would take, as text: runs by table, steps, tokens, hours and disk. lines: tables, folder, needs, arguments."""
    def option(args, name, default):
        words = args.split()[::-1]  # the last one holds
        return words[words.index(name) - 1] if name in words else default

    counts, to_do, measured, seconds, steps, models = {}, [], {}, 0.0, 0, set()
    parents = {line.split("\t")[2] for line in lines}
    for line in lines:
        names, folder, _, args = line.split("\t")
        folder, kind = Path(folder), re.sub(r"-s\d+$", "", Path(folder).name)
        done = (folder / "eval.json").exists()
        if not done:
            n = int(option(args, "--num-examples", 2000))
            own = n * (1 + (float(option(args, "--mix-ratio", 2)) if "--mix " in args else 0) + float(option(args, "--replay", 0)))
            asked = option(args, "--epochs", "20")
            epochs = 3 * int(option(args.replace(f"--epochs {asked}", ""), "--epochs", 20)) if asked.startswith("@") else int(asked)
            most = epochs * -(-round(own) // int(option(args, "--batch-size", 32)))
            steps += most
            to_do.append((kind, most))
        if option(args, "--stage", "") == "1":
            models.add(option(args, "--model", ""))
        if (folder / "metrics.jsonl").exists():
            rows = [row for row in read_rows(folder / "metrics.jsonl") if "tokens" in row]
            total = measured.setdefault(kind, [0, 0])
            total[0] += sum(row["tokens"] for row in rows)
            total[1] += len(rows)
            seconds += sum(row["seconds"] for row in rows)
        for name in set(names.split(",")):
            row = counts.setdefault(name, [0, 0])
            row[0] += 1
            row[1] += done
    text = [f"{'':10} {'runs':>6} {'done':>6} {'to do':>6}"]
    text += [f"{name:10} {n:6} {done:6} {n - done:6}" for name, (n, done) in sorted(counts.items(), key=lambda item: (item[0][0] != "t", int(item[0].strip("tablefigur"))))]
    text += [f"{'all':10} {len(lines):6} {len(lines) - len(to_do):6} {len(to_do):6}   (tables share runs)", f"steps to do: at most {steps}, where no loss stops a stage before"]
    tokens, n_steps = (sum(column) for column in zip(*measured.values())) if measured else (0, 0)
    if tokens and seconds:
        # A step has the tokens of its own kind's measured steps, or else of all that were measured.
        expected = sum(most * (measured[kind][0] / measured[kind][1] if measured.get(kind, [0, 0])[1] else tokens / n_steps) for kind, most in to_do)
        text.append(f"tokens to do: at most {expected:.3g}; {tokens / seconds:.0f} tokens/s measured: {expected / tokens * seconds / 3600:.1f} hours on one such machine")
    else:
        text.append("tokens and hours: nothing measured yet; they follow from the first run's metrics.jsonl")
    kept = len(parents - {"-"})
    for model in sorted(models):
        size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 1e9
        state = size * (3 if size and weights_dtype(model) == torch.float32 else 6)  # of each run in progress: weights and moments in fp32
        text.append(f"disk: {kept} checkpoints are kept for later stages" + (f", {size:.3f} GB each of {model}; a run in progress takes {2 * state:.3f} GB more"
                    if size else f"; {model} is not here, so its size is unknown"))  # fmt: skip
    return "\n".join(text)


def main():
    parser = Parser(description="Exact match of a checkpoint on the facts of its stages.")
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="folder of a model or of a finished stage")
    parser.add_argument("--data", nargs="+", metavar="NAME", help="sets or .jsonl files to ask instead of those of its stages")
    parser.add_argument("--split", metavar="NAME", help="sort a set's facts into those that the base model CKPT knows and those it does not")
    parser.add_argument("--shots", type=int, default=SHOTS, help=f"with --split: facts shown before each question (default: {SHOTS})")
    parser.add_argument("--num-examples", type=int, help="with --data: how many of each (default: 2000, or all that its stage learned); with --split: only the first N")
    parser.add_argument("--data-dir", default="data", help="folder of flat files (default: data)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="of the arithmetic; auto: as CKPT was trained, for a base model the faster type on this machine (default: auto)")
    parser.add_argument("--tables", metavar="RUNS", help="print the tables of the finished runs below this folder, draw the figures")
    parser.add_argument("--plan", action="store_true", help="say what run_all.sh's plan, on standard input, would take")
    args = parser.parse_args()
    if args.tables:
        return print(tables(args.tables))
    if args.plan:
        return print(plan_of([line.rstrip("\n") for line in sys.stdin]))
    if not args.checkpoint:
        raise DataError("name a checkpoint folder, or give --tables RUNS")
    if args.num_examples is not None and args.num_examples < 1 or args.shots < 0:
        raise DataError("--num-examples must be at least 1, --shots at least 0")
    lineage = read_lineage(args.checkpoint)
    if args.split:
        if lineage:
            raise DataError(f"{args.checkpoint}: has been trained; --split asks an untouched base model")
        tokenizer, model, rank = open_checkpoint(args, lineage)
        split(args.checkpoint, model, tokenizer, args.split, args.num_examples, args.shots, args.data_dir, rank, args.precision)
        return end_process_group()
    if args.data:
        if len({set_label(name) for name in args.data}) < len(args.data):
            raise DataError("--data: two sets of one name would share a predictions file; rename one")
        # The name of one of its stages means that stage's facts.
        own = {entry["data"]: entry for entry in lineage} if args.num_examples is None else {}
        sets = {set_label(name): stage_facts(own[name], args.data_dir) if name in own else
                load_examples(name, args.num_examples or 2000, args.data_dir)[0] for name in args.data}  # fmt: skip
    else:
        if not lineage:
            raise DataError(f"{args.checkpoint}: no run.json, so no stages to ask about; name sets with --data")
        sets = {set_label(entry["data"]): facts for entry in lineage if (facts := stage_facts(entry, args.data_dir))}
        if not sets:
            raise DataError(f"{args.checkpoint}: no stage of it learned facts; name sets with --data")
    for name, examples in sets.items():
        if any("messages" in example for example in examples):
            raise DataError(f"{name}: holds chats, which have no single right answer; name sets of facts")
    tokenizer, model, rank = open_checkpoint(args, lineage)
    results = evaluate(args.checkpoint, model, tokenizer, sets, args.precision, rank)
    if rank == 0:
        print(f"{'set':20} {'facts':>6} {'correct':>8} {'accuracy':>9}  in {args.precision}")
        for name, row in results.items():
            print(f"{name:20} {row['total']:6} {row['correct']:8} {row['accuracy']:8.1f}%")
    end_process_group()


def open_checkpoint(args, lineage):
    """(tokenizer, model, rank), with the process group set up and args.precision resolved."""
    tokenizer = load_tokenizer(args.checkpoint)
    device, rank, _ = setup_device()
    args.precision = resolve_precision(args.precision, args.checkpoint, lineage, device.type)
    model = load_model(args.checkpoint, compute_dtype(args.precision), device)
    check_vocabulary(tokenizer, model.config, args.checkpoint)
    return tokenizer, model, rank


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except OSError as error:  # a full disk, a folder that may not be written
        fail(error, 1)
