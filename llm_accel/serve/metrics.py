"""What the server counts, in the text format of Prometheus. Every request ends in exactly one outcome."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llm_accel.serve.group import Group
from llm_accel.serve.sequences import TokenSequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own so that two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="llm_accel", registry=self.registry)
        histogram = partial(Histogram, namespace="llm_accel", registry=self.registry, buckets=_SECONDS)
        self._gauges: dict[str, Gauge] = {}
        self.received = counter("requests_received", "Requests whose headers have arrived.", ["endpoint"])
        self.requests = counter("requests", "Requests that are over, by outcome.", ["endpoint", "outcome"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts whose turn came.")
        self.reused_tokens = counter("reused_tokens", "Prompt tokens that a kept cache held already.")
        self.generated_tokens = counter("generated_tokens", "Tokens generated, end tokens included.")
        label = ["method"]
        self.logical = counter("logical_tokens", "Cache entries of a dense model, per layer and KV head.", label)
        self.physical = counter("physical_tokens", "Cache entries stored, per layer and KV head.", label)
        self.dense_bytes = counter("kv_bytes_dense", "KV bytes of a dense model, at the end of a row.", label)
        self.held_bytes = counter("kv_bytes_held", "KV bytes held at the end of a row.", label)
        self.saved_bytes = counter("kv_bytes_saved", "The difference of the two.", label)
        self.failed_steps = counter("failed_steps", "Steps that ended with an exception.")
        self.waiting = histogram("queue_seconds", "Time in the queue.")
        self.first_token = histogram("time_to_first_token_seconds", "From acceptance to the first token.")
        self.per_token = histogram("seconds_per_token", "Mean time of a token after the first, per answer.")
        self.rows = histogram("step_rows", "Rows of a decode step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128))

    def note_row(self, row: TokenSequence, group: Group) -> None:
        """Counts an answer that is over, and what its row held: its share of what all rows beside it did."""
        name = "+".join(config.name for config in row.job.methods) or "dense"
        self.first_token.observe(row.first_at - row.job.accepted_at)
        if len(row.tokens) > 1:
            self.per_token.observe((row.last_at - row.first_at) / (len(row.tokens) - 1))
        seen, share = len(row.prompt) + len(row.tokens) - 1, 1 / group.running.width
        layers = [layer for layer in group.running.reports() if layer.logical_length]
        held = dense = group.nbytes * share
        physical: float = seen
        if layers:
            physical = min(seen, sum(layer.physical_length for layer in layers) / len(layers))
            held = sum(layer.kv_bytes for layer in layers) * share
            dense = sum(layer.dense_kv_bytes / layer.logical_length for layer in layers) * seen * share
        self.logical.labels(name).inc(seen)
        self.physical.labels(name).inc(physical)
        self.dense_bytes.labels(name).inc(dense)
        self.held_bytes.labels(name).inc(held)
        self.saved_bytes.labels(name).inc(max(0, dense - held))

    def watch(self, name: str, help: str, value: Callable[[], float], **labels: str) -> None:
        """A value that is read when somebody asks, under ``labels`` where there are several."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, help, list(labels), "llm_accel", registry=self.registry)
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def text(self) -> bytes:
        """The page of ``/metrics``."""
        return generate_latest(self.registry)
