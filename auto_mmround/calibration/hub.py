"""Tables of the `datasets` library: what users give, and sets on the hub, read by that library."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import one_line

STREAMED = 512  # rows read of a set that comes over the network, where the user names no number


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


def load_hub(repo: str, config: str | None, split: str, limit: int | None = None) -> Sequence[Any]:
    """The rows of a set on the hub. limit: read only so many, over the network. Raises UserError in
    one line.

    Its card may name files anywhere, on this machine too: what `datasets` has made of it is looked
    at before it reads.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        builder = datasets.load_dataset_builder(repo, config)
        check_origin(builder.config.data_files, repo)
        if limit is not None:
            return list(islice(builder.as_streaming_dataset(split=split).decode(False), limit))
        builder.download_and_prepare()
        rows: Sequence[Any] = undecoded(builder.as_dataset(split=split))
        return rows
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        reason = one_line(str(error))[:300] or type(error).__name__
        raise UserError(f"dataset {repo} can't be loaded: {reason}") from error


def check_origin(data_files: Mapping[str, Sequence[str]] | None, repo: str) -> None:
    """UserError for resolved data files (split -> addresses) that don't lie in the repository."""
    home = f"hf://datasets/{repo}@".lower()
    for place in [str(place) for places in (data_files or {}).values() for place in places]:
        if not place.lower().startswith(home) or "::" in place or ".." in place.split("/"):
            raise UserError(
                f"dataset {repo}: its card names {place[:200]}, which is not in the set: nothing is"
                " read"
            )
