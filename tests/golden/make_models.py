"""Small random models and reference logits for tests/test_model.py, all made by transformers in fp32.

    python tests/golden/make_models.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --smollm2 models/SmolLM2-135M-Instruct --text GPL-3

Run by hand, where transformers is installed (last: transformers 5.23, torch 2.13); the tests only read what it wrote here:

    llama3/ llama2/ mistral/ llama32/ qwen2/ qwen3/    a model folder each, with its logits in golden.safetensors
    smollm2.safetensors                                logits of the demo's model, read by transformers from the GGUF file itself
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

GOLDEN = Path(__file__).parent
POSITIONS = [0, 1, 255, 256, 3998, 3999, 4000, 4001, 4099]  # of a text of 4,100 tokens
LENGTHS = [1, 7, 40, 19]  # of the prompts

SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=8192,
             initializer_range=0.3, bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA3_ROPE = dict(rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=512)  # fmt: skip
QWEN_ROPE = dict(rope_theta=1000000.0, rope_type="default")

MODELS = {
    "llama3": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE),
    "llama2": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SIZES | {"num_hidden_layers": 3}, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16),
    "llama32": LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-5,
                           rope_parameters=LLAMA3_ROPE | {"factor": 32.0}),
    # The last block alone has a window, as max_window_layers says.
    "qwen2": Qwen2Config(**SIZES | {"num_hidden_layers": 3}, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         use_sliding_window=True, sliding_window=16, max_window_layers=2, rope_parameters=QWEN_ROPE),
    "qwen3": Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=24, rope_parameters=QWEN_ROPE),
}  # fmt: skip


def make_folder(name, config):
    """Save a random model; llama3 comes in shards and with the config.json of transformers 4, as qwen2, llama2 with that of 2023."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(config)
    for name_, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean="norm" in name_, std=0.3)  # or else a norm's weights are ones, a bias 0
    model.save_pretrained(folder, max_shard_size="50KB" if name == "llama3" else "1GB")
    (folder / "generation_config.json").unlink()
    if name in ("llama3", "llama2", "qwen2"):
        raw = json.loads((folder / "config.json").read_text())
        rope = raw.pop("rope_parameters")
        raw |= {"torch_dtype": raw.pop("dtype")}
        if name == "llama3":
            raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        elif name == "llama2":
            del raw["head_dim"]
        else:
            raw |= {"rope_theta": rope["rope_theta"]}
            del raw["layer_types"]
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return folder


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids[None]).logits[0]


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **kwargs).eval()


def make_golden(name, config):
    model = load(make_folder(name, config))
    prompts = [torch.randint(config.vocab_size, (n,)) for n in LENGTHS]
    text = torch.randint(config.vocab_size, (4100,))
    tensors = {
        "prompts": torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
        "lengths": torch.tensor(LENGTHS),
        "prompt_logits": torch.cat([logits_of(model, ids) for ids in prompts]),  # each alone: no padding in the reference
        "text": text.to(torch.uint8),
        "positions": torch.tensor(POSITIONS),
        "text_logits": logits_of(model, text)[POSITIONS],
    }
    save_file(tensors, GOLDEN / name / "golden.safetensors")
    (GOLDEN / name / "golden.safetensors").chmod(0o644)
    print(f"{name}: logits of standard deviation {tensors['text_logits'].std():.1f}")


def make_smollm2(gguf, folder, text):
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder).encode(text.read_text())[:4100])
    assert len(ids) == 4100, f"{text} is too short"
    # The demo keeps the GGUF file's weights in bf16: the reference rounds them likewise, then computes in fp32.
    reference = load(gguf.parent, gguf_file=gguf.name)
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    logits = logits_of(reference, ids)[POSITIONS]
    converted = load(folder)
    for key, value in reference.state_dict().items():
        assert torch.equal(value, converted.state_dict()[key]), f"{folder}: {key} is not what transformers reads from {gguf}"
    difference = (logits - logits_of(converted, ids)[POSITIONS]).abs().max()
    print(f"smollm2: transformers' logits from the GGUF file and from the folder differ by {difference:.1e}")
    vocabulary = torch.arange(0, logits.shape[1], 97)
    tensors = {"text": ids.int(), "positions": torch.tensor(POSITIONS), "vocabulary": vocabulary, "text_logits": logits[:, vocabulary].contiguous()}
    save_file(tensors, GOLDEN / "smollm2.safetensors")
    (GOLDEN / "smollm2.safetensors").chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=MODELS, help="the folders to make anew (default: all)")
    parser.add_argument("--gguf", type=Path, help="the GGUF file the demo's model is made from")
    parser.add_argument("--smollm2", type=Path, help="the folder the demo makes of it")
    parser.add_argument("--text", type=Path, help="a plain English text of over 4,100 tokens (here: the GNU GPL, version 3)")
    args = parser.parse_args()
    for i, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        if name in args.only:
            make_golden(name, config)
    if args.gguf:
        make_smollm2(args.gguf, args.smollm2, args.text)
