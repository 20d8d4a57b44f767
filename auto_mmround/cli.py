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
from auto_mmround.errors import UserError
from auto_mmround.recipe.recipe import ALGORITHMS, EQUALIZERS, HINTS, ORDERS, SCALE_DTYPES, Recipe, from_mapping, read
from auto_mmround.recipe.schemes import PRESETS
from auto_mmround.untrusted import one_line

EPILOG = """\
commands:
  auto-round-mllm [options]            quantize and export
  auto-round-mllm recipe.toml          the same from a file (.toml, .yaml); options given as well win
  auto-round-mllm plan [options]       show what every layer would become, and why some stay
  auto-round-mllm eval ...             perplexity, KL by modality, answers, word error rate; model card
  auto-round-mllm verify DIR ...       are the files right, and do real engines agree?
  auto-round-mllm report RUN [RUN ..]  a page on a run, or on several side by side
  auto-round-mllm formats | families   what can be written, what can be read

examples:
  auto-round-mllm --model demo --dataset demo --bits 4                       offline, about a minute
  auto-round-mllm --model ./Qwen2-VL-2B-Instruct --format "auto_round,auto_gptq" --output_dir ./tmp_autoround
  auto-round-mllm --model ./model --dataset "pairs.json:num=64,text.jsonl:num=64" --extra_data_dir ./images
"""

# (field of the recipe, other names of the flag, help). Flags may be written with - or _.
FLAGS: dict[str, list[tuple[str, list[str], str]]] = {
    "model and result": [
        ("model", ["model_name", "model_name_or_path"], "folder, hub name, or `demo` for the model that ships with us"),
        ("format", [], "comma list of formats, see `auto-round-mllm formats`"),
        ("output_dir", [], "parent folder; each format gets <model>-w4g128-<format> below it"),
        ("overwrite", [], "replace checkpoints that exist there"),
        ("stream", [], "read each block when its turn comes; default where the model takes most of the free memory"),
        ("no_stream", [], "keep the whole model in memory"),
        ("offload_states", [], "keep calibration states in files, which the system holds in memory as it can"),
        ("low_gpu_mem_usage", [], "keep calibration states in host memory"),
        ("restart", [], "begin anew instead of continuing an unfinished run"),
        ("sample_generation", [], "print what the quantized model answers to the first sample"),
        ("device", ["devices"], "0: the first accelerator, else the processor; cpu, hpu, cuda:1, auto"),
        (
            "device_map",
            [],
            "spread the model over all devices of this machine: auto, balanced, sequential (accelerate)",
        ),
        ("model_dtype", [], "load the weights as bfloat16, float16 or float32 instead of as stored"),
        ("trust_remote_code", [], "run Python code that comes with the model"),
    ],
    "scheme": [
        ("scheme", [], f"bits, group_size and sym by a known name: {', '.join(PRESETS)}"),
        ("bits", [], "2 to 8"),
        ("target_bits", [], "mixed bits: the average with scales and zero points, chosen layer by layer by damage"),
        ("bit_options", [], "what a layer may get with target_bits"),
        ("group_size", [], "columns that share a scale; -1: one per output channel"),
        ("asym", [], "asymmetric: a zero point for each group"),
        ("scale_dtype", [], f"one of {', '.join(SCALE_DTYPES)}"),
        ("fp_layers", [], "comma list of layers that stay in 16 bits: dotted parts of names, or re:REGEX"),
        ("ignore", [], "layers that stay, one word each: names, re:REGEX or classes"),
        ("targets", [], "quantize these layers only: names, re:REGEX or classes, e.g. Linear"),
        ("sequential_targets", [], "quantize the blocks of these classes, e.g. WhisperDecoderLayer"),
        ("quant_nontext_module", [], "quantize the vision and audio towers too"),
        ("quant_lm_head", [], "quantize the output head too, rounded to nearest, if it has a weight of its own"),
        ("to_quant_block_names", [], "comma list of regular expressions for the block lists to quantize"),
        ("data_type", ["dtype"], "int, or rounded to nearest: fp8, nvfp4, mxfp4, mxfp8 (compressed_tensors)"),
        ("act_bits", [], "8: the engine quantizes activations, a scale a token (compressed_tensors); 32: it does not"),
        ("act_static", [], "fp8: one scale for all inputs of a layer, from calibration"),
    ],
    "equalization": [
        ("equalize", [], f"first move magnitude between inputs and weights: {', '.join(EQUALIZERS)}"),
        ("smoothing_strength", [], "smoothquant: share of the activations' range that goes into the weights, 0 to 1"),
        ("disable_duo_scaling", [], "awq: scales from the activations alone"),
    ],
    "tuning": [
        ("algorithm", [], f"one of {', '.join(ALGORITHMS)}; auto: closed form, then few sign steps"),
        (
            "preset",
            [],
            "auto: light 16 sign steps a block on 4 samples, default 20 and best 60 on 8; iters, lr "
            "and batch_size override",
        ),
        ("iters", ["iter"], "sign steps a block, default 20 with auto, 200 with sign_round; 0 rounds to nearest"),
        ("lr", [], "first rate of the offsets; default 0.02 with auto, with best 0.01, with sign_round 1/iters"),
        ("minmax_lr", [], "first learning rate of the ranges; default lr"),
        ("batch_size", ["train_bs", "bs"], "samples run together; default 8, with preset light 4"),
        ("gradient_accumulate_steps", [], "batches a step"),
        ("nblocks", [], "consecutive blocks tuned on one loss"),
        ("block_size", [], "closed form: columns solved together; changes the time, not the result"),
        ("dampening", ["damp_percent", "dampening_frac"], "closed form: share of the mean diagonal added to it"),
        ("actorder", [], f"closed form: order of the columns, {', '.join(ORDERS)} (by falling second moment)"),
        ("true_sequential", [], "closed form: a block's layers one after another, inputs from those done before"),
        (
            "retarget",
            [],
            "closed form: solve for the unquantized model's outputs (GPTAQ); hurt where it was measured",
        ),
        ("disable_fisher", [], "auto, gptq: weigh all tokens, channels and modalities alike"),
        ("disable_minmax_tuning", [], "leave the ranges at smallest and largest value"),
        ("disable_quanted_input", [], "tune each block on inputs from the unquantized model"),
        ("not_use_best_mse", [], "keep the last step's parameters, not the best"),
        (
            "trim",
            [],
            "share of the largest errors that a block's steps do not see, e.g. 0.001 below 4 bits; default 0",
        ),
        ("polish", [], "at the end tune scales and norms on the whole model's output; kept if held-out KL falls"),
        ("disable_amp", [], "compute in the model's own dtype, not in bfloat16"),
        ("seed", [], "of sampling and shuffling"),
    ],
    "calibration": [
        ("dataset", [], "names, files, folders or module:Class, with options, e.g. demo, a.json:num=64,b.txt"),
        ("collator", ["data_collator"], "your own way from a row to model inputs, as module:function"),
        ("nsamples", [], "how many samples"),
        ("seqlen", ["seq_len"], "tokens a text sample; default 2048, with media 512"),
        ("truncation", [], "cut conversations to seqlen (plain text always is)"),
        ("extra_data_dir", [], "where images, audio, video lie: a folder, several, or image=DIR,video=DIR,audio=DIR"),
        ("template", [], "chat template: a JSON file or a name on the shelf; default by model type"),
        ("processor", [], "processor: a registered name or a Python file that registers one"),
        ("on_bad_sample", [], "error: stop at a missing or damaged file; skip: leave it out and count it"),
        ("allow_url", [], "read media from http(s) addresses in the dataset"),
    ],
    "accepted as in the original": [
        ("enable_torch_compile", [], "compile the blocks, once a class: pays off on accelerators"),
        ("disable_trust_remote_code", [], "the default here"),
        ("eval_bs", [], "no effect: evaluation runs sample by sample"),
        ("adam", [], "refused"),
        ("enable_norm_bias_tuning", [], "refused"),
        ("low_cpu_mem_mode", [], "1, 2: the same as --stream"),
        ("low_cpu_mem_tmp_dir", [], "no effect: blocks are read from the model's own files"),
    ],
}
NEGATED = {
    "asym": "sym",
    "act_static": "act_dynamic",
    "no_stream": "stream",
    "disable_minmax_tuning": "enable_minmax_tuning",
    "disable_quanted_input": "enable_quanted_input",
    "disable_amp": "amp",
    "disable_duo_scaling": "duo_scaling",
    "disable_fisher": "fisher",
    "disable_trust_remote_code": "trust_remote_code",
}
IGNORED = {"eval_bs": int}
TEXT = ("scheme",)  # flags with a word that are no field of their own
LONG_DASHES = ("\u2013", "\u2014")


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = next(iter(message.removeprefix("unrecognized arguments: ").split()), "''")
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            message = f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} -h")
        raise UserError(message)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Every field of the recipe as a flag; only flags that are given appear in the result."""
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, others, text in rows:
            flags = [f"--{flag}" for flag in (name, *others)]
            options: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
            hint = str if name in TEXT else IGNORED.get(name) or HINTS.get(name, bool)
            if name in NEGATED or hint is bool or name in ("truncation", "stream"):
                group.add_argument(*flags, action="store_true", **options)
                continue
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            default = None if name in TEXT else getattr(Recipe(), name, None)
            options["help"] += f" (default: {default})" if default not in (None, "") else ""
            several = typing.get_origin(kinds[0]) is list
            kind, nargs = (str, "+") if several else (kinds[0], None)
            group.add_argument(*flags, type=kind, nargs=nargs, metavar=name.upper(), **options)


def to_recipe(given: dict[str, Any], base: Recipe) -> Recipe:
    """Flags laid over a recipe."""
    values = {NEGATED.get(key, key): (not value if key in NEGATED else value) for key, value in given.items()}
    return from_mapping({key: value for key, value in values.items() if key not in IGNORED}, "command line", base)


def normalise(arguments: Sequence[str]) -> list[str]:
    """`--group-size` as `--group_size`; typographic dashes, as pasted from web pages, are named."""
    result = []
    for word in arguments:
        if word.startswith(LONG_DASHES):
            raise UserError(f"argument {word} starts with a long dash: write --{word.lstrip(''.join(LONG_DASHES))}")
        head, equals, tail = word.partition("=")
        result.append(head.replace("-", "_").replace("__", "--", 1) + equals + tail if word.startswith("--") else word)
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
    """The recipe of a command line: a file, if one is given first, under the flags."""
    parser = Parser(
        prog=prog,
        description="Quantize a multimodal model to 2-8 bits and export it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe_file", nargs="?", metavar="recipe.toml", help="a recipe file (.toml, .yaml)")
    parser.add_argument("--version", action="version", version=f"auto_mmround {__version__}")
    for mode in ("eval", "lmms"):
        parser.add_argument(f"--{mode}", action="store_true", help="comes after quantizing: auto-round-mllm eval")
    add_recipe_flags(parser)
    found = parser.parse_args(normalise(arguments))
    given = {key: value for key, value in vars(found).items() if key not in ("recipe_file", "eval", "lmms")}
    if found.eval or found.lmms:
        raise UserError("--eval and --lmms: evaluate the result with `auto-round-mllm eval --model DIR --lmms TASKS`")
    file = found.recipe_file
    if file and not Path(file).suffix:
        near = difflib.get_close_matches(file, COMMANDS, n=1)
        raise UserError(f"unknown command {file!r}; {f'did you mean {near[0]}?' if near else f'see {prog} -h'}")
    base = from_mapping(read(file), f"recipe file {file}") if file else Recipe()
    return to_recipe(given, base), found


def eval_command(arguments: Sequence[str]) -> int:
    """Measure a model, alone or against a reference."""
    parser = Parser(prog="auto-round-mllm eval", description=eval_command.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a model or of a checkpoint of ours, or demo")
    parser.add_argument("--reference", help="the model before quantization: adds KL, agreement and recovery")
    parser.add_argument("--baseline", help="another checkpoint to compare with, such as one rounded to nearest")
    parser.add_argument("--tasks", help="comma list of ppl, kl, vqa, wer, samples, lm_eval:NAME (default: kl,ppl)")
    parser.add_argument("--lmms", metavar="TASKS", help="comma list of tasks of lmms-eval, by name or .yaml file")
    parser.add_argument("--vlmeval", metavar="SETS", help="comma list of sets of VLMEvalKit, by name or .tsv file")
    parser.add_argument(
        "--dataset", default="demo", help="rows to measure on; demo: the held-out set of the demo model"
    )
    parser.add_argument("--extra_data_dir", help="where the media lie")
    parser.add_argument("--template", help="chat template, as for quantizing")
    parser.add_argument("--limit", type=int, default=None, help="at most so many samples of each set")
    parser.add_argument("--language", help="of the speech, a code such as en: for transcripts and their normaliser")
    parser.add_argument("--device", default="0")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--model_card", action="store_true", help="write README.md into the checkpoint")
    found = parser.parse_args(normalise(arguments))
    if found.limit is not None and found.limit < 1:
        raise UserError(f"limit = {found.limit}: at least 1")
    found.words = list(arguments)
    outside = [f"{p}:{n}" for p in ("lmms", "vlmeval") for n in (getattr(found, p) or "").split(",") if n.strip()]
    found.tasks = ",".join([*([found.tasks] if found.tasks else []), *outside]) or None
    from auto_mmround.console import evaluate_and_show

    return evaluate_and_show(found)


VERIFY_EPILOG = """\
Two questions about a checkpoint folder, of ours or of another tool:

static   are the files right? Tensors, shards and index, shapes, ranges, names as Transformers and vLLM will resolve
         them, side files, tokenizer; for our own files the decoded numbers, bit for bit, against those that were tuned
engines  does each engine that reads the format load it, with as many quantized layers, and compute what the decoded
         weights compute, for text, an image and a sound where the model takes them?

An engine that is not installed is named with the command that installs it. Exit status: 0 right, 1 wrong, 2 the command
can't be carried out.

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
        "--engine", help="comma list of transformers, vllm, llamacpp, mlx, openvino; none: the files only; "
        "default: all that read the format and are installed",
    )  # fmt: skip
    parser.add_argument("--source", type=Path, help="folder of the model before quantization, to compare with")
    parser.add_argument("--timeout", type=float, default=600, help="seconds an engine may take (default: 600)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args(normalise(arguments))
    from auto_mmround.console import verify_and_show

    return verify_and_show(found)


def report_command(arguments: Sequence[str]) -> int:
    """Write the report of a run again, or one page that compares several runs."""
    parser = Parser(prog="auto-round-mllm report", description=report_command.__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="checkpoint folders of ours")
    parser.add_argument("--output", help="the page to write (default: report.html in the run, or here for several)")
    found = parser.parse_args(normalise(arguments))
    from auto_mmround.console import show_report

    return show_report(found.folders, found.output)


def formats_command(arguments: Sequence[str]) -> int:
    """List the export formats, and which engines read them."""
    Parser(prog="auto-round-mllm formats", description=formats_command.__doc__).parse_args(arguments)
    from auto_mmround.console import show_formats

    return show_formats()


def families_command(arguments: Sequence[str]) -> int:
    """List the model families."""
    Parser(prog="auto-round-mllm families", description=families_command.__doc__).parse_args(arguments)
    from auto_mmround.console import show_families

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
    """Exit status: 0 done, 1 our fault, 2 the user's input is wrong (one line on standard error)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("auto_mmround").setLevel(logging.INFO)
    try:
        command = COMMANDS.get(words[0]) if words else None
        return command(words[1:]) if command else quantize_command(words)
    except UserError as error:
        print(f"auto-round-mllm: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("auto-round-mllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.close(sys.stdout.fileno())
        return 0
