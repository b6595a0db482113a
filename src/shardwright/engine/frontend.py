"""The half of the engine that owns text: checks and tokenizes requests, turns the core's tokens back into outputs.

Both public engines are a Frontend and a core: LLM has the core beside it, AsyncLLM in another process.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass

from shardwright.config import EngineConfig
from shardwright.engine.input_processor import InputProcessor, Prompt, prompt_text
from shardwright.engine.messages import EngineInfo, EngineOutput, EngineOutputs, EngineRequest
from shardwright.engine.output_processor import OutputProcessor, ProcessedOutputs
from shardwright.engine.tasks import check_task
from shardwright.errors import RequestError
from shardwright.models.generation import eos_token_ids
from shardwright.models.no_tokenizer import NoTokenizer
from shardwright.models.registry import registered
from shardwright.models.resolve import home_directory
from shardwright.models.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from shardwright.outputs import FinishReason
from shardwright.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


def load_frontend_tokenizer(config: EngineConfig) -> Tokenizer:
    """The tokenizer of an engine's model, or the one named in its place; none where its directory has none.

    Raises: ModelSourceError if there is one that cannot be read.
    """
    model = config.model
    registration = registered(model.model)
    named = model.tokenizer or (None if registration is None else registration.tokenizer)
    directory = None if named is not None else home_directory(model)
    if named is None and (directory is None or not has_tokenizer(directory)):
        return NoTokenizer(model.model)
    return load_tokenizer(named or str(directory), trust_remote_code=model.trust_remote_code)


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that has been taken in."""

    request_id: str
    sequences: list[EngineRequest]
    """For the core: one per completion."""


class Frontend:
    """Requests in, RequestOutputs out, for one engine.

    Args:
        tokenizer: of the model.
        info: what the core found out at start.
    """

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self.tokenizer = tokenizer
        self._info = info
        self._inputs = InputProcessor(
            tokenizer,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=[*info.eos_token_ids, *eos_token_ids(info.path), *tokenizer.eos_token_ids],
        )
        self._outputs = OutputProcessor(tokenizer)
        if isinstance(tokenizer, NoTokenizer):
            logger.warning("%s has no tokenizer: it takes and gives token ids alone", info.model)
        self._numbers = itertools.count()

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, *, request_id: str | None = None, priority: int = 0
    ) -> Submission:
        """Check a request and expect its outputs.

        Raises: RequestError naming the field at fault, that the id is in use, or that the model does not generate.
        """
        check_task(self._info, "generate")
        params = params or SamplingParams()
        if params.stop_strings and isinstance(self.tokenizer, NoTokenizer):
            raise RequestError(
                f"{self._info.model} has no tokenizer, and stop is looked for in text: use stop_token_ids",
                param="stop",
            )
        request_id = request_id if request_id is not None else f"request-{next(self._numbers)}"
        arrival_time = time.monotonic()
        sequences = self._inputs.process(request_id, prompt, params, arrival_time=arrival_time, priority=priority)
        self._outputs.add(
            request_id,
            prompt=prompt_text(prompt),
            prompt_token_ids=sequences[0].prompt_token_ids,
            params=params,
            child_ids=[sequence.request_id for sequence in sequences],
            arrival_time=arrival_time,
        )
        return Submission(request_id, sequences)

    def process(self, outputs: EngineOutputs) -> ProcessedOutputs:
        """Deltas of requests from what a step brought, and sequences that the core shall abort."""
        return self._outputs.process(outputs.outputs, now=time.monotonic())

    def cut_short(self, sequence_ids: list[str]) -> ProcessedOutputs:
        """Deltas that end these sequences with finish reason "abort"."""
        outputs = [
            EngineOutput(request_id=sequence_id, new_token_ids=[], finish_reason=FinishReason.ABORT)
            for sequence_id in sequence_ids
        ]
        return self._outputs.process(outputs, now=time.monotonic())

    def abort(self, request_id: str) -> list[str]:
        """Forget a request. Returns its sequences that the core shall abort."""
        return self._outputs.abort(request_id)
