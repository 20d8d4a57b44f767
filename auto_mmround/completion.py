"""Shell completion through argcomplete, from the same parsers that read the command line."""

import argparse
from types import ModuleType

from auto_mmround.errors import UserError
from auto_mmround.flags import COMMANDS, PROGRAM, add_flags

NAMES = (PROGRAM, PROGRAM.replace("-", "_"))
ASKED = "_ARGCOMPLETE"  # the shell's question comes with this in the environment


def shell_code(shell: str) -> str:
    """What a shell has to run, once a session. Raises UserError without argcomplete."""
    code: str = _argcomplete().shellcode(NAMES, shell=shell)
    return code


def answer_shell() -> None:
    """Write what fits the line that the shell sent, and leave the process."""
    whole = argparse.ArgumentParser(prog=PROGRAM)
    add_flags(whole, "quantize")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        if name != "quantize":
            add_flags(commands.add_parser(name, help=command.text), name)
    _argcomplete().autocomplete(whole, always_complete_options="long")


def _argcomplete() -> ModuleType:
    try:
        import argcomplete
    except ImportError:
        raise UserError("completion needs argcomplete: pip install argcomplete") from None
    module: ModuleType = argcomplete
    return module
