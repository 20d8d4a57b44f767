"""llama.cpp's architectures as data: tensor names, what happens to a tensor on the way, and the
metadata it reads.

Names follow `gguf.constants`; tests hold the tables against that package. What llama.cpp computes
differently from the model's own code is refused with one line instead of exported.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.families import family_of


class Step(NamedTuple):
    """What happens to a tensor on its way into the file, and back. Rows only, so that codes go the
    same way."""

    forward: Callable[[Tensor], Sequence[Tensor]]
    inverse: Callable[[Sequence[Tensor]], Tensor]


class Rule(NamedTuple):
    """Where one tensor goes: names in the file ({} is the layer), and the step that makes as many
    tensors of it."""

    targets: tuple[str, ...]
    step: Step


SAME = Step(lambda t: [t], lambda parts: parts[0])
# Gemma's norms multiply by 1 + w; llama.cpp expects the sum.
PLUS_ONE = Step(lambda t: [t.float() + 1], lambda parts: parts[0] - 1)
THIRDS = Step(lambda t: t.chunk(3), lambda parts: torch.cat(list(parts)))
# A convolution over two frames becomes one over each.
FRAMES = Step(lambda t: [t[:, :, 0], t[:, :, 1]], lambda parts: torch.stack(list(parts), 2))


def rotary(heads: int) -> Step:
    """Rows of a projection: halves of each head (rotate_half) <-> neighbouring pairs, as
    llama.cpp's `llama` wants."""
    return Step(
        lambda t: [t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)],
        lambda parts: parts[0].unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2),
    )


def rules(names: Mapping[str, str], steps: Mapping[str, Step] | None = None) -> dict[str, Rule]:
    """A table of rules from "source": "target target .." and the steps of some sources."""
    return {
        key: Rule(tuple(targets.split()), (steps or {}).get(key, SAME))
        for key, targets in names.items()
    }


@dataclass(frozen=True)
class Part:
    """The tensors of one file. prefixes: how checkpoints begin their names -> how the table does;
    the first match wins, and of several spellings the last is written back. rules: by name without
    prefix, with or without ".weight" and ".bias". dropped: what the names of unused tensors begin
    with."""

    prefixes: Mapping[str, str]
    rules: Mapping[str, Rule]
    dropped: tuple[str, ...] = ()

    def local(self, key: str) -> str | None:
        """The table's spelling of a checkpoint key, None if it belongs to another part."""
        prefix = next((p for p in self.prefixes if key.startswith(p)), None)
        return None if prefix is None else self.prefixes[prefix] + key.removeprefix(prefix)

    def place(self, local: str) -> Rule | None:
        """Where a tensor goes, with complete names; None if it is dropped. UserError for a name
        nobody knows."""
        layer, spellings = _general(local)
        if spellings[-1][0].startswith(self.dropped or "\0"):
            return None
        for name, suffix in spellings:
            if name in self.rules:
                targets, step = self.rules[name]
                return Rule(tuple(target.format(layer) + suffix for target in targets), step)
        raise UserError(
            f"GGUF export: llama.cpp's architecture has no place for the tensor {local}"
        )

    def sources(self, names: Sequence[str]) -> dict[str, Rule]:
        """Checkpoint key -> rule, for the names found in a file; the inverse of `place`. UserError
        as there."""
        back = {target: (key, rule) for key, rule in self.rules.items() for target in rule.targets}
        rules: dict[str, Rule] = {}
        for name in names:
            layer, spellings = _general(name)
            hit = next(((known, suffix) for known, suffix in spellings if known in back), None)
            if hit is None:
                raise UserError(f"GGUF file: the tensor {name} has no place in this model")
            key, rule = back[hit[0]]
            targets = tuple(target.format(layer) + hit[1] for target in rule.targets)
            rules[self._spell(key.format(layer) + hit[1])] = Rule(targets, rule.step)
        return rules

    def _spell(self, local: str) -> str:
        fits = [(len(begin), i, p, begin) for i, (p, begin) in enumerate(self.prefixes.items())]
        _, _, prefix, begin = max(fit for fit in fits if local.startswith(fit[-1]))
        return prefix + local.removeprefix(begin)


def _general(name: str) -> tuple[str, list[tuple[str, str]]]:
    """(first number in a name, [(spelling to look up, suffix it lacks)]: whole, without suffix, and
    with {})."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, suffix = name, ""
    number = re.search(r"(?<![^.])\d+(?![^.])", stem)
    general = stem if number is None else f"{stem[: number.start()]}{{}}{stem[number.end() :]}"
    ending = f".{suffix}" if suffix else ""
    return number[0] if number else "", [(name, ""), (stem, ending), (general, ending)]


_TEXT = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.{}.input_layernorm": "blk.{}.attn_norm",
    "layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_GEMMA = {
    **_TEXT,
    "layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp. pairs: q and k rows are reordered. shifted: norms are stored
    plus one.
    activation: the only one it computes. windows: the layer count of its sliding window pattern,
      0: has none."""

    name: str
    names: Mapping[str, str]
    pairs: bool = False
    shifted: bool = False
    activation: str = "silu"
    windows: int = 0


# By the text configuration's model_type.
ARCHITECTURES = {
    "llama": Architecture("llama", _TEXT, pairs=True),
    "mistral": Architecture("llama", _TEXT, pairs=True),
    "qwen2": Architecture("qwen2", _TEXT),
    "qwen3": Architecture("qwen3", _TEXT),
    "qwen2_vl_text": Architecture("qwen2vl", _TEXT),
    "qwen2_5_vl_text": Architecture("qwen2vl", _TEXT),
    "qwen3_vl_text": Architecture("qwen3vl", _TEXT),
    "gemma3_text": Architecture(
        "gemma3", _GEMMA, shifted=True, activation="gelu_pytorch_tanh", windows=6
    ),
}


def architecture(text: Any) -> Architecture:
    """The architecture for a text configuration. UserError where llama.cpp would compute something
    else."""
    known = ARCHITECTURES.get(text.model_type)
    if known is None:
        raise UserError(
            f"GGUF export: no table for {text.model_type}; there are {', '.join(ARCHITECTURES)}"
        )
    act = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    rope = _rope(text)
    layer_types = list(getattr(text, "layer_types", None) or ())
    wanted = ["full_attention" if (i + 1) % known.windows == 0 else "sliding_attention"
        for i in range(len(layer_types))] \
        if known.windows else ["full_attention"] * len(layer_types)  # fmt: skip
    scalar = getattr(text, "query_pre_attn_scalar", None)
    # as in the 27 B
    wide = text.num_hidden_layers == 62 and scalar == text.hidden_size // text.num_attention_heads
    rules = (
        (act != known.activation, f"computes {known.activation}, not {act}"),
        (
            rope["rope_type"] not in ("default", "linear", "llama3"),
            f"rope type {rope['rope_type']} is not exported",
        ),
        (rope["rope_type"] == "llama3" and known.name != "llama", "has llama3 rope for llama only"),
        (layer_types != wanted, "uses another pattern of sliding windows"),
        (
            known.name.endswith("vl") and "mrope_section" not in rope,
            "needs mrope_section in the rope parameters",
        ),
        (
            scalar not in (None, head_dim(text)) and not wide,
            f"scales queries by the head size, not {scalar}",
        ),
        (
            getattr(text, "attn_logit_softcapping", None) is not None,
            "has no attn_logit_softcapping here",
        ),
        (getattr(text, "use_bidirectional_attention", False) is True, "attends causally only"),
    )
    problem = next((reason for broken, reason in rules if broken), None)
    if problem:
        raise UserError(f"GGUF export: llama.cpp's {known.name} {problem}")
    return known


def head_dim(text: Any) -> int:
    """Size of an attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def text_part(model_type: str, text: Any) -> Part:
    """Names and steps of the text model's tensors."""
    arch = architecture(text)
    steps = {key: PLUS_ONE for key in arch.names if arch.shifted and key.endswith("norm")}
    if arch.pairs:
        heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        steps |= {f"layers.{{}}.self_attn.{name}": rotary(count) for name, count in heads.items()}
    return Part(
        family_of(model_type).gguf, rules(arch.names, steps), ("layers.{}.self_attn.rotary_emb",)
    )


def text_metadata(config: Any, text: Any) -> dict[str, Any]:
    """The hyperparameters that llama.cpp reads, with their full keys."""
    arch, rope = architecture(text), _rope(text)
    window = getattr(text, "sliding_window", None)
    if arch.name.startswith("qwen") and not getattr(text, "use_sliding_window", False):
        window = None
    length = text.max_position_embeddings
    facts = {
        # Within its window a model with windows on every layer is exact without them.
        "context_length": length if arch.windows or not window else min(length, window),
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head_dim(text),
        "attention.value_length": head_dim(text),
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.dimension_count": head_dim(text),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if "mrope_section" in rope:
        facts["rope.dimension_sections"] = [*rope["mrope_section"], 0, 0][:4]
    if arch.windows and window:
        facts |= {
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": arch.windows,
        }
    if getattr(text, "final_logit_softcapping", None):
        facts["final_logit_softcapping"] = float(text.final_logit_softcapping)
    if arch.name == "qwen3vl":
        facts["n_deepstack_layers"] = len(config.vision_config.deepstack_visual_indexes)
    return {f"{arch.name}.{key}": value for key, value in facts.items()}


def extra_tensors(text: Any) -> dict[str, Tensor]:
    """Tensors that no checkpoint has: the frequency factors of llama3 rope, float32 (head_dim / 2).

    The formula is Llama 3.1's: wavelengths below the high-frequency bound stay, those above the
    low-frequency bound are stretched by ``factor``, those between are blended.
    """
    rope = _rope(text)
    if rope["rope_type"] != "llama3":
        return {}
    size, factor = head_dim(text), rope["factor"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    old = rope["original_max_position_embeddings"]
    wave_F = (
        2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    )
    share_F = ((old / wave_F - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - share_F) / factor + share_F)).float()}


def _rope(text: Any) -> Mapping[str, Any]:
    rope = text.rope_parameters
    return rope.get("full_attention", rope)
