"""The prompts of one HTTP request run side by side on the engine.

What comes out are pairs (index of the prompt, delta of its output), one per engine step and prompt. Closing the stream
closes every engine stream under it, and with that aborts what is unfinished. How outputs become response bodies is
decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from shardwright.engine.cumulative_output import CumulativeOutput
from shardwright.errors import RequestError
from shardwright.outputs import RequestOutput
from shardwright.sampling_params import SamplingParams
from shardwright.server.context import ServerContext
from shardwright.server.engine import Prompt

Item = TypeVar("Item")
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one of several streams."""

    error: Exception | None = None


async def run_prompts(
    context: ServerContext,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    request_id: str,
    priority: int,
    prompt_field: str = "prompt",
) -> Outputs:
    """Deltas of all prompts as steps bring them; an error of any prompt is raised and ends the others.

    Args:
        context: of the server.
        prompts: what to complete, side by side.
        params: for all of them.
        request_id: prefix of the prompts' own ids.
        priority: lower runs first, under the priority policy.
        prompt_field: the request's field that the prompts were made of, to be named by errors.

    Raises: RequestError, EngineBusyError, EngineDeadError, all at the first step; the last one later, too.
    """
    with context.lifecycle.admit(len(prompts) * params.n):
        streams = [
            run_prompt(context, prompt, params, request_id=f"{request_id}-{index}", priority=priority)
            for index, prompt in enumerate(prompts)
        ]
        try:
            async with aclosing(merge(streams)) as merged:
                async for item in merged:
                    yield item
        except RequestError as exc:
            if exc.param == "prompt":
                exc.param = prompt_field
            raise


async def run_prompt(
    context: ServerContext, prompt: Prompt, params: SamplingParams, *, request_id: str, priority: int
) -> AsyncGenerator[RequestOutput, None]:
    """Deltas of one prompt, seen by the metrics."""
    stream = context.engine.generate(prompt, params, request_id=request_id, priority=priority, stream="delta")
    async with aclosing(stream):
        with context.metrics.observe_request() as observation:
            async for output in stream:
                observation.add(output)
                yield output


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams with the index of theirs, as they come. Closing it closes them all."""
    if len(streams) == 1:  # the usual case needs no tasks and no queue
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return

    queue: asyncio.Queue[tuple[int, Item] | Ended] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait((index, output))
            queue.put_nowait(Ended())
        except Exception as exc:
            queue.put_nowait(Ended(exc))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await queue.get()
            if not isinstance(item, Ended):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                unfinished -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gather(outputs: Outputs, num_prompts: int) -> list[RequestOutput]:
    """Run to the end and put the deltas of each prompt together again."""
    whole = [CumulativeOutput() for _ in range(num_prompts)]
    async with aclosing(outputs):
        async for index, delta in outputs:
            whole[index].add(delta)
    return [cumulative.output for cumulative in whole]
