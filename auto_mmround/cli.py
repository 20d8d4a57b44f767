"""The command line: `auto-round-mllm`, also `auto_round_mllm` and `python -m auto_mmround`.

Heavy imports wait until a command needs them, so that `-h` and mistakes answer at once.
"""

import argparse
import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from auto_mmround import __version__
from auto_mmround.errors import NotProved, UserError
from auto_mmround.recipe.fields import Key
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import HINTS, KEYS, Recipe, from_mapping
from auto_mmround.recipe.schemes import SCHEMES
from auto_mmround.untrusted import one_line

EPILOG = """\
commands:
  auto-round-mllm [options]            quantize and export
  auto-round-mllm recipe.toml          the same from a file (.toml, .yaml); given options win
  auto-round-mllm plan [options]       show what every layer would become, and why some stay
  auto-round-mllm eval ...             perplexity, KL by modality, answers, word errors; a card
  auto-round-mllm verify DIR ...       are the files right, and do real engines agree?
  auto-round-mllm report RUN [RUN ..]  a page on a run, or on several side by side
  auto-round-mllm formats | families   what can be written, what can be read

examples:
  auto-round-mllm --model demo --dataset demo --bits 4                       offline, about a minute
  auto-round-mllm --model ./Qwen2-VL-2B-Instruct --format auto_round,auto_gptq --output_dir ./out
  auto-round-mllm --model ./model --dataset pairs.json:num=64,text.jsonl:num=64
"""

# Flags that are not fields of the recipe: (name, type, help), by section.
MORE: dict[str, list[tuple[str, type, str]]] = {
    "scheme": [("scheme", str, f"bits, group_size and sym by a known name: {', '.join(SCHEMES)}")],
    "result": [("eval_bs", int, "no effect: evaluation runs sample by sample")],
}
NEGATED = {key.off[0]: name for name, key in KEYS.items() if key.off}
IGNORED = ("eval_bs",)
LONG_DASHES = ("\u2013", "\u2014")


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = next(iter(message.removeprefix("unrecognized arguments: ").split()), "''")
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            message = f"unknown argument {word}" + (
                f"; did you mean {near[0]}?" if near else f"; see {self.prog} -h"
            )
        raise UserError(message)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of the recipe with a help text; the result holds given flags only."""
    for section in dict.fromkeys(key.section for key in KEYS.values()):
        group = parser.add_argument_group(section)
        for name, kind, text in MORE.get(section, []):
            group.add_argument(
                f"--{name}", type=kind, metavar=name.upper(), help=text, default=argparse.SUPPRESS
            )
        for name, key in KEYS.items():
            if key.section == section:
                _add_flags(group, name, key)


def _add_flags(group: Any, name: str, key: Key) -> None:
    """The flags of one field: its own name, other names, and the flag that means False."""
    hint, default = HINTS[name], getattr(Recipe(), name)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    shared: dict[str, Any] = {"default": argparse.SUPPRESS}
    if key.text:
        flags = [f"--{flag}" for flag in (name, *key.names)]
        text = key.text.replace("%", "%%") + (
            f" (default: {default})" if default not in (None, "", False) else ""
        )
        several = typing.get_origin(kinds[0]) is list
        value = {
            "type": str if several else kinds[0],
            "nargs": "+" if several else None,
            "metavar": name.upper(),
        }
        kind = {"action": "store_true"} if bool in kinds else value
        group.add_argument(*flags, dest=name, help=text, **kind, **shared)
    if key.off:
        group.add_argument(
            f"--{key.off[0]}", help=key.off[1].replace("%", "%%"), action="store_true", **shared
        )


def to_recipe(given: dict[str, Any], base: Recipe) -> Recipe:
    """A recipe with flags laid over it."""
    values = {
        NEGATED.get(key, key): not value if key in NEGATED else value
        for key, value in given.items()
    }
    return from_mapping(
        {key: value for key, value in values.items() if key not in IGNORED}, "command line", base
    )


def normalise(arguments: Sequence[str]) -> list[str]:
    """`--group-size` as `--group_size`; a typographic dash, as web pages show it, is named."""
    result = []
    for word in arguments:
        if word.startswith(LONG_DASHES):
            raise UserError(
                f"argument {word} starts with a long dash: write"
                f" --{word.lstrip(''.join(LONG_DASHES))}"
            )
        head, equals, tail = word.partition("=")
        result.append(
            head.replace("-", "_").replace("__", "--", 1) + equals + tail
            if word.startswith("--")
            else word
        )
    return result


def quantize_command(arguments: Sequence[str]) -> int:
    """Quantize and export."""
    recipe, _ = parse_recipe(arguments, "auto-round-mllm")
    from auto_mmround.console import quantize_with_progress

    return quantize_with_progress(recipe)


def plan_command(arguments: Sequence[str]) -> int:
    """Print the plan and stop."""
    recipe, _ = parse_recipe(arguments, "auto-round-mllm plan")
    from auto_mmround.console import show_plan

    return show_plan(recipe)


def parse_recipe(arguments: Sequence[str], prog: str) -> tuple[Recipe, argparse.Namespace]:
    """The recipe of a command line: a file, if the first argument is one, under the flags."""
    parser = Parser(
        prog=prog,
        description="Quantize a multimodal model to 2-8 bits and export it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe_file", nargs="?", metavar="recipe.toml", help="a recipe file (.toml, .yaml)"
    )
    parser.add_argument("--version", action="version", version=f"auto_mmround {__version__}")
    for mode in ("eval", "lmms"):
        parser.add_argument(
            f"--{mode}", action="store_true", help="comes after quantizing: auto-round-mllm eval"
        )
    add_recipe_flags(parser)
    found = parser.parse_args(normalise(arguments))
    given = {
        key: value
        for key, value in vars(found).items()
        if key not in ("recipe_file", "eval", "lmms")
    }
    if found.eval or found.lmms:
        raise UserError(
            "--eval and --lmms: evaluate the result with `auto-round-mllm eval --model DIR --lmms"
            " TASKS`"
        )
    file = found.recipe_file
    if file and not Path(file).suffix:
        near = difflib.get_close_matches(file, COMMANDS, n=1)
        raise UserError(
            f"unknown command {file!r}; {f'did you mean {near[0]}?' if near else f'see {prog} -h'}"
        )
    base = from_mapping(read(file), f"recipe file {file}") if file else Recipe()
    return to_recipe(given, base), found


EVAL_FLAGS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "help": "folder of a model or of a checkpoint of ours, or demo"},
    "reference": {"help": "the model before quantization: adds KL, agreement and recovery"},
    "baseline": {"help": "another checkpoint to compare with, such as one rounded to nearest"},
    "tasks": {"help": "comma list of ppl, kl, vqa, wer, samples, lm_eval:NAME (default: kl,ppl)"},
    "lmms": {
        "metavar": "TASKS", "help": "comma list of tasks of lmms-eval, by name or .yaml file",
    },
    "vlmeval": {
        "metavar": "SETS", "help": "comma list of sets of VLMEvalKit, by name or .tsv file",
    },
    "dataset": {
        "default": "demo", "help": "rows to measure on; demo: the held-out set of the demo model",
    },
    "extra_data_dir": {"help": "where the media lie"},
    "template": {"help": "chat template, as for quantizing"},
    "limit": {"type": int, "help": "at most so many samples of each set"},
    "language": {
        "help": "of the speech, a code such as en: for transcripts and their normaliser",
    },
    "device": {"default": "0"},
    "trust_remote_code": {
        "action": "store_true", "help": "run Python code that comes with the model",
    },
    "json": {"action": "store_true", "help": "print JSON"},
    "model_card": {"action": "store_true", "help": "write README.md into the checkpoint"},
}  # fmt: skip


def eval_command(arguments: Sequence[str]) -> int:
    """Measure a model, alone or against a reference."""
    parser = Parser(
        prog="auto-round-mllm eval", description=eval_command.__doc__, allow_abbrev=False
    )
    for flag, options in EVAL_FLAGS.items():
        parser.add_argument(f"--{flag}", **options)
    found = parser.parse_args(normalise(arguments))
    if found.limit is not None and found.limit < 1:
        raise UserError(f"limit = {found.limit}: at least 1")
    found.words = list(arguments)
    outside = [
        f"{p}:{n}"
        for p in ("lmms", "vlmeval")
        for n in (getattr(found, p) or "").split(",")
        if n.strip()
    ]
    found.tasks = ",".join([*([found.tasks] if found.tasks else []), *outside]) or None
    from auto_mmround.console import evaluate_and_show

    return evaluate_and_show(found)


VERIFY_EPILOG = """\
Two questions about a checkpoint folder, of ours or of another tool:

static   are the files right? Tensors, shards and index, shapes, ranges, names as Transformers
         and vLLM will resolve them, side files, tokenizer; for our own files the decoded
         numbers, bit for bit, against those that were tuned
engines  does each engine that reads the format load it, with as many quantized layers, and
         compute what the decoded weights compute, for text, an image and a sound where the
         model takes them?

An engine that is not installed is named with the command that installs it. Exit status:
0 right, 1 wrong, 2 the command can't be carried out.

examples:
  auto-round-mllm verify ./tmp_autoround/demo-w4g128-auto_round
  auto-round-mllm verify ./some-awq-model --source ./original-model --engine none
  auto-round-mllm verify ./demo-w4g128-auto_gptq --engine transformers,vllm --json
"""


def verify_command(arguments: Sequence[str]) -> int:
    """Check a checkpoint: its files, then real engines against the decoded weights."""
    parser = Parser(
        prog="auto-round-mllm verify",
        description=verify_command.__doc__,
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the checkpoint")
    parser.add_argument(
        "--engine",
        help="comma list of transformers, vllm, llamacpp, mlx, openvino; none: the files only; "
        "default: all that read the format and are installed",
    )  # fmt: skip
    parser.add_argument(
        "--source", type=Path, help="folder of the model before quantization, to compare with"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds an engine may take (default: 600)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args(normalise(arguments))
    from auto_mmround.console import verify_and_show

    return verify_and_show(found)


def report_command(arguments: Sequence[str]) -> int:
    """Write the report of a run again, or one page that compares several runs."""
    parser = Parser(
        prog="auto-round-mllm report", description=report_command.__doc__, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="checkpoint folders of ours")
    parser.add_argument(
        "--output", help="the page to write (default: report.html in the run, or here for several)"
    )
    found = parser.parse_args(normalise(arguments))
    from auto_mmround.console import show_report

    return show_report(found.folders, found.output)


def formats_command(arguments: Sequence[str]) -> int:
    """List the export formats, and which engines read them."""
    Parser(prog="auto-round-mllm formats", description=formats_command.__doc__).parse_args(
        arguments
    )
    from auto_mmround.lists import show_formats

    return show_formats()


def families_command(arguments: Sequence[str]) -> int:
    """List the model families."""
    Parser(prog="auto-round-mllm families", description=families_command.__doc__).parse_args(
        arguments
    )
    from auto_mmround.lists import show_families

    return show_families()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": plan_command,
    "eval": eval_command,
    "verify": verify_command,
    "report": report_command,
    "formats": formats_command,
    "families": families_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 our fault, or a wrong result; 2 wrong input (one line on stderr)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("auto_mmround").setLevel(logging.INFO)
    try:
        command = COMMANDS.get(words[0]) if words else None
        return command(words[1:]) if command else quantize_command(words)
    except UserError as error:
        print(f"auto-round-mllm: {one_line(str(error))}", file=sys.stderr)
        return 2
    except NotProved as error:
        print(f"auto-round-mllm: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("auto-round-mllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.close(sys.stdout.fileno())
        return 0
