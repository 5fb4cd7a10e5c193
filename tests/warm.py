"""What a process holds before it forks for each command of a test: PyTorch, the scripts, and what these import as they run."""

import gc
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import english_words  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import nltk  # noqa: E402, F401
import regex  # noqa: E402, F401
import tiktoken  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401

import probe  # noqa: E402, F401


def state_of(path):
    return str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns


COMPILED = {}  # (path, size, time of its last change) of each script: its code
for script in ROOT.glob("*.py"):
    COMPILED[state_of(script)] = compile(script.read_bytes(), str(script), "exec")
gc.freeze()  # or every fork's collection would copy all of this


def run_script(path):
    """Be the module __main__ of a script, as python does."""
    code = COMPILED.get(state_of(path)) or compile(Path(path).read_bytes(), path, "exec")
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    exec(code, module.__dict__)
