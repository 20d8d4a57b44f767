"""Rows as files hold them: JSON, JSON lines, text, CSV, Parquet, Arrow. What a file is, its name
says; no other parser is asked, and nothing is unpacked or fetched."""

import csv
import gzip
import io
import re
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import DATASET_BYTES, one_line, parse_json, read_text

TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson")
PLAIN = (".json", *LINES, ".txt", ".csv", ".tsv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
HELD_BYTES = 2 << 30  # of decoded tables in memory; what is beyond goes to a temporary file
TABLE_BYTES = 64 << 30  # of one decoded table: a small file may claim to hold a huge one
# A row of a .json file that holds one object; any other object holds its rows as values.
ROW_KEYS = {"text", "input_ids", "conversations", "messages"}


def ending(path: Path) -> str:
    """The ending that says how a file is read, `.gz` left out: `.jsonl` for a.jsonl.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix if name.endswith(".gz") else path.suffix.lower()


def is_data(path: Path) -> bool:
    """Whether `read_files` can read a file of this name."""
    packed = path.suffix.lower() == ".gz"
    return ending(path) in PLAIN or (ending(path) in TABLES and not packed)


class Joined(Sequence[Any]):
    """Rows of several files one after the other, and the folder that each lies in."""

    def __init__(self, parts: Iterable[tuple[Path, Sequence[Any]]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(rows) for _, rows in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _place(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, index: Any) -> Any:
        part, row = self._place(index)
        return self.parts[part][1][row]

    def folder(self, index: int) -> Path:
        """The folder of the file that row `index` comes from."""
        return self.parts[self._place(index)[0]][0]

    def cut(self, start: int, end: int) -> "Joined":
        """Rows start .. end, without end."""
        starts = [0, *self.ends]
        return Joined(
            (folder, rows[max(start - at, 0) : max(end - at, 0)])
            for at, (folder, rows) in zip(starts, self.parts)
        )


class TableRows(Sequence[Any]):
    """Rows of an Arrow table, media as stored: our own readers decode them, with their bounds."""

    def __init__(self, table: Any, what: str) -> None:
        self.table, self.what = table, what

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, end, _ = index.indices(len(self))
            return TableRows(self.table.slice(start, max(end - start, 0)), self.what)
        at = range(len(self))[index]
        try:
            return self.table.slice(at, 1).to_pylist()[0]
        except (ValueError, OverflowError, TypeError) as error:
            raise UserError(
                f"{self.what} row {at} can't be read: {one_line(str(error))[:200]}"
            ) from None


def read_files(paths: Sequence[Path]) -> Joined:
    """The rows of files of any kind that `is_data` knows. Raises UserError for one that can't be
    read."""
    left, parts = HELD_BYTES, []
    for path in paths:
        rows: Sequence[Any]
        if ending(path) in TABLES:
            rows = read_table(path, left)
            left -= min(left, rows.table.nbytes)
        else:
            rows = read_plain(path)
        parts.append((path.parent, rows))
    return Joined(parts)


def read_table(path: Path, held: int = HELD_BYTES) -> TableRows:
    """A Parquet or Arrow file. held: bytes of it that may stay in memory. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    what = f"dataset {path}"
    try:
        if ending(path) == ".arrow":
            table = _arrow(path)
        else:
            with pq.ParquetFile(path) as file:
                table = _gathered(file.schema_arrow, file.iter_batches(1024), held, what)
    except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{what} can't be loaded: {one_line(str(error))[:300]}") from None
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(f"{what} can't be loaded: it has two columns called {twice[0]!r}")
    return TableRows(table, what)


def _arrow(path: Path) -> Any:
    """A stream (what `save_to_disk` writes) or a file of Arrow, looked through before its offsets
    are believed."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source).read_all()
    table.validate(full=True)
    return table


def _gathered(schema: Any, batches: Iterator[Any], held: int, what: str) -> Any:
    """The batches as one table: in memory, or in a temporary file if they are more than `held`
    bytes."""
    import pyarrow as pa

    first, size = [], 0
    for batch in batches:
        first.append(batch)
        size += batch.nbytes
        if size > held:
            break
    else:
        return pa.Table.from_batches(first, schema)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        size = 0
        with pa.ipc.new_file(file.name, schema) as sink:
            for batch in chain(first, batches):
                size += batch.nbytes
                if size > TABLE_BYTES:
                    raise ValueError(f"it holds more than {TABLE_BYTES >> 30} GiB")
                sink.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()  # lives on without its name


def read_plain(path: Path) -> list[Any]:
    """The rows of a JSON, JSON lines, text or CSV file (.gz too). Raises UserError when it can't be
    read."""
    what, end = f"dataset {path}", ending(path)
    text = _text(path, what).removeprefix("\ufeff")
    if end == ".txt":
        return [line for _, line in _lines(text)]
    if end in DELIMITERS:
        return _csv(text, DELIMITERS[end], what)
    # Many call JSON lines .json and a list .jsonl: where the first line is a value, it can't be a
    # part of a larger one.
    first = re.search(r"\S[^\r\n]*", text)
    alone = first is not None and _is_json(first[0])
    more = first is not None and re.compile(r"\S").search(text, first.end()) is not None
    if (alone and (more or end in LINES)) or (end in LINES and not _is_json(text)):
        return [parse_json(line, f"{what} line {number}") for number, line in _lines(text)]
    return _json_rows(parse_json(text, what), what)


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not empty. Only real line ends: JSON strings may hold
    other separators."""
    return [(i, line) for i, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "")
    except UserError:
        return False
    return True


def _json_rows(data: Any, what: str) -> list[Any]:
    """The rows of a .json file: a list, one row, or an object of rows or with one list of them."""
    if isinstance(data, Mapping):
        if ROW_KEYS & set(data):
            return [data]
        values = list(data.values())
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not isinstance(data, list):
        raise UserError(f"{what} must hold a list of rows")
    return data


def _text(path: Path, what: str) -> str:
    """A text file, unpacked if its name ends in .gz, bounded by what comes out."""
    if path.suffix.lower() != ".gz":
        return read_text(path, what, DATASET_BYTES)
    try:
        with gzip.open(path) as file:
            data = file.read(DATASET_BYTES + 1)
        if len(data) > DATASET_BYTES:
            raise UserError(f"{what} is larger than {DATASET_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{what} can't be read: {one_line(str(error))}") from None


def _csv(text: str, delimiter: str, what: str) -> list[dict[str, str]]:
    """The rows of a table whose first line names its columns; empty cells are left out."""
    try:
        header, *rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row
        ] or [[]]
    except csv.Error as error:
        raise UserError(f"{what} can't be read: {error}") from None
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise UserError(f"{what} can't be read: its first line names a column twice")
    wrong = next((i for i, row in enumerate(rows, 2) if len(row) > len(names)), None)
    if wrong:
        raise UserError(
            f"{what} can't be read: row {wrong} has more cells than the first line names columns"
        )
    return [{name: cell for name, cell in zip(names, row) if cell.strip()} for row in rows]
