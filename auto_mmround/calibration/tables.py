"""Rows as files hold them: JSON and text of our own forms, and tables read by the `datasets` library: parquet files,
and folders in the hub's layout, looked at before."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.calibration.named import Named
from auto_mmround.errors import UserError
from auto_mmround.untrusted import DATASET_BYTES, TooLong, one_line, parse_json, read_text, time_limit

# Tables of `datasets` that are nothing but data; others unpack archives or load what Python pickled.
BUILDERS = ("parquet", "json", "csv", "text", "arrow")
CARD_SECONDS = 5.0
STREAMED = 512  # rows read of a set that comes over the network, where the user names no number


def read_json(path: Path) -> list[Any]:
    """The rows of a .json, .jsonl or .txt file (a line each). Raises UserError when it can't be read."""
    text = read_text(path, f"dataset {path}", DATASET_BYTES)
    if path.suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        return [parse_json(ln, f"dataset {path} line {i}") for i, ln in enumerate(text.splitlines(), 1) if ln.strip()]
    data = parse_json(text, f"dataset {path}")
    if isinstance(data, Mapping):
        if {"text", "input_ids", "conversations", "messages"} & set(data):
            return [data]
        values = list(data.values())
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not isinstance(data, list):
        raise UserError(f"dataset {path} must hold a list of rows")
    return data


class RawRows(Sequence[Any]):
    """Rows of a table with its media as stored: our own readers decode them, with their bounds."""

    def __init__(self, table: Any) -> None:
        self.table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index].to_pylist()[0]


def _decodes(feature: Any) -> bool:
    """Whether a feature of `datasets`, or one inside it, would decode media by itself."""
    import datasets

    if isinstance(feature, Mapping):
        return any(map(_decodes, feature.values()))
    return isinstance(feature, datasets.Image | datasets.Audio | datasets.Video) or (
        hasattr(feature, "feature") and _decodes(feature.feature)
    )


def undecoded(rows: Any) -> Any:
    """A table of `datasets` whose media stay as stored; anything else as it is."""
    table = getattr(rows, "rows", rows)
    features = getattr(table, "features", None)
    return RawRows(table) if isinstance(features, Mapping) and _decodes(features) else rows


def load_table(path: str, *args: Any, limit: int = STREAMED, **kwargs: Any) -> Sequence[Any]:
    """datasets.load_dataset with its errors told in one line. limit: rows taken of a stream."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        table = datasets.load_dataset(path, *args, **kwargs)
        if kwargs.get("streaming"):
            return list(islice(table.decode(False), limit))
        rows: Sequence[Any] = undecoded(table)
        return rows
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"dataset {kwargs.get('data_files') or path} can't be loaded: {reason}") from error


def local_copy(path: Path, config: str | None, split: str | None, named: Named | None = None) -> Sequence[Any]:
    """Rows of a folder in the layout of a set on the hub.

    Without a config and a split of the user's, those of the named set are read if the copy has them, else its only
    config and `train` or its first split. Raises UserError, also for a folder that `check_card` or BUILDERS refuse.
    """
    import datasets

    check_card(path)
    try:
        configs = datasets.get_dataset_config_names(str(path))
        config = config or (named.config if named and named.config in configs else None)
        if config is None and len(configs) > 1:
            raise UserError(f"dataset {path} has several configs, choose with config=: {', '.join(configs)}")
        _check_builder(path, config)
        splits = datasets.get_dataset_split_names(str(path), config)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(f"dataset {path} can't be loaded: {(str(error).splitlines() or [''])[0]}") from error
    usual = [name for name in (named.split if named else "train", "train", *splits) if name in splits]
    return load_table(str(path), config, split=split or (usual or ["train"])[0])


def _check_builder(folder: Path, config: str | None) -> None:
    """UserError for a folder whose files are no tables of BUILDERS."""
    import datasets

    kind = datasets.load_dataset_builder(str(folder), config).__module__.rpartition(".")[2]
    if kind not in BUILDERS:
        raise UserError(f"dataset {folder} holds files of the kind {kind}; read are {', '.join(BUILDERS)}")


def check_card(folder: Path) -> None:
    """UserError for a folder whose card can't be read or sends the reader elsewhere."""
    card = folder / "README.md"
    parts = read_text(card, f"dataset {card}").split("---", 2) if card.is_file() else []
    try:
        with time_limit(CARD_SECONDS):
            head = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError, TooLong) as error:
        raise UserError(f"dataset {card}: its head can't be read: {one_line(str(error))[:200]}") from None
    for config in (head.get("configs") or []) if isinstance(head, dict) else []:
        for place in _texts([config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else []):
            if "://" in place or place.startswith(("/", "~")) or ".." in Path(place).parts:
                raise UserError(f"dataset {card} names {place!r}, which is not in the folder: nothing else is read")


def _texts(value: Any, depth: int = 0) -> list[str]:
    """Every text in a tree that YAML has read; what lies too deep counts as one that is refused."""
    if depth > 8:
        return ["/"]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in parts for text in _texts(part, depth + 1)]
