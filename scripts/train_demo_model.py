"""Train the demo vision-language model and write it with its data: `python
scripts/train_demo_model.py`.

A Qwen2-VL of about six million parameters learns, from nothing and on two CPU cores in about half
an hour, to answer questions about drawn scenes (`demo_scenes.py`, `demo_data.py`) and to model
English text (`data/demo_corpus.txt.xz`, public domain); `demo_report.py` measures the result. The
number of steps is fixed and every random draw comes from `--seed`.

Stage 1 trains the vision tower alone to name what each image token shows (a stand-in for the
image-text pretraining of real towers, without which the model takes hours to start seeing).  Stage
2 trains the whole model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import GRID, ChatEncoder, patchify, read_documents, stream, write_data
from demo_report import evaluate, write_readme
from demo_scenes import COLOR_NAMES, COLUMNS, DIGITS, KINDS, ROWS, conversation, random_scene
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.vision_utils import get_vision_position_ids

VOCABULARY = 2048
SHARDS = 2  # threads that train, one core each
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for"
    " message in messages %}{% if loop.first and message['role'] != 'system'"
    " %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{"
    " message['role'] }}\n{% if message['content'] is string %}{{ message['content']"
    " }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] =="
    " 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value ="
    " image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in"
    " content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{"
    " video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in"
    " content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{%"
    " if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ---------------------------------------------------------------------------------- text,
# tokenizer, configuration


def build_processor(documents: list[str], seed: int) -> Qwen2VLProcessor:
    """Learn the byte-level BPE merges and put them in the real Qwen2-VL processor classes."""
    rng = stream(seed, "order")
    # Question words must be frequent enough to become single tokens.
    chats = [
        f"{q}\n{a}"
        for _ in range(1500)
        for q, a in conversation(rng, int(rng.integers(1, 3)), 4)[1]
    ]
    chats += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 500
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(documents + chats, trainer)
    bpe = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        additional_special_tokens=SPECIAL_TOKENS,
    )
    assert len(tokenizer) == VOCABULARY
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=dict(pixels)),
        tokenizer,
        Qwen2VLVideoProcessor(size=dict(pixels)),
        CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            initializer_range=0.05,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            tie_word_embeddings=True,
            **ids,
        ),
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 4,
            "initializer_range": 0.05,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        **ids,
    )
    model = Qwen2VLForConditionalGeneration(config)
    attend_to_alike(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=[ids["eos_token_id"], ids["bos_token_id"]],
        pad_token_id=ids["bos_token_id"],
    )
    return model


def attend_to_alike(model: Qwen2VLForConditionalGeneration) -> None:
    """Start the text layers with attention to tokens of like content, which it copies.

    Queries start equal to keys, and output projections as the transpose of the values.  Image
    tokens are made similar to the words for what they show (stage 1), so a question about the star
    looks at the star from the first step. From the usual random start, finding that out takes most
    of the training.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        groups, width = attention.num_key_value_groups, attention.head_dim

        def spread(weight, groups=groups, width=width):  # of the key/value heads to all heads
            return (
                weight.view(-1, width, weight.shape[1]).repeat_interleave(groups, 0).flatten(0, 1)
            )

        with torch.no_grad():
            attention.k_proj.weight.mul_(1.5)
            attention.q_proj.weight.copy_(spread(attention.k_proj.weight))
            attention.o_proj.weight.copy_(spread(attention.v_proj.weight).T)


# -------------------------------------------------------------------------------------------
# images, the fast way


def attend(query, key, value, scaling: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention in plain matrix products: at these lengths several times as fast on a CPU as the
    fused kernel."""
    batch, heads, length, width = query.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    mask = query.new_zeros(1, 1, 1) if mask is None else mask.to(query.dtype)
    weights = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling).softmax(-1)
    return torch.bmm(weights, value).view(batch, heads, length, width).transpose(1, 2)


def causal_attention(module, query, key, value, attention_mask, scaling, **_):
    """`attend` behind the library's attention interface; causal unless a mask (batch, length,
    length) is given."""
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1).to(query.dtype) for x in (key, value))
    length = query.shape[2]
    if attention_mask is None:
        mask = torch.full((1, length, length), -math.inf).triu(1)
    else:
        mask = attention_mask.to(query.dtype).repeat_interleave(query.shape[1], dim=0)
    return attend(query, key, value.to(query.dtype), scaling, mask), None


def image_tokens(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower's forward pass for images of one size, batched.

    The library's own pass calls attention for one image after the other, and a slow 3d convolution.
    """
    images, patches, _ = pixels.shape
    side = 2 * GRID
    hidden = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    cos, sin = tower.rotary_pos_emb(
        hidden, get_vision_position_ids(torch.tensor([[1, side, side]]), 2)
    )
    half = cos.shape[-1] // 2

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(images, patches, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(
            rotate(query).to(value.dtype), rotate(key).to(value.dtype), value, attention.scaling
        )
        hidden = hidden + attention.proj(mixed.flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.flatten(0, 1)).view(images, GRID**2, -1)


def token_labels(scenes: list) -> torch.Tensor:
    """For each image token, the classes (of `class_words`) of the thing centred in it; 0 for
    none."""
    labels = torch.zeros(len(scenes), GRID**2, 4, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            classes = (
                KINDS.index(thing.kind),
                COLOR_NAMES.index(thing.color),
                thing.cell // 3,
                thing.cell % 3,
            )
            labels[i, int(thing.y // 28) * GRID + int(thing.x // 28)] = torch.tensor(classes) + 1
    return labels


class Namer:
    """The loss of naming what image tokens show by similarity with the embeddings of the words for
    it."""

    def __init__(self, processor: Qwen2VLProcessor, embedding: torch.nn.Embedding) -> None:
        self.embedding = embedding
        # for kinds, colours, rows and columns: the vocabulary's words for each class (none for 0)
        self.groups = []
        for names in (KINDS, COLOR_NAMES, ROWS, COLUMNS):
            words = torch.zeros(len(names) + 1, VOCABULARY)
            for i, name in enumerate(names):
                for word in (name, f" {name}", *([" digit"] if name in DIGITS else [])):
                    tokens = processor.tokenizer(word)["input_ids"]
                    if len(tokens) == 1:
                        words[i + 1, tokens[0]] = 1.0
            self.groups.append(words)
        # what speaks for class 0
        self.nothing = torch.nn.ParameterList([torch.zeros(1) for _ in self.groups])

    def losses(self, tokens: torch.Tensor, scenes: list) -> list[torch.Tensor]:
        values = []
        for words, bias, label in zip(
            self.groups, self.nothing, token_labels(scenes).flatten(0, 1).T
        ):
            logits = tokens.flatten(0, 1).float() @ (words @ self.embedding.weight).T
            values.append(
                F.cross_entropy(torch.cat([logits[:, :1] + bias, logits[:, 1:]], 1), label)
            )
        return values


# --------------------------------------------------------------------------------------------------
# training


def optimizer_and_schedule(parts: list, peak: float, steps: int, warmup: int):
    """AdamW over `parts`, each a list of parameters and its share of the `peak` learning rate."""
    groups = []
    for parameters, share in parts:
        for decay, chosen in ((0.05, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim < 2)):
            group = [p for p in parameters if chosen(p)]
            groups.append({"params": group, "lr": share * peak, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    parameters = [p for group in groups for p in group["params"]]

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


class Workers:
    """Splits each step over threads that use one core each.

    Far faster than one pass with many threads inside every operation, which here are small, and
    when another process takes a core for a moment only one half step waits for it.
    """

    def __init__(self, count: int, parameters: list) -> None:
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self.parameters = parameters

    def gradients(self, losses, shards: list) -> np.ndarray:
        """Set the mean gradient of `sum(losses(shard))` over the shards; return the mean of each
        loss."""

        def work(shard):
            with torch.autocast("cpu", torch.bfloat16):
                parts = losses(shard)
            return torch.autograd.grad(sum(parts), self.parameters), [part.item() for part in parts]

        results = list(self.pool.map(work, shards))
        for parameter, *parts in zip(self.parameters, *(gradients for gradients, _ in results)):
            parameter.grad = sum(parts) / len(parts)
        return np.mean([values for _, values in results], axis=0)


def update(parameters: list, optimizer, schedule) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def train_tower(model, processor, namer: Namer, seed: int, steps: int) -> None:
    """Stage 1: each image token becomes similar to the embeddings of the words that name what it
    shows."""
    tower, rng = model.model.visual, stream(seed, "tower")
    learning = [*tower.parameters(), *namer.embedding.parameters(), *namer.nothing]
    parameters, optimizer, schedule = optimizer_and_schedule([(learning, 1.0)], 2e-3, steps, 50)
    workers = Workers(SHARDS, parameters)

    def losses(scenes):
        return namer.losses(image_tokens(tower, patchify(scenes, processor)), scenes)

    for step in range(steps):
        values = workers.gradients(
            losses, [[random_scene(rng) for _ in range(32)] for _ in range(SHARDS)]
        )
        update(parameters, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            print(
                f"tower {step:5d}  kind, colour, row, column loss"
                f" {' '.join(f'{x:.4f}' for x in values)}",
                flush=True,
            )


def text_stretches(tokens: list[list[int]], end: int, length: int, order: np.random.Generator):
    """Endless stretches of text; every epoch joins the documents in another order."""
    while True:
        joined = [token for i in order.permutation(len(tokens)) for token in [*tokens[i], end]]
        for start in range(0, len(joined) - length, length):
            yield torch.tensor([joined[start : start + length]])


def train_model(
    model, processor, namer: Namer, documents: list[str], seed: int, steps: int
) -> None:
    """Stage 2: each shard of a step sees twelve conversations and a stretch of 512 tokens of text.

    The questions are learned too, at a lower weight: they speak of what is in the images, and this
    gets the text layers to look at the images much sooner than the few tokens of the answers do.
    """
    rng = stream(seed, "train")
    tower = [*model.model.visual.parameters(), *namer.nothing]
    # with the output layer, which is tied to the embedding
    text = [*model.model.language_model.parameters()]
    parameters, optimizer, schedule = optimizer_and_schedule(
        [(text, 1.0), (tower, 0.3)], 2e-3, steps, 60
    )
    workers, encoder = Workers(SHARDS, parameters), ChatEncoder(processor)
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    prose = text_stretches(
        processor.tokenizer(documents)["input_ids"], end, 513, stream(seed, "order")
    )

    def losses(shard):
        batch, text = shard
        seen = image_tokens(model.model.visual, patchify(batch["scenes"], processor))
        hidden = model.model(
            input_ids=batch["ids"],
            attention_mask={"full_attention": batch["mask"]},
            position_ids=batch["positions"],
            mm_encoder_outputs={
                "image": BaseModelOutputWithPooling(pooler_output=(seen.flatten(0, 1),))
            },
            use_cache=False,
        ).last_hidden_state
        target, learn, asked = (batch[name][:, 1:] for name in ("ids", "learn", "asked"))
        answers, questions = (
            model.lm_head(hidden[:, :-1][mask]).float() for mask in (learn, asked)
        )
        prose = torch.zeros(())
        if text is not None:
            words = model.lm_head(
                model.model(input_ids=text[:, :-1], use_cache=False).last_hidden_state[0]
            ).float()
            prose = F.cross_entropy(words, text[0, 1:])
        return (
            F.cross_entropy(answers, target[learn]),
            0.2 * F.cross_entropy(questions, target[asked]),
            0.5 * prose,
            0.5 * sum(namer.losses(seen, batch["scenes"])),
        )

    model.model.language_model.set_attn_implementation("train_demo")
    averages, began = np.zeros(4), time.time()
    for step in range(steps):
        easy = step < 0.25 * steps
        shards = [
            (encoder.batch(rng, 12, easy), None if easy else next(prose)) for _ in range(SHARDS)
        ]
        values = workers.gradients(losses, shards) * [1, 5, 2, 2]
        update(parameters, optimizer, schedule)
        averages = values if step == 0 else 0.98 * averages + 0.02 * values
        if step % 25 == 0 or step == steps - 1:
            speed = (time.time() - began) / (step + 1)
            shown = " ".join(f"{value:.4f}" for value in averages)
            print(
                f"model {step:5d}  answers, questions, text, names {shown}  {speed:.2f} s/step",
                flush=True,
            )
    model.model.language_model.set_attn_implementation("sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "auto_mmround" / "demo"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the full number of steps (for trying out)",
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    ALL_ATTENTION_FUNCTIONS.register("train_demo", causal_attention)
    began = time.time()
    documents, held_documents = read_documents()
    write_data(args.out, args.seed, documents, held_documents)
    processor = build_processor(documents, args.seed)
    model = build_model(processor)
    namer = Namer(processor, model.get_input_embeddings())
    train_tower(model, processor, namer, args.seed, int(1000 * args.scale))
    train_model(model, processor, namer, documents, args.seed, int(2400 * args.scale))
    seconds = time.time() - began
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    processor.image_processor.save_pretrained(args.out / "model")
    print(f"trained in {seconds:.0f} s")
    report = evaluate(args.out)
    write_readme(args.out, report, seconds, args.seed)


if __name__ == "__main__":
    main()
