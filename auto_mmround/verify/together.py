"""Do the vocabulary, the configuration and the tokenizer of a checkpoint fit each other?"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from auto_mmround.checkpoint.findings import Finding, fault, read_json
from auto_mmround.checkpoint.subject import Subject

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Older spelling of a configuration -> the place of the same value in Transformers 5.
ROPE = {
    "rope_theta": ("rope_parameters", "rope_theta"),
    "rope_type": ("rope_parameters", "rope_type"),
}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the configuration that describes the text model."""
    nested = (
        config.get(key) for key in ("text_config", "llm_config", "decoder", "language_config")
    )
    return next(
        (level for level in nested if isinstance(level, Mapping) and "vocab_size" in level), config
    )


def _rows(s: Subject) -> int | None:
    """Rows of the embedding by the configuration."""
    size = _text(s.config).get("vocab_size", s.config.get("vocab_size"))
    return size if type(size) is int and size > 0 else None


def _highest(tokenizer: Mapping[str, Any]) -> tuple[int, str]:
    """The largest token id of a `tokenizer.json`, and its token; -1 if there is none."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    highest: list[tuple[int, str]] = []
    if isinstance(vocab, Mapping):
        highest += [(number, str(token)) for token, number in vocab.items() if type(number) is int]
    elif isinstance(vocab, list) and vocab:
        highest.append((len(vocab) - 1, str(vocab[-1])[:40]))
    for token in tokenizer.get("added_tokens") or ():
        if isinstance(token, Mapping) and type(token.get("id")) is int:
            highest.append((token["id"], str(token.get("content"))))
    return max(highest, default=(-1, ""))


def check_vocabulary(s: Subject) -> Iterator[Finding]:
    """Every token of the tokenizer has a row in the embedding."""
    rows = _rows(s)
    if rows is None or not (s.folder / "tokenizer.json").is_file():
        return
    number, token = _highest(s.tokenizer[0])
    if number >= rows:
        text = (
            f"its token {token[:40]!r} has id {number}, but config.json has a vocabulary of {rows}"
        )
        yield Finding(s.hygiene, "tokenizer.json", text)


def check_special_tokens(s: Subject) -> Iterator[Finding]:
    """Special tokens that configurations give as numbers are in the vocabulary."""
    rows = _rows(s)
    path = s.folder / "generation_config.json"
    settings = read_json(path, []) if path.is_file() else None
    for file, level in (
        ("config.json", s.config),
        ("config.json", _text(s.config)),
        (path.name, settings or {}),
    ):
        for key in SPECIAL if rows is not None else ():
            beyond = [number for number in _numbers(level.get(key)) if number >= (rows or 0)]
            if beyond:
                yield Finding(
                    s.hygiene, file, f"{key} is {beyond[0]}, the vocabulary has {rows} tokens"
                )


def _numbers(value: Any) -> Iterable[int]:
    return [
        number for number in (value if isinstance(value, list) else [value]) if type(number) is int
    ]


def check_tied(s: Subject) -> Iterator[Finding]:
    """Tied tensors are not there twice with different values: engines would ignore one of them."""
    for name, origin in s.skeleton.tied.items() if s.skeleton and not s.whole else ():
        here = [
            each
            for each in (name, origin)
            if each in s.tensors and each.removesuffix(".weight") not in s.packed
        ]
        tensors = dict(s.read(here))
        if len(here) < 2 or not torch.equal(tensors[name].float(), tensors[origin].float()):
            yield Finding(s.hygiene, name, f"differs from {origin}, to which config.json ties it")


def check_rope(s: Subject) -> Iterator[Finding]:
    """Old and new spellings of rotary positions agree."""
    for level in {id(each): each for each in (s.config, _text(s.config))}.values():
        for old, (group, new) in ROPE.items():
            table = level.get(group)
            if (
                isinstance(table, Mapping)
                and old in level
                and new in table
                and level[old] != table[new]
            ):
                yield fault("config.json", f"{old} is {level[old]}, {group}.{new} is {table[new]}")


def check_layer_count(s: Subject) -> Iterator[Finding]:
    """Lists with one entry per layer have as many entries as there are layers."""
    text = _text(s.config)
    layers, layer_types = text.get("num_hidden_layers"), text.get("layer_types")
    if type(layers) is int and isinstance(layer_types, list) and len(layer_types) != layers:
        yield fault(
            "config.json", f"layer_types has {len(layer_types)} entries for {layers} layers"
        )


TOGETHER = (check_vocabulary, check_special_tokens, check_tied, check_rope, check_layer_count)
