"""Flags as tables, and the parsers made from them. A run's flags come from the recipe's fields."""

import argparse
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from auto_mmround import __version__
from auto_mmround.errors import UserError
from auto_mmround.recipe.checks import types_of
from auto_mmround.recipe.fields import Key
from auto_mmround.recipe.recipe import HINTS, KEYS, Recipe, from_mapping
from auto_mmround.recipe.schemes import SCHEMES

PROGRAM = "auto-round-mllm"
# The flags of the first help screen; `--help_all` has the others.
USUAL = (
    "model", "dataset", "bits", "group_size", "scheme", "target_bits", "quant_nontext_module",
    "preset", "nsamples", "format", "output_dir", "device",
)  # fmt: skip
# Flags that are not fields of the recipe: (section, name, options).
MORE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "scheme",
        "scheme",
        {"help": f"bits, group_size and sym by a known name: {', '.join(SCHEMES)}"},
    ),
    (
        "result",
        "eval_bs",
        {"type": int, "metavar": "N", "help": "no effect: evaluation runs sample by sample"},
    ),
)
ALSO = "; also "  # before the other names of a flag, in its help
METAVARS: dict[Any, str] = {int: "N", float: "X"}
NEGATED = {key.off[0]: name for name, key in KEYS.items() if key.off}
IGNORED = ("eval_bs",)
LONG_DASHES = ("\u2013", "\u2014")

EXAMPLES = """\
examples:
  auto-round-mllm --model demo --dataset demo       offline, about a minute
  auto-round-mllm --model ./my-model --dataset ./pairs.json --format auto_round,gguf:q4_0
  auto-round-mllm plan --model ./my-model --dataset demo    minutes, memory, disk
"""
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
ASK_EPILOG = """\
examples:
  auto-round-mllm ask ./demo-w4g128-auto_round "What color is the digit?" --image a.png
  auto-round-mllm ask ./my-model ./my-model-w4g128 "What is written here?" --image a.png
  auto-round-mllm ask ./whisper-w4g128-auto_round --audio speech.wav
  auto-round-mllm ask ./my-model-w4g32-gguf-q4_0 "What do you see?" --image a.png --engine llamacpp
"""
COMPLETION_EPILOG = """\
  bash   eval "$(auto-round-mllm completion bash)"       in ~/.bashrc
  zsh    eval "$(auto-round-mllm completion zsh)"        in ~/.zshrc
  fish   auto-round-mllm completion fish | source        in ~/.config/fish/config.fish
"""
# For commands that run decoded models; recipes have the same words.
STREAM: dict[str, dict[str, Any]] = {
    "--stream": {
        "action": "store_true", "default": None,
        "help": "read blocks when their turn comes (default: where a model would not fit)",
    },
    "--no_stream": {
        "action": "store_false", "dest": "stream", "help": "the whole model in memory",
    },
}  # fmt: skip
TRUST = {"action": "store_true", "help": "run Python code that comes with the model"}
JSON = {"action": "store_true", "help": "print JSON"}


TELL: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-v", "--verbose"), {"action": "store_true", "help": "say more: every block, and why"}),
    (("-q", "--quiet"), {"action": "store_true", "help": "say nothing but warnings and results"}),
    (
        ("--json_log",),
        {"type": Path, "metavar": "FILE", "help": "events for programs, a JSON object a line"},
    ),
)


HUB: dict[str, dict[str, Any]] = {
    "--public": {"action": "store_true", "help": "everybody may read the repository"},
    "--hub_endpoint": {"metavar": "URL", "help": "another Hub than huggingface.co"},
}
# Of a run that sends its result.
SEND: dict[str, dict[str, Any]] = {
    "--push_to_hub": {
        "metavar": "USER/NAME",
        "help": "send the result to the Hub with a model card, private; several formats: one each",
    },
    **HUB,
}


@dataclass(frozen=True)
class Command:
    """One command: a line of help, its flags with argparse's options, and what stands below them.

    recipe: it takes the flags of a run as well.
    """

    text: str
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epilog: str = ""
    recipe: bool = False


# The first is what the program does without the name of a command.
COMMANDS: dict[str, Command] = {
    "quantize": Command(
        "Quantize a multimodal model to 2-8 bits and export it.", SEND, recipe=True
    ),
    "plan": Command(
        "Show what each layer becomes, and what a run would take.", {"--json": JSON}, recipe=True
    ),
    "eval": Command(
        "Measure a model, alone or against a reference.",
        {
            "--model": {
                "required": True, "help": "folder of a model or of a checkpoint of ours, or demo",
            },
            "--reference": {
                "help": "the model before quantization: adds KL, agreement and recovery",
            },
            "--baseline": {
                "help": "another checkpoint to compare with, such as one rounded to nearest",
            },
            "--tasks": {
                "help": "comma list of ppl, kl, vqa, wer, samples, lm_eval:NAME (default: kl,ppl)",
            },
            "--lmms": {
                "metavar": "TASKS",
                "help": "comma list of tasks of lmms-eval, by name or .yaml file",
            },
            "--vlmeval": {
                "metavar": "SETS", "help": "comma list of sets of VLMEvalKit, by name or .tsv file",
            },
            "--dataset": {
                "default": "demo",
                "help": "rows to measure on; demo: the held-out set of the demo model",
            },
            "--extra_data_dir": {"help": "where the media lie"},
            "--template": {"help": "chat template, as for quantizing"},
            "--limit": {"type": int, "help": "at most so many samples of each set"},
            "--language": {
                "help": "of the speech, a code such as en: for transcripts and their normaliser",
            },
            "--device": {"default": "0", "help": "0: the first accelerator, else the processor"},
            "--model_dtype": {
                "help": "compute in bfloat16, float16 or float32; float32, which float16 becomes on"
                " a processor, tells damage of less than .001 nats from rounding on the way"
                " (default: each model's own)",
            },
            "--trust_remote_code": TRUST,
            **STREAM,
            "--json": JSON,
            "--model_card": {
                "action": "store_true", "help": "write README.md into the checkpoint",
            },
        },
    ),
    "verify": Command(
        "Check a checkpoint: are its files right, do engines agree?",
        {
            "folder": {"metavar": "DIR", "type": Path, "help": "folder of the checkpoint"},
            "--engine": {
                "help": "comma list of transformers, vllm, llamacpp, mlx, openvino; none: the files"
                " only; default: all that read the format and are installed",
            },
            "--source": {
                "type": Path, "help": "folder of the model before quantization, to compare with",
            },
            "--timeout": {
                "type": float, "default": 600,
                "help": "seconds an engine may take (default: 600)",
            },
            "--trust_remote_code": TRUST,
            **STREAM,
            "--json": JSON,
        },
        VERIFY_EPILOG,
    ),
    "ask": Command(
        "Ask a checkpoint about a picture or a sound, or several side by side.",
        {
            "words": {
                "nargs": "+", "metavar": "DIR .. QUESTION",
                "help": "folders of models or checkpoints, or demo; then the question",
            },
            "--image": {"action": "append", "default": [], "metavar": "FILE", "help": "a picture"},
            "--audio": {
                "action": "append", "default": [], "metavar": "FILE",
                "help": "a sound; without a question it is written down",
            },
            "--video": {"action": "append", "default": [], "metavar": "FILE", "help": "a film"},
            "--engine": {
                "metavar": "NAME",
                "help": "vllm, llamacpp, mlx or openvino, where it is installed; default: our own"
                " loader",
            },
            "--max_tokens": {
                "type": int, "default": 128, "metavar": "N",
                "help": "most tokens of an answer (default: 128)",
            },
            "--device": {"default": "0", "help": "0: the first accelerator, else the processor"},
            "--timeout": {
                "type": float, "default": 600, "metavar": "S",
                "help": "seconds an engine may take (default: 600)",
            },
            "--trust_remote_code": TRUST,
            "--json": JSON,
        },
        ASK_EPILOG,
    ),
    "report": Command(
        "Write the page of a run again, or one that compares several runs.",
        {
            "folders": {"nargs": "+", "metavar": "RUN", "help": "checkpoint folders of ours"},
            "--output": {
                "help": "the page to write (default: report.html in the run, or here for several)",
            },
            "--open": {"action": "store_true", "help": "show the page in the browser"},
        },
    ),
    "push": Command(
        "Send a checkpoint to the Hub with a model card; private if not told else.",
        {
            "folder": {"metavar": "DIR", "type": Path, "help": "a checkpoint of ours"},
            "repo": {"metavar": "USER/NAME", "help": "the repository, made where there is none"},
            **HUB,
        },
    ),
    "formats": Command("List the export formats, and which engines read them."),
    "families": Command("List the model families, and what became of each class."),
    "completion": Command(
        "Print the code with which a shell completes what you type.",
        {"shell": {"choices": ("bash", "zsh", "fish"), "help": "whose code"}},
        COMPLETION_EPILOG,
    ),
}  # fmt: skip


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


def parser_of(name: str, every: bool = False) -> Parser:
    """The parser of a command. every: its help names all flags of a run, else the usual ones."""
    command = COMMANDS[name]
    prog = PROGRAM if name == "quantize" else f"{PROGRAM} {name}"
    parser = Parser(
        prog=prog,
        usage=f"{prog} --model MODEL [options]" if command.recipe else None,
        description=command.text,
        epilog=command.epilog or ("\n".join(_overview()) if command.recipe else None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.recipe:
        parser.add_argument(
            "recipe_file", nargs="?", metavar="recipe.toml",
            help="a recipe file (.toml, .yaml); given flags win",
        )  # fmt: skip
    add_flags(parser, name, every)
    return parser


def add_flags(parser: argparse.ArgumentParser, name: str, every: bool = True) -> None:
    """All that a command takes, but for a recipe file."""
    command = COMMANDS[name]
    hidden = {"help": argparse.SUPPRESS} if command.recipe and not every else {}
    for flag, options in command.flags.items():
        parser.add_argument(flag, **{**options, **hidden})
    if command.recipe:
        _add_recipe_flags(parser, every)


def _overview() -> Iterator[str]:
    """What the program can do, and examples."""
    yield f"commands, each with -h ({PROGRAM} COMMAND -h):"
    for name, command in COMMANDS.items():
        yield f"  {name:<12}{command.text}{' (the default)' if name == 'quantize' else ''}"
    yield f"\n{EXAMPLES}"


def _add_recipe_flags(parser: argparse.ArgumentParser, every: bool) -> None:
    """All flags of a run; the result holds given ones only. Without ``every`` few have a help."""
    flags = list(recipe_flags())
    count = sum(options["help"] is not argparse.SUPPRESS for _, _, options in flags)
    version = f"auto_mmround {__version__}"
    parser.add_argument("--help_all", action="help", help=f"all {count} flags, by topic")
    parser.add_argument("--version", action="version", version=version, help="print the version")
    for flags_of, options in TELL:
        parser.add_argument(*flags_of, **options)
    for mode in ("eval", "lmms"):
        parser.add_argument(f"--{mode}", action="store_true", help=argparse.SUPPRESS)
    titles = dict.fromkeys(section for section, _, _ in flags) if every else ["the usual options"]
    groups = {title: parser.add_argument_group(title) for title in titles}
    if not every:
        flags.sort(key=lambda flag: USUAL.index(flag[1]) if flag[1] in USUAL else len(USUAL))
    for section, name, options in flags:
        short = options["help"].split(ALSO)[0] if name in USUAL else argparse.SUPPRESS
        shown = options | {"help": options["help"] if every else short}
        choices = shown.pop("completed", ())
        group = groups[section if every else "the usual options"]
        action = group.add_argument(f"--{name}", default=argparse.SUPPRESS, **shown)
        if choices:
            # argcomplete asks an action's `completer` for values
            action.completer = lambda choices=choices, **_: choices  # type: ignore[attr-defined]


def recipe_flags() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(section, name, options) of every flag of a run: a field's own, its other names, without a
    help, and the one that means False."""
    for name, key in KEYS.items():
        types = types_of(HINTS[name])
        several = typing.get_origin(types[0]) is list
        valued = {
            "type": str if several else types[0],
            "nargs": "+" if several else None,
            "metavar": METAVARS.get(types[0], name.split("_")[-1].upper()),
            "completed": list(key.choices),
        }
        options = {"action": "store_true"} if bool in types else valued
        if key.text:
            yield key.section, name, options | {"dest": name, "help": _help(name, key)}
            for other in key.names:
                yield key.section, other, options | {"dest": name, "help": argparse.SUPPRESS}
        if key.off:
            text = key.off[1].replace("%", "%%")
            yield key.section, key.off[0], {"action": "store_true", "help": text}
    yield from MORE


def _help(name: str, key: Key) -> str:
    default = getattr(Recipe(), name)
    text = key.text + (f" (default: {default})" if default not in (None, "", False) else "")
    also = ", ".join(f"--{other}" for other in key.names)
    return (text + (f"{ALSO}{also}" if also else "")).replace("%", "%%")


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
