"""A tiny model of the zoo, served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.zoo.builder import NUM_TOKENS, PROMPT_LENGTHS, Reference

from shardwright import LLM, SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = max(PROMPT_LENGTHS) + NUM_TOKENS


@dataclass(frozen=True)
class Architecture:
    """A model on disk, and what it shall say."""

    reference: Reference
    rung: str = "interface"
    caches_latents: bool = False
    runs_over_pages: bool = False

    @contextmanager
    def engine(self, **options: object) -> Iterator[LLM]:
        """A float32 engine; at its end no block may be held."""
        fixed = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4}
        with LLM(str(self.reference.path), **(fixed | options)) as llm:
            assert llm.info.attention_rung == self.rung, llm.info.attention_reason
            assert ("cache one latent of" in llm.info.attention_reason) == self.caches_latents
            assert ("run their own attention over pages" in llm.info.attention_reason) == self.runs_over_pages
            yield llm
            assert llm.stats.num_free_blocks == llm.stats.num_blocks

    def check(self, llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected

    def check_all(self, llm: LLM) -> None:
        self.check(llm, self.reference.prompts, self.reference.outputs)
