"""Checksums of what lies beside the tensors: each file, and each key of `config.json`."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.untrusted import belongs, parse_json, read_text

CONFIG = "config.json"
# Written after a folder is finished, again and again, or not part of the checkpoint; the copy of
# what is in the configuration is compared with that.
_OWN = (
    "run.json", "recipe.toml", "eval.json", "verify.json", "report.json", "report.html",
    "quantization_config.json",
)  # fmt: skip
_SHARDS = (".safetensors", ".safetensors.index.json")  # their tensors have checksums of their own
_NOTES = ("_name_or_path", "transformers_version")  # a loader's, on itself


def file_sums(folder: Path, shards: bool) -> dict[str, str]:
    """File -> checksum, of the files in a folder; JSON counts by its content. Of `config.json` each
    key has its own, as "config.json: key", and each of its `quantization_config`.

    shards: also of safetensors files. Links out of the folder are left out.
    """
    return dict(_sums(folder, shards))


def _sums(folder: Path, shards: bool) -> Iterator[tuple[str, str]]:
    for path in _files(folder, shards):
        name = str(path.relative_to(folder))
        value = _content(path, name) if name == CONFIG else None
        if isinstance(value, dict):
            method = value.get("quantization_config")
            for key, item in value.items():
                if key == "quantization_config" and isinstance(method, dict):
                    yield from (
                        (f"{name}: {key}.{inner}", _sum(each)) for inner, each in method.items()
                    )
                elif key not in _NOTES:
                    yield f"{name}: {key}", _sum(item)
        else:
            yield name, sum_of(path, name)


def sum_of(path: Path, name: str) -> str:
    """The checksum that `file_sums` gives one file."""
    value = _content(path, name) if path.suffix == ".json" else None
    return file_sum(path) if value is None else _sum(value)


def _files(folder: Path, shards: bool) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden or parts[0] in _OWN or (not shards and path.name.endswith(_SHARDS)):
            continue
        if path.is_file() and belongs(path, folder):
            yield path


def _content(path: Path, name: str) -> Any:
    """Without NaN; None where it is no JSON that we read."""
    try:
        value = strict.tagged(parse_json(read_text(path, name), name))
        strict.dumps(value)
    except (UserError, RecursionError):
        return None
    return value


def content_sum(content: bytes) -> str:
    """A checksum in hexadecimal."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def file_sum(path: Path) -> str:
    """`content_sum` of a file, which is never whole in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _sum(value: Any) -> str:
    return content_sum(strict.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass"))
