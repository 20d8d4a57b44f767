"""From a dataset's name to samples: the named sets, local files and folders, rows of any accepted
form."""

import socket
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from auto_mmround.calibration import dotted, folders
from auto_mmround.calibration.columns import PLURAL
from auto_mmround.calibration.hub import STREAMED, load_hub, undecoded
from auto_mmround.calibration.named import DEMO, KNOWN, LOCAL, NAMED, SHORT, Named
from auto_mmround.calibration.roots import find_file
from auto_mmround.calibration.rows import BadSample, Sample, parse_row, split_batch
from auto_mmround.calibration.sources import Source, parse_spec
from auto_mmround.calibration.tables import (
    LINES,
    PLAIN,
    TABLES,
    Joined,
    ending,
    is_data,
    read_files,
)
from auto_mmround.calibration.template import did_you_mean
from auto_mmround.calibration.transcripts import transcribed
from auto_mmround.errors import UserError

SUFFIXES = (*PLAIN, *TABLES)
PROBE_SECONDS = 3.0
STREAM_ROWS = 20_000  # read at most from an iterable that doesn't know its length
READY = "ready"


@dataclass(frozen=True)
class Rows:
    """The rows of one set; a Sample is made when it is asked for. Sequence of raw rows, and how to
    read them."""

    source: Source
    rows: Sequence[Any]
    base: Path | None = None
    remote: str = ""
    columns: tuple[str, ...] = ()
    name: str = ""
    collate: dotted.Collate | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Raises BadSample when the row has no form that is known, or code of the user's fails on
        it."""
        label = f"{self.name}#{index}"
        try:
            row = self.rows[index]
            if isinstance(row, Sample):
                return row
            if isinstance(row, Mapping):
                label = f"{self.name}#{row.get('id') or index}"
            made = self._parsed(row, label, self.folder(index))
            for text in (made.text, *(turn.content for turn in made.messages)):
                (text or "").encode()
            return made
        except BadSample:
            raise
        except UnicodeEncodeError:
            problem = f"sample {label}: its text holds half a character, which no tokenizer takes"
            raise BadSample("form", problem) from None
        except UserError as error:
            raise BadSample("form", f"sample {label}: {error}") from error

    def folder(self, index: int) -> Path | None:
        """Where the media of a row lie: beside the file that it is from, inside the folder of the
        whole set."""
        return self.rows.folder(index) if isinstance(self.rows, Joined) else self.base

    def _parsed(self, row: Any, label: str, folder: Path | None) -> Sample:
        if self.collate is not None:
            made = parse_row(self.collate([row]), label)
            if made.inputs is None and made.input_ids is None:
                raise UserError("the collator must give input_ids, or a decoder's inputs or labels")
            return made
        if (
            self.columns
            and isinstance(row, Mapping)
            and all(isinstance(row.get(key), str) for key in self.columns)
        ):
            row = "\n".join(row[key] for key in self.columns)
        chat, system = self.source.as_chat, self.source.system_prompt
        made = parse_row(
            row, label, base=folder, remote=self.remote, as_chat=chat, system_prompt=system
        )
        # Tables name media from their own folder or from that of the whole set.
        beside = folder == self.base or any(
            find_file(name, (), folder) for name in made.media if isinstance(name, str)
        )
        return made if beside else replace(made, base=self.base)

    def kinds(self) -> frozenset[str]:
        """Kinds of media that the first rows carry, READY for finished model inputs, whose kind
        nobody asks; rows of no known form are left to whoever uses them."""
        kinds: set[str] = set()
        for index in range(min(16, len(self))):
            with suppress(BadSample):
                sample = self.sample(index)
                kinds |= {kind for kind, field in PLURAL.items() if getattr(sample, field)}
                kinds |= {READY} if sample.inputs is not None else set()
        return frozenset(kinds)


def _local(path: Path, source: Source, named: Named | None = None) -> Rows:
    """A file, or a folder: a copy in the hub's layout, one of `save_to_disk`, files of our own
    forms, or sounds."""
    if path.is_file():
        if not is_data(path):
            raise UserError(f"dataset {path}: expected a file ending in {', '.join(SUFFIXES)}")
        if source.split:
            raise UserError(
                f"dataset {path}: a single file has no splits, leave split={source.split} out"
            )
        return Rows(source, read_files([path]), path.resolve().parent, name=path.name)
    if not path.is_dir():
        raise UserError(f"dataset {path} is neither a file nor a folder")
    folder = path.resolve()
    files = folders.walk(folder)
    data = folders.data_files(folder, files)
    tables = any(ending(file.path) in TABLES for file in data)
    rows: Sequence[Any] | None = None
    if (
        not tables
        and source.split
        and all((folder / part).is_dir() for part in source.split.split("+"))
    ):
        parts = [
            _local(folder / part, replace(source, split=None)).rows
            for part in source.split.split("+")
        ]
        rows = Joined(part for each in parts if isinstance(each, Joined) for part in each.parts)
    elif not tables and not any(
        ending(f.path) in (".json", *LINES) and f.path.parent == folder for f in data
    ):
        spoken = transcribed(folder, files)
        rows = None if spoken is None else Joined([(folder, spoken)])
    if rows is None and not data:
        there = Counter(file.suffix or file.name for file in files).most_common(5)
        others = f" ({', '.join(f'{count} {suffix}' for suffix, count in there)})" if there else ""
        wanted = f"{', '.join(SUFFIXES)} files and no sounds with transcripts"
        raise UserError(f"dataset folder {path} holds no {wanted}{others}")
    if rows is None:
        rows = folders.read(folder, data, source.config, source.split, named)
    return Rows(source, rows, folder, name=path.name)


def hub_answers() -> bool:
    """Whether the hub (or the proxy to it) takes a connection within PROBE_SECONDS; False in
    offline mode."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(host.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host.hostname or ""):
        host = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answers: list[bool] = []

    def probe() -> None:
        try:
            socket.create_connection(
                (host.hostname, host.port or 443), timeout=PROBE_SECONDS
            ).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # A thread, since looking up a name has no time-out of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return any(answers)


def _hub(named: Named, source: Source) -> Rows:
    """A set of the hub, or the copy in the hub's cache when there is no connection."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    online = hub_answers()
    more: dict[str, Any] = {
        "remote": named.remote,
        "columns": named.columns,
        "name": source.name.rpartition("/")[2],
    }
    try:
        if named.file:
            path = Path(
                hf_hub_download(
                    named.repo, named.file, repo_type="dataset", local_files_only=not online
                )
            )
            return Rows(source, read_files([path]), path.parent, **more)
        if online:
            limit = (source.num or STREAMED) if named.streamed else None
            rows = load_hub(
                named.repo, source.config or named.config, source.split or named.split, limit
            )
            return Rows(source, rows, **more)
        folder = Path(snapshot_download(named.repo, repo_type="dataset", local_files_only=True))
        return Rows(source, _local(folder, source, named).rows, folder.resolve(), **more)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"dataset {source.name!r}: the hub can't be reached and no copy is in its cache; "
            f"use {LOCAL['audio' if 'audio' in named.kinds else 'image']}"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"dataset {source.name!r} is no file here and no valid name on the hub"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"dataset {source.name!r} can't be fetched: {str(error).splitlines()[0]}"
        ) from error


def _rows(source: Source) -> Rows:
    path = Path(source.name)
    if source.name in DEMO:
        folder = Path(str(resources.files("auto_mmround"))) / "demo" / "calibration"
        return Rows(source, read_files([folder / DEMO[source.name]]), folder, name=source.name)
    name = SHORT.get(source.name, source.name)
    if name in NAMED and not path.exists():
        return _hub(NAMED[name], source)
    if dotted.is_dotted(source.name) and not path.exists():
        options = {
            key: value for key in ("split", "config") if (value := getattr(source, key)) is not None
        }
        return Rows(
            source,
            undecoded(dotted.rows(source.name, STREAM_ROWS, **options)),
            Path.cwd(),
            name=source.name,
        )
    if path.exists():
        return _local(path, source)
    if path.suffix in SUFFIXES or path.is_absolute() or source.name.startswith((".", "~")):
        raise UserError(f"dataset {source.name!r}: there is no such file or folder")
    if source.name.count("/") != 1:
        hint = did_you_mean(source.name, KNOWN)
        names = ", ".join([*NAMED, "demo", *DEMO])
        raise UserError(
            f"unknown dataset {source.name!r}{hint} (known: {names}, or a local file or folder)"
        )
    try:
        return _hub(Named(source.name), source)
    except UserError as error:
        raise UserError(f"{error}{did_you_mean(source.name, KNOWN)}") from error


def load_rows(dataset: Any, collate: dotted.Collate | None = None) -> list[Rows]:
    """The sets of a dataset argument: a spec, or a list, DataLoader or other iterable of rows.

    collate: the user's own way from a row to model inputs, see `dotted.collator`.

    Raises UserError for a name, file, option or form that isn't known, or a set without rows.
    """
    if isinstance(dataset, str | Path):
        sets = [_rows(source) for source in parse_spec(str(dataset))]
    elif isinstance(dataset, Iterable):
        dataset = undecoded(dataset)
        items = islice(dataset, len(dataset) if isinstance(dataset, Sized) else STREAM_ROWS)
        rows = list(items) if collate else [row for item in items for row in split_batch(item)]
        sets = [Rows(Source("given rows"), rows, Path.cwd(), name="row")]
    else:
        raise UserError(
            f"dataset must be a name, a path or a list of rows, not {type(dataset).__name__}"
        )
    for each in sets:
        if not len(each):
            raise UserError(f"dataset {each.source.name!r} is empty")
    return [replace(each, collate=collate) for each in sets] if collate else sets
