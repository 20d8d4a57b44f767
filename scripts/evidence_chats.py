"""Batches of questions about strips, for the frozen text model of the evidence model."""

from __future__ import annotations

import re

import numpy as np
import torch
from evidence_model import SYSTEM
from evidence_scenes import TOKENS, conversation, features
from transformers import DynamicCache

START = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
# Starts of answers, that nothing is learned from where there is no question.
KNOWN = re.compile(r".*? (is|are)\b")


class Chats:
    """Turns strips and questions into padded batches for the text model.

    What comes before the picture is always the same, so its keys and values are computed once. All
    questions about a picture follow it at the same positions, each in a segment that does not see
    the others: as if each had the picture to itself, at a fraction of the cost.
    """

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer, self.known = model, tokenizer, {}
        start = torch.tensor([self.tokens(START)])
        with torch.no_grad():
            kept = model.model.language_model(input_ids=start, use_cache=True).past_key_values
        self.start = [(layer.keys, layer.values) for layer in kept.layers]
        self.before = start.shape[1]

    def tokens(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text)["input_ids"]
        return self.known[text]

    def encode(self, talk: list[tuple[str, str, str]], bare: bool = False) -> list[np.ndarray]:
        """Ids after the picture, which of them are answers, positions and segments.

        `bare` answers come without their questions, and what follows their first words is learned:
        as much to learn of the picture from half of the tokens.
        """
        turn = "<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokens("<|vision_end|>" + turn * bare)[:]
        trunk = len(ids)
        learn, segments, places = [False] * trunk, [0] * trunk, [*range(trunk)]
        for number, (_, question, answer) in enumerate(talk, 1):
            start = KNOWN.match(answer).group() if bare else ""
            asked = self.tokens(start if bare else question + turn)
            reply = self.tokens(f"{answer.removeprefix(start)}<|im_end|>")
            ids += asked + reply
            learn += [False] * len(asked) + [True] * len(reply)
            segments += [number] * (len(asked) + len(reply))
            places += range(trunk, trunk + len(asked) + len(reply))
        return [np.array(x) for x in (ids, learn, segments, places)]

    def batch(self, rng: np.random.Generator, args) -> dict:
        """`args.strips` strips with at most `args.rounds` questions of `args.kinds` each; a share
        of the batches, `args.bare`, is bare, with twice as many."""
        alone = bool(rng.random() < args.bare)
        rounds = args.rounds * (1 + alone)
        return self.padded(
            [conversation(rng, rounds, args.kinds) for _ in range(args.strips)], alone
        )

    def padded(self, talks: list, bare: bool = False) -> dict:
        """Ids (B, A) after the picture; learn (B, L), positions (3, B, L), mask (B, 1, L, P + L)
        with the picture's tokens, P those before it."""
        strips = [strip for strip, _ in talks]
        encoded = [self.encode(asked, bare) for _, asked in talks]
        longest = max(len(ids) for ids, *_ in encoded)
        size, length = len(strips), TOKENS + longest
        ids = torch.full((size, longest), self.tokenizer.pad_token_id)
        learn = torch.zeros(size, length, dtype=torch.bool)
        segments = torch.zeros(size, length)
        positions = torch.zeros(3, size, length, dtype=torch.long)
        positions[2, :, :TOKENS] = torch.arange(TOKENS)  # one row: time and height stay
        for row, parts in enumerate(encoded):
            one, answer, segment, place = (torch.from_numpy(part) for part in parts)
            end = TOKENS + len(one)
            ids[row, : len(one)], learn[row, TOKENS:end] = one, answer
            segments[row, TOKENS:end] = segment.float()
            positions[:, row, TOKENS:end] = TOKENS + place
        sees = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = torch.zeros(size, 1, length, self.before + length, dtype=torch.bfloat16)
        mask[..., self.before :].masked_fill_(~sees.tril()[:, None], -torch.inf)
        return {
            "ids": ids, "learn": learn, "positions": self.before + positions, "mask": mask,
            "kinds": [[kind for kind, *_ in asked] for _, asked in talks], "segments": segments,
            "strips": strips, "shown": [features(strip) for strip in strips],
        }  # fmt: skip

    def hidden(self, seen: torch.Tensor, batch: dict) -> torch.Tensor:
        """The text model's last hidden state (B, L, D) for the pictures' tokens `seen`
        (B, 12, D)."""
        text = self.model.model.language_model
        size = len(seen)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.start):
            cache.update(*(x.expand(size, -1, -1, -1) for x in (keys, values)), layer)
        words = text.embed_tokens(batch["ids"])
        return text(
            inputs_embeds=torch.cat([seen.to(words.dtype), words], 1),
            position_ids=batch["positions"],
            attention_mask={"full_attention": batch["mask"]},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
