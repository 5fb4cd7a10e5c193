"""One stage of continual memorization: train a model on a set, alone or mixed with D_M (REMIX), and save it.

    torchrun --nproc_per_node 8 train.py --stage 1 --mix random                              # Llama-3-8B learns KVR
    torchrun --nproc_per_node 8 train.py --stage 2 --model CKPT --data bios --mix pydoc      # then something else
    python train.py --stage 1 --model models/SmolLM2-135M-Instruct --num-examples 96         # one device, GPU or CPU
    python train.py --stage 1 --mix random --dry-run 8 --gpu-memory 80                       # what it would take

Defaults are the paper's (appendix B.4). One path for any number of ranks: FSDP2 shards the model over several; one
alone holds it whole, and casts fp32 master weights where bf16 ones compute. A batch gives the same step whatever the
number of ranks and micro-batches. A run that was killed or stopped goes on with --resume, on any number of ranks;
without a state it begins at the first step, so a script can always give it.

--out is a complete checkpoint: config.json, safetensors and manifest.json with their sha256, the base model's tokenizer
files, chat_template.jinja, metrics.jsonl (a line a step: losses by source, learning rate, gradient norm, tokens,
seconds; and the retention checks), and last run.json: an entry a stage with every setting and what came of it. Until
then state-STEP holds weights, moments, position and settings, a file a rank. Folders' names mean nothing.

Several machines share one file system; GLOO_SOCKET_IFNAME names the network between them. With Slurm, --requeue covers
preemption and the trap the time limit:

    #!/bin/bash
    #SBATCH --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --cpus-per-task 64 --time 4:00:00
    #SBATCH --signal B:USR1@300 --requeue --open-mode append
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280  # seconds that torchrun, from torch 2.13 on, leaves its ranks to save
    trap 'stopped=yes; scancel --signal TERM "$SLURM_JOB_ID"' USR1  # before the time limit: the ranks save their state
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
    srun torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \\
      --rdzv_endpoint "$host:29500" train.py --stage 1 --mix random --resume &
    wait $!; status=$?
    [ -z "$stopped" ] || { wait $!; scontrol requeue "$SLURM_JOB_ID"; }
    exit $status
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports take their seconds, Ctrl-C has nothing to save

import argparse
import atexit
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch.optim.adamw import adamw

from data import (
    DEFAULT_WORDS, SETS, STOPPING, DataError, Parser, SentencePieceTokenizer, TiktokenTokenizer, at_hand, batches,
    begin_command, encode_example, end_by, flat_file, load_examples, load_tokenizer, lock, progress_bar, read_json,
    write_file,
)
from evaluate import (
    STEP_FIELDS, BaseModel, base_of, check_folder, check_vocabulary, common_prefix_len, exact_matches, facts_at_hand,
    familiarity, is_foreign, is_own_log, is_split, load_set, read_lineage, read_rows, record, relative_lineage,
    resolve_precision, said, set_label, settings_of, stage_facts, stage_sets, was_sorted, without_paths, wrong_fields,
)
from model import (
    MANIFEST, PRECISIONS, CheckpointError, Config, Packed, SaveError, all_gather, answer_positions, any_rank,
    build_model, content_id, device_name, end_process_group, fail, free_memory, generation_mode, is_run, is_sharded,
    load_weights, local, local_rows, model_name, product_speeds, raise_on_all_ranks, reshard, rows_of, save_model,
    setup_device, temporary_name, tensor_files, to_device, verify, weights_dtype, weights_sample_sha256, whole_memory,
    write_json, write_tensors, writing,
)

LEARNING_RATES = {"llama": 5e-5, "mistral": 1e-5}  # appendix B.4
OTHER_LEARNING_RATE = 5e-5  # of families that are not in the paper
STOP_HITS = 10  # consecutive steps below --stop-loss that end a stage
WARMUP = 0.05  # share of all steps
MICRO_TOKENS = {"cuda": 16384, "cpu": 1024}  # of a micro-batch, unless told otherwise
USABLE = 0.9  # of a GPU's memory: the allocator leaves gaps
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, for each weight


def parse_args(words=None):
    """Options from the command line or from a list of words, checked."""
    parser = Parser(description="Train one stage.")

    def add(name, default=None, help="", **options):
        help += "" if default is None else f" (default: {default})"
        parser.add_argument(name, default=default, help=help, **options)

    def switch(name, help):
        parser.add_argument(name, action="store_true", help=help)

    # what to learn
    add("--stage", type=int, help="1 starts from a base model, later ones from the stage before")
    add("--data", help="set or .jsonl file to learn; at stage 1 kvr unless told otherwise")
    add("--num-examples", type=int, default=2000, help="its first N examples")
    switch("--fewer", "take what there is where the set or D_M has less than is asked for; the record says how much")
    switch("--unfiltered", "take all facts of a published set, not only those that the base model does not know")
    add("--mix", default="none", help="D_M: random, another mixing set, a .jsonl file, or none")
    add("--mix-ratio", type=float, default=2.0, help="examples of D_M for each of the set's own")
    add("--mix-words", type=int, default=DEFAULT_WORDS, help="length of D_M's passages in words")
    add("--mix-weight", type=mix_weight, default=1.0, metavar="W",
        help="weight of D_M's answer tokens in the loss; 0 computes none of them, equal weighs all like the facts")
    add("--replay", type=float, default=0.0, help="share of each earlier stage's facts that joins (section 3.2)")
    add("--data-dir", default="data", help="folder of flat files")
    # from where to where
    add("--model", help="base model at stage 1 (default models/Meta-Llama-3-8B), the previous stage's checkpoint after")
    add("--out", help="checkpoint folder (default: below runs/ at stage 1, inside the previous stage's folder after)")
    add("--tag", default="", help="a label in the run's record, by which tables tell a control apart; the name of a "
        "setting, such as lr, tells each of its values apart")  # fmt: skip
    # how
    add("--seed", type=int, default=0, help="seed of the training order")
    add("--lr", type=float, help="peak learning rate (default: 1e-5 for Mistral, 5e-5 for Llama and for families that "
        "are not in the paper)")  # fmt: skip
    add("--batch-size", type=int, default=32, help="examples a step, over all ranks")
    add("--epochs", type=epochs, default=20, metavar="N",
        help="most passes over the data; @RUN, a finished run's folder, for as many as make its steps")  # fmt: skip
    add("--stop-loss", type=float,
        help=f"end after {STOP_HITS} consecutive steps below this loss, 0 never (default: 1e-4, kvr 0)")  # fmt: skip
    add("--max-length", type=int, default=2048, help="tokens after which an example is cut")
    add("--micro-tokens", type=int,
        help="most tokens of a micro-batch, padding included (default: 16384 on a GPU, 1024 on a CPU)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="auto",
        help="bf16-mixed keeps fp32 master weights; auto: as the stage before, else what is faster here")  # fmt: skip
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction,
        help="keep each block's input alone and compute the rest again: a third slower, much less memory "
             "(default: only where a rank has no room for them)")  # fmt: skip
    add("--reshard-after-forward", action=argparse.BooleanOptionalAction,
        help="gather the weights again for the backward pass and for each micro-batch: slower, less memory "
             "(default: only where a rank has no room for them)")  # fmt: skip
    switch("--compile", "compile the blocks; takes minutes before the first step")
    switch("--deterministic", "on a GPU, the same sums in the same order in every run; slower")
    add("--eval-every", type=int, default=100, help="steps between checks of the earlier stages' facts, 0 for none")
    add("--eval-facts", type=int, default=256, help="facts of each stage asked in a retention check")
    # what a fault must not take
    add("--save-every", type=Every.of, default="20m", metavar="N",
        help="minutes (20m) or steps (250) between saves of the state, which goes when the run ends; 0 for only at "
             "SIGTERM or Ctrl-C")  # fmt: skip
    switch("--resume", "go on from the state in --out; without one, begin at the first step")
    add("--dry-run", type=int, nargs="?", const=0, metavar="RANKS",
        help="print what RANKS ranks would take, load no weights, and stop with status 2 where it cannot fit")
    add("--gpu-memory", type=float,
        help="with --dry-run: GB of each GPU (default: as found, else this machine's memory)")  # fmt: skip
    switch("--plan", "say what the runs of run_all.sh's plan, on standard input, would take")
    add("--gpu-tflops", type=float, default=300, help="with --plan: TFLOP/s that a GPU sustains")
    add("--only", help="with --plan: of one table or figure alone")
    add("--asked", nargs="+", default=[], metavar="NAME", help="with --plan: sets that runs tagged familiar are asked")
    switch("--brief", "with --plan: say in one line how long they will take on this machine")
    add("--after", type=int, default=0, metavar="N", help="with --brief: once N steps of one of them were timed")
    args = parser.parse_args(words)
    if not args.plan:
        check_options(args)
        complete_options(args)
    return args


# ---------------------------------------------------------------- the examples of a stage


@dataclass
class EncodedExample:
    """An example as it is trained on."""

    id: str  # of its line in the flat file
    ids: list  # its T tokens
    labels: list  # as many: the token where an answer is to be learned, -100 elsewhere
    source: str  # one of SOURCES

    @property
    def n_supervised(self):
        """How many of its tokens are to be learned."""
        return sum(label != -100 for label in self.labels)


SOURCES = ("own", "mix", "replay")  # the stage's own set, D_M, an earlier stage's facts


def encode(tokenizer, examples, source="own", max_length=2048):
    """A list of examples as EncodedExamples of one source."""
    return [EncodedExample(example["id"], *encode_example(tokenizer, example, max_length), source) for example in examples]


def gather_examples(args, lineage):
    """({source: examples}, what run.json says of them): own ones, ratio x as many of D_M, facts of earlier stages."""
    base_model = base_of(args.model, lineage) if is_split(args.data) and not args.unfiltered else None
    kept = familiarity(args.data, base_model, args.data_dir) if base_model else ""
    name = f"{args.data}.{kept}" if kept else args.data
    own, sha256 = load_set(name, args.num_examples, args.data_dir, base_model=base_model, fewer=args.fewer)
    counts = {"num_examples": len(own), "familiarity": kept, "data_sha256": sha256, "mix_sha256": None}
    mix, replayed = [], []
    if args.mix != "none":
        n_mix = round(args.mix_ratio * len(own))
        mix, counts["mix_sha256"] = load_examples(args.mix, n_mix, args.data_dir, args.mix_words, fewer=args.fewer)
    for earlier in lineage if args.replay else []:
        facts = stage_facts(earlier, args.data_dir)
        replayed += random.Random(f"replay {args.seed}").sample(facts, round(args.replay * len(facts)))
    counts |= {"num_mix": len(mix), "num_replay": len(replayed)}
    return {"own": own, "mix": mix, "replay": replayed}, counts


def encode_stage(args, lineage, tokenizer):
    """(the stage's EncodedExamples, what run.json says of them), without those that have no answer to learn."""
    gathered, counts = gather_examples(args, lineage)
    encoded = []
    for source in SOURCES:
        encoded += encode(tokenizer, gathered[source], source, args.max_length)
    kept = [example for example in encoded if example.n_supervised]
    cut = [example.id for example in encoded if not example.n_supervised]
    if cut and int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(cut)} examples have no answer within --max-length {args.max_length} and are left out, "
              f"first {cut[0]}")  # fmt: skip
    if not kept:
        raise DataError(f"no example has an answer within --max-length {args.max_length}; raise it")
    return kept, counts | {"num_cut": len(cut)}


def count_answer_tokens(examples):
    """{source: answer tokens} of EncodedExamples."""
    counts = Counter()
    for example in examples:
        counts[example.source] += example.n_supervised
    return counts


def resolve_mix_weight(weight, examples):
    """--mix-weight as a number: "equal" gives D_M's answer tokens in all the weight of own and replayed facts'."""
    counts = count_answer_tokens(examples)
    if weight == "equal" and counts["mix"]:
        weight = (counts["own"] + counts["replay"]) / counts["mix"]
    if weight == "equal" or not trained_examples(examples, weight):
        raise DataError(f"--mix-weight {weight}: the stage has answer tokens {dict(counts)} within --max-length; "
                        "raise that, or give another weight")  # fmt: skip
    return weight


def trained_examples(batch, mix_weight):
    """A batch's examples that are computed: without D_M's, where they weigh nothing."""
    return [example for example in batch if mix_weight or example.source != "mix"]


# ---------------------------------------------------------------- the model and its step


def build_sharded(config, device, precision="bf16-mixed", kept=None, compile=False, shard=None):
    """A model with room for this rank's share of its weights, which are still to be loaded.

    precision and compile are train.py's options; kept: what its ranks keep, activations alone unless told otherwise.
    shard: whether by FSDP, as over several ranks it always is.
    """
    kept = kept or Kept(weights=False)
    world = dist.get_world_size()
    shard = world > 1 if shard is None else shard
    model = build_model(config, torch.bfloat16 if precision == "bf16" else torch.float32, "meta" if shard else device)
    model.checkpoint_activations, model.keep_gathered = not kept.activations, kept.weights
    model.keep_gradients = kept.weights and kept.gradients
    half = {"bf16-mixed": torch.bfloat16, "bf16": None, "fp32": None}[precision]
    model.compute_dtype = half  # a rank alone has nothing to gather, only to cast
    for block in model.model.layers if compile else []:
        block.forward = torch.compile(block.forward)  # inside of FSDP's hooks
    if shard:
        # A second of a start that a rank alone need not wait for.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # cast_forward_inputs would round the cosines and sines of the positions.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (world,))
        share_out = functools.partial(fully_shard, mesh=mesh, mp_policy=policy)
        # A group is gathered as one: each block, and, of a model whose head is not its embedding, the head apart, which
        # nothing before it waits for. Only blocks are ever put back between the passes: the others come right again.
        for block in model.model.layers:
            share_out(block, reshard_after_forward=not kept.weights)
        if not config.tie_word_embeddings:
            share_out([model.model.norm, model.lm_head], reshard_after_forward=False)
        share_out(model, reshard_after_forward=False)
        model.to_empty(device=device)
    return model


@dataclass
class StepLoss:
    """A batch over all ranks: the mean of `losses` over answer tokens, D_M's counting mix_weight, and its gradient."""

    loss: float  # with a penalty where there is one
    losses: dict  # {source: mean loss of its answer tokens}, of the sources that the batch has
    answer_tokens: dict  # {source: how many}
    grad_norm: float  # length of the gradient in the parameters
    signals: list  # for each signal whether any rank gave it


def train_step(model, batch, micro_tokens, mix_weight=1.0, penalty=None, signals=list, backward=True):
    """The StepLoss of a batch of trained_examples; backward: its gradient is left in the parameters.

    The loss is (loss summed over own and replayed answer tokens + mix_weight x that over D_M's) / (their number +
    mix_weight x D_M's number), for any number of ranks and any micro_tokens (of a micro-batch, padding included).
    penalty() is called after the backward pass: it adds its gradient to that in the parameters and returns this rank's
    part of its value, a scalar tensor. signals() gives this rank's signals to all, booleans, as late as can be.
    """
    device = model.model.embed_tokens.weight.device
    # Counted before the first backward pass: every micro-batch's gradient is a part of the whole batch's mean.
    counts = count_answer_tokens(batch)
    n_tokens = counts["own"] + counts["replay"] + mix_weight * counts["mix"]
    total, penalized = torch.zeros(2, dtype=torch.float64, device=device)
    by_source = torch.zeros(len(SOURCES), dtype=torch.float64, device=device)
    parts = collate(batch, micro_tokens, device)
    for number, part in enumerate(parts, 1):
        with torch.set_grad_enabled(backward):
            places = (part.rows, part.columns)
            log_probs = model(part.ids, logit_positions=places, packed=part.packed).float().log_softmax(-1)  # (n, V)
            losses = F.nll_loss(log_probs.detach(), part.targets, reduction="none")  # (n,)
            if mix_weight == 1 or not counts["mix"]:  # all weigh the same
                loss_sum = F.nll_loss(log_probs, part.targets, reduction="sum")
            else:
                weights = torch.where(part.sources == SOURCES.index("mix"), mix_weight, 1.0)
                loss_sum = F.nll_loss(log_probs, part.targets, reduction="none") @ weights
        del log_probs  # the largest tensor of all must not outlive its own backward pass
        if backward:
            hold(model, number < len(parts))
            # Gradients are averaged over ranks: times world, over the whole batch's tokens, is the mean over tokens.
            (loss_sum * dist.get_world_size() / n_tokens).backward()
        total += loss_sum.detach()
        by_source += (part.sources == torch.arange(len(SOURCES), device=device)[:, None]).double() @ losses.double()
    if not backward:
        reshard(model)
    if penalty:
        penalized += penalty().detach()
    # All that ranks have to tell each other goes with the loss, and reading it is a GPU step's one wait.
    told = to_device(torch.tensor(signals(), dtype=torch.float64), device)
    sums = torch.cat([torch.stack([total, penalized, squared_length(model)]), by_source, told])
    dist.all_reduce(sums)
    total, penalized, squares, *sums = sums.tolist()
    by_source, told = sums[: len(SOURCES)], sums[len(SOURCES) :]
    losses = {source: summed / counts[source] for source, summed in zip(SOURCES, by_source) if counts[source]}
    return StepLoss(total / n_tokens + penalized, losses, dict(counts), math.sqrt(squares), [n > 0 for n in told])


def main(penalty=None):
    """One stage, from its options to a finished checkpoint.

    A penalty is a function, whose name stands in the record.
    penalty(model, batch, reference) is called in each step as train_step says; reference() is the model as the stage
    began (theta_A), loaded when first asked for. What it takes is not in the plan.
    """
    args = parse_args()
    if args.plan:
        runs = read_plan(sys.stdin)
        return say_time(runs, args.precision, args.after) if args.brief else say_plan(runs, args)
    check_folder(args.data_dir, may_be_made=True)
    lineage = read_lineage(args.model)
    config = Config.from_folder(args.model)
    if args.stage != len(lineage) + 1:
        raise DataError(f"{args.model}: has {len(lineage)} stages behind it, so the next is --stage {len(lineage) + 1}")
    out = Path(args.out)
    if out.resolve() == Path(args.model).resolve():
        raise DataError(f"{out}: holds the model to start from; give another --out")
    tokenizer = load_tokenizer(args.model)
    check_vocabulary(tokenizer, config, args.model)
    template = chat_template(tokenizer, args.model)
    if args.dry_run is not None:
        return plan(args, config, lineage, tokenizer)

    device, rank, world = setup_device()
    if device.type == "cpu":
        use_large_pages()
    if args.deterministic:
        be_deterministic()
    say = print if rank == 0 else lambda *_: None
    # A folder is one run's: rank 0 locks its log, and finds the state that an earlier attempt left.
    log, state = None, None
    with raise_on_all_ranks():
        if rank == 0:
            log, state = claim(out, args.resume)
            begun = log.tell() > 0
    state = all_gather(state)[0]
    manifest = read_state(state) if state else None
    # One precision for a chain of stages, and for a run that is resumed on another machine.
    if manifest and args.precision == "auto":
        args.precision = manifest["settings"]["precision"]
    args.precision = resolve_precision(args.precision, args.model, lineage, device.type)

    # What the stage learns. A machine's first rank builds what is missing, the others read it; all must have the same.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        with raise_on_all_ranks():
            if turn == first:
                examples, counts = encode_stage(args, lineage, tokenizer)
                earlier = stage_sets(lineage, args.data_dir)
    args.lr = args.lr or LEARNING_RATES.get(config.model_type, OTHER_LEARNING_RATE)
    args.equal_weight = args.mix_weight == "equal"
    args.mix_weight = resolve_mix_weight(args.mix_weight, examples)
    args.epochs, args.step_matched = resolve_epochs(args.epochs, len(examples), args.batch_size)
    args.penalty = penalty.__name__ if penalty else None
    with raise_on_all_ranks():
        entry = stage_entry(args, counts, base_of(args.model, lineage))
        settings = all_settings(args.model, entry, examples, config, lineage)
    if len(set(all_gather(sha256_of(settings)))) > 1:
        raise DataError(f"{args.data_dir}: the ranks were given different data or settings; copy one machine's to all")

    # Nothing here draws random numbers and an epoch's order depends on the seed alone: a run's position is its step.
    position, files = load_state(state, manifest, settings) if state else (Position(), None)
    micro_tokens = args.micro_tokens or MICRO_TOKENS[device.type]
    made = made_with(args, device, world, micro_tokens)
    if made not in position.made_with:
        position.made_with.append(made)
    load, room = measure_load(args, examples, micro_tokens, world), min(all_gather(whole_memory(device)))
    kept, taken = choose_kept(args, config, load, world, device.type == "cuda", room)
    keeps_freed = device.type == "cpu" and 2 * sum(taken.values()) < room
    if keeps_freed:
        keep_freed_memory()
    model = build_sharded(config, device, args.precision, kept, args.compile)
    optimizer = AdamW(model.parameters())
    if state:
        restore(files, position, model, optimizer)
    else:
        load_weights(model, args.model)
    reference = functools.cache(functools.partial(starting_model, args.model, config, device, args.precision))
    with raise_on_all_ranks():
        if rank == 0:
            rewind(log, position)
    order = list(batches(len(examples), args.batch_size, args.epochs, args.seed))
    total = len(order)
    announce(say, args, entry, examples, total, f"{world} x {device.type}{said_of(kept, world)} -> {out}")
    if state:
        say(f"goes on after step {position.step} of {state}")
    elif rank == 0 and begun:
        say(f"no state in {out}: begins again at the first step")

    def write_row(row):
        if rank == 0:
            with writing(out / "metrics.jsonl"):
                log.write(json.dumps(row) + "\n")

    def signals():
        """What all ranks must know of each other: a signal to stop, and by rank 0's clock that a save is due."""
        due = args.save_every.is_due(position.step + 1, time.perf_counter() - saved)
        stopping = [signal.SIGINT in sent, signal.SIGTERM in sent]
        return [*stopping, rank == 0 and due]

    # From here on a signal is seen at the end of a step, so that no step is lost; before, there was none to lose.
    sent = []
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sent.append(number))
    stopped_by = "epochs"
    mixed = "" if args.mix == "none" else f" + {set_label(args.mix)}"
    title = f"stage {args.stage}: {set_label(args.data)}{mixed}"
    bar = progress_bar(total=total, initial=position.step, desc=title, unit="step", disable=rank > 0)
    ended = saved = time.perf_counter()
    for step in range(position.step + 1, total + 1):
        # Every example once an epoch, facts and D_M shuffled together, in an order that seed and epoch alone decide.
        epoch, indices = order[step - 1]
        batch = trained_examples([examples[i] for i in indices], args.mix_weight)
        # The schedule counts steps, with an update or without: a control's facts meet the rates of the mixed run's.
        optimizer.lr = learning_rate(step, total, args.lr)
        step_loss = None
        if batch:
            # The loss, and its gradient in the parameters.
            extra = functools.partial(penalty, model, batch, reference) if penalty else None
            step_loss = train_step(model, batch, micro_tokens, args.mix_weight, extra, signals)
            if not math.isfinite(step_loss.loss) or not math.isfinite(step_loss.grad_norm):
                # Every rank has the same two numbers, so all of them stop here, before this step changes a weight.
                names = ", ".join(example.id for example in batch)
                fail(f"step {step}: loss {step_loss.loss}, gradient norm {step_loss.grad_norm}; nothing was updated. "
                     f"The batch was: {names}", 1)  # fmt: skip
            # One outlier must not undo the stage: a gradient is cut to length 1.
            optimizer.step(step_loss.grad_norm)
            optimizer.zero_grad()  # the next step's gradient adds up from nothing
            # Only an update says whether the facts are learned: a batch without one neither counts nor breaks the row.
            position.loss, position.updates = step_loss.loss, position.updates + 1
            position.hits = position.hits + 1 if step_loss.loss < args.stop_loss else 0
            *stopping, due = step_loss.signals
        else:
            *stopping, due = [any_rank(signal, device) for signal in signals()]
        position.step = step

        # The log holds the loss that this step trained on, whole and by source, and the time from the last step's end:
        # a GPU is still at an update when the next step begins.
        before, ended = ended, time.perf_counter()
        tokens, seconds = sum(len(example.ids) for example in batch), ended - before
        row = {"step": step, "epoch": epoch, "loss": None, "lr": optimizer.lr, "grad_norm": None, "tokens": tokens,
               "seconds": round(seconds, 4)}  # fmt: skip
        found = asdict(step_loss) if step_loss else {}
        found.pop("signals", None)
        write_row(row | found)
        shown = f"loss {step_loss.loss:.5f}" if step_loss else "no fact in the batch, no update"
        bar.set_postfix_str(f"{shown}, lr {optimizer.lr:.2e}, {tokens / seconds:.0f} tokens/s", refresh=False)
        bar.update()
        if keeps_freed and step % 10 == 0:
            give_back_freed_memory()
        # What is left of the earlier stages is what the experiment asks: look on the way, not only at the end.
        if earlier and args.eval_every and step % args.eval_every == 0:
            for name, accuracy in check_retention(model, tokenizer, earlier, args.eval_facts).items():
                write_row({"step": step, "data": name, "accuracy": accuracy})
                bar.write(f"step {step}: {name} {accuracy:.1f}%") if rank == 0 else None
            ended = time.perf_counter()
        # Appendix B.4: a stage ends when its loss has stayed below the threshold.
        if position.hits == STOP_HITS:
            stopped_by = "loss"
            break
        # A kill must not cost more than --save-every, and a signal no step.
        if step < total and (any(stopping) or due):
            state = save_state(out, log, model, optimizer, position, settings)
            ended = saved = time.perf_counter()
            if any(stopping):
                stopped_by = "signal"
                break
    bar.close()

    if stopped_by != "signal":
        # Weights in the base model's own type, its tokenizer, and last the lineage: a folder with run.json is complete.
        save_model(model, out, weights_dtype(args.model))
        with raise_on_all_ranks(), writing(out):
            if rank == 0:
                synced_size(log)
                copy_tokenizer(args.model, out, template)
                entry |= made | {"resumed_from": [part for part in position.made_with if part != made]}
                entry |= outcome(log.name) | {"steps": step, "updates": position.updates, "final_loss": position.loss,
                                              "stopped_by": stopped_by, "checkpoint": str(out)}  # fmt: skip
                rows = relative_lineage([*lineage, entry], out)
                write_file(out / "run.json", json.dumps(rows, indent=2) + "\n")
                for old in states_in(out):
                    shutil.rmtree(old)
        idle = step - position.updates
        without = f"; {idle} of the batches held no fact and gave no update" if idle else ""
        say(f"{out}: {step} steps in {entry.get('seconds', 0):.0f} s, loss {position.loss:.2e}, stopped by "
            f"{stopped_by}{without}")  # fmt: skip
    del model, optimizer, reference
    end_process_group()
    if stopped_by == "signal":
        number = STOPPING[stopping.index(True)]
        if rank == 0:
            line = f"{number.name}: stopped after step {step}, saved in {state}; go on with --resume"
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        end_by(number)


# Options that decide neither weights nor log, so that --resume may change them.
FREE_OPTIONS = {
    "model", "out", "data_dir",  # folders, whose content is compared
    "unfiltered", "fewer",  # the entry's familiarity and numbers of examples say what came of it
    # they change no more than roundings
    "micro_tokens", "checkpoint_activations", "reshard_after_forward", "compile", "deterministic",
    "save_every", "resume", "dry_run", "gpu_memory", "plan", "gpu_tflops", "only", "asked", "brief", "after",
}


def stage_entry(args, counts, base_model):
    """What run.json says of a stage, but for how it went: every setting that can decide a result, and its log."""
    options = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    for name in ("data", "mix"):
        if options[name].endswith(".jsonl"):
            options[name] = os.path.abspath(options[name])
    return options | counts | {"base_model": os.path.abspath(base_model.path), "base_model_name": base_model.name,
                               "base_model_sha256": base_model.sha256}  # fmt: skip


def made_with(args, device, world, micro_tokens):
    """What a run is made with, by its record: the code's commit, versions, and what changes roundings alone."""
    tree = functools.partial(git, Path(__file__).resolve().parent)
    tracked = tree("ls-files", "train.py")
    return {"commit": tree("rev-parse", "HEAD") if tracked else None,
            "clean": tree("status", "--porcelain", "--untracked-files=no") == "" if tracked else None,
            "python": platform.python_version(), "torch": str(torch.__version__), "device": device_name(device),
            "ranks": world, "micro_tokens": micro_tokens, "compile": args.compile,
            "deterministic": args.deterministic}  # fmt: skip


def git(folder, *words):
    """What a git command says of a folder; None where it cannot."""
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
    except OSError:  # git is not there
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def outcome(log):
    """What a finished run's log adds up to: tokens, seconds, and by source the mean loss of an answer token.

    The losses are those that the last epoch's steps began with: a batch alone may hold little of a source.
    """
    steps = [row for row in read_rows(Path(log)) if "tokens" in row]
    if any(wrong_fields(row, STEP_FIELDS) for row in steps):
        raise DataError(f"{log}: damaged; restore it")
    summed, counts = Counter(), Counter()
    for row in steps:
        if row["epoch"] == steps[-1]["epoch"]:
            for source, loss in row.get("losses", {}).items():
                counts[source] += row["answer_tokens"][source]
                summed[source] += loss * row["answer_tokens"][source]
    return {"tokens": sum(row["tokens"] for row in steps), "seconds": round(sum(row["seconds"] for row in steps), 1),
            "losses": {source: summed[source] / counts[source] for source in counts}}  # fmt: skip


def all_settings(model, entry, examples, config, lineage):
    """All that decides a run's weights and log: its state keeps it, and --resume compares it."""
    tokens = [(example.ids, example.labels, example.source) for example in examples]
    contents = {"tokens": tokens, "config": config.raw, "lineage": record(lineage)}
    hashes = {f"{name}_sha256": sha256_of(content) for name, content in contents.items()}
    hashes["weights_sample_sha256"] = weights_sample_sha256(model)
    return {key: value for key, value in without_paths(entry).items() if key != "base_model_name"} | hashes


def sha256_of(value):
    """Of what JSON writes of a value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def announce(say, args, entry, examples, total, where):
    """The line that says what a run is about to do."""
    chosen = f" {entry['familiarity']} to {entry['base_model_name']}" if entry["familiarity"] else ""
    weight = f" of weight {args.mix_weight:.4g}" if args.mix_weight != 1 else ""
    tokens = sum(len(example.ids) for example in trained_examples(examples, args.mix_weight))
    say(f"stage {args.stage}: {entry['num_examples']} x {args.data}{chosen}, {entry['num_mix']} x {args.mix}{weight}, "
        f"{entry['num_replay']} replayed; {tokens} tokens an epoch, at most {total} steps, lr {args.lr}, "
        f"{args.precision}, {where}")  # fmt: skip


# ---------------------------------------------------------------- values of options


def check_options(args):
    """A DataError where an option's value is none, or options do not go together."""
    if args.stage is None:
        raise DataError("--stage says which stage this is: 1 for the first")
    for name in ("stage", "num_examples", "mix_words", "batch_size", "max_length", "eval_facts"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be at least 1")
    if not args.tag.isprintable():
        raise DataError(f"--tag {args.tag!r}: give one line of text")
    if args.mix_weight != 1 and args.mix == "none":
        raise DataError("--mix-weight weighs D_M, so it goes with --mix")
    if not 0 <= args.mix_ratio < math.inf or min(args.eval_every, args.dry_run or 0) < 0:
        raise DataError("--mix-ratio, --eval-every and --dry-run cannot be negative")
    if not 0 <= args.replay <= 1:
        raise DataError("--replay lies between 0 and 1")
    for name in ("lr", "micro_tokens", "gpu_memory"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise DataError(f"--{name.replace('_', '-')} must be above 0")
    if args.stage > 1 and not (args.model and args.data):
        raise DataError("after stage 1, --model names the previous stage's checkpoint and --data the set to learn")


def complete_options(args):
    """Give the options that were left out the values that others decide."""
    args.data = args.data or "kvr"
    args.model = args.model or "models/Meta-Llama-3-8B"
    if args.stop_loss is None:
        args.stop_loss = SETS[args.data].stop_loss if args.data in SETS else 1e-4
    if not args.out:
        mix = "" if args.mix == "none" else f"+{set_label(args.mix)}"
        mix += "" if args.mix_weight == 1 else f".m{args.mix_weight}".removesuffix(".0")
        mix += f"-{re.sub(r'[^A-Za-z0-9_.]+', '-', args.tag)}" if args.tag else ""
        parent = Path("runs") / model_name(args.model) if args.stage == 1 else Path(args.model)
        args.out = str(parent / f"{set_label(args.data)}{mix}-s{args.seed}")


def mix_weight(text):
    """--mix-weight's value: "equal" or a number."""
    with contextlib.suppress(ValueError):
        if text == "equal" or 0 <= float(text) < math.inf:
            return text if text == "equal" else float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 on nor equal")


def epochs(text):
    """--epochs' value: a number from 1 on, or @ and a run's folder."""
    with contextlib.suppress(ValueError):
        if text[:1] == "@" and text[1:] or int(text) >= 1:
            return text if text[0] == "@" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor @ with a run's folder")


def resolve_epochs(epochs, n, batch_size):
    """(--epochs as a number over n examples, whether a run's steps decided it)."""
    if isinstance(epochs, int):
        return epochs, False
    lineage = read_lineage(epochs[1:])
    if not lineage:
        raise DataError(f"--epochs {epochs}: holds no finished run; name one's folder after the @")
    return max(1, round(lineage[-1]["steps"] / math.ceil(n / batch_size))), True


@dataclass(frozen=True)
class Every:
    """--save-every's value: so many steps or minutes lie between two saves; none where both are 0."""

    steps: int = 0
    minutes: float = 0.0

    @classmethod
    def of(cls, text):
        with contextlib.suppress(ValueError):
            if text.endswith("m") and 0 <= float(text[:-1]) < math.inf:
                return cls(minutes=float(text[:-1]))
            if int(text) >= 0:
                return cls(steps=int(text))
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor minutes like 20m")

    def is_due(self, step, seconds):
        """Whether to save after this step, so many seconds after the last save."""
        if self.steps:
            return step % self.steps == 0
        return 0 < self.minutes * 60 <= seconds


# ---------------------------------------------------------------- what a step needs


PADDED = 1 / 8  # about what a token of the padded batch, which attention alone computes, costs beside a packed one


def micro_batches(lengths, budget, world):
    """Share a batch out over the ranks, and each rank's part into groups of similar length.

    lengths: {index: tokens}. A group has at most budget tokens once padded, or is one example alone. Returns lists of
    indices, a multiple of `world` of them, some empty where examples are few: rank r takes groups r, r + world, ...
    """
    by_length = sorted(lengths, key=lengths.get, reverse=True)
    busy = min(world, len(lengths))  # ranks that get anything
    shares, work = [[] for _ in range(world)], [0.0] * world
    for index in by_length:  # the longest first, each to the rank that has least to do with it
        longest = [lengths[share[0]] if share else lengths[index] for share in shares[:busy]]
        with_it = [work[rank] + lengths[index] + PADDED * longest[rank] for rank in range(busy)]
        rank = with_it.index(min(with_it))
        shares[rank].append(index)
        work[rank] = with_it[rank]
    turns = itertools.zip_longest(*[cut(share, lengths, budget) for share in shares], fillvalue=[])
    return list(itertools.chain.from_iterable(turns))


def cut(indices, lengths, budget):
    """Indices, the longest first, in groups of at most budget tokens once padded; at least one group."""
    groups = [[]]
    for index in indices:
        # The first of a group is its longest and sets the padding.
        if groups[-1] and lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups


def starting_model(path, config, device, precision):
    """The model that a stage starts from (theta_A), frozen, and shared out over the ranks as the trained one is."""
    model = build_sharded(config, device, precision)
    load_weights(model, path)
    model.register_forward_hook(lambda *_: reshard(model))  # no backward pass will
    return model.requires_grad_(False)


@dataclass
class MicroBatch:
    """Texts that go through the model together, and the n answer tokens to be learned from them."""

    ids: torch.Tensor  # (B, T), right-padded to the longest
    rows: torch.Tensor  # (n,) with columns: the places that predict an answer token
    columns: torch.Tensor
    targets: torch.Tensor  # (n,) these tokens
    sources: torch.Tensor  # (n,) where they come from, as places in SOURCES
    packed: Packed


def collate(batch, micro_tokens, device):
    """This rank's MicroBatches of a batch of EncodedExamples, as many as every other rank has.

    A rank without examples gets one unsupervised token, with which it makes the others' passes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    groups, parts = micro_batches({i: len(example.ids) for i, example in enumerate(batch)}, micro_tokens, world), []
    for group in groups[rank::world]:
        examples = [batch[i] for i in group]
        longest = max((len(example.ids) for example in examples), default=1)
        ids = torch.zeros(max(1, len(examples)), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, : len(example.ids)] = torch.tensor(example.labels)
        sources = torch.tensor([SOURCES.index(example.source) for example in examples] or [0])
        rows = [example.ids for example in examples] or [[0]]
        packed = Packed.of([len(row) for row in rows], common_prefix_len(rows))
        # Places are found here, on the CPU: how many there are, a GPU would have to be asked.
        (rows, columns), targets = answer_positions(labels)
        tensors = [ids, rows, columns, targets, sources[rows]]
        parts.append(MicroBatch(*[to_device(tensor, device) for tensor in tensors], packed.to(device)))
    return parts


def hold(model, more):
    """Have a sharded model's next backward pass leave what it keeps of weights and gradients to more micro-batches."""
    if is_sharded(model):
        model.set_reshard_after_backward(not (more and model.keep_gathered))
        model.set_requires_gradient_sync(not (more and model.keep_gradients))


@torch.no_grad()
def squared_length(model):
    """Of what this rank holds of the gradient in the parameters, a scalar tensor, fp64; 0 where there is none."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=model.model.embed_tokens.weight.device)
    lengths = torch._foreach_norm([local(gradient) for gradient in gradients], 2, dtype=torch.float32)
    return torch.stack(lengths).double().square().sum()


class AdamW:
    """PyTorch's fused AdamW in its functional form: torch.optim's classes import the compiler, two seconds a start."""

    def __init__(self, params):
        self.params, self.state, self.lr = list(params), {}, 0.0
        for param in self.params:
            moments = {key: torch.zeros_like(local(param)) for key in MOMENTS}
            self.state[param] = {"step": torch.zeros((), device=param.device)} | moments

    @torch.no_grad()
    def step(self, grad_norm=0.0):
        """An update by this rank's rows of the gradient, whose length grad_norm is cut to 1 where it is more."""
        of_all = lambda key: [self.state[param][key] for param in self.params]
        weights, gradients = [local(param) for param in self.params], [local(param.grad) for param in self.params]
        # Divided by in the update itself: cutting costs no pass over the gradients.
        length = torch.full((), max(1.0, grad_norm + 1e-6), device=weights[0].device)
        adamw(weights, gradients, *map(of_all, MOMENTS), [], of_all("step"), fused=True, grad_scale=length,
              amsgrad=False, maximize=False, beta1=0.9, beta2=0.95, lr=self.lr, weight_decay=0.0, eps=1e-8)  # fmt: skip

    def zero_grad(self):
        for param in self.params:
            param.grad = None


def learning_rate(step, total, peak):
    """Of step 1 ... total: linear warm-up over the first 5%, then a cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def check_retention(model, tokenizer, sets, n):
    """{name: accuracy in %} on the first n facts of each of some FactSets."""
    accuracies = {}
    with generation_mode(model):
        for asked in sets:
            right = exact_matches(model, tokenizer, asked.facts[:n])
            accuracies[asked.name] = 100 * sum(right) / len(right)
    return accuracies


def use_large_pages():
    """Have PyTorch take large tensors in large pages: a tenth of a CPU step. To be called before the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory():
    """Have glibc keep what is freed between steps, which the kernel would zero again: a tenth of a CPU step.

    It leaves gaps, which grow: of two ranks with a block of 7B's sizes each took half as much again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def give_back_freed_memory():
    """Have glibc give all of it back after all: at every tenth step that costs a hundredth, and no gap grows large."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def be_deterministic():
    """Have a GPU add up in one order, as far as it can; PyTorch warns of what it cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it


# ---------------------------------------------------------------- what is saved beside the weights


TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "original/tokenizer.model"]  # fmt: skip


def copy_tokenizer(source, target, template):
    """Copy a checkpoint folder's tokenizer files, byte for byte, so that what is trained from it can be loaded alone.

    Beside them chat_template.jinja, as chat_template has it, tells how the model was trained to be asked.
    """
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            write_file(Path(target) / name, (Path(source) / name).read_bytes())
    write_file(Path(target) / "chat_template.jinja", template)


def chat_template(tokenizer, path):
    """encode_example's template for the tokenizer of a folder, as transformers 5 and servers read it (jinja).

    Llama 2 and Mistral begin a text with a space, behind bos too. transformers does so in a chat only where the
    tokenizer's settings say legacy, and then before each turn: one turn has the ids of training, several have not.
    """
    if tokenizer.bos_id is None:
        return CHAT_TEMPLATE.replace("{{- bos_token or '' }}\n", "")
    bare = _bare_behind_bos(tokenizer, Path(path))
    return CHAT_TEMPLATE.replace("bos_token or ''", "bos_token + ' '") if bare else CHAT_TEMPLATE


def _bare_behind_bos(tokenizer, path):
    """Whether transformers reads what stands behind bos without the space that this tokenizer puts before a text."""
    files = (path / "tokenizer_config.json", path / "config.json")
    config, model = (read_json(file) if file.exists() else {} for file in files)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return config.get("legacy") is False
    if isinstance(tokenizer, TiktokenTokenizer) or not tokenizer.begins_with_space:
        return False
    if str(config.get("tokenizer_class")).startswith("LlamaTokenizer") and model.get("model_type") != "mistral":
        return config.get("legacy") is not True  # transformers makes this one itself, whatever tokenizer.json says
    return not tokenizer.adds_space_behind_bos()


CHAT_TEMPLATE = """\
{{- bos_token or '' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>\\n' + message.content + eos_token }}
    {%- elif message.role == 'user' or (message.role == 'system' and loop.first) %}
        {{- '<|' + message.role + '|>\\n' + message.content + '\\n' }}
    {%- else %}
        {{- raise_exception('a message is of a user or an assistant, the first perhaps of the system') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


# ---------------------------------------------------------------- the state of an unfinished run


@dataclass
class Position:
    """How far a run has come: with the weights and their moments all that it needs to go on."""

    step: int = 0  # the last one made
    updates: int = 0  # steps that changed the weights: all but those whose batch held nothing to compute
    hits: int = 0  # consecutive updates with a loss below --stop-loss
    loss: float | None = None  # of the last update
    log_bytes: int = 0  # of metrics.jsonl
    made_with: list = field(default_factory=list)  # as made_with has it, of each part of the run that had another


def claim(out, resume):
    """Make folder out this process's own: (its metrics.jsonl, the newest state in it or None); else a DataError."""
    finished = is_run(out)
    if not finished:
        check_own(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Open, and so locked, as long as the run.
        log = open(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        mine = lock(log)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror.lower()}; give another --out") from None
    if not mine:
        raise DataError(f"{out}: another run is writing there; give another --out")
    states = sorted(states_in(out))
    for left in [*out.glob("*.[0-9]*.tmp"), *(states if finished else [])]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if finished:
        raise DataError(f"{out}: holds a finished run; give another --out, or remove it")
    if not resume and (states or log.tell()):
        raise DataError(f"{out}: holds an unfinished run; go on with --resume, or remove it")
    for old in [out / "eval.json", *out.glob("predictions.*.jsonl"), *out.glob("text.*.json")]:
        old.unlink(missing_ok=True)
    atexit.register(leave_no_empty, log)
    return log, states[-1] if states else None


def leave_no_empty(log):
    """Remove the log of a run that was refused before its first step, and its folder if nothing else is there."""
    path = Path(log.name)
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()
            path.parent.rmdir()


# All that a run writes or removes in its folder, beside its log.
RUN_FILES = (MANIFEST, "config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES,
             "chat_template.jinja", "run.json", "eval.json", "predictions.*.jsonl", "text.*.json", "state-*",
             "*.[0-9]*.tmp")  # fmt: skip


def check_own(out):
    """A DataError where a folder holds what a run would take the place of, a base model for one, and is no run's."""
    log = out / "metrics.jsonl"
    begun = is_own_log(log)
    if log.exists() and not begun:
        raise DataError(f"{log}: not of a run of this code; give another --out")
    there = [path for pattern in RUN_FILES for path in out.glob(pattern)]
    if there and not (begun and log.stat().st_size):
        raise DataError(f"{out}: holds {there[0].name}, and no run of this code; give another --out")
    if (out / "run.json").exists():
        raise DataError(f"{out / 'run.json'}: damaged, or another program's; give another --out")


def states_in(out):
    """The folders of whole states in a run's folder."""
    return [path for path in out.glob("state-*") if re.fullmatch(r"state-\d+", path.name)]


def save_state(out, log, model, optimizer, position, settings):
    """Write out/state-STEP: for each rank a file with its rows of every weight and moment, and last the manifest.

    The folder gets its name only when it is whole, and only then do older states go: a kill at any moment leaves one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    target = out / f"state-{position.step:06d}"
    unfinished = all_gather(temporary_name(target))[0]
    params = dict(model.named_parameters())
    tensors = {name: local(param) for name, param in params.items()}
    for name, param in params.items():
        tensors |= {f"{name}.{key}": optimizer.state[param][key] for key in MOMENTS}
    try:
        with raise_on_all_ranks(), writing(unfinished):
            unfinished.mkdir(exist_ok=True)
            position.log_bytes = synced_size(log)
        with raise_on_all_ranks():
            file = f"rank-{rank:05d}-of-{world:05d}.safetensors"
            layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            digest = write_tensors(unfinished / file, layout, tensors.values())
        files = dict(all_gather((file, digest)))
        with raise_on_all_ranks():
            if rank == 0:
                manifest = {"position": asdict(position), "settings": settings, "files": files}
                write_json(unfinished / MANIFEST, manifest)
                os.replace(unfinished, target)
                for old in states_in(out):
                    if old != target:
                        shutil.rmtree(old)
    except SaveError:
        shutil.rmtree(unfinished, ignore_errors=True)  # all ranks are here; what is left of it would only fill the disk
        raise
    return target


def read_state(state):
    """The manifest of a state whose files are whole."""
    manifest = verify(state, f"restore it, or remove {state.parent} to begin again")
    kinds = {**dict.fromkeys(["step", "updates", "hits", "log_bytes"], int), "made_with": list,
             "loss": (float, int, type(None))}  # fmt: skip
    position, settings = manifest.get("position"), manifest.get("settings")
    fits = not wrong_fields(position, kinds) and position.keys() == kinds.keys() and position["step"] == int(state.name[6:])
    if not fits or not isinstance(settings, dict) or settings.get("precision") not in PRECISIONS:
        raise DataError(f"{state}: of an earlier version of this code; go on with that, or remove {state.parent}")
    return manifest


def load_state(state, manifest, settings):
    """(Position, files in the order of ranks) of a state, whose run must have had the same settings."""
    settings, then = json.loads(json.dumps(settings)), manifest["settings"]
    others = [key for key in settings | then if settings.get(key) != then.get(key)]
    changed = [f"{key} was {said(then.get(key))}, now {said(settings.get(key))}" for key in others]
    if changed:
        raise DataError(f"{state}: of a run with other settings: {'; '.join(changed)}; give the same, or another --out")
    return Position(**manifest["position"]), [state / file for file in sorted(manifest["files"])]


def restore(files, position, model, optimizer):
    """Fill model and optimizer with this rank's rows, whatever the number of ranks that wrote the files."""
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        for name, param in model.named_parameters():
            optimizer.state[param]["step"].fill_(position.updates)
            stored = {name: param.detach()} | {f"{name}.{key}": optimizer.state[param][key] for key in MOMENTS}
            first, last = local_rows(param)
            for key, tensor in stored.items():
                for rank, shard in enumerate(shards):
                    begin, end = rows_of(param.shape[0], rank, len(shards))
                    start, stop = max(first, begin), min(last, end)
                    if start < stop:
                        local(tensor)[start - first : stop - first] = shard.get_slice(key)[start - begin : stop - begin]


def synced_size(log):
    """The bytes of the log, all of them on the disk; None where another rank has it."""
    if log:
        os.fsync(log.fileno())
        return log.tell()


def rewind(log, position):
    """Cut the log to what it was when the state was saved: a DataError unless each step so far stands in it once."""
    kept = Path(log.name).read_bytes()[: position.log_bytes]
    with contextlib.suppress(ValueError, RecursionError):
        rows = [json.loads(line) for line in kept.decode().splitlines()]
        steps = [row for row in rows if "loss" in row] if all(isinstance(row, dict) for row in rows) else [{}]
        counted = [row.get("step") for row in steps], sum(row.get("loss") is not None for row in steps)
        whole = len(kept) == position.log_bytes and kept[-1:] in (b"", b"\n")
        fit = counted == (list(range(1, position.step + 1)), position.updates)
        if whole and fit and not any(wrong_fields(row, STEP_FIELDS) for row in steps):
            log.truncate(position.log_bytes)
            return
    raise DataError(f"{log.name}: not the log of the state beside it, of steps 1 to {position.step}; restore it, or remove "
                    f"{Path(log.name).parent} to begin again")  # fmt: skip


# ---------------------------------------------------------------- what a run would take


def plan(args, config, lineage, tokenizer):
    """Print what the run would take; a DataError says what does not fit, and what would."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    ranks = args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    gpu = args.gpu_memory is not None or torch.cuda.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = resolve_precision(args.precision, args.model, lineage, "cuda" if gpu else "cpu")
    examples, _ = encode_stage(args, lineage, tokenizer)
    args.mix_weight = resolve_mix_weight(args.mix_weight, examples)
    args.epochs, _ = resolve_epochs(args.epochs, len(examples), args.batch_size)
    tokens = sum(len(example.ids) for example in trained_examples(examples, args.mix_weight))  # an epoch
    total = args.epochs * math.ceil(len(examples) / args.batch_size)
    n_params = count_params(config)
    micro_tokens = args.micro_tokens or MICRO_TOKENS["cuda" if gpu else "cpu"]
    # Without GPUs all ranks are taken to share this machine's memory.
    share = 1 if gpu else int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / ranks
    whole = args.gpu_memory * 1e9 if args.gpu_memory else whole_memory(device) * share
    room = whole if gpu else free_memory(device) * share

    load_of = functools.cache(functools.partial(measure_load, args, examples, micro_tokens))

    def need(ranks=ranks, **changes):
        """(what each of so many ranks would keep, and would take), also with other options."""
        return choose_kept(argparse.Namespace(**vars(args) | changes), config, load_of(ranks), ranks, gpu, whole)

    def fits(**changes):
        return sum(need(**changes)[1].values()) <= room

    kept, parts = need()
    taken = sum(parts.values())
    of = "a GPU" if gpu else "a rank"
    folder = next(parent for parent in [Path(args.out).resolve(), *Path(args.out).resolve().parents] if parent.exists())
    # Bytes a weight, by what config.json says: the folder may lack its weights yet.
    stored = 4 if "float32" in (config.raw.get("dtype"), config.raw.get("torch_dtype")) else 2
    checkpoint, state = n_params * stored, 3 * n_params * (2 if args.precision == "bf16" else 4)
    saves = args.save_every.minutes or 0 < args.save_every.steps < total
    disk, free = checkpoint + state * (2 if saves else 1), shutil.disk_usage(folder).free
    gb = lambda size: f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.3f}"
    print(f"{args.model}: {n_params / 1e9:.3f} billion parameters, {args.precision}, {ranks} rank{'s' * (ranks > 1)}"
          f"{said_of(kept, ranks)}")  # fmt: skip
    print(f"data: {len(examples)} examples, {tokens} tokens an epoch, at most {total} steps and "
          f"{args.epochs * tokens} tokens")  # fmt: skip
    if ranks > 1:
        balance = load_of(ranks).balance
        print(f"balance: the rank with most to do has {balance:.2f} times the tokens of the mean, over all steps")
    summands = " + ".join(f"{what} {gb(size)}" for what, size in parts.items() if size)
    print(f"memory {of}: {gb(taken)} GB = {summands}")
    print(f"disk: checkpoint {gb(checkpoint)} GB, state {gb(state)} GB; at most {gb(disk)} GB, {gb(free)} GB are free "
          f"for {args.out}")  # fmt: skip
    problems = []
    if taken > room:
        more = [2**i for i in range(11) if 2**i > ranks] if gpu else []
        problems.append(f"{gb(taken)} GB needed for {of}, {gb(room)} GB there; {what_fits(fits, more)}")
    if disk > free:
        less = ", or --save-every 0" if saves and checkpoint + state <= free else ""
        problems.append(f"{gb(disk)} GB needed on disk, {gb(free)} GB free for {args.out}; make room, or give another "
                        f"--out{less}")  # fmt: skip
    if problems:
        raise DataError(f"{args.model}: {'; '.join(problems)}")


def count_params(config):
    return sum(param.numel() for param in build_model(config, torch.float32).parameters())


def what_fits(fits, more):
    """Which other options would do, and the first of the larger numbers of ranks `more`; fits(**changes) tries one."""
    thrifty, less = "--checkpoint-activations --reshard-after-forward", "--precision bf16"
    options = {"checkpoint_activations": True, "reshard_after_forward": True}
    ways = {thrifty: options, less: {"precision": "bf16"}, f"{thrifty} {less}": options | {"precision": "bf16"}}
    fitting = [way for way, changes in ways.items() if fits(**changes)]
    fitting = fitting[:-1] or fitting  # all of them only where some are not enough
    for ranks in more:
        if fits(ranks=ranks):
            fitting.append(f"{ranks} ranks")
            break
    if not fitting:
        return "neither recomputing nor bf16 nor more ranks makes it fit"
    return f"what would fit: {', '.join(fitting)}"


@dataclass(frozen=True)
class Kept:
    """What a rank keeps in memory where it has the room, because making it again takes time."""

    activations: bool = True  # for the backward pass; or else each block's input alone, and the rest is computed again
    weights: bool = True  # once gathered, until the step's last backward pass; or else each pass gathers them
    gradients: bool = True  # whole, until the last micro-batch has added its own; or else each micro-batch reduces them


@dataclass
class Load:
    """What the steps of a stage ask of the ranks."""

    micro_batches: set  # {(tokens once packed, tokens once padded, answer tokens)}
    several: bool  # whether in some step a rank has more than one
    balance: float  # tokens of the rank that has most in a step over those of a rank's mean, over all steps


def measure_load(args, examples, micro_tokens, ranks):
    """The Load of a stage; its balance counts all tokens of an example, as if no start were shared, and no padding."""
    load, fullest, all_tokens = Load(set(), False, 1.0), 0, 0
    for _, indices in batches(len(examples), args.batch_size, args.epochs, args.seed):
        batch = trained_examples([examples[i] for i in indices], args.mix_weight)
        groups = micro_batches({i: len(example.ids) for i, example in enumerate(batch)}, micro_tokens, ranks)
        load.several = load.several or len(groups) > ranks
        tokens = [0] * ranks
        for place, group in enumerate(groups):
            rows, answers = [batch[i].ids for i in group], sum(batch[i].n_supervised for i in group)
            if rows:
                whole, repeated = sum(map(len, rows)), common_prefix_len(rows) * (len(rows) - 1)
                load.micro_batches.add((whole - repeated, len(rows) * max(map(len, rows)), answers))
                tokens[place % ranks] += whole
        fullest, all_tokens = fullest + max(tokens), all_tokens + sum(tokens)
    load.balance = fullest * ranks / all_tokens
    return load


def choose_kept(args, config, load, ranks, gpu, room):
    """(the most that a rank can keep in `room` bytes, the least if nothing fits, as options allow; what it takes)."""
    activations, weights = [True, False], [True, False]
    if args.checkpoint_activations is not None:
        activations = [not args.checkpoint_activations]
    if args.reshard_after_forward is not None:
        weights = [not args.reshard_after_forward]
    # Computing again costs most, so it is the last thing to be done.
    for kept in itertools.starmap(Kept, itertools.product(activations, weights, [True, False])):
        taken = memory_of_rank(config, ranks, args.precision, kept, load, gpu)
        if sum(taken.values()) <= USABLE * room:
            break
    return kept, taken


def said_of(kept, ranks):
    """What a plan or a run says of what its ranks keep."""
    said = "" if kept.activations else ", activations recomputed"
    if ranks == 1:
        return said
    if not kept.weights:
        return f"{said}, weights gathered for each pass"
    reduced = "" if kept.gradients else ", gradients reduced with each micro-batch"
    return f"{said}, weights gathered once a step{reduced}"


def activations_of_block(config, size, gpu, tokens, padded):
    """Bytes that a block keeps for its backward pass, of tokens once packed and once padded; size: of a number."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # Both norms' input in fp32, their quotient and their output; the output projection's input and four of the MLP.
    token = 2 * config.hidden_size * (4 + 2 * size) + size * (queries + 4 * config.intermediate_size)
    if config.qk_norm:
        token += (queries + keys) * (4 + 2 * size)  # as both norms
    attended = size * (queries * (1 + gpu) + 2 * keys)  # q, k, v, on a GPU the attention's output
    return tokens * token + padded * attended


def memory_of_rank(config, ranks, precision, kept, load, gpu):
    """{what: bytes} at the fullest moment of a step."""
    model = build_model(config, torch.float32)
    count = lambda module: sum(param.numel() for param in module.parameters())
    n_params, layers, block = count(model), len(model.model.layers), count(model.model.layers[0])
    head = 0 if config.tie_word_embeddings else count(model.lm_head) + count(model.model.norm)
    embedding = n_params - layers * block - head
    master = 2 if precision == "bf16" else 4  # bytes of a weight, its gradient and each of its moments
    size = 4 if precision == "fp32" else 2  # bytes of a number in the forward pass
    own_rows = n_params * master // ranks

    of_block = functools.partial(activations_of_block, config, size, gpu)

    def of_pass(tokens, padded):
        return layers * (of_block(tokens, padded) if kept.activations else tokens * config.hidden_size * size)

    most = max(of_pass(*texts) for *texts, _ in load.micro_batches)
    again = 0 if kept.activations else max(of_block(*texts) for *texts, _ in load.micro_batches)
    vocabulary = config.vocab_size
    *texts, answers = max(load.micro_batches, key=lambda part: of_pass(*part[:2]) + 12 * part[2] * vocabulary)

    if ranks > 1:
        between = n_params if kept.weights else embedding + head  # weights that are gathered between the passes
        in_block = n_params - head if kept.weights else embedding + 2 * block  # of which one is the next block's
        # A group's gradient as it came, in fp32 to be reduced, within gloo a second time, and this rank's rows of it.
        reduced = 4 if gpu else 8
        sent = size + reduced + 4 / ranks + (master if master < 4 else 0) / ranks
        waiting = 4 * (head or block)  # the one before
    else:  # has nothing to gather, but keeps what it has cast for the backward pass
        between = in_block = (n_params if kept.activations else embedding + head + block) * (size < master)
        sent, reduced, waiting = master + size, 0, 0
    gradients, head_sent, leaves = 0, sent, head  # leaves: weights that go as soon as the head is done
    if load.several and ranks > 1 and kept.weights and kept.gradients:
        gradients, head_sent = 4 * n_params, reduced  # of earlier micro-batches, whole: there already
    elif load.several:
        gradients, leaves = own_rows, 0 if kept.weights else head
    moments = [
        # The head is gathered, and computes.
        {"gathered weights": (between + head * (ranks > 1)) * size, "activations": of_pass(*texts),
         "logits": answers * vocabulary * size, "gradients": gradients},
        # The logits in fp32, their softmax, its gradient.
        {"gathered weights": between * size, "activations": of_pass(*texts), "logits": answers * vocabulary * 12,
         "gradients": gradients},
        # The head's gradient is reduced.
        {"gathered weights": (between - leaves + (ranks > 1 and not kept.weights) * block) * size,
         "activations": most, "gradients": gradients + int(head * head_sent)},
        # The last block's backward pass, with all that the others have kept for theirs.
        {"gathered weights": in_block * size, "activations": most + again,
         "gradients": max(gradients, head * master // ranks) + block * size + waiting},
        # The first block's, when the others' gradients are there.
        {"gathered weights": (embedding + block) * size * (ranks > 1), "activations": most // layers + again,
         "gradients": own_rows + int(block * sent)},
        # The embedding's gradient, the last.
        {"gradients": own_rows + int(embedding * sent)},
    ]  # fmt: skip
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return {
        "weights": own_rows,
        "moments": 2 * own_rows,
        **fullest,
        "libraries": int(1.5e9 if gpu else 0.4e9),  # the CUDA context and NCCL's buffers; on a CPU Python and PyTorch
    }


# ---------------------------------------------------------------- what a grid would take


@dataclass
class Planned:
    """A run of run_all.sh's plan."""

    tables: list
    folder: Path
    needs: str  # the folder of the run that it starts from, or -
    args: argparse.Namespace

    @property
    def done(self):
        return (self.folder / "eval.json").exists()

    def check(self, runs):
        """A DataError where the folder holds a finished run that is not the planned one; runs: all of the plan."""
        if not (self.folder / "run.json").exists() or is_foreign(self.folder):
            return
        *before, entry = read_lineage(self.folder)
        needed = read_lineage(self.needs) if before and Path(self.needs).is_dir() else []
        if record(before) != record(needed):
            raise DataError(f"{self.folder}: began with another run than {self.needs} now holds; remove it")
        planned = settings_of(vars(self.args)) | {"seed": self.args.seed, "familiarity": self.familiarity}
        if not before and list(Path(self.args.model).glob("*.safetensors")):
            planned["base_model_sha256"] = id_of(self.args.model)
        # What the model, the machine or another run decides stays open in a plan.
        fixed = [key for key, value in planned.items() if key in entry and value not in (None, "auto", "equal")]
        fixed = [key for key in fixed if key != "epochs" or isinstance(planned[key], int)]
        then = without_paths(entry)
        if "num_mix" in then and then["mix"] != "none":
            planned["num_mix"] = round(then["mix_ratio"] * then["num_examples"])
            fixed.append("num_mix")
        for key, need in zip(("num_examples", "num_mix"), needs_of(self, runs, []) if self.args.fewer else []):
            if key in fixed and then[key] < planned[key] and not need.has_more(than=then[key]):
                fixed.remove(key)
        changed = [f"{key} is {then[key]!r}, not {planned[key]!r}" for key in fixed if then[key] != planned[key]]
        if changed:
            raise DataError(f"{self.folder}: holds a finished run whose {'; '.join(changed)}; remove it, or give "
                            "another --runs")  # fmt: skip

    @property
    def familiarity(self):
        """As the run's record will have it."""
        chosen = is_split(self.args.data) and "." not in self.args.data and not self.args.unfiltered
        return "unfamiliar" if chosen else ""

    @property
    def kind(self):
        """Runs of one kind take the same tokens a step."""
        free = {*FREE_OPTIONS, "seed", "epochs", "lr", "tag", "stage"}
        return json.dumps({name: value for name, value in vars(self.args).items() if name not in free})


id_of = functools.cache(content_id)  # of a plan's models, each read once


def read_plan(lines):
    """{folder: Planned} of run_all.sh's plan, whose lines hold, between tabs, the tables that a run is of, its folder,
    the folder it needs, and this script's options between unit separators.
    """
    runs = {}
    for line in lines:
        names, folder, needs, options = line.rstrip("\n").split("\t")
        args = parse_args([word for word in options.split("\x1f") if word])
        if isinstance(args.epochs, str):
            args.epochs = f"@{Path(args.epochs[1:])}"  # a folder has one name, however it was written
        run = Planned(names.split(","), Path(folder), str(Path(needs)), args)
        runs[str(run.folder)] = run
    for run in runs.values():
        run.check(runs)
    return runs


def say_plan(runs, args):
    """Print what a plan would take: runs and GPU-hours by table, steps, disk, and what is known to fall short."""
    if not 0 < args.gpu_tflops < math.inf:
        raise DataError("--gpu-tflops must be above 0")
    by_table, hours, seeds = {}, {}, Counter()
    if args.only:
        shown = [run for run in runs.values() if args.only in run.tables]
        if not shown:
            known = {name for run in runs.values() for name in run.tables}
            there = ", ".join(sorted(known, key=place_of_table))
            raise DataError(f"--only {args.only}: no run is of it; there are {there}")
        runs = {str(run.folder): run for run in with_needed(shown, runs)}
    for folder, run in runs.items():
        for name in [args.only] if args.only else dict.fromkeys(run.tables):
            by_table.setdefault(name, []).append(run)
        hours[folder] = 0.0 if run.done else flops(run, runs) / (args.gpu_tflops * 1e12) / 3600
        seeds[run.args.seed] += hours[folder]
    print(f"{'':10} {'runs':>6} {'done':>6} {'to do':>6} {'GPU-hours':>10}")

    def say(name, chosen):
        left, needed = sum(not run.done for run in chosen), sum(hours[str(run.folder)] for run in chosen)
        print(f"{name:10} {len(chosen):6} {len(chosen) - left:6} {left:6} {hours_said(needed):>10}", end="")

    for name in sorted(by_table, key=place_of_table):
        say(name, with_needed(by_table[name], runs))
        print()
    say("all", list(runs.values()))
    print("   (tables share runs)")
    print(f"GPU-hours: 6 FLOPs for each parameter and token trained on, at {args.gpu_tflops:g} TFLOP/s sustained "
          "(--gpu-tflops); at most, as a loss may stop a stage before; what asking and probing takes is not "
          "counted")  # fmt: skip
    if len(seeds) > 1:
        of_seeds = ", ".join(f"{seed} {hours_said(needed)}" for seed, needed in sorted(seeds.items()))
        print(f"by seed (--seeds): {of_seeds}; a line above is what --only takes with all of them")
    to_do = [run for run in runs.values() if not run.done]
    steps = sum(most_steps(run.args, runs) for run in to_do)
    print(f"steps to do: at most {steps}")
    say_hours(runs, to_do)
    kept = {run.needs for run in runs.values()} - {"-"}
    for model in base_models(runs):
        weights = set(tensor_files(Path(model)).values()) if any(Path(model).glob("*.safetensors")) else []
        size = sum(file.stat().st_size for file in weights) / 1e9
        said = f"; {model} has no weights here, so their size is unknown"
        if size:
            state = size * (3 if weights_dtype(model) == torch.float32 else 6)  # weights and moments in fp32
            said = f", {size:.3f} GB each of {model}; a run in progress takes {2 * state:.3f} GB more"
        of_model = [folder for folder in kept if base_of_run(runs[folder], runs) == model]
        print(f"disk: {len(of_model)} checkpoints are kept for later stages{said}")
    say_shortfalls(runs, to_do, args)


def place_of_table(name):
    """table1 to table6, then figure2 to figure12."""
    return not name.startswith("table"), len(name), name


def hours_said(hours):
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def with_needed(chosen, runs):
    """Runs, and before each those that it starts from or takes its steps from."""
    found = {}

    def add(folder):
        run = runs[folder]
        for needed in (run.needs, run.args.epochs[1:] if isinstance(run.args.epochs, str) else "-"):
            if needed != "-":
                add(needed)
        found[folder] = run

    for run in chosen:
        add(str(run.folder))
    return list(found.values())


def base_of_run(run, runs):
    """The folder of the base model that a planned run goes back to."""
    while run.needs != "-":
        run = runs[run.needs]
    return run.args.model


def base_models(runs):
    return sorted({run.args.model for run in runs.values() if run.args.stage == 1})


def flops(run, runs):
    """Of a planned run's training, whose loss never stops it: 6 for each parameter and token."""
    args, model = run.args, base_of_run(run, runs)
    tokens = args.num_examples * (1 + args.replay) * mean_tokens(args.data, DEFAULT_WORDS, args.data_dir, model)
    if args.mix != "none" and args.mix_weight != 0:
        n_mix = round(args.mix_ratio * args.num_examples)
        tokens += n_mix * mean_tokens(args.mix, args.mix_words, args.data_dir, model)
    epochs = most_steps(args, runs) / steps_an_epoch(args)
    return 6 * params_of(model) * epochs * tokens


@functools.cache
def params_of(model):
    """How many parameters the model in a folder has; of the paper's two also where it is not here."""
    if not (Path(model) / "config.json").exists():
        return PARAMETERS.get(model_name(model), PARAMETERS["Meta-Llama-3-8B"])
    return count_params(Config.from_folder(model))


tokenizer_of_plan = functools.cache(load_tokenizer)  # read once, and warned of once, for all runs of a model


@functools.cache
def mean_tokens(name, words, data, model):
    """Tokens of an example of a set: counted where it and the model's tokenizer are at hand, else as SETS has them."""
    whole = name if name.endswith(".jsonl") else name.partition(".")[0]  # split for a model or not
    try:
        tokenizer = tokenizer_of_plan(model)
        if at_hand(whole, 1, data, words) and flat_file(whole, data, words).exists():
            examples = encode(tokenizer, load_examples(whole, None, data, words)[0][:COUNTED])
            return sum(len(example.ids) for example in examples) / len(examples)
    except DataError:  # of the tokenizer or the set, which the runs will name
        pass
    known = SETS.get(whole.removesuffix("-id"))
    return known.tokens + known.tokens_a_word * words if known else 0.0


COUNTED = 200  # examples whose tokens tell a set's
PARAMETERS = {"Meta-Llama-3-8B": 8_030_261_248, "Mistral-7B-v0.3": 7_248_023_552}  # where the folder is not here


@dataclass(frozen=True)
class Need:
    """What a planned run takes of a set."""

    name: str  # with familiar or unfamiliar, where it is split
    n: int
    words: int
    data: str  # the folder of flat files
    model: str = ""  # the base model, where the set is split for it

    @property
    def base_model(self):
        """None where the folder is not here, or nothing is split."""
        if not self.model or not list(Path(self.model).glob("*.safetensors")):
            return None
        return BaseModel(model_name(self.model), self.model, id_of(self.model))

    def found(self):
        """How many there are; None where nothing here tells. A DataError where its files are unusable."""
        return facts_at_hand(self.name, self.n, self.data, self.words, self.base_model)

    def has_more(self, than):
        """Whether more than so many are known to be here."""
        try:
            return (self.found() or 0) > than
        except DataError:
            return False

    @property
    def said(self):
        """The set in words."""
        of_model = f" to {model_name(self.model)}" if self.model else ""
        passages = f" of {self.words} words" if self.name in SETS and SETS[self.name].kind == "mixing" else ""
        return f"{self.name}{of_model}{passages}"

    def is_sorted(self):
        """Whether it is known which facts the base model knows; before, there are at most as many as found() says."""
        return bool(self.base_model) and was_sorted(self.name, self.base_model, self.data)


def needs_of(run, runs, asked):
    """The Needs of a planned run: its set, its mix, and the sets that it will be asked."""
    args, model = run.args, base_of_run(run, runs)
    own, of_model = (f"{args.data}.{run.familiarity}", model) if run.familiarity else (args.data, "")
    found = [Need(own, args.num_examples, DEFAULT_WORDS, args.data_dir, of_model)]
    if args.mix != "none":
        found.append(Need(args.mix, round(args.mix_ratio * args.num_examples), args.mix_words, args.data_dir))
    if args.tag == "familiar":
        found += [Need(name, args.num_examples, DEFAULT_WORDS, args.data_dir, model) for name in asked]
    return found


def say_shortfalls(runs, to_do, args):
    """Print which sets are known to lack what runs to do take of them, and which are not here to tell."""
    wanted, broken, short, failing, unknown, unsorted = {}, [], [], [], set(), set()
    for run in to_do:
        for need in needs_of(run, runs, args.asked):
            wanted.setdefault(need, []).append(run)
    before = {str(run.folder): {str(other.folder) for other in with_needed([run], runs)} for run in to_do}
    for need, of_runs in wanted.items():
        # Whatever goes on from one of these is lost with it.
        lost = [run for run in to_do if before[str(run.folder)] & {str(other.folder) for other in of_runs}]
        tables = {args.only} if args.only else set(itertools.chain(*[run.tables for run in lost]))
        cells = f"{len(lost)} runs of {', '.join(sorted(tables, key=place_of_table))}"
        try:
            found = need.found()
        except DataError as error:
            broken.append(f"{error}: {cells}")
            continue
        if found is None:
            unknown.add(need.name.partition(".")[0])
        elif found < need.n:
            most = "at most " if need.model and not need.is_sorted() else ""
            # With --fewer what there is will do, and of familiar sets the others.
            enough = of_runs[0].args.fewer and (found or need.name.endswith(".familiar"))
            said = f"{need.said}: {most}{found} of {need.n}, {need.n - found} too few: {cells}"
            (short if enough else failing).append(said)
        elif need.model and not need.is_sorted():
            unsorted.add(need.name.partition(".")[0])
    if broken:
        print("cannot be read, so that these runs will fail:")
        print("\n".join(f"  {line}" for line in sorted(broken)))
    if failing:
        remedy = "" if any(run.args.fewer for run in to_do) else " (--fewer takes what there is)"
        print(f"falls short, so that these runs will fail{remedy}:")
        print("\n".join(f"  {line}" for line in sorted(failing)))
    if short:
        print("falls short:")
        print("\n".join(f"  {line}" for line in sorted(short)))
    if unknown:
        print(f"not here yet, so not known to suffice: {', '.join(sorted(unknown))} (python data.py --list)")
    if unsorted:
        print(f"not known to suffice before familiar facts are sorted out: {', '.join(sorted(unsorted))}")


def say_time(runs, precision, after):
    """Print how long a plan's runs will take here, all and those before the first chain's end.

    Before a step was timed, the speed of matrix products tells; `after`: wait until so many were.
    """
    expected = Expected.of(next(iter(runs.values())).args.model, precision)
    starter = os.getppid()
    logs = {folder: timed_steps(run.folder) for folder, run in runs.items()}
    while sum(map(len, logs.values())) < after:
        if os.getppid() != starter:
            return None  # whoever asked is gone
        time.sleep(0.5)
        logs = {folder: timed_steps(run.folder) for folder, run in runs.items()}
    measured = [row for steps in logs.values() for row in steps[1:]]  # a first step takes longer
    theirs = sum(expected.seconds(row["tokens"]) for row in measured)
    slower = sum(row["seconds"] for row in measured) / theirs if measured else 1.0
    left, first_end = 0.0, None
    needed = {run.needs for run in runs.values()}
    for folder, run in runs.items():
        if not run.done:
            tokens, steps = tokens_and_steps(run, runs)
            still = 1 - len(logs[folder]) / steps
            left += slower * still * expected.seconds(tokens, steps) + START_SECONDS
        if first_end is None and folder not in needed:
            first_end = left
    first = f", the first row after {about(first_end)}" if first_end else ""
    if after:
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # of another process's bar
        return print(f"{clear}at the speed of the first steps: {about(left)} more{first}", file=sys.stderr)
    done = sum(run.done for run in runs.values())
    said = f"{len(runs)} runs" + (f", {done} of them done already" if done else "")
    print(f"{said}; {about(left)} in {precision}{first}" if left else said)


def about(seconds):
    """A time as people say it."""
    return f"about {seconds / 60:.0f} minutes" if seconds > 90 else f"about {math.ceil(seconds / 10) * 10} seconds"


START_SECONDS = 12  # that a run takes beside its steps: two processes' starts, saving, asking


@dataclass
class Expected:
    """What a step of a model is expected to take."""

    n_params: int
    flops: float  # a second, of matrix products

    @classmethod
    def of(cls, model, precision):
        config, device_type = Config.from_folder(model), "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return cls(count_params(config), product_speeds(config, device_type)[dtype])

    def seconds(self, tokens, steps=1):
        """Three products a weight and token, and an update that reads 16 bytes a weight and writes 12."""
        return 6 * self.n_params * tokens / self.flops + 28 * self.n_params / MEMORY_SPEED * steps


MEMORY_SPEED = 15e9  # bytes a second, a laptop's


def timed_steps(folder):
    """The steps in a run's log; none where it is damaged, which is for the run itself to say."""
    log = folder / "metrics.jsonl"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    try:  # what follows the last line break was cut by a kill
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError:
        return []
    return [row for row in rows if not wrong_fields(row, STEP_FIELDS)]


def tokens_and_steps(run, runs):
    """(tokens, steps) of a planned run whose loss never stops it."""
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will say what is left out
        examples, _ = encode_stage(run.args, [], tokenizer_of_plan(base_of_run(run, runs)))
    steps = most_steps(run.args, runs)
    epochs = steps / math.ceil(len(examples) / run.args.batch_size)
    weight = resolve_mix_weight(run.args.mix_weight, examples)
    return epochs * sum(len(example.ids) for example in trained_examples(examples, weight)), steps


def most_steps(args, runs):
    """Steps of a run whose loss never stops it; of --epochs @RUN those of that run."""
    if not isinstance(args.epochs, int):
        return most_steps(runs[args.epochs[1:]].args, runs)
    return args.epochs * steps_an_epoch(args)


def steps_an_epoch(args):
    n = args.num_examples * (1 + args.mix_ratio * (args.mix != "none") + args.replay)
    return math.ceil(round(n) / args.batch_size)


def say_hours(runs, to_do):
    """Print tokens and hours of the runs to do, once some are measured: a step has the tokens of its kind's logs."""
    measured, seconds = {}, 0.0
    for run in runs.values():
        if steps := timed_steps(run.folder):
            measured.setdefault(run.kind, []).extend(row["tokens"] for row in steps)
            seconds += sum(row["seconds"] for row in steps)
    everything = [tokens for steps in measured.values() for tokens in steps]
    if not everything or not seconds:
        return
    expected = 0
    for run in to_do:
        alike = measured.get(run.kind, everything)
        expected += most_steps(run.args, runs) * sum(alike) / len(alike)
    rate = sum(everything) / seconds
    print(f"tokens to do: at most {expected:.3g}; {rate:.0f} tokens/s measured: {expected / rate / 3600:.1f} hours on "
          "one such machine")  # fmt: skip


if __name__ == "__main__":
    begin_command("no step was made; give the same command again")
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except SaveError as error:
        fail(f"{error}; what was saved before is whole: make room, then go on with --resume", 1)
    except torch.OutOfMemoryError:
        fail("out of GPU memory; give --reshard-after-forward, --checkpoint-activations, fewer --micro-tokens or more "
             "ranks: --dry-run RANKS says what each takes", 1)  # fmt: skip
    except BrokenPipeError:  # of the dry run or the plan; a run goes on with --resume
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("whoever read the output went away before its end", 1)
    except OSError as error:  # a data folder that is full or may not be written
        fail(f"{error}; make room, or name a folder that may be written with --data-dir or --out", 1)
