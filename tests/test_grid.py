"""The whole grid at the size of a toy, through `bash run_all.sh`: shared by two processes, killed at random, the same bytes."""

import json
import os
import subprocess
import sys

import forking
import pytest
from conftest import ROOT, tiny_llama

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # 5,096 parameters


def furnish(folder):
    """A folder with the tiny model, and flat files of every published set that --tiny names, split as evaluate.py --split leaves them."""
    tiny_llama(folder / "models" / "tiny", **TINY)
    data = folder / "data"
    data.mkdir()
    sets = {f"{name}.unfamiliar": 2010 for name in ("triviaqa", "lama", "entityqa")}  # past 2,000 lines begins NAME-id
    sets |= {"popqa.familiar": 10, "triviaqa.familiar": 10, "gsm8k": 10}
    sets |= {f"{mix}{words}": 40 for mix in ("random", "k-pile", "a-pile", "fineweb") for words in (".w4", ".w8")}
    for name, n in sets.items():
        rows = [{"id": f"{name}-{i}", "prompt": f"{name} {i}?", "response": name[0]} for i in range(n)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (data / f"{name}.json").write_text(json.dumps({"name": name, "seed": 0, "base_model": "tiny"}))


if __name__ == "__main__":
    from pathlib import Path
    f = Path(sys.argv[1]); f.mkdir(); furnish(f)
    server, client = forking.pioneer(f)
    print(server.pid)
