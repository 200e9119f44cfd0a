"""An engine's figures as Prometheus text: vLLM's names behind the prefix `multibatch:`, then ours by program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from multibatch.metrics import ProgramUse
from multibatch.stats import EngineStats, Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What an engine is at, the moment it is asked."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the KV blocks that sequences hold."""
    prefix_cache_queries: int
    prefix_cache_hits: int
    programs: list[ProgramUse]
    """Each program since the start."""


class EngineCollector(Collector):
    """Makes the metric families of one engine whenever a registry asks."""

    def __init__(self, model_name: str, stats: EngineStats, state: Callable[[], EngineState]) -> None:
        """Reads `stats` as it then is, and calls `state`."""
        self._model_name = model_name
        self._stats = stats
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        state = self._state()
        yield self._gauge("num_requests_running", "Requests that hold KV blocks.", state.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for KV blocks.", state.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", state.kv_cache_usage)
        yield from self._counters(state)
        yield from self._histograms()
        yield from self._programs(state.programs)

    def _counters(self, state: EngineState) -> Iterator[Metric]:
        stats = self._stats
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", state.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", state.prefix_cache_hits),
            "num_preemptions": ("Requests that lost their KV blocks to others.", stats.num_preemptions),
            "prompt_tokens": ("Tokens of prompts, cached ones included.", stats.prompt_tokens),
            "prompt_tokens_cached": ("Tokens of prompts that were cached.", stats.prompt_tokens_cached),
            "generation_tokens": ("Tokens generated.", stats.generation_tokens),
            "step_seconds": ("Time of the steps that could be predicted.", stats.step_seconds),
            "step_predicted_seconds": ("What was predicted for them.", stats.step_predicted_seconds),
        }
        for name, (text, value) in counters.items():
            family = CounterMetricFamily(f"multibatch:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        ended = CounterMetricFamily(
            "multibatch:request_success", "Requests that ended.", labels=["model_name", "finished_reason"]
        )
        for reason, number in stats.ended.items():
            ended.add_metric([self._model_name, reason.value], number)
        yield ended

    def _histograms(self) -> Iterator[Metric]:
        s = self._stats
        yield self._histogram(
            "time_to_first_token_seconds", "From being queued to the first token.", s.time_to_first_token
        )
        yield self._histogram("inter_token_latency_seconds", "Between two tokens.", s.inter_token_latency)
        yield self._histogram(
            "request_time_per_output_token_seconds",
            "Mean of a request between tokens.",
            s.request_time_per_output_token,
        )
        yield self._histogram("e2e_request_latency_seconds", "From being queued to the end.", s.e2e_request_latency)
        yield self._histogram(
            "request_queue_time_seconds", "From being queued to the first step.", s.request_queue_time
        )
        yield self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", s.request_prefill_time
        )
        yield self._histogram("request_decode_time_seconds", "From the first token to the last.", s.request_decode_time)
        yield self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", s.request_inference_time
        )
        yield self._histogram("request_prompt_tokens", "Tokens of a prompt.", s.request_prompt_tokens)
        yield self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", s.request_generation_tokens
        )
        yield self._histogram("request_params_n", "The parameter n.", s.request_params_n)
        yield self._histogram("request_params_max_tokens", "The parameter max_tokens.", s.request_params_max_tokens)
        yield self._histogram("iteration_tokens_total", "Tokens that a step computed.", s.iteration_tokens)

    def _programs(self, programs: list[ProgramUse]) -> Iterator[Metric]:
        labels = ["model_name", "program"]
        steps = CounterMetricFamily("multibatch:program_steps", "Calls of a program.", labels=labels)
        live = CounterMetricFamily(
            "multibatch:program_live_rows", "Rows (of prompts: tokens) that belong to a request.", labels=labels
        )
        padded = CounterMetricFamily(
            "multibatch:program_padded_rows", "Rows (of prompts: tokens) that only fill the program.", labels=labels
        )
        seconds = CounterMetricFamily("multibatch:program_seconds", "Time in calls of a program.", labels=labels)
        wasted = GaugeMetricFamily(
            "multibatch:program_wasted_row_share", "Share of a program's rows that only filled it.", labels=labels
        )
        for use in programs:
            names = [self._model_name, use.program]
            steps.add_metric(names, use.num_calls)
            live.add_metric(names, use.num_live)
            padded.add_metric(names, use.num_padded)
            seconds.add_metric(names, use.ms / 1000)
            wasted.add_metric(names, use.num_padded / max(use.num_live + use.num_padded, 1))
        yield from (steps, live, padded, seconds, wasted)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"multibatch:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        counts = list(accumulate(histogram.counts))
        bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
        family = HistogramMetricFamily(f"multibatch:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], list(zip(bounds, counts, strict=True)), histogram.total)
        return family


def registry_of(collector: EngineCollector) -> CollectorRegistry:
    """A registry of the engine's own, so that engines and other libraries cannot meet in a global one."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def text_of(registry: CollectorRegistry) -> str:
    """Prometheus' text format, version 0.0.4."""
    return generate_latest(registry).decode()
