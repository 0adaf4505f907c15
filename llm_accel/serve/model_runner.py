"""Runs one batch through ``generate``: left padding, one method, each row with its own sampling, stops and end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llm_accel.api import Handle, apply
from llm_accel.cache.linear import state_bytes
from llm_accel.common.generation import cache_bytes, end_tokens
from llm_accel.errors import UnsupportedModelError
from llm_accel.methods import Dense, MethodConfig
from llm_accel.patches.cache_name import CACHE
from llm_accel.serve.conversations import Conversation, Conversations
from llm_accel.serve.logprobs import TokenLogprob, prompt_logprobs, token_logprobs
from llm_accel.serve.metrics import Metrics
from llm_accel.serve.sampling import choose
from llm_accel.serve.sequences import Job, TokenSequence

# What the model's own generation settings may hold beside sampling. Padding counts as text for some of it, so that a
# row would depend on the others.
_PLAIN = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "max_length": None,
    "min_length": 0,
    "use_cache": True,
    "return_dict_in_generate": True,
}
# tokens, padding included, of prompts that are read in one call: enough to be worth the call, and no more
AT_ONCE = {"cpu": 256, "cuda": 8192}


class SamplingProcessor(LogitsProcessor):
    """Leaves one token of each row possible, the chosen one: greedy search then takes it."""

    def __init__(self, rows: Sequence[TokenSequence], ends: set[int]) -> None:
        self.rows, self.ends = rows, ends
        self.logprobs: list[TokenLogprob | None] = [None] * len(rows)

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """Args and result as for every processor; ``scores`` float [B, V]."""
        draws = [row.draw() if row.job.sampling.temperature > 0 and not row.over else 0.0 for row in self.rows]
        tokens = choose(self._adjusted(scores), [row.job.sampling for row in self.rows], draws)
        self._note_logprobs(scores, tokens)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)

    def _adjusted(self, scores: Tensor) -> Tensor:
        if not any(row.job.sampling.adjusts for row in self.rows):
            return scores
        rows = [
            row.job.sampling.adjusted(logits, row.prompt, row.tokens, self.ends) if row.job.sampling.adjusts else logits
            for row, logits in zip(self.rows, scores, strict=True)
        ]
        return torch.stack(rows)

    def _note_logprobs(self, scores: Tensor, tokens: Tensor) -> None:
        for number, row in enumerate(self.rows):
            top = row.job.sampling.logprobs
            if top is not None and not row.over:
                [self.logprobs[number]] = token_logprobs(scores[number, None], tokens[number, None], top)


class RowProgress(StoppingCriteria):
    """Hands every new token to its row, and stops the rows that are over."""

    def __init__(self, rows: Sequence[TokenSequence], choice: SamplingProcessor) -> None:
        self.rows, self.choice = rows, choice

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, bool [B]."""
        for row, token, logprob in zip(self.rows, input_ids[:, -1].tolist(), self.choice.logprobs, strict=True):
            row.accept(token, self.choice.ends, logprob)
        return torch.tensor([row.over for row in self.rows], device=input_ids.device)


class ModelRunner:
    """The model with the method that ran last; used by the inference thread alone."""

    def __init__(self, model: Any, tokenizer: Any, conversations: Conversations, metrics: Metrics, decode: Any) -> None:
        self._model, self._conversations, self._metrics, self._decode = model, conversations, metrics, decode
        self._ends = end_tokens(model, tokenizer)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad = min(self._ends, default=0) if pad is None else int(pad)
        self._at_once = AT_ONCE.get(model.device.type, AT_ONCE["cuda"])
        self._plain = _plain(model)
        self._methods: tuple[MethodConfig, ...] = ()
        self._handle: Handle | None = None

    def use(self, methods: tuple[MethodConfig, ...]) -> Handle | None:
        """Puts these methods on the model, and takes the last ones off; None for the dense model."""
        if methods != self._methods:
            if self._handle is not None:
                self._handle.remove()
            self._methods, self._handle = (), None
            if methods:
                self._handle = apply(self._model, methods, decode=self._decode)
            self._methods = methods
        return self._handle

    def run(self, jobs: Sequence[Job], most: int) -> None:
        """Generates the next answers of these jobs, which share a method, up to ``most`` of each; raises what the model
        raises."""
        rows = [row for job in jobs for row in job.next_sequences(most)]
        if not rows:
            return
        begin = time.monotonic()
        for row in rows:
            if row.index == 0:
                self._metrics.waiting.observe(begin - row.job.accepted_at)
        self._metrics.rows.observe(len(rows))
        self._metrics.prompt_tokens.inc(sum(len(row.prompt) for row in rows))
        rows = self._read_alone(rows)
        if not rows:
            return
        shared = len(rows) > 1
        handle = self.use(jobs[0].methods or (self._plain if shared else ()))
        if shared and handle is not None and handle.can_prefill:
            rows = sorted(rows, key=lambda row: len(row.prompt))
            given = self._read(rows, handle)
        else:
            given = self._given(rows, self._open_cache(jobs[0], handle))
        output = self._generate(rows, given)
        filled = getattr(output, CACHE)
        self._count(rows, handle, filled)
        if jobs[0].session is not None and rows[0].finish is not None:
            self._keep_cache(jobs[0], handle, filled)

    def _read_alone(self, rows: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Notes the log-probabilities of prompts, by the dense model; what is left are the rows that generate."""
        for row in rows:
            if row.job.prompt_logprobs is not None and not row.over:
                self.use(())
                row.prompt_logprobs = prompt_logprobs(self._model, row.prompt, row.job.prompt_logprobs)
            if row.job.max_new_tokens == 0:
                row.end_unsaid()
        return [row for row in rows if not row.over]

    def _read(self, rows: Sequence[TokenSequence], handle: Handle) -> dict[str, Any]:
        """What generate continues from, once the prompts have been read, few at a time."""
        lengths = [len(row.prompt) for row in rows]
        cache = handle.prefill([torch.tensor(row.prompt) for row in rows], rows=prefill_groups(lengths, self._at_once))
        return cache.inputs

    def _given(self, rows: Sequence[TokenSequence], cache: Any) -> dict[str, Any]:
        """What generate begins with: all prompts, padded on the left."""
        width = max(len(row.prompt) for row in rows)
        padding = [width - len(row.prompt) for row in rows]
        ids = [[self._pad] * pad + list(row.prompt) for row, pad in zip(rows, padding, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        given = {
            "input_ids": torch.tensor(ids, device=self._model.device),
            "attention_mask": torch.tensor(mask, device=self._model.device),
        }
        if cache is not None:
            given[CACHE] = cache
        for name, tensor in rows[0].job.features.items():  # a job with features has one row and runs alone
            kind = self._model.dtype if tensor.is_floating_point() else tensor.dtype
            given[name] = tensor.to(self._model.device, kind)
        return given

    def _generate(self, rows: Sequence[TokenSequence], given: dict[str, Any]) -> Any:
        choice = SamplingProcessor(rows, self._ends)
        return self._model.generate(
            max_new_tokens=max(row.job.max_new_tokens for row in rows),
            logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList([RowProgress(rows, choice)]),
            pad_token_id=self._pad,
            eos_token_id=None,  # which tokens end a row is the row's own affair
            **given,
            **_PLAIN,
        )

    def _open_cache(self, job: Job, handle: Handle | None) -> Any:
        """The cache of a conversation, new where there is none to go on with; None for a request without one."""
        if job.session is None:
            return None
        found = self._conversations.take(job.session, job.prompts[0], job.methods)
        if found is not None:
            job.reused_tokens = len(found.ids)
            self._metrics.reused_tokens.inc(job.reused_tokens)
            return found.cache
        return DynamicCache(config=self._model.config) if handle is None else handle.new_cache()

    def _keep_cache(self, job: Job, handle: Handle | None, cache: Any) -> None:
        assert job.session is not None
        row = job.sequences[0]
        ids = (*row.prompt, *row.tokens)[: cache.get_seq_length()]  # the last token was never fed
        nbytes = cache_bytes(cache) if handle is None else handle.report().kv_bytes
        nbytes += sum(map(state_bytes, cache.layers))
        self._conversations.keep(job.session, Conversation(ids, cache, job.methods, nbytes))

    def _count(self, rows: Sequence[TokenSequence], handle: Handle | None, cache: Any) -> None:
        metrics, name = self._metrics, "+".join(config.name for config in self._methods) or "dense"
        metrics.generated_tokens.inc(sum(len(row.tokens) for row in rows))
        for row in rows:
            if row.tokens:
                metrics.first_token.observe(row.first_at - row.job.accepted_at)
            if len(row.tokens) > 1:
                metrics.per_token.observe((row.last_at - row.first_at) / (len(row.tokens) - 1))
        if handle is None:
            logical = physical = float(cache.get_seq_length())
            held = dense = cache_bytes(cache)
        else:
            report = handle.report()
            logical = sum(layer.logical_length for layer in report.layers) / len(report.layers)
            physical = sum(layer.physical_length for layer in report.layers) / len(report.layers)
            held, dense = report.kv_bytes, report.dense_kv_bytes
        metrics.logical.labels(name).inc(len(rows) * logical)
        metrics.physical.labels(name).inc(len(rows) * physical)
        metrics.dense_bytes.labels(name).inc(dense)
        metrics.held_bytes.labels(name).inc(held)
        metrics.saved_bytes.labels(name).inc(max(0, dense - held))


def _plain(model: Any) -> tuple[MethodConfig, ...]:
    """The dense model for batches: a method, whose prompts can be read a few at a time; none where that cannot be."""
    try:
        apply(model, Dense()).remove()
    except UnsupportedModelError:
        return ()
    return (Dense(),)


def prefill_groups(lengths: Sequence[int], at_once: int) -> list[int]:
    """How many prompts of ascending ``lengths`` to read in each call: as many as have ``at_once`` tokens together, all
    padded to the longest of them, but at least one."""
    sizes = [1]
    for length in lengths[1:]:
        if (sizes[-1] + 1) * length <= at_once:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes
