"""Programs that read quantized checkpoints, a row each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """asked: there is a program for it, engine_<name>.py on the shelf. dtype: what it is asked to
    compute in. kinds: of inputs it takes, see `verify.probes.Probe`. tower: the file without which
    it takes texts only. own_media: it processes media itself, and gets token ids, images and sounds
    as they are. rounds_inputs: it always quantizes activations where the checkpoint says so.
    speaks: its program generates. answers_in: what it computes in then; None: its own choice.
    plain: it reads a model in 16 bits, too. build: the one that limits were seen with, where there
    are several."""

    asked: bool = True
    dtype: str = "float32"
    kinds: tuple[str, ...] = ("text", "image", "audio", "speech")
    tower: str | None = None
    own_media: bool = False
    rounds_inputs: bool = False
    speaks: bool = True
    answers_in: str | None = None
    plain: bool = False
    build: str = ""

    def takes(self, folder: Path) -> tuple[str, ...]:
        """The kinds of inputs that it takes of a checkpoint."""
        return self.kinds if self.tower is None or (folder / self.tower).is_file() else ("text",)


# The formats say which of them read it.
READERS: Mapping[str, Engine] = {
    "transformers": Engine(speaks=False),
    # In float16 vLLM keeps the scales as they are stored; bfloat16 stands in many configurations.
    "vllm": Engine(
        dtype="float16", kinds=("text", "image", "speech"), own_media=True, rounds_inputs=True,
        answers_in="float16", plain=True, build="vllm on processors",
    ),
    "sglang": Engine(asked=False),
    "llamacpp": Engine(kinds=("text", "image"), own_media=True),
    "mlx": Engine(kinds=("text", "image")),
    "openvino": Engine(kinds=("text", "image"), tower="openvino_vision_embeddings_model.xml"),
}  # fmt: skip
ENGINES = {name: row for name, row in READERS.items() if row.asked}
