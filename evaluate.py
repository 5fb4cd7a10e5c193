"""What a checkpoint still knows: exact match on the facts of each of its stages, and tables of finished runs.

    python evaluate.py runs/SmolLM2-135M-Instruct/kvr-s0             # every factoid stage in its lineage
    python evaluate.py models/Meta-Llama-3-8B --data bios            # any model on any set
    python evaluate.py models/Meta-Llama-3-8B --split popqa          # which facts the base model knows: familiar and unfamiliar
    torchrun --nproc_per_node 8 evaluate.py CKPT                     # facts are shared out over the ranks
    python evaluate.py --tables runs/                                # one line a setting, from what was evaluated before

Writes CKPT/eval.json and CKPT/predictions.NAME.jsonl; --split writes data/NAME.familiar.jsonl and data/NAME.unfamiliar.jsonl.
"""

import gc
import json
import os
import random
import signal
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (SETS, DataError, Parser, encode_example, flat_file, load_examples, load_pool, load_tokenizer, resolve, set_label, write_file,
                  write_flat)  # fmt: skip
from model import CheckpointError, load_model

BATCH = 128  # prompts that generate together


def setup_device():
    """(device, rank, number of ranks): this process's own GPU or the CPU, with a process group under torchrun or without."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "gloo" if device.type == "cpu" else "nccl"
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DataError(f"--nproc_per_node: more ranks than this machine's {torch.cuda.device_count()} GPUs; give as many")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, dist.get_rank(), world


def leave():
    """End the process group, all ranks together: gloo can abort at exit while sharded tensors are alive or another rank still talks."""
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def check_vocabulary(tokenizer, config, path):
    """A DataError unless every id of the tokenizer is a row of the model's embedding."""
    largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id, tokenizer.eos_id)
    if largest >= config.vocab_size or min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise DataError(f"{path}: its tokenizer has ids up to {largest} (bos {tokenizer.bos_id}, eos {tokenizer.eos_id}), "
                        f"its model's vocabulary {config.vocab_size}; copy both from one model")  # fmt: skip


def fail(error, status=2):
    """End with one line. torchrun ends all ranks with the first, so the others wait: what all of them found is said once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    sys.exit(status)


def predict(model, tokenizer, examples, progress=False):
    """Greedy answers, a text for each example; under torch.distributed every rank calls it with the same examples.

    The prompt is exactly what was trained on; an answer may be a few tokens longer than the longest right one.
    """
    prompts, longest = [], 0
    for example in examples:
        ids, labels = encode_example(tokenizer, example)
        start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
        prompts.append(ids[:start])
        longest = max(longest, len(ids) - start)
    return ask(model, tokenizer, prompts, longest + 4, tokenizer.eos_id, progress)


def ask(model, tokenizer, prompts, max_new_tokens, ends, progress=False):
    """Greedy continuations of prompts (lists of ids) as texts, shared out over the ranks; ends: the id or ids that end one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = by_length[rank::world]
    # Each rank fills its own rows; their sum is the whole. Every rank generates equally often, the last time perhaps nothing.
    new_ids = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=model.model.embed_tokens.weight.device)
    for start in tqdm(range(0, len(by_length[::world]), BATCH), desc="asking", disable=not progress or rank > 0):
        rows = mine[start : start + BATCH]
        for row, ids in zip(rows, model.generate([prompts[i] for i in rows], max_new_tokens, ends)):
            new_ids[row, : len(ids)] = torch.tensor(ids, device=new_ids.device) + 1  # 0 means no token
    if world > 1:
        dist.all_reduce(new_ids)
    return [tokenizer.decode([i - 1 for i in row if i]) for row in new_ids.tolist()]


def is_correct(prediction, response):
    """Exact match as the paper scores it (section 2.2): white space stripped, lower case."""
    return prediction.strip().lower() == response.strip().lower()


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
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) and LINEAGE_FIELDS <= entry.keys() for entry in lineage):
        raise DataError(f"{file}: not a lineage of stages; remove the folder and train it again")
    return lineage


def stage_facts(entry, data="data"):
    """The facts a stage trained on; none for a set whose answers are no facts."""
    name = entry["data"]
    if name in SETS and SETS[name].kind != "factoid":
        return []
    if entry.get("familiarity"):
        name = f"{name}.{entry['familiarity']}"
    examples, sha256 = load_examples(name, entry["num_examples"], data)
    if sha256 != entry["data_sha256"]:
        raise DataError(f"{name}: its first {entry['num_examples']} lines in {data}/ are not those that stage {entry['stage']} was trained on; "
                        "give the folder that holds them with --data-dir")  # fmt: skip
    return [example for example in examples if "messages" not in example]


def evaluate(path, model, tokenizer, sets, rank=0):
    """Ask the model every fact of sets {name: examples}, write eval.json and predictions into folder path, return eval.json."""
    results = {}
    for name, examples in sets.items():
        predictions = predict(model, tokenizer, examples, progress=True)
        rows = [{"id": e["id"], "prompt": e["prompt"], "response": e["response"], "prediction": p, "correct": is_correct(p, e["response"])}
                for e, p in zip(examples, predictions)]  # fmt: skip
        correct = sum(row["correct"] for row in rows)
        results[name] = {"accuracy": 100 * correct / len(rows), "correct": correct, "total": len(rows)}
        if rank == 0:
            write_file(Path(path) / f"predictions.{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if rank == 0:
        old = Path(path) / "eval.json"
        before = read_rows(old) if old.exists() else {}
        write_file(old, json.dumps(before | results, indent=2) + "\n")
    return results


# ---------------------------------------------------------------- familiar and unfamiliar

SHOTS = 5


def familiarity(name, base_model, data="data"):
    """"unfamiliar" where a set has been split for this base model, "" where there is nothing to split; otherwise a DataError."""
    if name.endswith(".jsonl"):
        return ""
    base, _, chosen = resolve(name)
    if chosen or SETS[base].kind != "factoid" or SETS[base].build:
        return ""
    manifest = flat_file(f"{base}.unfamiliar", data).with_suffix(".json")
    made_with = read_rows(manifest).get("base_model") if manifest.exists() else None
    if made_with == model_name(base_model):
        return "unfamiliar"
    state = f"split into familiar and unfamiliar for {made_with}" if made_with else "not split into familiar and unfamiliar facts"
    raise DataError(f"{name}: {state}, the base model here is {model_name(base_model)}: run python evaluate.py {base_model} --split {base}"
                    + (" with another --data-dir" if made_with else "") + ", or take all facts with --unfiltered")  # fmt: skip


def model_name(path):
    return Path(path).resolve().name


def split(path, model, tokenizer, name, n, n_shots, data, rank):
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
    header = {"base_model": model_name(path), "name": base, "data_sha256": sha256, "shots": [pool[i]["id"] for i in shots]}
    for file in target.values():
        manifest = file.with_suffix(".json")
        if manifest.exists() and read_rows(manifest)["base_model"] != header["base_model"]:
            raise DataError(f"{file}: made with {read_rows(manifest)['base_model']}; remove it, or give another --data-dir")

    part = Path(data) / f"{base}.split.part"
    answers = _answered(part, header)[: len(facts)]
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
                file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in new)
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


def _answered(part, header):
    """Answers that an interrupted split with the same header left, the same on every rank; from here on part holds just those."""
    answers = []
    if dist.get_rank() == 0:
        lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []
        if lines and lines[0] == json.dumps(header) + "\n":
            answers = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
        write_file(part, "".join(json.dumps(row) + "\n" for row in [header, *answers]))
    box = [answers]
    dist.broadcast_object_list(box)
    return box[0]


# ---------------------------------------------------------------- tables


def mix_label(lineage):
    """The paper's label for a run: "Random / K-Pile" names the mix of each stage, "-" is none."""
    mixes = ["-" if entry["mix"] == "none" else set_label(entry["mix"]) for entry in lineage]
    label = "No Mixing" if set(mixes) == {"-"} else " / ".join(mixes)
    return label + "".join(f", replay {entry['replay']}" for entry in lineage if entry.get("replay"))


OUTCOMES = {"seed", "steps", "final_loss", "stopped_by", "data_sha256", "mix_sha256"}  # what may differ within one row of a table


def tables(folder):
    """Markdown of every evaluated chain of stages below folder, mean and standard deviation over seeds; kept as TABLES.md.

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
        settings = json.dumps([{key: value for key, value in entry.items() if key not in OUTCOMES} for entry in lineage])
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
    write_file(folder / "TABLES.md", text)
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


def main():
    parser = Parser(description="Exact match of a checkpoint on the facts of its stages.")
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="folder of a model or of a finished stage")
    parser.add_argument("--data", nargs="+", metavar="NAME", help="sets or .jsonl files to ask instead of those of its stages")
    parser.add_argument("--split", metavar="NAME", help="sort a set's facts into those that the base model CKPT knows and those it does not")
    parser.add_argument("--shots", type=int, default=SHOTS, help=f"with --split: facts shown before each question (default: {SHOTS})")
    parser.add_argument("--num-examples", type=int, help="with --data: how many of each (default: 2000, or all that its stage learned); with --split: only the first N")
    parser.add_argument("--data-dir", default="data", help="folder of flat files (default: data)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="type of weights and arithmetic (default: bf16)")
    parser.add_argument("--tables", metavar="RUNS", help="print the table of the finished runs below this folder")
    args = parser.parse_args()
    if args.tables:
        return print(tables(args.tables))
    if not args.checkpoint:
        raise DataError("name a checkpoint folder, or give --tables RUNS")
    if args.num_examples is not None and args.num_examples < 1 or args.shots < 0:
        raise DataError("--num-examples must be at least 1, --shots at least 0")
    lineage = read_lineage(args.checkpoint)
    if args.split:
        if lineage:
            raise DataError(f"{args.checkpoint}: has been trained; --split asks an untouched base model")
        tokenizer, model, rank = open_checkpoint(args)
        split(args.checkpoint, model, tokenizer, args.split, args.num_examples, args.shots, args.data_dir, rank)
        return leave()
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
    tokenizer, model, rank = open_checkpoint(args)
    results = evaluate(args.checkpoint, model, tokenizer, sets, rank)
    if rank == 0:
        print(f"{'set':20} {'facts':>6} {'correct':>8} {'accuracy':>9}")
        for name, row in results.items():
            print(f"{name:20} {row['total']:6} {row['correct']:8} {row['accuracy']:8.1f}%")
    leave()


def open_checkpoint(args):
    """(tokenizer, model, rank), with the process group set up."""
    tokenizer = load_tokenizer(args.checkpoint)
    device, rank, _ = setup_device()
    model = load_model(args.checkpoint, {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision], device)
    check_vocabulary(tokenizer, model.config, args.checkpoint)
    return tokenizer, model, rank


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except OSError as error:  # a full disk, a folder that may not be written
        fail(error, 1)
