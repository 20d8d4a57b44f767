"""Sets known by name, as data: where they lie on the hub, what their rows hold, and which one
stands in for a kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """A set known by name.

    file: its JSON file in the repository. columns: joined to the text of a row. remote: address
    that its media live under. config, split: read where the user names none. kinds: media of its
    rows, none for text. streamed: too large to fetch whole, so its first rows are read over the
    network.
    """

    repo: str
    file: str | None = None
    columns: tuple[str, ...] = ()
    remote: str = ""
    config: str | None = None
    split: str = "train"
    kinds: tuple[str, ...] = ()
    streamed: bool = False


def _llava(file: str) -> Named:
    return Named("liuhaotian/LLaVA-Instruct-150K", file, remote=COCO, kinds=("image",))


def _speech(repo: str, config: str, split: str) -> Named:
    return Named(repo, config=config, split=split, kinds=("audio",), streamed=True)


COCO = "http://images.cocodataset.org/train2017/"
NAMED = {
    "NeelNanda/pile-10k": Named("NeelNanda/pile-10k"),
    "madao33/new-title-chinese": Named("madao33/new-title-chinese", columns=("content",)),
    "mbpp": Named("google-research-datasets/mbpp", columns=("text", "code")),
    "liuhaotian/llava": _llava("conversation_58k.json"),
    "liuhaotian/llava_conv_58k": _llava("conversation_58k.json"),
    "liuhaotian/llava_instruct_80k": _llava("llava_instruct_80k.json"),
    "liuhaotian/llava_instruct_150k": _llava("llava_instruct_150k.json"),
    "MLCommons/peoples_speech": _speech("MLCommons/peoples_speech", "clean", "train"),
    "openslr/librispeech_asr": _speech("openslr/librispeech_asr", "clean", "train.100"),
    "librispeech": _speech("openslr/librispeech_asr", "clean", "train.100"),
}
DEMO = {"demo-text": "text.jsonl", "demo-llava": "llava.json"}
DEMO_KINDS: dict[str, tuple[str, ...]] = {"demo-text": (), "demo-llava": ("image",)}
SHORT = {name.rpartition("/")[2]: name for name in NAMED}
KNOWN = [*NAMED, *(short for short in SHORT if short not in NAMED), "demo", *DEMO]
# Read where samples with a kind of media are needed and the user's set has none.
STAND_IN = {"image": "liuhaotian/llava_conv_58k", "audio": "MLCommons/peoples_speech"}
# Told where the hub can't be reached: what to give instead, by the kind of media of the set.
LOCAL = {
    "image": "--dataset demo or a local .json, .jsonl, .txt or .parquet file or folder",
    "audio": (
        "--dataset FOLDER with sounds and their transcripts, or a .jsonl file of {audio, text} rows"
    ),
}
