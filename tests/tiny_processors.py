"""Real processors of tiny families, built without a download: a feature extractor, an image
processor, 128 words."""

import base64
import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GraniteSpeechProcessor,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    VoxtralProcessor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

TURNS = {
    110: "<|im_start|>",
    111: "<|im_end|>",
    116: "<|user|>",
    117: "<|assistant|>",
    118: "<|end|>",
}
CONTROL = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]", 11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]", 20: "[CALL_ID]", 21: "[ARGS]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]",
    34: "[TRANSCRIBE]",
}  # fmt: skip
MARKS = {
    "vision_bos_token": (112, "<|vision_bos|>"),
    "vision_eos_token": (113, "<|vision_eos|>"),
    "audio_bos_token": (114, "<|audio_bos|>"),
    "audio_eos_token": (115, "<|audio_eos|>"),
    "image_token": (120, "<|IMAGE|>"),
    "video_token": (121, "<|VIDEO|>"),
    "audio_token": (122, "<|AUDIO|>"),
}
# Turns as ChatML writes them, with media in their marks.
CHAT = (
    "{% set marks = {'image': '<|vision_bos|><|IMAGE|><|vision_eos|>', 'video':"
    " '<|vision_bos|><|VIDEO|><|vision_eos|>', 'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>'} %}{%"
    " for turn in messages %}<|im_start|>{{ turn['role'] }} {% if turn['content'] is string %}{{"
    " turn['content'] }}{% else %}{% for part in turn['content'] %}{{ marks.get(part['type'],"
    " part['text']) }}{% endfor %}{% endif %}<|im_end|> {% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant {% endif %}"
)


def words(chat: str | None = None, **marks: str) -> Any:
    """A tokenizer of the words w0 .. w127, some of which are special tokens. marks: the family's
    names of them."""
    special = {name: (index, marks.get(name, text)) for name, (index, text) in MARKS.items()}
    names = {i: f"w{i}" for i in range(128)} | TURNS | dict(special.values())
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in names.items()}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*TURNS.values(), *(text for _, text in special.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w0",
        chat_template=chat,
        extra_special_tokens={name: text for name, (_, text) in special.items()},
    )  # fmt: skip


def ears() -> WhisperFeatureExtractor:
    """One second of 8 mel bands."""
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def eyes() -> dict[str, Any]:
    """Patches of 4 x 4, merged two by two, at most sixteen of them after that."""
    size = {"shortest_edge": 64, "longest_edge": 1024}
    return {
        "image_processor": Qwen2VLImageProcessor(patch_size=4, size=size),
        "video_processor": Qwen2VLVideoProcessor(
            patch_size=4, size=size, cap_pixels_per_frame=False
        ),
    }


def whisper() -> Any:
    return WhisperProcessor(ears(), words())


def qwen2_audio() -> Any:
    return Qwen2AudioProcessor(ears(), words())


def qwen2_vl() -> Any:
    marks = dict(image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
                 vision_eos_token="<|vision_end|>")  # fmt: skip
    return Qwen2VLProcessor(**eyes(), tokenizer=words(**marks))


def omni() -> Any:
    return Qwen2_5OmniProcessor(
        **eyes(), feature_extractor=ears(), tokenizer=words(), chat_template=CHAT
    )


def omni3() -> Any:
    return Qwen3OmniMoeProcessor(
        **eyes(), feature_extractor=ears(), tokenizer=words(), chat_template=CHAT
    )


def phi4() -> Any:
    return Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(dynamic_hd=1),  # its count of tokens is that of 448 pixels
        Phi4MultimodalFeatureExtractor(feature_size=8),
        words(image_token="<|image|>", audio_token="<|audio|>"),
    )


def granite() -> Any:
    """Needs torchaudio."""
    extractor = transformers.GraniteSpeechFeatureExtractor(
        projector_window_size=4, projector_downsample_rate=2
    )
    return GraniteSpeechProcessor(extractor, words(chat=CHAT, audio_token="<|audio|>"))


def voxtral(folder: Path) -> Any:
    """Needs mistral-common, whose tokenizer file is written here: single bytes behind forty control
    tokens."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    control = [
        {"rank": i, "token_str": CONTROL.get(i, f"<SPECIAL_{i}>"), "is_control": True}
        for i in range(40)
    ]
    config = {
        "pattern": r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+", "version": "v7", "num_vocab_tokens": 256,
        "default_vocab_size": 296, "default_num_special_tokens": 40,
    }  # fmt: skip
    audio = {
        "sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0,
        "audio_encoding_config": {"num_mel_bins": 8, "hop_length": 160, "window_size": 400},
    }  # fmt: skip
    file = folder / "tekken.json"
    file.write_text(
        json.dumps(
            {"config": config, "vocab": vocabulary, "special_tokens": control, "audio": audio}
        )
    )
    return VoxtralProcessor(WhisperFeatureExtractor(feature_size=8), MistralCommonBackend(file))
