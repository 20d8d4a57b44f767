"""Take every class of Transformers the whole way, tiny: plan, tune, export, reload, compare.

    python scripts/sweep_families.py                  all, 20 minutes on two cores
    python scripts/sweep_families.py qwen3_vl llama   some, by model type
    python scripts/sweep_families.py --write          all, and the table into docs and package

Each class goes with text alone, with its media, and with its towers quantized. Its verdict is
passed, refused (one line; what packed formats refuse goes on as `fake`), traceback, or wrong
(silently). Exit 1 if one is wrong or ends in a
traceback. A class runs in a process of its own, so that none can stop the sweep.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors.torch import load_file
from sweep_inputs import Finder, block_lists, logits_of, samples
from sweep_models import Case, NotBuiltError, build, cases
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import NotProved, UserError
from auto_mmround.families import Swept, swept
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import TOLERANCE, difference
from auto_mmround.model.loading import read_by
from auto_mmround.model.passes import run_model
from auto_mmround.model.structure import find_stages, linears, used_twice
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.proof import prove

SECONDS, WALL = 150, 900  # of a processor, and of the clock, that a class may take
PASSED, REFUSED, WRONG, UNBUILT = 0, 2, 3, 4  # exit codes of a class' process
WORDS = {PASSED: "passed", REFUSED: "refused", WRONG: "wrong", UNBUILT: "not built"}
PAGE = Path(__file__).parents[1] / "docs" / "families" / "index.md"
DATA = Path(__file__).parents[1] / "auto_mmround" / "swept.json"
MARKS = "<!-- swept -->\n", "<!-- swept: end -->\n"


class WrongError(Exception):
    """Something came out wrong, and nobody said so."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ..."""
    found = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="w1", eos_token="w2", pad_token="w0"
    )


# One class


def go(case: Case, say: Any) -> None:
    """Take a class every way. ``say(key, value)``: what is known so far."""
    model = build(case)
    inputs = samples(model)
    say("media", [kind for kind in inputs if kind != "text"])
    given = [one for made in inputs.values() for one in made]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        refusals = []
        for way, chosen, formats in ways(model, inputs):
            try:
                journey(model, folder, way, chosen, formats, say)
            except UserError as error:  # by a packed format, maybe
                refusals.append(error)
                if formats == "fake":
                    raise
                journey(model, folder, way, chosen, "fake", say)
    changed_in_turn(model, given)
    if refusals:
        raise refusals[0]


def ways(model: PreTrainedModel, inputs: dict[str, list[Any]]) -> Iterator[tuple[str, Any, str]]:
    """(text alone, with media or with towers; samples; formats), floats and packed codes at least
    once."""
    given = [one for made in inputs.values() for one in made]
    names = {stage.name for stage in find_stages(model)} - {"text"}
    media = set(inputs) - {"text"}
    towers = names and (names <= {"encoder"} or media)
    if "text" in inputs:
        yield "text", inputs["text"], "auto_round" if media else "auto_round,fake"
    if media:
        yield "media", given, "fake" if towers else "auto_round,fake"
    if towers:
        yield "towers", given, "auto_round"


def journey(
    model: PreTrainedModel, place: Path, way: str, given: list[Any], formats: str, say: Any
) -> None:
    """One run; raises WrongError for what no check of the product has noticed."""
    recipe = Recipe(
        model=str(place / "model"), output_dir=str(place / way), format=formats, bits=4,
        group_size=32, iters=1, nsamples=len(given), seqlen=12, amp=False, device="cpu",
        quant_nontext_module=way == "towers",
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=given)
    say("stages", [stage.name for stage in find_stages(model)])
    check_stages(job.loaded.model, given)
    outs = dict(zip(formats.split(","), jobs.run(job, prove=prove), strict=True))
    quantized = set(job.plan.quantized)
    others = [(fmt, found) for fmt, out in outs.items() for found in reloaded(model, out, fmt)]
    for sample in (one.kwargs for one in job.inputs):
        tuned, before = (logits_of(run_model(m, sample)) for m in (job.loaded.model, model))
        if tuned is None or before is None or torch.equal(tuned, before):
            raise WrongError(f"{way}: the logits have not changed")
        for fmt, (name, other) in others:
            if difference(logits_of(run_model(other, sample)), tuned) > TOLERANCE[torch.float32]:
                raise WrongError(f"{way}: {fmt} reloaded {name}: other logits")
    if "fake" in outs:
        compare_files(place / "model", outs["fake"], len(quantized))
    say("ways", way)


def reloaded(model: Any, out: Path, fmt: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """The checkpoint as our loader and, of floating-point weights, plain Transformers reads it."""
    yield "by our loader", from_quantized(out).model
    if fmt == "fake":
        plain, info = read_by(type(model), out)
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if lost:
            raise WrongError(f"Transformers misses {len(lost)} tensors of fake, first {lost[0]}")
        yield "by Transformers", plain.eval()


def compare_files(source: Path, out: Path, most: int) -> None:
    """Every tensor is there, and no more than the quantized ones are changed."""
    before, after = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (source, out)
    )
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise WrongError(f"fake: {len(odd)} tensors are only in one, first {odd[0]}")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    if not changed or len(changed) > most:
        raise WrongError(f"fake: {len(changed)} tensors are changed, {most} are quantized")


def check_stages(model: PreTrainedModel, given: list[dict[str, Any]]) -> None:
    """The text is what ran last before the logits; a tower is named by what it reads."""
    stages = {stage.path: stage.name for stage in find_stages(model)}
    ran: dict[str, set[str]] = {}
    last: list[str] = []
    lists = block_lists(model)
    handles = [
        block.register_forward_pre_hook(lambda m, a, path=path: last.append(path))
        for path, blocks in lists.items()
        for block in blocks
    ]
    finder = Finder(model)
    for sample in given:
        last.clear()
        finder.answer(sample)
        for path in last:
            ran.setdefault(path, set()).add(kind_of(sample))
    for handle in handles:
        handle.remove()
    final = [path for path in last if len(lists[path]) > 1 or path in stages]
    if final and final[-1] != list(stages)[-1]:
        raise WrongError(f"the text is {list(stages)[-1]}, but {final[-1]} makes the logits")
    for path, kinds in ran.items():
        only = kinds - {"text"} if "text" not in kinds else set()
        name = stages.get(path)
        wrong = {"image": "audio", "audio": "vision"}.get(next(iter(only), ""))
        if len(only) == 1 and name == wrong:
            raise WrongError(f"{path} is called {name}, and reads {only.pop()}")


def kind_of(sample: dict[str, Any]) -> str:
    """What a sample holds."""
    for name in sample:
        if name.startswith(("pixel", "image", "flattened")):
            return "image"
        if name.startswith(("input_f", "input_v", "audio")):
            return "audio"
    return "text"


def changed_in_turn(model: PreTrainedModel, given: list[dict[str, Any]]) -> None:
    """Blocks change one after the other, as quantizing does: where the chain ends, the changed
    model must be."""
    stages = find_stages(model)
    twice = used_twice(model, stages)
    for stage in stages:
        chain = capture(model, [stage], given).get(stage.path)
        if chain is None:
            continue
        for index, path in enumerate(stage.blocks):
            block = model.get_submodule(path)
            for _, layer in linears(block):  # but for what other blocks use too, which stays
                layer.weight.data *= 1.0 if id(layer.weight) in twice else 1.1
            chain = chain.advanced([block], index, 1)
            if chain.live and index + 1 < stage.depth:
                chain = recapture(model, chain, index + 1, given)
        fresh = capture(model, [stage], given)[stage.path]
        blocks = [model.get_submodule(path) for path in stage.blocks]
        for i, hidden in enumerate(chain.hidden):
            # What a later pass of a loop reads, the block that was changed last has changed too.
            if chain.live and chain.sample[i] in chain.sample[:i]:
                continue
            if difference(hidden, fresh.run_group(blocks, 0, [i])) > 1e-3:
                raise WrongError(f"{stage.path}: tuned on inputs that the model does not give")


# All of them


def alone(case: Case, notes: Path) -> None:
    """The process of a class."""
    log = os.open(notes.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    os.fsync = lambda handle: None  # the folders are thrown away
    torch.set_num_threads(1)
    known: dict[str, Any] = {"ways": [], "stages": []}

    def say(key: str, value: Any) -> None:
        known[key] = [*known[key], value] if key == "ways" else value
        notes.write_text(json.dumps(known))

    try:
        go(case, say)
    except UserError as error:
        say("line", str(error))
        sys.exit(REFUSED)
    except (WrongError, NotProved) as error:
        say("line", str(error))
        sys.exit(WRONG)
    except NotBuiltError as error:
        say("line", str(error))
        sys.exit(UNBUILT)


def verdict(case: Case, notes: Path, code: int | None) -> Swept:
    """What a class' process has left."""
    known = json.loads(notes.read_text()) if notes.exists() else {}
    tail = notes.with_suffix(".log").read_text(errors="replace").strip().splitlines() or [""]
    line = known.get("line") or ("" if code == PASSED else tail[-1])
    line = f"nothing after {SECONDS} seconds" if code is None else line
    if code in (1, None) and "media" not in known:
        code = UNBUILT  # Transformers' own complaint of our configuration, or a long search
    word = "traceback" if code is None else WORDS.get(code, "traceback")
    line = re.sub(r"(/[\w.-]+)+/", "", line)  # folders of this run
    return Swept(*case, word, line[:400], known.get("ways", []), known.get("stages", []))


def sweep(chosen: list[Case], workers: int, keep: Path) -> Iterator[Swept]:
    """The rows as they are finished."""
    context, waiting = multiprocessing.get_context("fork"), list(chosen)
    running: dict[Any, tuple[Case, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop(0)
            notes = keep / f"{case.architecture}.json"
            notes.unlink(missing_ok=True)
            process = context.Process(target=alone, args=(case, notes))
            process.start()
            running[process] = case, notes, time.monotonic()
        for process, (case, notes, started) in list(running.items()):
            process.join(0.05)
            late = spent(process.pid) > SECONDS or time.monotonic() - started > WALL
            if process.is_alive() and not late:
                continue
            if late:
                process.kill()
                process.join()
            del running[process]
            yield verdict(case, notes, None if late else process.exitcode)


def spent(pid: int) -> float:
    """Seconds of a processor that a process has had; 0 once it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def totals(rows: list[Swept]) -> dict[str, str]:
    """Group -> how many classes of each verdict."""
    return {
        group: ", ".join(
            f"{count} {word}"
            for word, count in Counter(r.verdict for r in rows if r.group == group).most_common()
        )
        for group in dict.fromkeys(row.group for row in rows)
    }


def write(tried: list[Swept]) -> None:
    """The table into the docs, and what `auto-round-mllm families` prints into the package. Rows of
    classes that were not tried this time stay."""
    known = {row.architecture: row for row in [*swept(), *tried]}
    rows = sorted(known[case.architecture] for case in cases() if case.architecture in known)
    DATA.write_text("[\n" + ",\n".join(json.dumps(row._asdict()) for row in rows) + "\n]\n")
    table = "| class | verdict | stages | line |\n|---|---|---|---|\n" + "".join(
        f"| {r.architecture} | {r.verdict}: {', '.join(r.ways) or '-'} |"
        f" {', '.join(dict.fromkeys(r.stages))} | {r.line.replace('|', '/')[:160]} |\n"
        for r in rows
    )
    text = "".join(f"- {group}: {found}\n" for group, found in totals(rows).items())
    page = PAGE.read_text()
    before, after = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{table}\n{MARKS[1]}{after}")


def main() -> int:
    """Sweep, print, and say by the exit code whether something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into the docs and the package")
    parser.add_argument("--keep", type=Path, help="folder for notes and logs")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = set(arguments.model_types)
    chosen = [c for c in cases() if not names or names & {c.model_type, c.architecture, c.group}]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        keep = arguments.keep or Path(place)
        keep.mkdir(parents=True, exist_ok=True)
        for row in sweep(chosen, arguments.workers, keep):
            rows.append(row)
            print(f"{row.verdict:9} {row.model_type:28} {','.join(row.ways):18} {row.line[:300]}",
                  flush=True)  # fmt: skip
    for group, found in totals(rows).items():
        print(f"{group}: {found}")
    if arguments.write:
        write(rows)
    return int(any(row.verdict in ("wrong", "traceback") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
