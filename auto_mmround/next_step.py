"""The command that comes after a run, as its last line names it."""

import shlex
from pathlib import Path

from auto_mmround.calibration.inputs import placeholder_ids
from auto_mmround.modalities import AUDIO, IMAGE
from auto_mmround.model.loading import read_config

# What a first question may be, by what the model takes besides text.
FIRST = {
    "image": '"What do you see?" --image picture.png',
    "audio": '"What do you hear?" --audio sound.wav',
    "speech": "--audio speech.wav",
    "text": '"What can you do?"',
}


def first_question(folder: Path, remote_code: bool = False) -> str:
    """The command that asks a new checkpoint for the first time, with what its model takes."""
    kind = "text"
    if (folder / "config.json").is_file():
        config = read_config(folder, remote_code)
        known = set(placeholder_ids(config).values())
        kind = "audio" if AUDIO in known else kind
        kind = "image" if IMAGE in known else kind
        kind = "speech" if hasattr(config, "num_mel_bins") else kind
    name = f"./{folder}" if str(folder).startswith("-") else str(folder)  # no flag
    return f"auto-round-mllm ask {shlex.quote(name)} {FIRST[kind]}"
