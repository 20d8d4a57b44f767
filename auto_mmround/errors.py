"""What a run may end with besides success: the user's input is wrong, or what it wrote is."""

from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """One line for the user: what is wrong, where, and what to do. The command line prints it and
    exits with 2."""


class NotProved(Exception):
    """A checkpoint was written that is not what was tuned; the command line prints one line and
    exits with 1.

    folder: where it lies, marked by its name. findings: what is wrong, a line each. folders: all
      such of one run.
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
