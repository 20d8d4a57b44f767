"""A Hugging Face `tokenizer.json` as GGUF metadata: byte-level BPE and SentencePiece-like
vocabularies.

llama.cpp has its pre-tokenizers built in and picks one by name; the name is looked up by the very
expression that the tokenizer splits with, so a tokenizer it cannot reproduce is refused instead of
exported.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a byte-level tokenizer splits with -> llama.cpp's name for it.
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CASED,): "tekken",
    ("single digits", "gpt-2"): "smollm",
    ("gpt-2",): "gpt-2",
}


def splits(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """What a `pre_tokenizer` splits with, in order: expressions, or a word for what has none."""
    type_name = (pre_tokenizer or {}).get("type")
    if pre_tokenizer is None or type_name is None:
        return
    if type_name == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from splits(part)
    elif type_name == "Split" and "Regex" in pre_tokenizer["pattern"]:
        yield pre_tokenizer["pattern"]["Regex"]
    elif type_name == "ByteLevel":
        if pre_tokenizer.get("use_regex", True):
            yield "gpt-2"
    elif type_name == "Digits" and pre_tokenizer.get("individual_digits"):
        yield "single digits"
    else:
        yield f"type {type_name}"


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` of a folder. UserError if there is none or if llama.cpp has no tokenizer
    like it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"GGUF export: {folder} has no tokenizer.json; load and save the tokenizer with"
            " transformers"
        )
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer["model"]["type"] != "BPE":
        raise UserError(
            f"GGUF export: {path} is a {tokenizer['model']['type']} tokenizer; only BPE ones are"
            " exported"
        )
    if not tokenizer["model"].get("byte_fallback"):
        used = tuple(splits(tokenizer.get("pre_tokenizer")))
        if used not in PRE_TOKENIZERS:
            raise UserError(
                f"GGUF export: llama.cpp's pre-tokenizer for {' then '.join(used)[:200]!r} is not"
                " known"
            )
    return tokenizer


def metadata(folder: Path, rows: int) -> dict[str, Any]:
    """Everything under `tokenizer.`. rows: of the embedding; missing tokens are filled in, and
    tokens above are cut, since the model has no row for them. Raises UserError as
    `read_tokenizer`."""
    tokenizer = read_tokenizer(folder)
    model = tokenizer["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    token_types = dict.fromkeys(tokens, NORMAL)
    if model.get("byte_fallback"):
        token_types |= {
            i: BYTE
            for i, t in tokens.items()
            if len(t) == 6 and t.startswith("<0x") and t.endswith(">")
        }
        token_types |= {i: UNKNOWN for i, t in tokens.items() if t == model.get("unk_token")}
    for token in tokenizer.get("added_tokens", ()):
        tokens[token["id"]] = token["content"]
        if token_types.get(token["id"]) != UNKNOWN:
            token_types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    facts: dict[str, Any] = {
        "ggml.tokens": listed,
        "ggml.token_type": [token_types.get(i, UNUSED) for i in range(rows)],
    }
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        facts |= {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.scores": _scores(listed, merges),
            "ggml.add_space_prefix": _prepends_space(tokenizer),
        }
    else:
        facts |= {
            "ggml.model": "gpt2",
            "ggml.pre": PRE_TOKENIZERS[tuple(splits(tokenizer.get("pre_tokenizer")))],
            "ggml.merges": [" ".join(merge) for merge in merges],
        }
    facts |= _special(
        folder, tokenizer, {token: index for index, token in tokens.items() if index < rows}
    )
    return {f"tokenizer.{key}": value for key, value in facts.items()}


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins the pair whose token scores highest, BPE the pair that comes first in its
    list: minus the place of a token's first pair gives the same order, as long as all pairs of a
    token stand together."""
    place: dict[str, int] = {}
    last = None
    for merge in merges:
        joined = "".join(merge)
        if joined != last and joined in place:
            raise UserError(
                f"GGUF export: the tokenizer's merges of {joined!r} have no SentencePiece order"
            )
        last = joined
        place.setdefault(joined, len(place))
    return [-float(place.get(token, len(place))) for token in tokens]


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    parts = [normalizer, *normalizer.get("normalizers", ())]
    metaspace = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return metaspace or any(part.get("type") == "Prepend" for part in parts)


def _special(folder: Path, tokenizer: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Ids of the special tokens, whether a BOS is put before a text, and the chat template."""
    config = _json(folder / "tokenizer_config.json")
    facts: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in ids:
            long = {"unk": "unknown", "pad": "padding"}.get(name, name)
            facts[f"ggml.{long}_token_id"] = ids[content]
    single = _template(tokenizer.get("post_processor") or {})
    first = single[0].get("SpecialToken", {}).get("id") if single else None
    last = single[-1].get("SpecialToken", {}).get("id") if single else None
    facts["ggml.add_bos_token"] = first is not None and ids.get(str(first)) == facts.get(
        "ggml.bos_token_id"
    )
    facts["ggml.add_eos_token"] = last is not None and ids.get(str(last)) == facts.get(
        "ggml.eos_token_id"
    )
    for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        if name in ids:
            facts["ggml.eot_token_id"] = ids[name]
            break
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    text = (
        text
        or _json(folder / "chat_template.json").get("chat_template")
        or config.get("chat_template")
    )
    if isinstance(text, str):
        facts["chat_template"] = text
    return facts


def _template(post_processor: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if post_processor.get("type") == "TemplateProcessing":
        return post_processor["single"]
    parts = post_processor.get("processors", ())
    return next((part["single"] for part in parts if part.get("type") == "TemplateProcessing"), ())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
