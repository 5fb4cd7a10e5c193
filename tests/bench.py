"""How fast each part is, beside what one would use instead, on the same work in the same run. By hand, never among the tests:

    pip install transformers && python tests/bench.py            # all parts; PART... chooses some
    python tests/bench.py train --repeats 9 --precision fp32

Both sides take turns, at least five times, and every turn gives one ratio: machines are shared, so only ratios count. Printed are
their median and range. The work: SmolLM2-135M-Instruct (bash run_all.sh --demo-model), KVR with its 1:2 mixes, batch 32.

`growth` shows that time and memory grow no faster than the arithmetic. Seen on two cores: 16 times the examples took 3.5 times the
time and 3.2 times the memory, 6 times the layers (3.8 in arithmetic) 3.7 and 1.9, texts of 64 times the tokens (87.3) 59.4 and 8.1.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
GENERATED = 20  # prompts a batch of transformers' generate


def line(part, against, goal, ratios, note=""):
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {part} | {against} | {goal} | {spread} | {note} |", flush=True)


def seconds(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# ---------------------------------------------------------------- the two sides of a training step


def synchronize(device):
    """Wait until a GPU has done what it was given."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """train.py's step; its process group is set up before."""

    def __init__(self, precision, device="cpu", compiled=False):
        import torch

        import train
        from model import Config, load_weights

        self.device, self.micro_tokens = torch.device(device), train.MICRO_TOKENS[torch.device(device).type]
        self.model = train.build_sharded(Config.from_folder(MODEL), self.device, precision, compile=compiled)
        load_weights(self.model, MODEL)
        self.optimizer = train.AdamW(self.model.parameters())

    def step(self, batch, micro_tokens=None):
        """As train.py's: loss, clipping, AdamW."""
        import train

        found = train.train_step(self.model, batch, micro_tokens or self.micro_tokens)
        self.optimizer.step(found.grad_norm)
        self.optimizer.zero_grad()
        synchronize(self.device)
        return found.loss


class Theirs:
    """transformers as a good user writes it: sdpa, autocast, padded to the batch's longest. release: the paper's own release's way,
    eager attention and padding to the longest example of the data set (which it also trains on; that is left out here)."""

    def __init__(self, precision, device="cpu", pad_to=None):
        import torch
        from transformers import AutoModelForCausalLM

        self.device, self.pad_to, self.bf16 = torch.device(device), pad_to, precision != "fp32"
        attention = "eager" if pad_to else "sdpa"
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=attention).to(device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch):
        import torch

        longest = self.pad_to or max(len(example.ids) for example in batch)
        pad = lambda row, value: row + [value] * (longest - len(row))
        ids = torch.tensor([pad(example.ids, 0) for example in batch], device=self.device)
        labels = torch.tensor([pad(example.labels, -100) for example in batch], device=self.device)
        mask = torch.tensor([pad([1] * len(example.ids), 0) for example in batch], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return loss.item()


def encoded_mix(mix, n=2000, data="data"):
    """KVR with mix 1:2 or none in train.py's order of the first epoch: EncodedExamples."""
    from data import epoch_order, load_examples, load_tokenizer
    from train import encode

    tokenizer = load_tokenizer(MODEL)
    examples = encode(tokenizer, load_examples("kvr", n, data)[0])
    if mix != "none":
        examples += encode(tokenizer, load_examples(mix, 2 * n, data, 50)[0], "mix")
    return [examples[i] for i in epoch_order(len(examples), 0, 0)]


def needed_flops(batch, config, micro_tokens):
    """Multiplications and additions of a step that count: no padding, in a micro-batch a common start once, the head on supervised
    positions alone, forward and twice backward."""
    from evaluate import common_prefix_len
    from train import micro_batches

    C, I, heads, keys = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = 2 * C * (2 * heads + 2 * keys + 3 * I)
    of_text = lambda T: config.num_hidden_layers * (layer * T + 2 * 2 * heads * T * (T + 1) / 2)
    total = 0
    for group in micro_batches({i: len(example.ids) for i, example in enumerate(batch)}, micro_tokens, 1):
        rows = [batch[i].ids for i in group]
        total += sum(map(of_text, map(len, rows))) - (len(rows) - 1) * of_text(common_prefix_len(rows))
        total += 2 * C * config.vocab_size * sum(batch[i].n_supervised for i in group)
    return 3 * total


def machine_flops(precision, device="cpu"):
    """Operations a second of a large matrix product."""
    import torch

    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, dtype=torch.float32 if precision == "fp32" else torch.bfloat16, device=device)
    product = lambda: (a @ a, synchronize(device))
    return 2 * size**3 / min(seconds(product)[0] for _ in range(5))


class Worker:
    """A side in a process of its own, so that neither shares the other's heap: takes the number of a batch, gives seconds and loss."""

    def __init__(self, side, mix, args):
        command = [sys.executable, __file__, "--side", side, "--what", mix, *rest(args)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, k):
        self.process.stdin.write(f"{k}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            sys.exit(f"bench.py: a process with {self.process.args} ended: out of memory? Take a smaller --batch")
        return map(float, answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def this_side(args, pad_to=None):
    """The side that this process is to be."""
    import train
    from model import setup_device

    if args.side != "ours":
        return Theirs(args.precision, pad_to=pad_to)
    setup_device()
    train.use_large_pages()
    train.keep_freed_memory()
    return Ours(args.precision)


def train_side(args):
    encoded = encoded_mix(args.what, 200)
    side = this_side(args, max(len(example.ids) for example in encoded) if args.side == "release" else None)
    for k in map(int, sys.stdin):
        print(*seconds(lambda: side.step(encoded[k * args.batch : (k + 1) * args.batch])), flush=True)


def bench_train(args):
    """In the precision asked for, or in both, the faster one first."""
    train_table(args, wasteful=True)
    if args.both:
        other = "fp32" if args.precision == "bf16-mixed" else "bf16-mixed"
        train_table(argparse.Namespace(**vars(args) | {"precision": other}))


def train_table(args, wasteful=False):
    from model import Config
    from train import MICRO_TOKENS

    config = Config.from_folder(MODEL)
    for mix in ("none", "random", "pydoc"):
        encoded = encoded_mix(mix, 200)
        share, possible, losses = [], [], []

        def turns(peer):
            """How many times as long the other side takes, a ratio each turn; two at a time, as three do not fit into 24 GB."""
            ratios, workers = [], [Worker("ours", mix, args), Worker(peer, mix, args)]
            for k in range(args.repeats + 2):
                (own, loss), (other, its) = (worker.step(k) for worker in workers)
                work = needed_flops(encoded[k * args.batch : (k + 1) * args.batch], config, MICRO_TOKENS["cpu"])
                limit = work / machine_flops(args.precision)
                losses.extend([loss, its])
                if k >= 2:  # after the first touch of memory
                    ratios.append(other / own)
                    share.append(limit / own)
                    possible.append(other / limit) if peer == "theirs" else None
            for worker in workers:
                worker.end()
            return ratios

        against = turns("theirs")
        release = turns("release") if wasteful and mix == "random" else []
        note = f"batch {args.batch}, {args.precision}; losses of the first batch {losses[0]:.4f}, {losses[1]:.4f}"
        what = f"training step, KVR {'alone' if mix == 'none' else f'with {mix}'}"
        line(what, "transformers, sdpa", "2" if mix == "none" else "2.6", against, note)
        line(what, "the release's way", "4", release) if release else None
        line(what, "the machine's own matrix products", "0.7", share, "share of their FLOP/s, needed work only")
        line("the same work at their speed", "transformers, sdpa", "", possible, "what no code could surpass here")


def bench_memory(args):
    """Peak resident memory of two steps above that after loading and a step on one example, which has made the optimizer's moments."""
    found = {side: float(subprocess.run([sys.executable, __file__, "--side", side, *rest(args)], check=True, capture_output=True, text=True).stdout.split()[-1])
             for side in ("ours", "theirs")}
    line("training memory above weights and optimizer", "transformers", "at most 0.25", [found["ours"] / found["theirs"]], f"{found['ours']:.2f} and {found['theirs']:.2f} GB at batch {args.batch}")


def memory_side(args):
    side = this_side(args)
    encoded = encoded_mix("random", 200)
    side.step(sorted(encoded, key=lambda example: len(example.ids))[:1])
    print(peak(lambda: side.step(encoded[: args.batch]))[0])


def peak(work):
    """(GB by which this process's memory is larger at work's fullest moment than before it, what work returns)."""
    status = lambda key: int(next(row for row in open("/proc/self/status") if row.startswith(key)).split()[1]) / 1e6
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = work()
    return status("VmHWM") - before, result


# ---------------------------------------------------------------- answers


def generate(peer, tokenizer, facts, rows):
    """Greedy answers of a transformers model to facts, so many rows at a time, padded on the left."""
    import torch

    from data import encode_example

    answers = []
    encoded = [encode_example(tokenizer, fact) for fact in facts]
    longest = max(sum(label != -100 for label in labels) for _, labels in encoded) + 4
    for k in range(0, len(encoded), rows):
        prompts = [[token for token, label in zip(ids, labels) if label == -100] for ids, labels in encoded[k : k + rows]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=peer.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=peer.device)
        out = peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0)
        answers += [tokenizer.decode(list(itertools.takewhile(lambda token: token != tokenizer.eos_id, row))) for row in out[:, width:].tolist()]
    return answers


def bench_evaluate(args):
    """Exact match of KVR facts that the model knows and of facts that it does not, in one set, on a checkpoint that --checkpoint names."""
    import torch
    from transformers import AutoModelForCausalLM

    from data import load_examples, load_tokenizer
    from evaluate import exact_matches, predict, read_lineage, stage_facts
    from model import load_model

    folder = args.checkpoint or str(MODEL)
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    lineage = read_lineage(folder)
    facts = stage_facts(lineage[0], "data") if lineage else load_examples("kvr", 40, "data")[0]

    ratios, verdicts = [], []
    for _ in range(args.repeats):
        own, ours = seconds(lambda: predict(model, tokenizer, facts))
        verdict, _ = seconds(lambda: exact_matches(model, tokenizer, facts))
        other, theirs = seconds(lambda: generate(peer, tokenizer, facts, GENERATED))
        ratios.append(other / own)
        verdicts.append(other / verdict)
    right = sum(fact["response"] == answer for fact, answer in zip(facts, ours))
    same = sum(a == b for a, b in zip(ours, theirs))
    line("exact match", f"transformers' generate, batch {GENERATED}", "5", ratios, f"{len(facts)} facts, {right} known; {same} answers are the same; {args.precision}")
    line("exact match, without the rest of wrong answers", "the same", "5", verdicts, "as retention checks and probe.py ask")


# ---------------------------------------------------------------- start, loading, tokens


def in_process(code):
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT))[0]


def bench_start(args):
    """From process start to a loaded model with the first forward pass done."""
    own = f"import torch, train; from model import load_model; load_model({str(MODEL)!r})(torch.tensor([[1, 2]]))"
    peer = f"import torch; from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(MODEL)!r}, dtype=torch.bfloat16)(torch.tensor([[1, 2]]))"
    line("start, to the first forward pass", "transformers", "above 1", [in_process(peer) / in_process(own) for _ in range(args.repeats)])


def bench_load(args):
    size = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    peak = "import resource; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    ours = f"import torch, model, safetensors.torch; {peak} model.load_model({str(MODEL)!r}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    read = f"import torch, model, safetensors.torch, glob; {peak} x = [{{k: v.clone() for k, v in safetensors.torch.load_file(f).items()}} for f in glob.glob('{MODEL}/*.safetensors')]; print(0)"
    memory, ratios = [], []
    for _ in range(args.repeats):
        own, out = seconds(lambda: subprocess.run([sys.executable, "-c", ours], check=True, capture_output=True, text=True, cwd=ROOT).stdout)
        peer, _ = seconds(lambda: subprocess.run([sys.executable, "-c", read], check=True, capture_output=True, text=True, cwd=ROOT))
        ratios.append(peer / own)
        memory.append(int(out.split()[-1]) * 1024 / size)
    line("loading, time with imports", "safetensors' load_file of the same bytes", "", ratios)
    line("loading, peak memory", "bytes of the weights", "at most 1.2", memory)


def bench_build(args):
    """Each generated set at the paper's sizes from nothing, and the overlap check of 2,000 facts with each mixing set; seconds, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        data = lambda *rest: seconds(lambda: subprocess.run([sys.executable, "data.py", "--out", folder, *rest], check=True, capture_output=True))[0]
        print(f"| building kvr, bios, random (2,000, 2,000, 4,000 texts) and pydoc | | seconds | {data('kvr', 'bios', 'random', 'pydoc'):.1f} s | |")
        for mix in ("random", "pydoc"):
            print(f"| overlap of 2,000 facts of bios with {mix} | | seconds | {data('--overlap', 'bios', mix):.1f} s | |", flush=True)


GROWTH = {"examples": (500, 2000, 8000), "layers": (5, 10, 20, 30), "tokens": (50, 200, 800, 3200)}  # of 2 texts with 10 layers, of 8 texts with 100


def bench_growth(args):
    """Time and memory as work grows, in ratios to the smallest, beside the arithmetic: preparing a stage's examples, and steps by layers and length."""
    for what, points in GROWTH.items():
        found = []
        for point in points:
            command = [sys.executable, __file__, "--side", "growth", "--what", what, "--point", str(point), "--repeats", str(args.repeats), *rest(args)]
            found.append([float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]])
            time_, memory, work = ([f / first for f, first in zip(found[-1], found[0])])
            print(f"| {point} {what} | | arithmetic {work:.1f} | time {time_:.1f}, memory {memory:.1f} | {found[-1][0]:.2f} s, {found[-1][1]:.3f} GB |", flush=True)


def growth_side(args):
    """Prints seconds, peak memory above that before in GB, and the arithmetic in any unit."""
    import torch

    import train
    from data import encode_example, load_examples, load_tokenizer
    from train import EncodedExample
    from model import Config, build_model, setup_device

    setup_device()
    train.use_large_pages()
    train.keep_freed_memory()
    if args.what == "examples":
        tokenizer = load_tokenizer(MODEL)
        with tempfile.TemporaryDirectory() as folder:  # built, read and encoded
            work = lambda: [encode_example(tokenizer, example) for example in load_examples("random", args.point, folder)[0]]
            memory, (time_, _) = peak(lambda: seconds(work))
        return print(time_, memory, args.point)
    config = Config.from_folder(MODEL)
    config.num_hidden_layers, length, rows = (args.point, 100, 8) if args.what == "layers" else (10, args.point, 2)
    model = build_model(config, torch.float32, "cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
        p.grad = torch.zeros_like(p)
    texts = torch.randint(0, config.vocab_size, (rows, length)).tolist()
    batch = [EncodedExample("", ids, [-100] * (length // 2) + ids[length // 2 :], "own") for ids in texts]
    times = []
    memory, _ = peak(lambda: times.extend(seconds(lambda: train.train_step(model, batch, train.MICRO_TOKENS["cpu"]))[0] for _ in range(args.repeats)))
    print(statistics.median(times[1:]), memory, needed_flops(batch, config, train.MICRO_TOKENS["cpu"]))


def rest(args):
    return ["--precision", args.precision, "--batch", str(args.batch)]


PARTS = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["both", "bf16-mixed", "fp32"], default="both", help="both: train in each, the rest in the faster one")
    parser.add_argument("--checkpoint", help="evaluate: a trained checkpoint whose first stage is asked")
    parser.add_argument("--side", choices=["ours", "theirs", "release", "growth"], help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(ROOT)
    args.both = args.precision == "both"
    if args.both:
        from model import Config, faster_precision

        args.precision = faster_precision(Config.from_folder(MODEL), "cpu")
    if args.side:
        import torch

        from model import end_process_group

        (growth_side if args.side == "growth" else train_side if args.what else memory_side)(args)
        torch.distributed.is_initialized() and end_process_group()
    else:
        print("| part | against | goal | ratio: median (range) | |\n| --- | --- | --- | --- | --- |")
        for part in args.parts or PARTS:
            PARTS[part](args)
