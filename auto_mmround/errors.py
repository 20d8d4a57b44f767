"""Failures of a run: wrong input from the user, or a wrong result."""

from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """One line for the user: the fault, its place, what to do. The command line exits with 2."""


class NotProved(Exception):
    """A checkpoint does not hold the tuned values. The command line prints it and exits with 1.

    folder: its place, marked by its name. findings: one line for each fault. folders: all such
    folders of one run.
    """

    def __init__(
        self, folder: Path, findings: Sequence[str], folders: Sequence[Path] = (), note: str = ""
    ):
        self.folder, self.findings, self.folders = (
            folder,
            tuple(findings),
            tuple(folders) or (folder,),
        )
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        others = (
            f"; the same of {', '.join(path.name for path in self.folders[1:])}"
            if self.folders[1:]
            else ""
        )
        super().__init__(f"{folder} is not proved: {self.findings[0]}{more}{others}{note}")
