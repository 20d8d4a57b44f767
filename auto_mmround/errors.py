"""Failures of a run: wrong input from the user, or a wrong result."""

from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """One line for the user: the fault, its place, what to do. The command line exits with 2."""


def several(names: Sequence[str]) -> str:
    """The number of further things beside the first, in words."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class NotProved(Exception):
    """A checkpoint does not hold the tuned values. The command line prints it and exits with 1.

    folder: its place, marked by its name. findings: one line for each fault. folders: all such
    folders of one run.
    """

    def __init__(
        self, folder: Path, findings: Sequence[str], folders: Sequence[Path] = (), note: str = ""
    ):
        self.folder, self.findings = folder, tuple(findings)
        self.folders = tuple(folders) or (folder,)
        others = ", ".join(path.name for path in self.folders[1:])
        text = f"{self.findings[0]}{several(findings)}" + (
            f"; the same of {others}" if others else ""
        )
        super().__init__(f"{folder} is not proved: {text}{note}")
