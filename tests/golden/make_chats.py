"""Writes chats.json: chats, and the ids that transformers gives them by the chat_template.jinja of a trained stage.

    python tests/golden/make_chats.py LLAMA3_FOLDER MISTRAL_FOLDER SMOLLM2_FOLDER QWEN3_FOLDER MISTRAL_PREPEND_FOLDER MISTRAL_FIRST_FOLDER

Folders as on the hub: config.json (its model_type at least), tokenizer files, tokenizer_config.json; MISTRAL_FOLDER's
with "legacy": false. The last two are mistral_json's in test_tokenizers.py. Run by hand, where transformers and protobuf are installed (last: transformers 5.24).
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import load_tokenizer
from train import chat_template, copy_tokenizer

CHATS = [
    [("user", "The value of key e6395973 is?"), ("assistant", "p7xk2q9z")],
    [("user", "Question: What is New Lands's author?\nThe answer is:"), ("assistant", "Knut Hamsun")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "  two spaces"), ("assistant", " one")],
    [("user", "日本語 🙂"), ("assistant", "42"), ("user", "1234567"), ("assistant", "def f(x):\n    return x")],
]

rows = [{"chat": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
for name, folder in zip(["llama3", "mistral", "smollm2", "qwen3", "mistral_prepend", "mistral_first"], sys.argv[1:], strict=True):
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        copy_tokenizer(folder, copy, chat_template(load_tokenizer(folder), folder))
        tokenizer = AutoTokenizer.from_pretrained(copy)
    for row in rows:
        ids = {"asked": tokenizer.apply_chat_template(row["chat"][:-1], add_generation_prompt=True, return_dict=False)}
        row[name] = ids | {"whole": tokenizer.apply_chat_template(row["chat"], return_dict=False),
                           "text": tokenizer.apply_chat_template(row["chat"], tokenize=False)}  # fmt: skip
lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
Path(__file__).with_name("chats.json").write_text(f"[\n{lines}\n]\n")
