"""Tables read by the `datasets` library: parquet files, and folders in the hub's layout, looked at before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.untrusted import TooLong, one_line, read_text, time_limit

# Tables of `datasets` that are nothing but data; others unpack archives or load what Python pickled.
BUILDERS = ("parquet", "json", "csv", "text", "arrow")
CARD_SECONDS = 5.0


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


def load_table(path: str, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """datasets.load_dataset with its errors told in one line."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        table = datasets.load_dataset(path, *args, **kwargs)
        return RawRows(table) if _decodes(table.features) else table
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"dataset {kwargs.get('data_files') or path} can't be loaded: {reason}") from error


def check_layout(folder: Path) -> None:
    """UserError for a folder whose card sends the reader elsewhere, or whose files are no tables of BUILDERS."""
    import datasets

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
    try:
        builder = datasets.load_dataset_builder(str(folder))
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"dataset {folder} can't be loaded: {reason}") from error
    kind = builder.__module__.rpartition(".")[2]
    if kind not in BUILDERS:
        raise UserError(f"dataset {folder} holds files of the kind {kind}; read are {', '.join(BUILDERS)}")


def _texts(value: Any, depth: int = 0) -> list[str]:
    """Every text in a tree that YAML has read; what lies too deep counts as one that is refused."""
    if depth > 8:
        return ["/"]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in parts for text in _texts(part, depth + 1)]
