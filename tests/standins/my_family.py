"""The model of docs/new-model.md: a picture is one vector, and a gate stands between the blocks."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class MyConfig(PreTrainedConfig):
    model_type = "my_family"

    def __init__(self, vocab_size=128, hidden_size=64, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.RMSNorm(width),
            nn.Linear(width, 96),
            nn.Linear(96, width),
        )

    def forward(self, x):
        x = self.norm(x)
        return x + self.down((self.up(x).cumsum(1) / 8).tanh())


class MyModel(PreTrainedModel, GenerationMixin):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.eye = nn.Linear(48, config.hidden_size)
        self.stack = nn.ModuleList([Block(config.hidden_size) for _ in range(3)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, features=None, use_cache=None, **kwargs):
        x = self.words(input_ids)
        if features is not None:
            x = x.index_put([input_ids == 5], self.eye(features))
        for block in self.stack:
            x = block(x)
            x = x * (1 + x.mean().sigmoid())
        return CausalLMOutputWithPast(logits=self.head(x))
