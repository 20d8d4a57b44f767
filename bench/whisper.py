#!/usr/bin/env python3
"""Whisper, encoder and decoder quantized: word error rate and KL, full precision against RTN, GPTQ
and ours.

    bench/whisper.py --model FOLDER [--schemes W4g64 W3g64] [--methods rtn gptq auto]
                     [--keep bench/results]

Calibration is one synthetic voice that reads passages of the bundled corpus; the test is other
sentences in several voices, see speech.py. Every method runs in a process of its own; what is found
stays in --work, so a run that is cut off goes on where it stopped, and other schemes and methods
are added to the table.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import kept
import speech

FULL = "full precision"
VOICES = ["flite-slt", "flite-rms", "espeak-ng"]
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    # as in the released W4A16 checkpoints
    "gptq": {"algorithm": "gptq", "dampening": 0.01, "actorder": "weight"},
    "auto": {},
}
TOGETHER = 8  # clips decoded at once
LONGEST = 160  # tokens of a transcript; twice the longest that is said


def quantized(job: dict[str, Any]) -> Any:
    """The model with dequantized weights, in bfloat16: processors multiply it fast, float16 they
    don't.

    The checkpoint goes to the job's folder, for engines and `auto-round-mllm eval`.
    """
    from auto_mmround import AutoRoundMLLM

    scheme = {"bits": job["bits"], "group_size": job["group_size"]} | METHODS.get(job["method"], {})
    ours = AutoRoundMLLM(
        job["model"], model_dtype="bfloat16", device="cpu", dataset=job["calibration"],
        nsamples=job["samples"],
        seqlen=448, quant_nontext_module=True, format="compressed_tensors", **scheme,
    )  # fmt: skip
    if job["method"] != FULL:
        ours.quantize()
        ours.save_quantized(job["folder"], format="compressed_tensors")
    return ours.loaded


def listen(loaded: Any, clips: Sequence[Any], forced: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """(the decoder's last hidden states (T, D) on the given transcripts, greedy transcripts); each
    clip heard once."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    model = loaded.model
    hidden, heard = [], []
    with torch.inference_mode():
        for at in range(0, len(clips), TOGETHER):
            sound = []
            for clip, sample in zip(
                clips[at : at + TOGETHER], forced[at : at + TOGETHER], strict=True
            ):
                sound.append(
                    model.get_encoder()(
                        clip.kwargs["input_features"].to(model.dtype)
                    ).last_hidden_state
                )
                ids = sample.kwargs["decoder_input_ids"]
                hidden.append(
                    model.model(
                        encoder_outputs=(sound[-1],), decoder_input_ids=ids
                    ).last_hidden_state[0]
                )
            outputs = BaseModelOutput(last_hidden_state=torch.cat(sound))
            made = model.generate(encoder_outputs=outputs, do_sample=False, max_new_tokens=LONGEST)
            heard += loaded.tokenizer.batch_decode(made, skip_special_tokens=True)
    return hidden, heard


def divergence(loaded: Any, reference: Sequence[Any], hidden: Sequence[Any]) -> list[float]:
    """KL(full precision || quantized) in nats a token, the mean of each clip. The output head is
    the same for both."""
    head_VD = loaded.model.proj_out.weight.float()
    pairs = [
        [(h.float() @ head_VD.t()).log_softmax(-1) for h in pair]
        for pair in zip(reference, hidden, strict=True)
    ]
    return [(wanted.exp() * (wanted - got)).sum(-1).mean().item() for wanted, got in pairs]


def by_voice(job: dict[str, Any], loaded: Any) -> dict[str, dict[str, list[Any]]]:
    """Voice -> KL along the transcripts, word errors, words and what was heard, clip by clip. Full
    precision leaves its hidden states in the job's "work" for the others."""
    import jiwer
    from safetensors.torch import load_file, save_file

    from auto_mmround.evaluate import prompts
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.scoring import normaliser

    normalise, voices = normaliser(None, loaded.tokenizer), {}
    for voice, table in job["test"].items():
        clips = prompts.clips(loaded, prompts.Data(table))
        hidden, heard = listen(loaded, clips, held_out(loaded, table))
        stored = Path(job["work"]) / f"reference-{voice}.safetensors"
        if job["method"] == FULL:
            save_file({str(i): h.contiguous() for i, h in enumerate(hidden)}, stored)
        reference = load_file(stored)
        said = [normalise(clip.expected or "") for clip in clips]
        found = [jiwer.process_words(a, normalise(b)) for a, b in zip(said, heard, strict=True)]
        voices[voice] = {
            "kl": divergence(loaded, [reference[str(i)] for i in range(len(hidden))], hidden),
            "errors": [each.substitutions + each.deletions + each.insertions for each in found],
            "words": [len(a.split()) for a in said],
            "heard": heard,
        }
    return voices


def worker(job: dict[str, Any]) -> None:
    """One method in this process; the result goes to a file."""
    import transformers

    transformers.logging.set_verbosity_error()
    started = time.perf_counter(), time.process_time()
    loaded = quantized(job)
    result: dict[str, Any] = {"seconds": time.perf_counter() - started[0]}
    result |= {"cpu_seconds": time.process_time() - started[1]}
    result |= {"peak_gb": kept.peak_gb()}
    result |= {"voices": by_voice(job, loaded)}
    Path(job["result"]).write_text(json.dumps(result, indent=1))


def rate(voices: Sequence[dict[str, Any]]) -> float:
    """Word error rate in percent over some voices."""
    return 100 * sum(sum(v["errors"]) for v in voices) / sum(sum(v["words"]) for v in voices)


def interval(a: dict[str, Any], b: dict[str, Any], count: int = 10_000) -> tuple[float, float]:
    """95 % interval of WER(b) - WER(a) in points, from a bootstrap over clips (the same ones for
    both)."""
    import numpy as np

    def column(result: dict[str, Any], key: str) -> Any:
        return np.array([value for voice in result["voices"].values() for value in voice[key]])

    more, words = column(b, "errors") - column(a, "errors"), column(a, "words")
    drawn = np.random.default_rng(0).integers(len(more), size=(count, len(more)))
    low, high = np.percentile(100 * more[drawn].sum(1) / words[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def judged(result: dict[str, Any], others: Sequence[dict[str, Any] | None]) -> list[str]:
    """Cells: WER by voice and in all, the interval of its difference from each of the others, where
    there is one, and KL."""
    voices = list(result["voices"].values())
    kl = [value for voice in voices for value in voice["kl"]]
    cells = [*(f"{rate([voice]):.2f}" for voice in voices), f"{rate(voices):.2f}"]
    for other in others:
        same = other is None or other is result
        cells.append("" if same else "{:+.2f} to {:+.2f}".format(*interval(other, result)))
    return [*cells, f"{sum(kl) / len(kl):.5f}"]


def table(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The Markdown table of all results."""
    full = found["-", FULL]
    columns = ["weights", "method", *(f"WER {voice}" for voice in full["voices"]), "WER, all"]
    columns += ["against full precision", "against gptq", "KL", "seconds", "CPU seconds", "peak GB"]
    lines = kept.head(columns)
    for (scheme, method), result in found.items():
        cells = [scheme, method, *judged(result, (full, found.get((scheme, "gptq"))))]
        forms = (("seconds", ".0f"), ("cpu_seconds", ".0f"), ("peak_gb", ".2f"))
        cells += [f"{result[key]:{form}}" for key, form in forms]
        lines.append(kept.line(cells))
    return lines


def asked() -> argparse.Namespace:
    """The command line."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model")
    parser.add_argument("--work", type=Path, default=Path(".bench/whisper"))
    parser.add_argument("--schemes", nargs="+", default=["W4g64", "W3g64", "W2g64"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "auto"])
    parser.add_argument("--voices", nargs="+", default=VOICES)
    parser.add_argument(
        "--text",
        type=Path,
        default=speech.HERE / "sentences.txt",
        help="test sentences, one a line",
    )
    parser.add_argument("--per_clip", type=int, default=6)
    parser.add_argument("--samples", type=int, default=32, help="calibration clips")
    return parser.parse_args()


def jobs_of(given: argparse.Namespace, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What there is to run, full precision first; the speech is made."""
    spoken = speech.passages(given.samples)
    base = {
        "model": given.model,
        "samples": given.samples,
        "work": str(given.work),
        "test": {voice: str(speech.speak(given.work / "test", voice, texts))
                 for voice in given.voices},
        "calibration": str(speech.speak(given.work / "calibration", given.voices[0], spoken)),
    }  # fmt: skip
    jobs = []
    for scheme, method in [("-", FULL), *product(given.schemes, given.methods)]:
        path = given.work / f"{scheme}-{method}.json".replace(" ", "-")
        job = base | kept.scheme("W4g64" if method == FULL else scheme)
        job |= {"scheme": scheme, "method": method}
        jobs.append(job | {"result": str(path), "folder": str(path.with_suffix(""))})
    return jobs


def main() -> None:
    """Every scheme by every method, then the table."""
    given = asked()
    if given.worker:
        return worker(json.loads(given.worker))
    kept.work_folder(given, "schemes", "methods")
    texts = speech.sentences(given.text, given.per_clip)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs_of(given, texts):
        found[job["scheme"], job["method"]] = kept.result(__file__, job)
        print(table(found)[-1], flush=True)
    text = "\n".join(table(found))
    print(f"\n{text}")
    kept.keep(given.keep, "whisper", "Whisper base", explained(given, texts), text)


def explained(given: argparse.Namespace, texts: Sequence[str]) -> str:
    """What the table means."""
    words = sum(len(text.split()) for text in texts)
    said = sum(1 for line in given.text.read_text().splitlines() if line.strip())
    return (
        f"Test: {said} sentences ({words} words) in {len(texts)} clips, by each of"
        f" {', '.join(given.voices)}. Calibration: {given.samples} passages of another text, by"
        f" {given.voices[0]}. Encoder and decoder quantized, the output head not. WER in percent"
        " after Whisper's normaliser; the 95 % intervals are of differences in points (bootstrap"
        " over clips); KL in nats a token, along the true transcripts."
    )


if __name__ == "__main__":
    main()
