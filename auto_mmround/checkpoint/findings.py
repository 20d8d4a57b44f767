"""What is found wrong in a checkpoint folder, and JSON files read so that faults are findings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import one_line, parse_json, read_text


@dataclass(frozen=True)
class Finding:
    """severity: "error" or "warning". where: a tensor, module, file or configuration key."""

    severity: str
    where: str
    message: str

    def line(self) -> str:
        """One line for people."""
        return one_line(f"{self.severity}: {self.where}: {self.message}")


def fault(where: str, message: str) -> Finding:
    """An error: some reader would fail, or read wrong values without a warning."""
    return Finding("error", where, message)


def read_json(path: Path, findings: list[Finding]) -> dict[str, Any] | None:
    """A JSON object, or None and a finding."""
    try:
        value = parse_json(read_text(path, path.name), path.name, once=True)
    except UserError as error:
        text = "is missing" if not path.is_file() else str(error).removeprefix(f"{path.name} ")
        findings.append(fault(path.name, text))
        return None
    if not isinstance(value, dict):
        findings.append(fault(path.name, "holds no JSON object"))
        return None
    return value
