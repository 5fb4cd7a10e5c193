"""One stage of continual memorization: train a model on a set, alone or mixed with D_M (REMIX), and save the checkpoint.

    torchrun --nproc_per_node 8 train.py --stage 1 --mix random                              # Llama-3-8B learns KVR
    torchrun --nproc_per_node 8 train.py --stage 2 --model CKPT --data bios --mix pydoc      # then something else
    python train.py --stage 1 --model models/SmolLM2-135M-Instruct --num-examples 96         # one device, GPU or CPU
    python train.py --stage 1 --mix random --dry-run 8 --gpu-memory 80                       # what it would take

Defaults are the paper's (appendix B.4). One path for any number of ranks: FSDP2 shards the model over several; one alone
holds it whole, and casts fp32 master weights where bf16 ones compute. A batch gives the same step whatever the number of
ranks and micro-batches. A run that was killed or stopped goes on with --resume, on any number of ranks.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.optim.adamw import adamw
from tqdm import tqdm

from data import (
    DEFAULT_WORDS,
    SETS,
    DataError,
    Parser,
    copy_tokenizer,
    encode_example,
    epoch_order,
    load_examples,
    load_tokenizer,
    micro_batches,
    set_label,
    write_file,
)
from evaluate import (
    check_vocabulary,
    fail,
    familiarity,
    known,
    leave,
    model_name,
    read_lineage,
    setup_device,
    stage_facts,
)
from model import (
    MANIFEST,
    CheckpointError,
    Config,
    SaveError,
    build_model,
    from_all,
    load_weights,
    local,
    local_rows,
    naming,
    rows_of,
    save_model,
    together,
    verify,
    weights_dtype,
    whole,
    write_json,
    write_tensors,
)

LEARNING_RATES = {"llama": 5e-5, "mistral": 1e-5}  # appendix B.4
STOP_HITS = 10  # consecutive steps below --stop-loss that end a stage
WARMUP = 0.05  # share of all steps
LARGE = 3e9  # parameters from which a GPU recomputes activations unless told otherwise
MICRO_TOKENS = {"cuda": 8192, "cpu": 768}  # of a micro-batch, unless told otherwise
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, for each weight


def parse_args():
    parser = Parser(description="Train one stage.")

    def add(name, default=None, help="", **options):
        parser.add_argument(name, default=default, help=help if default is None else f"{help} (default: {default})", **options)

    # what to learn
    add("--stage", type=int, required=True, help="1 starts from a base model, later ones from the previous stage's checkpoint")
    add("--data", help="set or .jsonl file to learn; at stage 1 kvr unless told otherwise")
    add("--num-examples", type=int, default=2000, help="its first N examples")
    parser.add_argument("--unfiltered", action="store_true", help="take all facts of a published set, not only those that the base model does not know")
    add("--mix", default="none", help="D_M: random, another mixing set, a .jsonl file, or none")
    add("--mix-ratio", type=float, default=2.0, help="examples of D_M for each of the set's own")
    add("--mix-words", type=int, default=DEFAULT_WORDS, help="length of D_M's passages in words")
    add("--replay", type=float, default=0.0, help="share of each earlier stage's facts that joins this stage (section 3.2)")
    add("--data-dir", default="data", help="folder of flat files")
    # from where to where
    add("--model", help="base model at stage 1 (default models/Meta-Llama-3-8B), the previous stage's checkpoint after")
    add("--out", help="checkpoint folder (default: below runs/ at stage 1, inside the previous stage's folder after)")
    # how
    add("--seed", type=int, default=0, help="seed of the training order")
    add("--lr", type=float, help="peak learning rate (default: 5e-5 for Llama, 1e-5 for Mistral)")
    add("--batch-size", type=int, default=32, help="examples a step, over all ranks")
    add("--epochs", type=int, default=20, help="most passes over the data")
    add("--stop-loss", type=float, help=f"end after {STOP_HITS} consecutive steps below this loss, 0 never (default: 1e-4, kvr 0)")
    add("--max-length", type=int, default=2048, help="tokens after which an example is cut")
    add("--micro-tokens", type=int, help="most tokens of a micro-batch, padding included (default: 8192 on a GPU, 768 on a CPU)")
    add("--precision", choices=["bf16-mixed", "bf16", "fp32"], default="bf16-mixed", help="bf16-mixed keeps fp32 master weights")
    parser.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction,
                        help="keep each block's input alone and compute the rest again: a third slower, much less memory (default: on a GPU from 3 billion parameters)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the blocks; takes minutes before the first step")
    add("--eval-every", type=int, default=100, help="steps between retention checks on the earlier stages' facts, 0 for none")
    add("--eval-facts", type=int, default=256, help="facts of each stage asked in a retention check")
    # what a fault must not take
    add("--save-every", type=int, default=250, help="steps between saves of the training state, 0 for only at SIGTERM; the state goes when the run ends")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out; without one, begin at the first step")
    parser.add_argument("--dry-run", type=int, nargs="?", const=0, metavar="RANKS",
                        help="print parameters, memory, tokens, steps and disk for RANKS ranks, load no weights, and stop with status 2 where it cannot fit")  # fmt: skip
    add("--gpu-memory", type=float, help="with --dry-run: GB of each GPU (default: as found, or this machine's memory where there is none)")
    args = parser.parse_args()

    for name in ("stage", "num_examples", "mix_words", "batch_size", "epochs", "max_length", "eval_facts"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.mix_ratio < math.inf or not 0 <= args.replay <= 1 or min(args.eval_every, args.save_every, args.dry_run or 0) < 0:
        raise DataError("--mix-ratio, --eval-every, --save-every and --dry-run cannot be negative, and --replay lies between 0 and 1")
    for name in ("lr", "micro_tokens", "gpu_memory"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise DataError(f"--{name.replace('_', '-')} must be above 0")
    if args.stage > 1 and not (args.model and args.data):
        raise DataError("after stage 1, --model names the previous stage's checkpoint and --data the set to learn")
    args.data = args.data or "kvr"
    args.model = args.model or "models/Meta-Llama-3-8B"
    if args.stop_loss is None:
        args.stop_loss = SETS[args.data].stop_loss if args.data in SETS else 1e-4
    if not args.out:
        mix = "" if args.mix == "none" else f"+{set_label(args.mix)}"
        parent = Path("runs") / Path(args.model).name if args.stage == 1 else Path(args.model)
        args.out = str(parent / f"{set_label(args.data)}{mix}-s{args.seed}")
    return args


def gather_examples(args, lineage):
    """(all examples of the stage, what run.json says of them): the set's own, then ratio x as many of D_M, then replayed facts."""
    base_model = lineage[0]["base_model"] if lineage else args.model
    kept = "" if args.unfiltered else familiarity(args.data, base_model, args.data_dir)
    own, sha256 = load_examples(f"{args.data}.{kept}" if kept else args.data, args.num_examples, args.data_dir)
    counts = {"base_model": base_model, "familiarity": kept, "data_sha256": sha256, "mix_sha256": None}
    mix, replayed = [], []
    if args.mix != "none":
        mix, counts["mix_sha256"] = load_examples(args.mix, round(args.mix_ratio * len(own)), args.data_dir, args.mix_words)
    for earlier in lineage if args.replay else []:
        facts = stage_facts(earlier, args.data_dir)
        replayed += random.Random(f"replay {args.seed}").sample(facts, round(args.replay * len(facts)))
    counts |= {"num_mix": len(mix), "num_replay": len(replayed)}
    return own + mix + replayed, counts


def encode_stage(args, lineage, tokenizer):
    """(ids of the examples, their tokens and labels, what run.json says of them), without those that have no answer to learn."""
    examples, counts = gather_examples(args, lineage)
    names = [example["id"] for example in examples]
    encoded = [encode_example(tokenizer, example, args.max_length) for example in examples]
    cut = [name for name, (_, labels) in zip(names, encoded) if not n_supervised(labels)]
    if cut and int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(cut)} examples have no answer within --max-length {args.max_length} and are left out, first {cut[0]}")
    kept = [(name, row) for name, row in zip(names, encoded) if n_supervised(row[1])]
    if not kept:
        raise DataError(f"no example has an answer within --max-length {args.max_length}; raise it")
    names, encoded = zip(*kept)
    return names, encoded, counts | {"num_cut": len(cut)}


def n_supervised(labels):
    return sum(label != -100 for label in labels)


def sha256_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class AdamW:
    """PyTorch's fused AdamW in its functional form: the classes of torch.optim import the compiler, two seconds of every start."""

    def __init__(self, params):
        self.params, self.state, self.lr = list(params), {}, 0.0

    @torch.no_grad()
    def step(self):
        for param in self.params:
            if param not in self.state:
                self.state[param] = {"step": torch.zeros((), device=param.device)} | {key: torch.zeros_like(param) for key in MOMENTS}
        steps, first, second = ([self.state[param][key] for param in self.params] for key in ("step", *MOMENTS))
        adamw(self.params, [param.grad for param in self.params], first, second, [], steps, fused=True, amsgrad=False, maximize=False,
              beta1=0.9, beta2=0.95, lr=self.lr, weight_decay=0.0, eps=1e-8)  # fmt: skip

    def zero_grad(self):
        for param in self.params:
            param.grad = None


def build_sharded(args, config, device, shard=None):
    """The model with room for this rank's share of its weights, and its optimizer; shard: whether by FSDP, as with several ranks it always is."""
    world = dist.get_world_size()
    shard = world > 1 if shard is None else shard
    model = build_model(config, torch.bfloat16 if args.precision == "bf16" else torch.float32, "meta" if shard else device)
    model.checkpoint_activations = recompute(args, sum(param.numel() for param in model.parameters()), device.type)
    half = torch.bfloat16 if args.precision == "bf16-mixed" else None
    for block in model.model.layers if args.compile else []:
        block.forward = torch.compile(block.forward)  # inside of FSDP's hooks
    if shard:
        # A second of a start that a rank alone need not wait for.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # cast_forward_inputs would round the cosines and sines of the positions.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (world,))
        for module in [*model.model.layers, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.to_empty(device=device)
    else:
        model.compute_dtype = half  # a rank alone has nothing to gather, only to cast
    return model, AdamW(model.parameters())


def recompute(args, n_params, device_type):
    """Whether activations are computed again in the backward pass."""
    return args.checkpoint_activations if args.checkpoint_activations is not None else device_type == "cuda" and n_params >= LARGE


def batches(n, batch_size, epochs, seed):
    """(epoch, indices) of each step: every example once an epoch, the last batch as small as it comes."""
    for epoch in range(epochs):
        order = epoch_order(n, seed, epoch)
        for start in range(0, n, batch_size):
            yield epoch, order[start : start + batch_size]


def collate(examples, device):
    """ids and labels (B, T) of encoded examples, padded on the right to the longest; an empty list gives one unsupervised token."""
    examples = examples or [([0], [-100])]
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in examples])
    return ids.to(device), labels.to(device)


def batch_loss(model, batch, micro_tokens, learn=True):
    """The mean loss of an answer token of a batch, [(ids, labels), ...], over all ranks; learn: leaves its gradient in the parameters."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), model.model.embed_tokens.weight.device
    n_tokens = sum(n_supervised(labels) for _, labels in batch)
    groups = micro_batches({i: len(ids) for i, (ids, _) in enumerate(batch)}, micro_tokens, world)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for k in range(0, len(groups), world):
        ids, labels = collate([batch[i] for i in groups[k + rank]], device)
        with torch.set_grad_enabled(learn):
            micro_sum, _ = model(ids, labels=labels)
        if learn:
            # Gradients are averaged over ranks: times world, over the whole batch's tokens, is the mean over tokens.
            (micro_sum * world / n_tokens).backward()
        total += micro_sum.detach()
    dist.all_reduce(total)
    if not learn:
        reshard(model)
    return total.item() / n_tokens


def learning_rate(step, total, peak):
    """Of step 1 ... total: linear warm-up over the first 5%, then a cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def check_retention(model, tokenizer, facts):
    """{name: accuracy in %} on earlier stages' facts."""
    accuracies = {}
    with asking(model):
        for name, examples in facts.items():
            accuracies[name] = 100 * sum(known(model, tokenizer, examples)) / len(examples)
    return accuracies


@contextlib.contextmanager
def asking(model):
    """A model in training answers questions in this block: its weights are cast once for all tokens."""
    masters = {param: param.data for param in model.parameters()} if model.compute_dtype else {}
    for param in masters:
        param.data = param.data.to(model.compute_dtype)
    # Lengths change with every token: nothing to compile for.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with torch.no_grad(), eager:
        yield
    for param, master in masters.items():
        param.data = master
    reshard(model)


def reshard(model):
    """Without a backward pass the gathered weights stay: put the sharded ones, which the optimizer owns, back in place."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ---------------------------------------------------------------- the state of an unfinished run


def claim(out, resume):
    """Make folder out this process's own: (its metrics.jsonl, the newest state in it or None). A DataError where it is not to be had."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open, and so locked, as long as the run)
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however this process ends
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        raise DataError(f"{out}: {'another run is writing there' if busy else error.strerror.lower()}; give another --out") from None
    states = sorted(path for path in out.glob("state-*") if path.suffix != ".tmp")
    finished = (out / "run.json").exists()
    for left in [*out.glob("*.tmp"), *(states if finished else [])]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if finished:
        raise DataError(f"{out}: holds a finished run; give another --out, or remove it")
    if not resume and (states or log.tell()):
        raise DataError(f"{out}: holds an unfinished run; go on with --resume, or remove it")
    for old in [out / "eval.json", *out.glob("predictions.*.jsonl")]:
        old.unlink(missing_ok=True)
    return log, states[-1] if states else None


def save_state(out, model, optimizer, **position):
    """Write out/state-STEP: for each rank a file with its rows of every weight and of its moments, and last the manifest.

    The folder gets its name only when it is whole, and only then do older states go: a kill at any moment leaves one to go on from.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    target = out / f"state-{position['step']:06d}"
    unfinished = target.with_suffix(".tmp")
    tensors = {name: local(param) for name, param in model.named_parameters()}
    tensors |= {f"{name}.{key}": local(optimizer.state[param][key]) for name, param in model.named_parameters() for key in MOMENTS}
    try:
        with together(), naming(unfinished):
            unfinished.mkdir(exist_ok=True)
        with together():
            file = f"rank-{rank:05d}-of-{world:05d}.safetensors"
            digest = write_tensors(unfinished / file, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.values())
        files = dict(from_all((file, digest)))
        with together():
            if rank == 0:
                write_json(unfinished / MANIFEST, position | {"files": files})
                os.replace(unfinished, target)
                for old in out.glob("state-*"):
                    if old != target:
                        shutil.rmtree(old)
    except SaveError:
        shutil.rmtree(unfinished, ignore_errors=True)  # all ranks are here; what is left of it would only fill the disk
        raise
    return target


def load_state(state, settings):
    """The manifest of a state whose files are whole and whose run had the same settings."""
    manifest = verify(state, f"restore it, or remove {state.parent} to begin again")
    settings, then = json.loads(json.dumps(settings)), manifest["settings"]
    changed = [f"{key} was {then.get(key)}, now {settings.get(key)}" for key in settings | then if settings.get(key) != then.get(key)]
    if changed:
        raise DataError(f"{state}: of a run with other settings: {'; '.join(changed)}; give the same, or another --out")
    return manifest


def restore(state, manifest, model, optimizer):
    """Fill model and optimizer with this rank's rows, whatever the number of ranks that wrote them."""
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(safe_open(state / file, framework="pt")) for file in sorted(manifest["files"])]
        for name, param in model.named_parameters():
            moments = {key: torch.zeros_like(param) for key in MOMENTS}
            optimizer.state[param] = {"step": torch.tensor(float(manifest["step"]), device=local(param).device)} | moments
            first, last = local_rows(param)
            for key, tensor in {name: param.detach(), **{f"{name}.{key}": moment for key, moment in moments.items()}}.items():
                for rank, shard in enumerate(shards):
                    begin, end = rows_of(param.shape[0], rank, len(shards))
                    start, stop = max(first, begin), min(last, end)
                    if start < stop:
                        local(tensor)[start - first : stop - first] = shard.get_slice(key)[start - begin : stop - begin]


def rewind(log, size):
    """Cut the log to the bytes it had when the state was saved, so that no step stands in it twice or is missing."""
    if os.path.getsize(log.name) < size:
        raise DataError(f"{log.name}: shorter than when the state beside it was saved; restore it, or remove {Path(log.name).parent} to begin again")
    log.truncate(size)


# ---------------------------------------------------------------- what a run would take


def plan(args, config, lineage, tokenizer):
    """Print what the run would take; a DataError says what does not fit, and what would."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    ranks = args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    gpu = args.gpu_memory is not None or torch.cuda.is_available()
    _, encoded, _ = encode_stage(args, lineage, tokenizer)
    lengths = [len(ids) for ids, _ in encoded]
    total = args.epochs * -(-len(encoded) // args.batch_size)
    model = build_model(config, torch.float32)
    n_params = sum(param.numel() for param in model.parameters())

    recomputes = recompute(args, n_params, "cuda" if gpu else "cpu")

    def need(ranks=ranks, precision=args.precision, recomputed=recomputes):
        micro_tokens = args.micro_tokens or MICRO_TOKENS["cuda" if gpu else "cpu"]
        groups = [group for _, batch in batches(len(encoded), args.batch_size, 1, args.seed)
                  for group in micro_batches({i: lengths[i] for i in batch}, micro_tokens, ranks)]  # fmt: skip
        padded = [(len(group), max((lengths[i] for i in group), default=1)) for group in groups]
        answers = max(sum(n_supervised(encoded[i][1]) for i in group) for group in groups)
        return memory_of_rank(model, ranks, precision, recomputed, padded, answers, gpu)

    if args.gpu_memory:
        room = args.gpu_memory * 1e9
    elif gpu:
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = available_memory()
    parts = need()
    of = "a GPU" if gpu else "a rank"
    folder = next(parent for parent in [Path(args.out).resolve(), *Path(args.out).resolve().parents] if parent.exists())
    stored = 4 if "float32" in (config.raw.get("dtype"), config.raw.get("torch_dtype")) else 2  # bytes a weight: the folder may lack them yet
    checkpoint, state = n_params * stored, 3 * n_params * (2 if args.precision == "bf16" else 4)
    disk, free = checkpoint + state * (2 if 0 < args.save_every < total else 1), shutil.disk_usage(folder).free
    gb = lambda size: f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.3f}"
    print(f"{args.model}: {n_params / 1e9:.3f} billion parameters, {args.precision}, {ranks} rank{'s' * (ranks > 1)}")
    print(f"data: {len(encoded)} examples, {sum(lengths)} tokens an epoch, at most {total} steps and {args.epochs * sum(lengths)} tokens")
    print(f"memory {of}: {gb(sum(parts.values()))} GB = " + " + ".join(f"{what} {gb(size)}" for what, size in parts.items()))
    print(f"disk: checkpoint {gb(checkpoint)} GB, state {gb(state)} GB; at most {gb(disk)} GB, {gb(free)} GB are free for {args.out}")
    problems = []
    share = 1 if gpu else ranks  # without GPUs all ranks are taken to share this machine's memory
    if sum(parts.values()) * share > room:
        ways = {"--checkpoint-activations": {"recomputed": True}, "--precision bf16": {"precision": "bf16"},
                "--checkpoint-activations --precision bf16": {"recomputed": True, "precision": "bf16"}}  # fmt: skip
        fitting = [way for way, change in ways.items() if sum(need(**change).values()) * share <= room]
        fitting = fitting[:-1] or fitting  # both options only where neither is enough
        more = [n for n in (2**i for i in range(11)) if gpu and n > ranks and sum(need(ranks=n).values()) <= room]
        fitting += [f"{n} ranks" for n in more[:1]]
        problems.append(f"{gb(sum(parts.values()))} GB needed for {of}, {gb(room / share)} GB there; "
                        + (f"what would fit: {', '.join(fitting)}" if fitting else "neither recomputing nor bf16 nor more ranks makes it fit"))  # fmt: skip
    if disk > free:
        less = ", or --save-every 0" if args.save_every and checkpoint + state <= free else ""
        problems.append(f"{gb(disk)} GB needed on disk, {gb(free)} GB free for {args.out}; make room, or give another --out{less}")
    if problems:
        raise DataError(f"{args.model}: {'; '.join(problems)}")


def memory_of_rank(model, ranks, precision, recomputed, padded, answers, gpu):
    """{what: bytes} at the fullest moment of a step; padded: (rows, length) of each micro-batch, answers: most supervised tokens in one."""
    config = model.config
    kept = 2 if precision == "bf16" else 4  # bytes a master weight
    size = 4 if precision == "fp32" else 2  # bytes a number in the forward pass
    n_params, layers = sum(param.numel() for param in model.parameters()), len(model.model.layers)
    block = sum(param.numel() for param in model.model.layers[0].parameters())
    root = n_params - layers * block  # embedding, head and last norm are gathered as one
    # Of a block a token leaves for the backward pass: both norms' input in fp32, their quotient and their output ...
    C, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    token = 2 * C * (4 + 2 * size) + size * (2 * queries + 2 * keys + 4 * I)  # ... q, k, v, the attention's output, and four of the MLP

    def activations(rows, length):
        own = rows * length * token
        if not gpu and length <= 256:
            own += 2 * rows * config.num_attention_heads * length**2 * size  # the scores and their softmax
        return own + layers * rows * length * C * size if recomputed else layers * own

    def gathered(blocks):  # a rank alone has nothing to gather, but keeps what it has cast for the backward pass
        if ranks > 1 or recomputed:
            return {"gathered weights": (root + min(blocks, layers) * block) * size * (ranks > 1 or size < kept)}
        return {"gathered weights": n_params * size * (size < kept)}

    # Gradients are reduced in fp32: a whole copy, this rank's rows of it, and within gloo a second whole copy. A rank alone adds one at a time.
    reduced = 4 * (1 + 1 / ranks + (not gpu)) if ranks > 1 else 4
    moments = [
        gathered(2) | {"activations": max(activations(*group) for group in padded),
                       "logits": answers * V * 4 * 3},  # in fp32: the logits, their softmax, its gradient
        gathered(min(1, layers - 1)) | {"whole gradients": int(root * size + block * reduced)},  # the root's wait for the end
        {"whole gradients": int(root * (size + reduced))},
    ]  # fmt: skip
    return {
        "weights": n_params * kept // ranks,
        "gradients": n_params * kept // ranks,
        "moments": 2 * n_params * kept // ranks,
        **max(moments, key=lambda moment: sum(moment.values())),
        "libraries": int(1.5e9 if gpu else 0.3e9),  # the CUDA context and NCCL's buffers; on a CPU Python and PyTorch
    }


def available_memory():
    """Bytes this machine has left."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux: what it has at all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- the run


def keep_freed_memory():
    """Have glibc keep what is freed between steps: from the kernel it would come back zeroed, which is a tenth of a CPU step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def main():
    args = parse_args()
    config, lineage = Config.from_folder(args.model), read_lineage(args.model)
    if args.stage != len(lineage) + 1:
        raise DataError(f"{args.model}: has {len(lineage)} stages behind it, so the next is --stage {len(lineage) + 1}")
    out = Path(args.out)
    if out.resolve() == Path(args.model).resolve():
        raise DataError(f"{out}: holds the model to start from; give another --out")
    tokenizer = load_tokenizer(args.model)
    check_vocabulary(tokenizer, config, args.model)
    if args.dry_run is not None:
        return plan(args, config, lineage, tokenizer)

    device, rank, world = setup_device()
    if device.type == "cpu":
        keep_freed_memory()
    say = print if rank == 0 else lambda *_: None
    terminated = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))  # seen at the end of a step
    log, state = None, None
    with together():
        if rank == 0:
            log, state = claim(out, args.resume)
    state = from_all(state)[0]

    # What the stage learns. A machine's first rank builds what is missing, the others read it; all must have the same.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        with together():
            if turn == first:
                names, encoded, counts = encode_stage(args, lineage, tokenizer)
                earlier = {set_label(e["data"]): facts[: args.eval_facts] for e in lineage if (facts := stage_facts(e, args.data_dir))}
    lr = args.lr or LEARNING_RATES[config.model_type]
    entry = {"stage": args.stage, "data": args.data, "num_examples": args.num_examples, "mix": args.mix, "mix_ratio": args.mix_ratio,
             "mix_words": args.mix_words, "replay": args.replay, "seed": args.seed, "lr": lr, "batch_size": args.batch_size,
             "epochs": args.epochs, "precision": args.precision} | counts  # fmt: skip
    # All that decides the weights and the log. Ranks, micro-batches, recomputing and compiling change no more than roundings.
    settings = entry | {"base_model": model_name(counts["base_model"]), "stop_loss": args.stop_loss, "max_length": args.max_length,
                        "eval_every": args.eval_every, "eval_facts": args.eval_facts, "tokens_sha256": sha256_of(encoded),
                        "config_sha256": sha256_of(config.raw), "lineage_sha256": sha256_of(lineage)}  # fmt: skip
    if len(set(from_all(sha256_of(settings)))) > 1:
        raise DataError(f"{args.data_dir}: the ranks were given different data or settings; copy one machine's folder to all others")

    model, optimizer = build_sharded(args, config, device)
    # Nothing here draws random numbers and an epoch's order depends on the seed alone: a run's position is its step.
    step, hits = 0, 0
    if state:
        manifest = load_state(state, settings)
        restore(state, manifest, model, optimizer)
        step, hits = manifest["step"], manifest["hits"]
    else:
        load_weights(model, args.model)
    with together():
        if rank == 0:
            rewind(log, manifest["log_bytes"] if state else 0)

    micro_tokens = args.micro_tokens or MICRO_TOKENS[device.type]
    total = args.epochs * -(-len(encoded) // args.batch_size)
    chosen = f" {counts['familiarity']} to {model_name(counts['base_model'])}" if counts["familiarity"] else ""
    say(f"stage {args.stage}: {args.num_examples} x {args.data}{chosen}, {counts['num_mix']} x {args.mix}, {counts['num_replay']} replayed; "
        f"{sum(len(ids) for ids, _ in encoded)} tokens an epoch, at most {total} steps, lr {lr}, {world} x {device.type} -> {out}")  # fmt: skip
    if args.resume:
        say(f"goes on after step {step} of {state}" if state else f"no state in {out}: begins at the first step")

    def record(row):
        if rank == 0:
            with naming(out / "metrics.jsonl"):
                log.write(json.dumps(row) + "\n")

    bar = tqdm(total=total, initial=step, desc=f"stage {args.stage}", unit="step", disable=rank > 0)
    stopped_by = "epochs"
    steps = enumerate(batches(len(encoded), args.batch_size, args.epochs, args.seed), 1)
    for step, (epoch, batch) in itertools.islice(steps, step, None):  # noqa: B020 (from the step before on)
        began = time.perf_counter()
        loss = batch_loss(model, [encoded[i] for i in batch], micro_tokens)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            # Every rank has the same two numbers, so all of them stop here.
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; nothing was updated. The batch was: {', '.join(names[i] for i in batch)}", 1)
        optimizer.lr = learning_rate(step, total, lr)
        optimizer.step()
        optimizer.zero_grad()

        tokens, seconds = sum(len(encoded[i][0]) for i in batch), time.perf_counter() - began
        record({"step": step, "epoch": epoch, "loss": loss, "lr": optimizer.lr, "grad_norm": grad_norm, "tokens": tokens, "seconds": round(seconds, 4)})
        bar.update()
        bar.set_postfix_str(f"loss {loss:.5f}, lr {optimizer.lr:.2e}, {tokens / seconds:.0f} tokens/s")
        if earlier and args.eval_every and step % args.eval_every == 0:
            for name, accuracy in check_retention(model, tokenizer, earlier).items():
                record({"step": step, "data": name, "accuracy": accuracy})
                bar.write(f"step {step}: {name} {accuracy:.1f}%") if rank == 0 else None
        hits = hits + 1 if loss < args.stop_loss else 0
        if hits == STOP_HITS:
            stopped_by = "loss"
            break
        signalled = torch.tensor(len(terminated), device=device)
        dist.all_reduce(signalled)  # on any rank
        if step < total and (signalled or args.save_every and step % args.save_every == 0):
            state = save_state(out, model, optimizer, step=step, hits=hits, log_bytes=log.tell() if log else 0, settings=settings)
            if signalled:
                stopped_by = "SIGTERM"
                break
    bar.close()

    if stopped_by != "SIGTERM":
        # Weights in the base model's own type, then its tokenizer, and last the lineage: a folder with run.json is complete.
        save_model(model, out, weights_dtype(args.model))
        with together(), naming(out):
            if rank == 0:
                copy_tokenizer(args.model, out)
                entry |= {"steps": step, "final_loss": loss, "stopped_by": stopped_by}
                write_file(out / "run.json", json.dumps(lineage + [entry], indent=2) + "\n")
                for old in out.glob("state-*"):
                    shutil.rmtree(old)
        say(f"{out}: {step} steps, loss {loss:.2e}, stopped by {stopped_by}")
    del model, optimizer
    leave()
    if stopped_by == "SIGTERM" and rank > 0:
        sys.exit(128 + signal.SIGTERM)
    if stopped_by == "SIGTERM":
        fail(f"SIGTERM: stopped after step {step}, saved in {state}; go on with --resume", 128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
    except SaveError as error:
        fail(f"{error}; what was saved before is whole: make room, then go on with --resume", 1)
    except OSError as error:  # a data folder that is full or may not be written
        fail(f"{error}; make room, or name a folder that may be written with --data-dir or --out", 1)
