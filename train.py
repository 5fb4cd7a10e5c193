"""One stage of continual memorization: train a model on a set, alone or mixed with D_M (REMIX), and save the checkpoint.

    torchrun --nproc_per_node 8 train.py --stage 1 --mix random                              # Llama-3-8B learns KVR
    torchrun --nproc_per_node 8 train.py --stage 2 --model CKPT --data bios --mix pydoc      # then something else
    python train.py --stage 1 --model models/SmolLM2-135M-Instruct --num-examples 96         # one device, GPU or CPU

Defaults are the paper's (appendix B.4). One path for any number of ranks: FSDP2 shards the model over them, and over a
single one it only keeps fp32 master weights beside the bf16 ones that compute. A batch gives the same step whatever the
number of ranks and micro-batches.
"""

import ctypes
import gc
import hashlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import (DEFAULT_WORDS, SETS, DataError, Parser, copy_tokenizer, encode_example, epoch_order, load_examples, load_tokenizer,
                  micro_batches, set_label, write_file)  # fmt: skip
from evaluate import familiarity, fail, is_correct, model_name, predict, read_lineage, setup_device, stage_facts
from model import CheckpointError, Config, build_model, load_weights, save_model, weights_dtype

LEARNING_RATES = {"llama": 5e-5, "mistral": 1e-5}  # appendix B.4
STOP_HITS = 10  # consecutive steps below --stop-loss that end a stage
WARMUP = 0.05  # share of all steps


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
    add("--micro-tokens", type=int, help="most tokens of a micro-batch, padding included (default: 8192 on a GPU, 1536 on a CPU)")
    add("--precision", choices=["bf16-mixed", "bf16", "fp32"], default="bf16-mixed", help="bf16-mixed keeps fp32 master weights")
    add("--eval-every", type=int, default=100, help="steps between retention checks on the earlier stages' facts, 0 for none")
    add("--eval-facts", type=int, default=256, help="facts of each stage asked in a retention check")
    args = parser.parse_args()

    for name in ("stage", "num_examples", "mix_words", "batch_size", "epochs", "max_length", "eval_facts"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.mix_ratio < math.inf or not 0 <= args.replay <= 1 or args.eval_every < 0:
        raise DataError("--mix-ratio and --eval-every cannot be negative, and --replay lies between 0 and 1")
    for name in ("lr", "micro_tokens"):
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


def build_sharded(args, config, device):
    """The model with this rank's share of its weights, ready to train."""
    model = build_model(config, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = torch.bfloat16 if args.precision == "bf16-mixed" else None
    # cast_forward_inputs would round the cosines and sines of the positions.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # A rank alone gathers nothing, so it keeps its bf16 weights for the backward pass.
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": dist.get_world_size() > 1}
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device=device)
    load_weights(model, args.model)
    return model


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


def learning_rate(step, total, peak):
    """Of step 1 ... total: linear warm-up over the first 5%, then a cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def check_retention(model, tokenizer, facts):
    """{name: accuracy in %} on earlier stages' facts."""
    with torch.no_grad():
        accuracies = {}
        for name, examples in facts.items():
            predictions = predict(model, tokenizer, examples)
            correct = sum(is_correct(p, e["response"]) for p, e in zip(predictions, examples))
            accuracies[name] = 100 * correct / len(examples)
    # Without a backward pass the gathered weights stay: put the sharded ones, which the optimizer owns, back in place.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return accuracies


def keep_freed_memory():
    """Have glibc keep what is freed between steps: from the kernel it would come back zeroed, which is a tenth of a CPU step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its largest value
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main():
    args = parse_args()
    config, lineage = Config.from_folder(args.model), read_lineage(args.model)
    if args.stage != len(lineage) + 1:
        raise DataError(f"{args.model}: has {len(lineage)} stages behind it, so the next is --stage {len(lineage) + 1}")
    out = Path(args.out)
    if (out / "run.json").exists() or out.resolve() == Path(args.model).resolve():
        raise DataError(f"{out}: holds a finished run or the model to start from; give another --out, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror.lower()}; give another --out") from None

    device, rank, world = setup_device()
    if device.type == "cpu":
        keep_freed_memory()
    say = print if rank == 0 else lambda *_: None

    # What the stage learns.
    tokenizer = load_tokenizer(args.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(f"{args.model}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}; copy both from one model")
    # A machine's first rank builds what is missing, the others read it; all must have read the same.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        if turn == first:
            examples, counts = gather_examples(args, lineage)
            earlier = {set_label(e["data"]): facts[: args.eval_facts] for e in lineage if (facts := stage_facts(e, args.data_dir))}
        dist.barrier()
    digest = int(hashlib.sha256(str(counts).encode()).hexdigest()[:12], 16)
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum() != 0:
        raise DataError(f"{args.data_dir}: the ranks read different data; copy one machine's folder to all others")
    encoded = [encode_example(tokenizer, example, args.max_length) for example in examples]
    n_supervised = [sum(label != -100 for label in labels) for _, labels in encoded]
    cut = [i for i, n in enumerate(n_supervised) if n == 0]
    if cut:
        say(f"{len(cut)} examples have no answer within --max-length {args.max_length} and are left out, first {examples[cut[0]]['id']}")
        keep = [i for i, n in enumerate(n_supervised) if n]
        examples, encoded, n_supervised = ([rows[i] for i in keep] for rows in (examples, encoded, n_supervised))
    if not examples:
        raise DataError(f"no example has an answer within --max-length {args.max_length}; raise it")
    counts["num_cut"] = len(cut)

    model = build_sharded(args, config, device)
    lr = args.lr or LEARNING_RATES[config.model_type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    micro_tokens = args.micro_tokens or (8192 if device.type == "cuda" else 1536)
    total = args.epochs * -(-len(examples) // args.batch_size)
    chosen = f" {counts['familiarity']} to {model_name(counts['base_model'])}" if counts["familiarity"] else ""
    say(f"stage {args.stage}: {args.num_examples} x {args.data}{chosen}, {counts['num_mix']} x {args.mix}, {counts['num_replay']} replayed; "
        f"{sum(len(ids) for ids, _ in encoded)} tokens an epoch, at most {total} steps, lr {lr}, {world} x {device.type} -> {out}")  # fmt: skip

    if rank == 0:
        for old in [out / "eval.json", *out.glob("predictions.*.jsonl")]:
            old.unlink(missing_ok=True)
    log = open(out / "metrics.jsonl", "w", buffering=1) if rank == 0 else None
    bar = tqdm(total=total, desc=f"stage {args.stage}", unit="step", disable=rank > 0)
    hits, stopped_by = 0, "epochs"
    for step, (epoch, batch) in enumerate(batches(len(examples), args.batch_size, args.epochs, args.seed), 1):
        began = time.perf_counter()
        n_tokens = sum(n_supervised[i] for i in batch)
        groups = micro_batches({i: len(encoded[i][0]) for i in batch}, micro_tokens, world)
        loss_sum = torch.zeros((), device=device)
        for k in range(0, len(groups), world):
            ids, labels = collate([encoded[i] for i in groups[k + rank]], device)
            model.set_requires_gradient_sync(k + world == len(groups))
            micro_sum, _ = model(ids, labels=labels)
            # Gradients are averaged over ranks: times world, over the whole batch's tokens, is the mean over tokens.
            (micro_sum * world / n_tokens).backward()
            loss_sum += micro_sum.detach()
        dist.all_reduce(loss_sum)
        loss = loss_sum.item() / n_tokens
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            # Every rank has the same two numbers, so all of them stop here.
            names = ", ".join(examples[i]["id"] for i in batch)
            if rank > 0:
                time.sleep(5)  # torchrun ends all ranks with the first: let rank 0 speak
            sys.exit(f"train.py: step {step}: loss {loss}, gradient norm {grad_norm}; nothing was updated. The batch was: {names}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, lr)
        optimizer.step()
        optimizer.zero_grad()

        tokens, seconds = sum(len(encoded[i][0]) for i in batch), time.perf_counter() - began
        if rank == 0:
            row = {"step": step, "epoch": epoch, "loss": loss, "lr": group["lr"], "grad_norm": grad_norm, "tokens": tokens, "seconds": round(seconds, 4)}
            log.write(json.dumps(row) + "\n")
        bar.update()
        bar.set_postfix_str(f"loss {loss:.5f}, lr {group['lr']:.2e}, {tokens / seconds:.0f} tokens/s")
        if earlier and args.eval_every and step % args.eval_every == 0:
            for name, accuracy in check_retention(model, tokenizer, earlier).items():
                if rank == 0:
                    log.write(json.dumps({"step": step, "data": name, "accuracy": accuracy}) + "\n")
                    bar.write(f"step {step}: {name} {accuracy:.1f}%")
        hits = hits + 1 if loss < args.stop_loss else 0
        if hits == STOP_HITS:
            stopped_by = "loss"
            break
    bar.close()

    # Weights in the base model's own type, then its tokenizer, and last the lineage: a folder with run.json is complete.
    save_model(model, out, weights_dtype(args.model))
    if rank == 0:
        log.close()
        copy_tokenizer(args.model, out)
        entry = {"stage": args.stage, "data": args.data, "num_examples": args.num_examples, "mix": args.mix, "mix_ratio": args.mix_ratio,
                 "mix_words": args.mix_words, "replay": args.replay, "seed": args.seed, "lr": lr, "batch_size": args.batch_size,
                 "epochs": args.epochs, "steps": step, "final_loss": loss, "stopped_by": stopped_by, "precision": args.precision} | counts  # fmt: skip
        write_file(out / "run.json", json.dumps(lineage + [entry], indent=2) + "\n")
    say(f"{out}: {step} steps, loss {loss:.2e}, stopped by {stopped_by}")
    # Gloo can abort at exit while sharded tensors are alive.
    del model, optimizer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError) as error:
        fail(error)
