"""Where the facts are: at which layer they can be read, what pulls them away, and where they were lost.

    python probe.py CKPT                             # logit lens on D_A (section 5, figures 4, 11, 12)
    python probe.py CKPT CKPT ... --out figure4.png  # and the paper's figure 4, one line a checkpoint
    python probe.py STAGE1 --gradients --mix pydoc   # interference of a step on D_B with D_A (section 4.1, appendix A)
    python probe.py STAGE2 --transplant STAGE1       # put stage 1's blocks back, ask again: where were the facts lost?
    python probe.py STAGE2 --recover 8               # relearn 8 lost facts: do the others return with them?
    torchrun --nproc_per_node 8 probe.py CKPT ...    # any of these over several ranks

D_A is always the facts of the first stage. Each writes JSON and a picture into CKPT: probe.NAME, gradients, transplant,
recover. The checkpoint itself is only read.

Axes: L layers, n answer tokens, V vocabulary, P parameters.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports take their seconds, Ctrl-C has nothing to save

import argparse
import contextlib
import itertools
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from data import (
    DEFAULT_WORDS, DataError, Parser, begin_command, load_examples, load_tokenizer, progress_bar, relative_path,
    resolve,
)
from evaluate import (
    LENS_FIELDS, MOST, Lens, Stage, base_of, check_agreement, check_folder, check_place, check_writable,
    common_prefix_len, draw_figure4, exact_matches, first_share, folders_with, is_correct, is_wrong, kept_rows,
    label_of, load_set, mix_name, named_sets, picture, questions, read_lineage, read_run, record, resolve_precision,
    save, set_label, set_names, settings_of, shown_weight, spelled, stage_set, stage_sets, wrong_fields,
)
from model import (
    PRECISIONS, CheckpointError, Config, check_saved, compute_dtype, content_id, end_process_group, fail, fits_beside,
    generation_mode, load_model, load_weights, local, model_name, setup_device, write_json,
)
from train import (
    MICRO_TOKENS, AdamW, Kept, batches, build_sharded, count_answer_tokens, encode, keep_freed_memory, learning_rate,
    train_step, use_large_pages,
)

TOP_K = 10  # section 5
ASKED = 24  # facts that go through the model together
RESULTS = {"gradients": {"batches": int}, "transplant": {"parts": list}, "recover": {"arms": dict}}  # {file: fields}
ELSEWHERE = "make a folder of links to the checkpoint's files, and name that"
HEAD_ROWS = 48  # positions, of any layer, whose logits exist at a time; of 64 a CPU's copy in fp32 costs twice as much


def main():
    args = parse_args()
    check_folder(args.data_dir, may_be_made=True)
    stages = {path: read_lineage(path) for path in args.checkpoints}
    for path in args.checkpoints + [args.transplant] * bool(args.transplant):
        Config.from_folder(path)
    for path in args.checkpoints:
        files = {f"{name}.json": fields for name, fields in RESULTS.items() if getattr(args, name)}
        check_place(path, files, ELSEWHERE)
    if args.out:
        check_writable(Path(args.out).parent, "give another --out")
        if Path(args.out).is_dir():
            raise DataError(f"--out {args.out}: a folder; name the picture's file")
    device, rank, _ = setup_device()
    if device.type == "cpu" and (args.gradients or args.recover):
        use_large_pages()
        keep_freed_memory()
    if args.gradients:
        measure_gradients(args, stages, device, rank)
    elif args.transplant or args.recover:
        ((path, lineage),) = stages.items()
        (transplant if args.transplant else recover)(args, path, lineage, device, rank)
    else:
        probe(args, stages, device, rank)
    end_process_group()


def parse_args():
    parser = Parser(description="Where the facts are.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT",
                        help="folders of finished stages, or of a base model with --data")  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="NAME",
                        help="lens: sets to probe, not the first stage's; --gradients: the D_B, not those of the runs "
                             "below CKPT")  # fmt: skip
    parser.add_argument("--num-examples", type=int, metavar="N",
                        help="only the first N facts; of other sets the first N (2000 if not given)")  # fmt: skip
    parser.add_argument("--data-dir", default="data", help="folder of flat files")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="of the lens and the transplant, auto: as CKPT was trained, for a base model the faster "
                             "type here; --gradients is fp32")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of sampled batches")
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a sampled batch or a step")
    parser.add_argument("--lr", type=float,
                        help="step size of --gradients and --recover; if not given, the checkpoint's own first "
                             "stage's")  # fmt: skip
    # logit lens
    parser.add_argument("--first-token", action="store_true", help="look at each answer's first token alone")
    parser.add_argument("--no-base", action="store_true", help="do not probe the base model for comparison")
    parser.add_argument("--out", metavar="FILE.png", help="draw figure 4: all checkpoints, layers against frequency")
    # the other three
    parser.add_argument("--gradients", action="store_true", help="interference of D_B, and of D_B with D_M, with D_A")
    parser.add_argument("--mix", default="none", help="with --gradients and --data: D_M")
    parser.add_argument("--mix-ratio", type=float, default=2.0, help="examples of D_M for each of D_B")
    parser.add_argument("--mix-words", type=int, default=DEFAULT_WORDS, help="length of D_M's passages in words")
    parser.add_argument("--batches", type=int, default=4, help="sampled batches")
    parser.add_argument("--transplant", metavar="OTHER", help="put blocks of this checkpoint into CKPT")
    parser.add_argument("--grid", type=int, default=7,
                        help="with --transplant: groups of blocks; all their windows are tried")  # fmt: skip
    parser.add_argument("--recover", type=int, metavar="N", help="train on N of the facts that CKPT lost")
    parser.add_argument("--steps", type=int, default=8, help="with --recover: steps of training")
    args = parser.parse_args()
    for name in ("num_examples", "batch_size", "batches", "grid", "recover", "steps", "mix_words", "lr"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and (name == "lr" or value >= 1)):
            raise DataError(f"--{name.replace('_', '-')} must be above 0")
    if args.mix_ratio < 0 or args.gradients + bool(args.transplant) + bool(args.recover) > 1:
        raise DataError("--mix-ratio cannot be negative, and --gradients, --transplant and --recover exclude each "
                        "other")  # fmt: skip
    if (args.transplant or args.recover) and len(args.checkpoints) > 1:
        raise DataError("--transplant and --recover take one checkpoint")
    if args.mix != "none" and not (args.gradients and args.data):
        raise DataError("--mix goes with --gradients and --data, which names the D_B")
    return args


def first_set(args, path, lineage):
    """(the stage that learned D_A, D_A as a FactSet, whole): the first stage whose set is one of facts."""
    sets = stage_sets(lineage, args.data_dir)
    if not sets:
        raise DataError(f"{path}: no stage in its run.json learned facts; name a trained checkpoint, or for the lens a "
                        "set with --data")  # fmt: skip
    return lineage[set_names(lineage).index(sets[0].name)], sets[0]


def sharded(path, precision, device):
    """A checkpoint's model as train.py holds it: over all ranks, each with its rows of the weights."""
    # No plan is made here, and a GPU may hold several gradients beside: activations are kept on a CPU alone.
    kept = Kept(activations=device.type == "cpu", weights=False)
    model = build_sharded(Config.from_folder(path), device, precision, kept)
    load_weights(model, path)
    return model


# ---------------------------------------------------------------- logit lens


def probe(args, stages, device, rank):
    """The lens on every checkpoint: CKPT/probe.NAME.json and .png, a table, and figure 4 where --out asks for it."""
    lenses, base_models = [], {}
    for path, lineage in stages.items():
        precision = resolve_precision(args.precision, path, lineage, device.type)
        for asked in probed_sets(args, path, lineage):
            facts, name = asked.facts, asked.name + (".first-token" if args.first_token else "")
            check_place(path, {f"probe.{name}.json": LENS_FIELDS}, ELSEWHERE)
            result, ranks = probe_one(args, path, facts, precision, device)
            base_model = None if args.no_base else base_beside(lineage, rank)
            if base_model:
                key = (base_model, precision, json.dumps(facts))
                if key not in base_models:
                    base_models[key] = probe_one(args, base_model, facts, precision, device)[0]
                of_base = base_models[key]
                result["floor"]["base_model"] = {k: of_base[k] for k in [*result["floor"]["shuffled"], "accuracy"]}
            label = model_name(path)
            if lineage:
                label = f"{label_of([Stage.of(entry) for entry in lineage])}, after {set_label(lineage[-1]['data'])}"
            lenses.append(Lens(name, label, {path: result}))
            result["data_sha256"] = asked.data_sha256
            if rank == 0:
                print_lens(path, name, result)
                draw_ranks(ranks, result, f"{path}: {name}", Path(path) / f"probe.{name}.png")
                write_json(Path(path) / f"probe.{name}.json", result)  # last: where it is, all is
    if args.out and rank == 0:
        draw_figure4(lenses, args.out)
        print(f"-> {args.out}")


def base_beside(lineage, rank):
    """The folder of a checkpoint's base model, if it is there and still that model."""
    folder = Path(lineage[0]["base_model"]) if lineage else None
    if not folder or not (folder / "config.json").exists():
        return None
    if content_id(folder) == lineage[0]["base_model_sha256"]:
        return folder
    if rank == 0:
        print(f"{folder}: not the base model any more that the checkpoint goes back to, so it is left out",
              file=sys.stderr)  # fmt: skip
    return None


def probed_sets(args, path, lineage):
    """The FactSets that the lens looks for in a checkpoint: those of --data, or D_A."""
    names = args.data
    if not names:
        stage, asked = first_set(args, path, lineage)
        if not args.num_examples:
            return [asked]
        names = [stage["data"]]
    return named_sets(names, args.num_examples, path, lineage, args.data_dir)


def probe_one(args, path, facts, precision, device):
    """(what probe.NAME.json says of a model folder, the rank of each fact's worst token (L + 1, facts))."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, compute_dtype(precision), device)
    ranks, log_probs, floor, owner, correct = read_layers(model, tokenizer, facts, args.first_token)
    result = {"layers": model.config.num_hidden_layers, "top_k": TOP_K, **summary(ranks, log_probs),
              "total": ranks.shape[1], "accuracy": 100 * int(correct.sum()) / len(facts), "facts": len(facts),
              "first_token": args.first_token, "precision": precision,
              "floor": {"shuffled": summary(*floor)}}  # fmt: skip
    worst = torch.stack([ranks[:, owner == i].amax(1) for i in range(len(facts))], dim=1)
    return result, (worst, correct)


def summary(ranks, log_probs):
    """ranks, log_probs (L + 1, n) -> {name: a figure for each layer}.

    How many right tokens are in the top 10 ("hits"; "frequency" of all n) and how many are there for the first time
    ("first_hits"; "first_share" of all hits of all layers), median rank and mean log-probability. Section 5 defines
    figure 4 by first occurrences, its caption by occurrences: first_share is the former, frequency the latter.
    """
    hit = ranks <= TOP_K
    first = hit & (hit.cumsum(0) == 1)
    counts = {"hits": hit.sum(1).tolist(), "first_hits": first.sum(1).tolist()}
    return {**counts, "frequency": (hit.sum(1) / ranks.shape[1]).tolist(), "first_share": first_share(counts),
            "median_rank": ranks.double().quantile(0.5, dim=1).tolist(),
            "log_prob": log_probs.double().mean(1).tolist()}  # fmt: skip


@torch.no_grad()
def read_layers(model, tokenizer, facts, first_token=False):
    """Read every answer token off every layer, at the position that predicts it; facts are shared out over the ranks.

    Returns (ranks (L + 1, n), 1 the most likely; log-probabilities (L + 1, n); the same two for the floor, where each
    token is that of another fact's answer; which fact each of the n tokens belongs to (n); which facts the model
    answers correctly). The eos after an answer is no part of it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prompts, drafts, most = questions(tokenizer, facts)
    rights = [spelled(tokenizer, fact["response"]) for fact in facts]
    prefix_len = common_prefix_len(prompts)
    answers = [draft[: 1 if first_token else -1] for draft in drafts]
    others = shuffled_answers(answers)
    owner = torch.tensor([i for i, answer in enumerate(answers) for _ in answer])
    start = [0, *itertools.accumulate(map(len, answers))]
    device = model.model.embed_tokens.weight.device
    found = torch.zeros(4, model.config.num_hidden_layers + 1, len(owner), device=device, dtype=torch.float64)
    correct = torch.zeros(len(facts), device=device, dtype=torch.long)
    by_length = sorted(range(len(facts)), key=lambda i: len(prompts[i]))
    for first in progress_bar(range(0, len(by_length[::world]), ASKED), desc="lens", disable=rank > 0):
        group = by_length[rank::world][first : first + ASKED]
        # The same pass over prompts and answers tells what the model answers and what each layer holds on the way.
        stop = lambda k, ids, group=group: is_wrong(tokenizer.decode(ids), rights[group[k]])
        asked, guesses = [prompts[i] for i in group], [drafts[i] for i in group]
        new, hidden = model.generate(asked, most, tokenizer.eos_id, guesses, stop, prefix_len, return_hidden=True)
        for i, ids in zip(group, new):
            correct[i] = is_correct(tokenizer.decode(ids), rights[i])
        # hidden has a row for each token of each draft, eos included, and one for what follows it.
        begin = [0, *itertools.accumulate(len(drafts[i]) + 1 for i in group)]
        rows = [b + j for b, i in zip(begin, group) for j in range(len(answers[i]))]
        rows = torch.tensor(rows, dtype=torch.long, device=device)
        if first == 0 and group:
            check_lens(model, prompts[group[0]] + drafts[group[0]])
        columns = [j for i in group for j in range(start[i], start[i + 1])]
        columns = torch.tensor(columns, dtype=torch.long, device=device)
        targets = torch.tensor([pair for i in group for pair in zip(answers[i], others[i])], device=device).view(-1, 2)
        places = torch.cartesian_prod(torch.arange(len(hidden), device=device), torch.arange(len(rows), device=device))
        for layer, k in (part.T for part in places.split(HEAD_ROWS)):
            found[:, layer, columns[k]] = read(lens(model, hidden[layer, rows[k]]), targets[k])
    if world > 1:
        dist.all_reduce(found)
        dist.all_reduce(correct)
    ranks, log_probs, floor_ranks, floor_log_probs = found.cpu()
    return ranks.long(), log_probs, (floor_ranks.long(), floor_log_probs), owner, correct.cpu().bool()


def lens(model, hidden):
    """Residuals (..., C) of any layer -> logits (..., V), as if the model ended there (nostalgebraist, 2020).

    The final norm with these residuals' own statistics, then the output embedding.
    """
    return model.head(hidden)


def read(logits, targets):
    """logits (n, V), targets (n, 2) -> (4, n): rank and log-probability of the first targets, then of the second.

    Of equal logits, frequent in bf16, the lower id comes first, as in a greedy choice.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    found = []
    ids = torch.arange(logits.shape[1], device=logits.device)
    for target in targets.T[..., None]:  # (n, 1)
        own = logits.gather(1, target)
        below = own.nextafter(torch.full_like(own, float("-inf")))
        # Counted in int32: int64 is six times slower on a CPU.
        above = (logits > torch.where(ids < target, below, own)).sum(1, dtype=torch.int32)
        found += [1 + above, own[:, 0] - total]
    return torch.stack([row.double() for row in found])


def check_lens(model, ids):
    """The lens of what the last layer holds must be the model's own logits, but for rounding.

    Both come of passes of one shape: in bf16 a pass over a batch with a shared start rounds its residuals differently,
    on long texts by more than is allowed here.
    """
    ids = torch.tensor([ids], device=model.model.embed_tokens.weight.device)
    ours, logits = lens(model, model(ids, return_hidden=True)[-1]).float(), model(ids).float()
    worst = ((ours - logits).abs().max() / logits.abs().max()).item()
    if not worst <= (1e-5 if model.model.norm.weight.dtype == torch.float32 else 2**-7):
        raise RuntimeError(f"the last layer's lens differs from the model's logits by {worst:.1e} of the largest")


def shuffled_answers(answers, seed=0):
    """Lists of token ids -> lists as long, each token from the same place of another answer, each used once.

    Letters and digits are frequent whatever the fact: what the lens reads of these is the floor.
    """
    order = random.Random(f"floor {seed}").sample(range(len(answers)), len(answers))
    others = [list(answer) for answer in answers]
    for j in range(max(map(len, answers))):
        have = [i for i in order if len(answers[i]) > j]
        for i, other in zip(have, have[1:] + have[:1]):
            others[i][j] = answers[other][j]
    return others


def print_lens(path, name, result):
    base = result["floor"].get("base_model", {})
    shown, read = "answer tokens", "each token of an answer but its eos"
    if result["first_token"]:
        shown, read = "first answer tokens", "the first token of an answer"
    print(f"{path}: {name}, {result['accuracy']:.1f}% of {result['facts']} facts; {result['total']} {shown}, "
          f"top {TOP_K}, in {result['precision']}")  # fmt: skip
    print(f"frequency: right tokens in the top {TOP_K} / all {shown}; "
          "first here: first occurrences at this layer / occurrences at all layers")  # fmt: skip
    print(f"teacher-forced: {read} is read where it is predicted, behind the right ones before it")
    print(f"{'layer':>5} {'frequency':>10} {'shuffled':>9} {'base':>7} {'first here':>11} {'median rank':>12} "
          f"{'log prob':>9}")  # fmt: skip
    shuffled = result["floor"]["shuffled"]
    for layer in range(result["layers"] + 1):
        of_base = f"{base['frequency'][layer]:7.3f}" if base else f"{'-':>7}"
        print(f"{layer:5} {result['frequency'][layer]:10.3f} {shuffled['frequency'][layer]:9.3f} {of_base} "
              f"{result['first_share'][layer]:11.3f} {result['median_rank'][layer]:12.1f} "
              f"{result['log_prob'][layer]:9.2f}")  # fmt: skip


# ---------------------------------------------------------------- interference meter


def measure_gradients(args, stages, device, rank):
    """The gradients of D_A, D_B and D_M at each checkpoint, and predicted against measured forgetting.

    Writes CKPT/gradients.json and .png. With theta_A the first checkpoint named and theta'_A another (or the same),
    appendix A.1's terms are Delta_1 = L(theta_A; D_A) - L(theta'_A; D_A) and, to first order, Delta_2 = (change of
    D_A's loss by a step on D_B from theta_A) - (change by a step on D_B, with D_M if there is one, from theta'_A);
    above zero means less forgetting.
    """
    predicted, measured, baseline = [], [], None
    if rank == 0:
        print(f"{'checkpoint':>14} {'D_B':>8} {'D_M':>8} {'|g_A|':>8} {'|g_B|':>8} {'cos(A,B)':>9} {'cos(A,M)':>9} "
              f"{'1st order':>11} {'spread':>8} {'real':>10} {'Delta_1':>10} {'Delta_2':>10} "
              f"{'forgotten':>9}")  # fmt: skip
    for path, lineage in stages.items():
        stage, asked = first_set(args, path, lineage)
        facts, lr, base_model = asked.facts[: args.num_examples], args.lr or stage["lr"], base_of(path, lineage)
        steps = stage_two_steps(args, path, lineage, asked.name, base_model)
        rows, layers, loss = meter(args, path, facts, steps, lr, device, base_model)
        of_b = {step.content[0]: row["first_order"]["B"]["mean"] for step, row in zip(steps, rows)}
        baseline = baseline or {"loss": loss, "B": of_b}
        for row, step in zip(rows, steps):
            own = "B+M" if row["mix"] else "B"
            row["delta_1"] = baseline["loss"] - loss
            alone = baseline["B"].get(step.content[0])
            row["delta_2"] = None if alone is None else alone - row["first_order"][own]["mean"]
            row |= {"runs": [relative_path(run.folder, path) for run in step.runs], "forgotten": step.forgotten}
            if row["forgotten"] is not None:
                predicted.append(row["first_order"][own]["mean"])
                measured.append(row["forgotten"])
            if rank == 0:
                print_row(Path(path).name, row, own)
        if rank == 0:
            result = {"data": set_label(stage["data"]), "loss": loss, "lr": lr, "batches": args.batches,
                      "batch_size": args.batch_size, "layers": layers, "rows": rows}  # fmt: skip
            write_json(Path(path) / "gradients.json", result)
            draw_gradients(rows, layers, f"{path}: D_A is {set_label(stage['data'])}", Path(path) / "gradients.png")
    if rank == 0 and len(measured) > 1:
        print(f"Spearman's rank correlation of first-order change and forgetting: {spearman(predicted, measured):.2f} "
              f"over {len(measured)} runs")  # fmt: skip


@dataclass
class Step:
    """A step on D_B, alone or with D_M, and the finished runs that consist of such steps."""

    settings: dict  # of it, named as in an entry of a lineage
    runs: list = field(default_factory=list)  # of one cell: they differ in the seed alone
    forgotten: float | None = None  # points of D_A's accuracy that the runs lost, their mean, where all were evaluated

    @property
    def content(self):
        """What decides its gradients: the lines of D_B, and those of D_M with their weight."""
        return tuple(self.settings[key] for key in ("data_sha256", "mix_sha256", "mix_weight"))


def stage_two_steps(args, path, lineage, name, base_model):
    """The Steps that are measured: on the sets of --data and --mix, or those of the finished runs below the checkpoint.

    Every setting counts: a run has forgotten what it has, beside others of another ratio, tag or number of facts.
    name: of D_A.
    """
    before, cells = read_run(path), {}
    for folder in folders_with(["run.json"], path):
        run = read_run(folder)
        if record(run.lineage[:-1]) == record(lineage):
            if run.lineage[-1]["replay"]:
                if dist.get_rank() == 0:
                    print(f"{run.folder}: left out, its steps hold facts of D_A itself (--replay)", file=sys.stderr)
                continue
            cells.setdefault(json.dumps(settings_of(run.lineage[-1]), sort_keys=True), []).append(run)
    steps = [step_of(before, cell, name) for cell in cells.values()]
    if args.data:
        steps = asked_steps(args, steps, base_model)
    if not steps:
        raise DataError(f"{path}: no finished stage-2 runs below it; name the sets D_B with --data")
    return steps


def step_of(before, runs, name):
    """The Step of runs that differ in the seed alone."""
    step = Step(runs[0].lineage[-1], runs)
    scores = [run.score(name) for run in [before, *runs]]
    if all(scores):
        first, *after = [row["accuracy"] for _, row in scores]
        step.forgotten = first - sum(after) / len(after)
    return step


def asked_steps(args, found, base_model):
    """The Steps of --data and --mix; of the `found` ones the one that has their very examples, if there is one."""
    steps = []
    for data, mix in itertools.product(args.data, dict.fromkeys(["none", args.mix])):
        step = Step({"data": data, "num_examples": args.num_examples or MOST, "mix": mix, "mix_ratio": args.mix_ratio,
                     "mix_words": args.mix_words, "mix_weight": 1.0, "tag": "", "mix_sha256": None})  # fmt: skip
        for key, (_, sha256) in load_step(args, step, base_model).items():
            step.settings[f"{key}_sha256"] = sha256
        alike = [other for other in found if other.content == step.content]
        alike = [other for other in alike if not other.settings["tag"]] or alike  # rather than a control
        for other in alike[1:]:
            check_agreement(alike[0].runs[0], other.runs[0])
        steps.append(alike[0] if alike else step)
    return steps


def load_step(args, step, base_model):
    """{"data": (examples of D_B, sha256 of their lines)}, with D_M also "mix"."""
    of = step.settings
    loaded = {"data": load_set(stage_set(of), of["num_examples"], args.data_dir, base_model=base_model)}
    if of["mix"] != "none":
        n_mix = round(of["mix_ratio"] * of["num_examples"])
        loaded["mix"] = load_examples(of["mix"], n_mix, args.data_dir, of["mix_words"])
    for key, (_, sha256) in loaded.items():
        if of.get(f"{key}_sha256") not in (None, sha256):
            raise DataError(f"{of[key]}: in {args.data_dir}/ not what {step.runs[0].folder} was trained on; give the "
                            "folder that holds it with --data-dir")  # fmt: skip
    return loaded


def meter(args, path, facts, steps, lr, device, base_model):
    """Each Step's gradients against D_A's, sampled over batches.

    Returns (a row of gradients.json a step, names of layers, loss on D_A).
    """
    tokenizer = load_tokenizer(path)
    model = sharded(path, "fp32", device)
    names = [name for name, _ in model.named_parameters()]
    weights = [local(p).detach().clone() for p in model.parameters()]

    def sample(examples, size, source="own"):
        encoded, sampled = encode(tokenizer, examples, source), []
        for _, indices in itertools.islice(batches(len(encoded), size, args.batches, args.seed), args.batches):
            sampled.append([encoded[i] for i in indices])
        return sampled

    of_a, samples, losses = sample(facts, args.batch_size), [], []
    for step in steps:
        loaded, batches_m = load_step(args, step, base_model), None
        if "mix" in loaded:
            batches_m = sample(loaded["mix"][0], round(step.settings["mix_ratio"] * args.batch_size), "mix")
        samples.append((sample(loaded["data"][0], args.batch_size), batches_m))

    found = [[] for _ in steps]
    bar = progress_bar(total=len(of_a) * len(steps), desc="gradients", disable=dist.get_rank() > 0)
    for k, batch in enumerate(of_a):
        loss, a = gradient(model, batch)
        losses.append(loss)
        for step, (batches_b, batches_m), rows in zip(steps, samples, found):
            batch_b = batches_b[k % len(batches_b)]
            _, b = gradient(model, batch_b)
            row = {"AA": inner(a, a), "AB": inner(a, b), "BB": inner(b, b)}
            row["first_order"] = {"B": -lr * row["AB"].sum()}
            row["real"] = {"B": real_change(model, weights, b, lr, batch, loss)}
            if batches_m:
                batch_m = batches_m[k % len(batches_m)]
                _, m = gradient(model, batch_m)
                row |= {"AM": inner(a, m), "MM": inner(m, m), "BM": inner(b, m)}
                # The gradient of the union is the mean by answer tokens, as in training: appendix A.3's beta_1 and
                # beta_2.
                counts, weight = count_answer_tokens(batch_b + batch_m), step.settings["mix_weight"]
                share = weight * counts["mix"] / (counts["own"] + weight * counts["mix"])
                union = [x.lerp(y, share) for x, y in zip(b, m)]
                row["first_order"]["B+M"] = -lr * ((1 - share) * row["AB"] + share * row["AM"]).sum()
                row["real"]["B+M"] = real_change(model, weights, union, lr, batch, loss)
            rows.append(row)
            bar.update()
    bar.close()
    layers, kinds = zip(*map(layer_and_kind, names))
    rows = [summarize(step, samples_, layers, kinds) for step, samples_ in zip(steps, found)]
    return rows, list(dict.fromkeys(layers)), sum(losses) / len(losses)


def gradient(model, batch):
    """(loss of a batch, its gradient: this rank's rows of each of the P parameters)."""
    loss = train_step(model, batch, micro_tokens(model)).loss
    gradients = [local(p.grad) for p in model.parameters()]
    model.zero_grad()
    return loss, gradients


def micro_tokens(model):
    """As train.py's for the device that the model is on."""
    return MICRO_TOKENS[next(model.parameters()).device.type]


def inner(x, y):
    """The inner product of two gradients parameter by parameter, (P), over all ranks' rows.

    Summed in fp64, as small cosines need.
    """
    products = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(x, y)])
    dist.all_reduce(products)
    return products.cpu()


@torch.no_grad()
def real_change(model, weights, direction, lr, batch, before):
    """What a plain gradient step of size lr really does to a batch's loss; the weights are put back."""
    for p, w, g in zip(model.parameters(), weights, direction):
        local(p).copy_(w - lr * g)
    after = train_step(model, batch, micro_tokens(model), backward=False).loss
    for p, w in zip(model.parameters(), weights):
        local(p).copy_(w)
    return after - before


def layer_and_kind(name):
    """model.layers.3.self_attn.q_proj.weight -> ("3", "q_proj"); what is in no block is a layer of its own."""
    parts = name.split(".")
    return (parts[2] if "layers" in parts else parts[-2]), parts[-2]


def summarize(step, samples, layers, kinds):
    """One row of gradients.json from a step's samples: means and standard deviations over them."""

    def spread(values):
        values = torch.tensor([float(value) for value in values], dtype=torch.float64)
        return {"mean": values.mean().item(), "std": values.std().item() if len(values) > 1 else 0.0}

    def cosines(pair, keep=slice(None)):
        part = lambda sample, key: sample[key][keep].sum()
        x, y = pair
        lengths = lambda sample: (part(sample, x + x) * part(sample, y + y)).sqrt().clamp(min=1e-30)
        return spread(part(sample, pair) / lengths(sample) for sample in samples)

    letters = "ABM" if "MM" in samples[0] else "AB"
    pairs = ["".join(pair) for pair in itertools.combinations(letters, 2)]
    of = step.settings
    mix = mix_name(Stage(mix=set_label(of["mix"]), mix_weight=shown_weight(of)))
    row = {"data": set_label(of["data"]), "mix": mix, "tag": of["tag"]}
    row["norm"] = {x: spread(s[x + x].sum().sqrt() for s in samples) for x in letters}
    row["dot"] = {pair: spread(s[pair].sum() for s in samples) for pair in pairs}
    row["cosine"] = {pair: cosines(pair) for pair in pairs}
    for key in ("first_order", "real"):
        row[key] = {which: spread(s[key][which] for s in samples) for which in samples[0][key]}
    for key, labels in (("by_layer", layers), ("by_kind", kinds)):
        row[key] = {}
        for label in dict.fromkeys(labels):
            keep = torch.tensor([x == label for x in labels])
            row[key][label] = {}
            for pair in pairs:
                dot = spread(s[pair][keep].sum() for s in samples)
                row[key][label][pair] = {"dot": dot, "cosine": cosines(pair, keep)}
    return row


def print_row(name, row, own):
    mean = lambda values, form: format(values["mean"], form) if values else "-"
    number = lambda value, form: "-" if value is None else format(value, form)
    first, data = row["first_order"][own], row["data"] + (f" ({row['tag']})" if row["tag"] else "")
    print(f"{name:>14} {data:>8} {row['mix'] or '-':>8} {mean(row['norm']['A'], '.3f'):>8} "
          f"{mean(row['norm']['B'], '.3f'):>8} {mean(row['cosine']['AB'], '+.4f'):>9} "
          f"{mean(row['cosine'].get('AM'), '+.4f'):>9} {first['mean']:+11.2e} {first['std']:8.1e} "
          f"{mean(row['real'][own], '+.2e'):>10} {row['delta_1']:+10.2e} {number(row['delta_2'], '+.2e'):>10} "
          f"{number(row['forgotten'], '.1f'):>9}")  # fmt: skip


def spearman(x, y):
    """Spearman's rank correlation; equal values share their mean rank. 0 where one side does not vary."""

    def ranked(values):
        ranks = [sum(a < b for a in values) + sum(a == b for a in values) / 2 for b in values]
        return torch.tensor(ranks, dtype=torch.float64)

    x, y = ranked(x), ranked(y)
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()).clamp(min=1e-30))


# ---------------------------------------------------------------- layer transplant


def transplant(args, path, lineage, device, rank):
    """Ask D_A of CKPT with each window of OTHER's parts in place of its own: CKPT/transplant.json and .png.

    The parts in order: the embedding (with the output embedding where the two are tied), --grid groups of blocks, and
    the final norm with the output embedding. All parts make the model OTHER, none leave it CKPT. A share is of the
    facts that OTHER answers and CKPT does not. What was asked is kept as it comes, so a killed run goes on.
    """
    facts = first_set(args, path, lineage)[1].facts[: args.num_examples]
    if Config.from_folder(path).raw != Config.from_folder(args.transplant).raw:
        raise DataError(f"{args.transplant}: its config.json is not that of {path}; name a checkpoint of the same "
                        "model")  # fmt: skip
    tokenizer = load_tokenizer(path)
    precision = resolve_precision(args.precision, path, lineage, device.type)
    model = load_model(path, compute_dtype(precision), device)
    if fits_beside(model):
        other = load_model(args.transplant, compute_dtype(precision), device)
    else:
        other = None
        check_saved(args.transplant)
    parts = split_parts(model, args.grid)
    file, part = Path(path) / "transplant.json", Path(path) / "transplant.part"
    other_path = relative_path(args.transplant, path)
    header = {"other": other_path, "precision": precision, "parts": [label for label, _ in parts],
              "facts": [fact["id"] for fact in facts]}  # fmt: skip
    fits = lambda row: not wrong_fields(row, {"first": int, "last": int, "correct": list})
    done = {(row["first"], row["last"]): row["correct"] for row in kept_rows(part, header, fits)}

    windows = [(0, -1)] + [(first, last) for first in range(len(parts)) for last in range(first, len(parts))]
    bar = progress_bar(total=len(windows), initial=len(done), desc="transplant", disable=rank > 0)
    for first, last in windows:
        if (first, last) in done:
            continue
        names = {name for _, names in parts[first : last + 1] for name in names}
        with parts_of(model, other, names, path, args.transplant):
            right = exact_matches(model, tokenizer, facts)
        done[first, last] = [fact["id"] for fact, is_right in zip(facts, right) if is_right]
        if rank == 0:
            with open(part, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"first": first, "last": last, "correct": done[first, last]}) + "\n")
        bar.update()
    bar.close()
    none, whole = set(done[0, -1]), set(done[0, len(parts) - 1])
    lost = whole - none
    rows = []
    for first, last in windows[1:]:
        right = done[first, last]
        returned = len(lost.intersection(right)) / len(lost) if lost else None
        rows.append({"first": first, "last": last, "accuracy": 100 * len(right) / len(facts), "returned": returned})
    result = {"other": other_path, "parts": header["parts"], "total": len(facts),
              "none": 100 * len(none) / len(facts), "all": 100 * len(whole) / len(facts), "lost": len(lost),
              "windows": rows}  # fmt: skip
    if rank == 0:
        print_windows(result)
        write_json(file, result)
        draw_transplant(result, f"{path} with parts of {args.transplant}", file.with_suffix(".png"))
        part.unlink()


@contextlib.contextmanager
def parts_of(model, other, names, path, other_path):
    """In this block the model, that of folder path, has other_path's parameters of these names.

    other: the other model where memory holds both, which then exchange them; None: they are read from the folders.
    """
    if other is None:
        load_weights(model, other_path, only=names)
        yield
        load_weights(model, path, only=names)
        return
    mine, others = dict(model.named_parameters()), dict(other.named_parameters())
    for name in names:
        mine[name].data, others[name].data = others[name].data, mine[name].data
    yield
    for name in names:
        mine[name].data, others[name].data = others[name].data, mine[name].data


def split_parts(model, grid):
    """[(label, names of parameters), ...]: the embedding, at most grid groups of blocks, the end of the model."""
    n, names = model.config.num_hidden_layers, [name for name, _ in model.named_parameters()]
    bounds = sorted({round(i * n / grid) for i in range(grid + 1)})
    parts = [("embedding", {"model.embed_tokens.weight"})]
    for first, end in zip(bounds, bounds[1:]):
        inside = {name for name in names if name.startswith("model.layers.") and first <= int(name.split(".")[2]) < end}
        parts.append((f"{first}-{end - 1}" if end - first > 1 else str(first), inside))
    return parts + [("end", {name for name in names if name.startswith(("model.norm.", "lm_head."))})]


def print_windows(result):
    """The heat map's first row, diagonal and last column: the parts up to each one, each alone, from each one on."""
    shares = {(row["first"], row["last"]): row["returned"] for row in result["windows"]}
    print(f"{result['none']:.1f}% of {result['total']} facts, {result['all']:.1f}% with all parts; share of the "
          f"{result['lost']} lost facts that return:")  # fmt: skip
    print(f"{'part':>10} {'alone':>7} {'up to it':>9} {'from it on':>11}")
    for i, label in enumerate(result["parts"]):
        cells = [shares[i, i], shares[0, i], shares[i, len(result["parts"]) - 1]]
        alone, up_to, from_on = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        print(f"{label:>10} {alone:>7} {up_to:>9} {from_on:>11}")


# ---------------------------------------------------------------- lost or unreachable


def recover(args, path, lineage, device, rank):
    """Train on N of the facts that CKPT lost, apart from that on N never seen, and ask the other lost facts.

    Writes CKPT/recover.json and .png. If the lost facts are still there but no longer reached (section 4.1), relearning
    some brings others back, and facts of the same form that were never seen bring back fewer.
    """
    stage, asked = first_set(args, path, lineage)
    facts = asked.facts[: args.num_examples]
    tokenizer = load_tokenizer(path)
    model = sharded(path, lineage[-1]["precision"], device)

    def ask(model):
        with generation_mode(model):
            return exact_matches(model, tokenizer, facts)

    before = ask(model)
    lost = [i for i, right in enumerate(before) if not right]
    if len(lost) <= args.recover:
        raise DataError(f"{path}: lost {len(lost)} of its {len(facts)} facts, not more than --recover {args.recover}; "
                        "give a lower number")  # fmt: skip
    chosen = random.Random(f"recover {args.seed}").sample(lost, args.recover)
    others = [i for i in lost if i not in chosen]
    never = never_seen(stage, lineage, args.recover, args.data_dir, base_of(path, lineage))
    lr, every = args.lr or stage["lr"], max(1, args.steps // 4)
    arms = {"own": [facts[i] for i in chosen], "never seen": never}
    result = {"facts": len(facts), "lost": len(lost), "trained": args.recover, "others": len(others),
              "steps": args.steps, "lr": lr, "arms": {}}  # fmt: skip
    for arm, examples in arms.items():
        load_weights(model, path)
        encoded, log = encode(tokenizer, examples), [{"step": 0, "returned": 0, "kept": sum(before)}]
        optimizer = AdamW(model.parameters())
        order = batches(len(encoded), args.batch_size, args.steps, args.seed)
        bar = progress_bar(order, total=args.steps, desc=arm, disable=rank > 0)
        for step, (_, batch) in enumerate(itertools.islice(bar, args.steps), 1):
            step_loss = train_step(model, [encoded[i] for i in batch], micro_tokens(model))
            optimizer.lr = learning_rate(step, args.steps, lr)
            optimizer.step(step_loss.grad_norm)
            optimizer.zero_grad()
            if step % every == 0 or step == args.steps:
                right = ask(model)
                kept = sum(right[i] for i in range(len(facts)) if before[i])
                log.append({"step": step, "loss": step_loss.loss, "returned": sum(right[i] for i in others),
                            "kept": kept, "relearned": sum(right[i] for i in chosen)})  # fmt: skip
        result["arms"][arm] = log
        del optimizer
    if rank == 0:
        print(f"{path}: {len(lost)} of {len(facts)} facts lost; {args.steps} steps on {args.recover}, then the "
              f"{len(others)} other lost facts are asked")  # fmt: skip
        print(f"{'trained on':>12} {'step':>5} {'loss':>8} {'others returned':>16} {'still known':>12} "
              f"{'of the ' + str(args.recover):>10}")  # fmt: skip
        for arm, log in result["arms"].items():
            for row in log[1:]:
                print(f"{arm:>12} {row['step']:5} {row['loss']:8.4f} {row['returned']:16} {row['kept']:12} "
                      f"{row['relearned']:10}")  # fmt: skip
        write_json(Path(path) / "recover.json", result)
        draw_recovery(result, path, Path(path) / "recover.png")


def never_seen(stage, lineage, n, data, base_model):
    """n facts like a stage's that no stage of the lineage was trained on.

    They are from its set's second slice, or the later lines of a file.
    """
    name = stage["data"]
    if not name.endswith(".jsonl"):
        base, second, familiarity = resolve(name)
        familiarity = familiarity or stage.get("familiarity")
        name = (base if second else f"{base}-id") + (f".{familiarity}" if familiarity else "")
    of_set = [entry["num_examples"] for entry in lineage if entry["data"] in (name, name.partition(".")[0])]
    seen = max(of_set, default=0)
    return load_set(name, seen + n, data, base_model=base_model)[0][seen:]


# ---------------------------------------------------------------- pictures


def draw_ranks(ranks, result, title, path):
    """Heat map of facts x layers: the rank of a fact's worst token.

    Known facts are above the line, each part by its mean log-rank.
    """
    worst, correct = ranks
    order = sorted(range(len(correct)), key=lambda i: (not correct[i], worst[:, i].log().mean().item()))
    figure, ((axes,),) = picture(size=(6.5, 5))
    from matplotlib.colors import LogNorm

    norm = LogNorm(1, max(2, int(worst.max())))
    image = axes.imshow(worst[:, order].T, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
    axes.axhline(int(correct.sum()) - 0.5, color="red", linewidth=1)
    axes.set(title=f"{title}\n{result['accuracy']:.1f}% correct (above the line)", xlabel="layer", ylabel="facts")
    figure.colorbar(image, label="rank of the fact's worst token")
    save(figure, path)


def draw_gradients(rows, layers, title, path):
    """Cosine with D_A's gradient by layer and by kind of module, a line a step: of D_B solid, of D_M dashed."""
    figure, axes = picture(1, 2, (11, 4.2))
    kinds = list(rows[0]["by_kind"])
    for panel, key, labels in ((axes[0][0], "by_layer", layers), (axes[0][1], "by_kind", kinds)):
        drawn = set()
        for row in rows:
            for pair, name, style in (("AB", row["data"], "-"), ("AM", row["mix"], "--")):
                if name and (pair, name) not in drawn:
                    cosines = [row[key][x][pair]["cosine"]["mean"] for x in labels]
                    label = f"{'D_B' if pair == 'AB' else 'D_M'} = {name}"
                    panel.plot(range(len(labels)), cosines, style, marker=".", color=f"C{len(drawn)}", label=label)
                    drawn.add((pair, name))
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        panel.set(xlabel="layer" if key == "by_layer" else "kind of module", ylabel="cosine with the gradient of D_A")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def draw_transplant(result, title, path):
    """Curve: the parts alone, up to and from each one. Heat map: every window, first part against last."""
    figure, ((curve, heat),) = picture(1, 2, (11, 4.4))
    labels, n = result["parts"], len(result["parts"])
    share = torch.full((n, n), float("nan"))
    for row in result["windows"]:
        share[row["first"], row["last"]] = float("nan") if row["returned"] is None else row["returned"]
    curves = {"this part alone": share.diagonal(), "all up to this": share[0], "this and all after": share[:, -1]}
    for label, values in curves.items():
        curve.plot(range(n), values, marker=".", label=label)
    curve.set_xticks(range(n), labels, rotation=45)
    curve.set(xlabel="part taken from the other checkpoint", ylabel="share of the lost facts that return",
              ylim=(-0.03, 1.03))  # fmt: skip
    curve.legend(fontsize="small")
    image = heat.imshow(share, vmin=0, vmax=1, cmap="viridis")
    heat.set_xticks(range(n), labels, rotation=45)
    heat.set_yticks(range(n), labels)
    heat.set(xlabel="last part", ylabel="first part")
    figure.colorbar(image, label="share that returns")
    figure.suptitle(f"{title}: {result['none']:.1f}% with none, {result['all']:.1f}% with all", fontsize="medium")
    save(figure, path)


def draw_recovery(result, title, path):
    figure, ((axes,),) = picture(size=(6, 3.8))
    for arm, log in result["arms"].items():
        shares = [100 * row["returned"] / result["others"] for row in log]
        label = f"trained on {result['trained']} {arm} facts"
        axes.plot([row["step"] for row in log], shares, marker=".", label=label)
    axes.set(title=f"{title}\n{result['others']} lost facts that were not trained on", xlabel="step",
             ylabel="% that return", ylim=(-3, 103))  # fmt: skip
    axes.legend(fontsize="small")
    save(figure, path)


if __name__ == "__main__":
    begin_command("give the same command again")
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except OSError as error:  # a full disk, a folder that may not be written
        fail(error, 1)
