"""Prometheus metrics: what requests saw is observed as they run, the engine's state is read when somebody asks.

Every server has its own registry, so that several can live in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from shardwright.engine.messages import SchedulerStats
from shardwright.errors import UsageError
from shardwright.outputs import FinishReason, RequestOutput
from shardwright.server.engine import ServedEngine

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
ITL_BUCKETS_S = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)
LATENCY_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: ServedEngine, *, version: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineState(engine, version=version))
        self.ttft = Histogram(
            "shardwright_time_to_first_token_seconds",
            "From a prompt's arrival to its first token.",
            buckets=TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self.itl = Histogram(
            "shardwright_inter_token_latency_seconds",
            "Between two tokens of one completion.",
            buckets=ITL_BUCKETS_S,
            registry=self._registry,
        )
        self.latency = Histogram(
            "shardwright_e2e_request_latency_seconds",
            "From a prompt's arrival to the end of its last completion.",
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "shardwright_prompt_tokens", "Tokens of the prompts that were taken in.", registry=self._registry
        )
        self.generation_tokens = Counter(
            "shardwright_generation_tokens", "Tokens generated for clients.", registry=self._registry
        )
        self.requests = Counter(
            "shardwright_requests",
            "Prompts and completions by how they ended: stop, length, abort, rejected (bad input), error.",
            labelnames=("finish_reason",),
            registry=self._registry,
        )

    @contextlib.contextmanager
    def observe_request(self) -> Iterator[RequestObservation]:
        """Observe one prompt from now until the block ends, however it ends."""
        observation = RequestObservation(self)
        try:
            yield observation
        except BaseException as exc:
            if not observation.finished:
                gone = isinstance(exc, (GeneratorExit, asyncio.CancelledError))
                reason = "abort" if gone else "rejected" if isinstance(exc, UsageError) else "error"
                self.requests.labels(reason).inc()
            raise

    def expose(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics as text, and its content type, in the format that the Accept header prefers."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type


class RequestObservation:
    """What one prompt's outputs tell the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.finished = False
        self._metrics = metrics
        self._arrival_s = time.perf_counter()
        self._last_token_s: dict[int, float] = {}

    def add(self, output: RequestOutput) -> None:
        """Take in the next delta."""
        now = time.perf_counter()
        metrics, last = self._metrics, self._last_token_s
        for completion in output.outputs:
            if num_tokens := len(completion.token_ids):
                if not last:
                    metrics.ttft.observe(now - self._arrival_s)
                    metrics.prompt_tokens.inc(len(output.prompt_token_ids))
                if completion.index in last:
                    interval_s = (now - last[completion.index]) / num_tokens
                    for _ in range(num_tokens):
                        metrics.itl.observe(interval_s)
                last[completion.index] = now
                metrics.generation_tokens.inc(num_tokens)
            if completion.finish_reason is not None:
                metrics.requests.labels(completion.finish_reason).inc()
        if output.finished:
            self.finished = True
            metrics.latency.observe(now - self._arrival_s)

    def end_of_reading(self, num_tokens: int) -> None:
        """The texts of a request that generates nothing have been read."""
        self.finished = True
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.requests.labels(FinishReason.STOP).inc()
        self._metrics.latency.observe(time.perf_counter() - self._arrival_s)


GAUGES: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "num_requests_running": ("Sequences in the running batch.", lambda stats: stats.num_running),
    "num_requests_waiting": ("Sequences waiting for room.", lambda stats: stats.num_waiting),
    "kv_cache_usage_ratio": (
        "Share of KV cache blocks that sequences hold, 0 to 1.",
        lambda stats: stats.kv_cache_usage,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.num_prefix_query_tokens,
    ),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.num_prefix_hit_tokens),
    "speculative_proposed_tokens": (
        "Tokens guessed ahead and verified.",
        lambda stats: stats.num_proposed_tokens,
    ),
    "speculative_accepted_tokens": (
        "Tokens guessed ahead that were right.",
        lambda stats: stats.num_accepted_tokens,
    ),
    "preemptions": ("Sequences put back for lack of blocks.", lambda stats: stats.num_preemptions),
    "engine_steps": ("Steps of the engine.", lambda stats: stats.num_steps),
    "engine_restarts": (
        "Times that ranks, or a replica, were lost and started anew.",
        lambda stats: stats.num_restarts,
    ),
}


class EngineState(Collector):
    """The engine's own counters and gauges, read at every scrape; with the label `replica` where there are several."""

    def __init__(self, engine: ServedEngine, *, version: str) -> None:
        self._engine = engine
        self._version = version

    def collect(self) -> Iterable[Metric]:
        info, states = self._engine.info, self._engine.replica_stats
        names = {"model": info.model, "dtype": info.dtype, "device": info.device, "version": self._version}
        yield InfoMetricFamily("shardwright_server", "What is served.", names)
        stats = [one for one, _ in states]
        for name, (help, value) in GAUGES.items():
            yield _gauge(name, help, [value(one) for one in stats])
        yield _gauge("kv_cache_blocks", "Blocks of the KV cache.", [one.num_blocks or info.num_blocks for one in stats])
        up = [float(is_up and self._engine.is_alive) for _, is_up in states]
        yield _gauge("engine_up", "1 while the engine runs.", up)
        for name, (help, value) in COUNTERS.items():
            family = CounterMetricFamily(f"shardwright_{name}", help, labels=_labels(stats))
            yield _filled(family, [value(one) for one in stats])


def _gauge(name: str, help: str, values: Sequence[float]) -> Metric:
    return _filled(GaugeMetricFamily(f"shardwright_{name}", help, labels=_labels(values)), values)


def _labels(values: Sequence[object]) -> list[str]:
    return ["replica"] if len(values) > 1 else []


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[float]) -> Metric:
    for index, value in enumerate(values):
        family.add_metric([str(index)] if len(values) > 1 else [], value)
    return family
