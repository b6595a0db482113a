"""A small language model as its author may have written it: names of its own, layers in a ModuleDict, tables computed
in constructors. Tests copy this file into model directories, and import it to make variations.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class TaleConfig(PretrainedConfig):
    model_type = "tale"

    def __init__(
        self, vocab_size=128, width=64, num_chapters=3, num_voices=4, num_shared_voices=2, max_position_embeddings=256,
        **kwargs,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.width = width
        self.num_chapters = num_chapters
        self.num_voices = num_voices
        self.num_shared_voices = num_shared_voices
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


def listen(module, query, key, value, attention_mask, scaling, **kwargs):
    """Plain attention under the module's own table of what is in the past."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    scores = query @ key.transpose(2, 3) * scaling
    past = module.past[: scores.shape[2], : scores.shape[3]]
    return (scores.masked_fill(~past, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


class Listener(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.size = config.width // config.num_voices
        self.to_questions = nn.Linear(config.width, config.width, bias=False)
        self.to_keys = nn.Linear(config.width, config.num_shared_voices * self.size, bias=False)
        self.to_contents = nn.Linear(config.width, config.num_shared_voices * self.size, bias=False)
        self.to_output = nn.Linear(config.width, config.width, bias=False)
        length = config.max_position_embeddings
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        table = torch.zeros(2, length, self.size // 2)
        table[0], table[1] = angles.cos(), angles.sin()
        self.register_buffer("turns", table, persistent=False)
        self.register_buffer("past", torch.tril(torch.ones(length, length, dtype=torch.bool)), persistent=False)

    def turn(self, x, position_ids):
        cos, sin = self.turns[:, position_ids].unsqueeze(2).to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x, position_ids):
        def split(y):
            return y.view(*y.shape[:-1], -1, self.size).transpose(1, 2)

        question = self.turn(split(self.to_questions(x)), position_ids)
        key = self.turn(split(self.to_keys(x)), position_ids)
        name = self.config._attn_implementation
        attend = listen if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        heard, _ = attend(self, question, key, split(self.to_contents(x)), None, scaling=self.size**-0.5)
        return self.to_output(heard.flatten(-2))


class Chapter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.before_listening = nn.LayerNorm(config.width)
        self.listener = Listener(config)
        self.before_thinking = nn.LayerNorm(config.width)
        self.thought = nn.Sequential(
            nn.Linear(config.width, 2 * config.width), nn.GELU(), nn.Linear(2 * config.width, config.width)
        )
        self.weight_of_thought = nn.Parameter(torch.full((config.width,), 0.7))

    def forward(self, x, position_ids):
        x = x + self.listener(self.before_listening(x), position_ids)
        return x + self.weight_of_thought * self.thought(self.before_thinking(x))


class Tale(PreTrainedModel):
    config_class = TaleConfig
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.chapters = nn.ModuleDict({f"chapter_{i}": Chapter(config) for i in range(config.num_chapters)})
        self.register_buffer("mood", torch.linspace(0.5, 1.5, config.width))
        self.end = nn.LayerNorm(config.width)
        self.next_word = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.2)

    def get_output_embeddings(self):
        return self.next_word

    def places(self, input_ids, position_ids):
        """Positions that the chapters use."""
        return position_ids if position_ids is not None else torch.arange(input_ids.shape[1])[None]

    def tell(self, input_ids, position_ids):
        """What is known at each word."""
        x = self.words(input_ids) * self.mood
        for chapter in self.chapters.values():
            x = chapter(x, position_ids)
        return self.end(x)

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        x = self.tell(input_ids, self.places(input_ids, position_ids))
        return CausalLMOutput(logits=self.next_word(x))
