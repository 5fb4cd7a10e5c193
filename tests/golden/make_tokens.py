"""Writes tokens.json: telling texts and the ids that the reference libraries give them, control tokens read as plain text.

    python tests/golden/make_tokens.py LLAMA3_FOLDER MISTRAL_FOLDER SMOLLM2_FOLDER QWEN3_FOLDER GEMMA3_FOLDER DEEPSEEK_V3_FOLDER

The folders are those of the fixtures in conftest.py: .cache/llama3 .cache/mistral models/SmolLM2-135M-Instruct .cache/hub-qwen3 ...
Run by hand, where the libraries are installed (last: transformers 5.23, tokenizers 0.23, mistral-common 1.13, sentencepiece 0.2).
"mistral_inside" is what a text gives behind other text or a control token: SentencePiece without its dummy space.
"""

import json
import sys
from pathlib import Path

from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

TEXTS = [
    "", " ", "  ", "\n", "a", " a", "  a", "a ", "Hello, world!", "p7xk2q9z", "0qq8 zz11 x9x9x9x9", "The value of key e6395973 is?",
    "<|user|>\nThe value of key e6395973 is?\n<|assistant|>\n", "Question: What is New Lands's author?\nThe answer is:",
    "supercalifragilisticexpialidocious", "x" * 17, "ab" * 60, "=" * 100, "-" * 33 + "\n", "." * 129, "aeinorstlu" * 12,
    # numbers
    "#### 72", "$\\boxed{\\frac{1}{2}}$", "1 12 123 1234 12345 1234567890", "3.14159e-10", "in 1996,  2,000 of 16%", "    7",
    "a 1  2   3\t4\n5", "१२३ ٤٥٦ 七 Ⅷ ½ ² ௧",
    # contractions; U+017F is a long s, an s to those who ignore case
    "I'm, you'LL, WE'VE, it's, 'tis, 's 'S 'd''re'", "HE'Sx HE'LLO, I'Mx, 'Tis, 'reve, 'sa", "'\u017fa '\u017f", "don’t",
    # white space
    " " * 83 + "x", "\t" * 20 + "x", "\n" * 40, "a" + "\u3000" * 9 + "b", " \n \n  \n", "x \r\n\r\n y\r", "\xa0a\xa0\xa0b",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "\ufeffa\u200bb\u180ec\u202fd",
    "def f(x):\n    if x:\n\treturn x**2  # square\n\n\nclass A:\r\n        pass\r\n",
    # languages and symbols
    "Größe naïve Å\u030a cafe\u0301 ﬁ ß İı", "Привет, мир! Ёж ҐЄ", "你好，世界。これは日本語です", "한국어 텍스트", "हिन्दी में", "ภาษาไทยไม่เว้น",
    "العَرَبِيَّة", "עִבְרִית", "🙂🙃 👩‍👩‍👧 🇩🇪 👍🏽", "𝔘𝔫𝔦 \U00020000 \U000f0000", "\ufffd\ufffe\U0010ffff",
    # what tokenizers use themselves
    "▁a ▁▁b Ġc", "<0x0A><unk>\\n", "<s>[INST] a [/INST]</s>", "<|begin_of_text|><|end_of_text|><|eot_id|>",
    " <|im_start|>user<|im_end|><|endoftext|><repo_name>",
    # bytes that SmolLM2 has no token for
    "(\x04)", "a\x00b\x04\x06c \x13\x14 \x16\x1d1", " \U00040000!",
]  # fmt: skip

llama3, mistral, smollm2, *others = map(Path, sys.argv[1:])
hugging_face = {
    "llama3": TikTokenConverter(str(llama3 / "tokenizer.model")).converted(),
    "smollm2": Tokenizer.from_file(str(smollm2 / "tokenizer.json")),
}
for tokenizer in hugging_face.values():
    tokenizer.encode_special_tokens = True
auto = {}
for name, folder in zip(["qwen3", "gemma3", "deepseek_v3"], others, strict=True):
    auto[name] = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
mistral_common = SentencePieceTokenizer(mistral / "tokenizer.model")
proto = ModelProto.FromString((mistral / "tokenizer.model").read_bytes())
proto.normalizer_spec.add_dummy_prefix = False
inside = SentencePieceProcessor(model_proto=proto.SerializeToString())

rows = []
for text in TEXTS:
    row = {"text": text} | {name: t.encode(text, add_special_tokens=False).ids for name, t in hugging_face.items()}
    row |= {name: tokenizer.encode(text, add_special_tokens=False) for name, tokenizer in auto.items()}
    rows.append(row | {"mistral": mistral_common.encode(text, bos=False, eos=False), "mistral_inside": inside.encode(text)})
lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
Path(__file__).with_name("tokens.json").write_text(f"[\n{lines}\n]\n")
