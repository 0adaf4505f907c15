"""VASparse written down a second time, in float64 and entry by entry, for one row without padding.

The stock model keeps every key and value; an entry here is the list of positions whose keys and values were summed.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llm_accel import VASparse
from tests.contracts.plain_attention import running
from tests.vision_oracle import decoder_inputs

Entry = tuple[int, ...]


class Layer:
    """What one layer remembers: entries of each KV head, and numbers of each entry."""

    def __init__(self) -> None:
        self.heads: list[list[Entry]] = []
        self.received: dict[tuple[int, Entry], float] = {}
        self.looked: dict[int, float] = {}
        self.seen = self.prompt = 0


class Oracle:
    """An attention function; ``visual``: bool [T] of the first prompt; behind layer ``exit`` nobody sees them."""

    def __init__(self, method: VASparse, visual: Tensor, exit: int | None = None) -> None:
        self.method, self.visual, self.exit = method, visual, exit
        self.layers: dict[int, Layer] = {}
        self.decoding = False

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = self.layers.setdefault(module.layer_idx, Layer())
        length, kv_heads = query.shape[2], key.shape[1]
        layer.heads = layer.heads or [[] for _ in range(kv_heads)]
        gone = set(self._visual()) if self.exit is not None and module.layer_idx > self.exit else set()
        new = range(layer.seen, layer.seen + length)
        layer.seen += length
        for entries in layer.heads:
            entries.extend((position,) for position in new if position not in gone)
        tables = [self._table(entries, key[0, group], value[0, group]) for group, entries in enumerate(layer.heads)]
        output = torch.zeros(1, length, query.shape[1], value.shape[-1], dtype=query.dtype)
        for row, position in enumerate(new):
            if position in gone:
                continue
            watched = self.decoding or self.method.sink_window is None or length - row <= self.method.sink_window
            weights = []
            for head in range(query.shape[1]):
                table = tables[head * kv_heads // query.shape[1]]
                logits = table[1] @ query[0, head, row] * kwargs["scaling"]
                paid = self._weights(layer, head, table[0], logits, position)
                output[0, row, head] = paid @ table[2]
                weights.append(dict(zip(table[0], paid.tolist(), strict=True)))
            for head, paid in enumerate(weights):
                for entry, weight in paid.items():
                    if watched:
                        layer.received[head, entry] = layer.received.get((head, entry), 0.0) + weight
            if self.decoding:
                visual = set(self._visual())
                to_image = [sum(w for entry, w in paid.items() if entry[0] in visual) for paid in weights]
                mean = sum(to_image) / len(to_image)
                layer.looked[position] = to_image[-1] if self.method.saliency_head == "last" else mean
        if self.decoding:
            self._prune(layer, query[0, :, 0], key[0])
        else:
            layer.prompt = layer.seen
        return output, None

    def _visual(self) -> list[int]:
        return self.visual.nonzero()[:, 0].tolist()

    def _table(self, entries: list[Entry], key: Tensor, value: Tensor) -> tuple[list[Entry], Tensor, Tensor]:
        """Entries with their summed keys and values."""
        return entries, *(torch.stack([one[list(entry)].sum(0) for entry in entries]) for one in (key, value))

    def _weights(self, layer: Layer, head: int, entries: list[Entry], logits: Tensor, position: int) -> Tensor:
        later = torch.tensor([entry[0] > position for entry in entries])
        if self.decoding:
            sink = torch.tensor([layer.received.get((head, entry), 0.0) for entry in entries], dtype=logits.dtype)
            logits = (1 + self.method.beta) * logits - self.method.beta * sink.softmax(0) * logits
        return logits.masked_fill(later, -math.inf).softmax(0)

    def _prune(self, layer: Layer, query: Tensor, key: Tensor) -> None:
        method, generated = self.method, layer.seen - layer.prompt
        if method.keep == 1 or generated % method.prune_every:
            return
        for group, entries in enumerate(layer.heads):
            prompt = [entry for entry in entries if entry[0] < layer.prompt]
            reply = [entry for entry in entries if entry[0] >= layer.prompt]
            count = min(len(reply), max(method.protect_last, math.ceil(method.keep * generated - 1e-9)))
            looked = torch.tensor([sum(layer.looked[p] for p in entry) for entry in reply]).exp()
            sharing = query.shape[0] // len(layer.heads)
            queries = query[group * sharing : (group + 1) * sharing]
            delta = [
                float((queries @ key[group, list(entry)].sum(0)).square().mean() + method.lam * share)
                for entry, share in zip(reply, looked / looked.sum(), strict=True)
            ]
            newest = len(reply) - method.protect_last
            order = sorted(range(len(reply)), key=lambda i: (i < newest, -delta[i], i))
            kept = sorted(order[:count])
            rest = [reply[i] for i in range(len(reply)) if i not in kept]
            merged = self._merged(rest, [key[group, list(entry)].sum(0) for entry in rest])
            for head in range(group * sharing, (group + 1) * sharing):
                for members in merged.values():
                    parts = [layer.received.get((head, entry), 0.0) for entry in rest if entry[0] in members]
                    layer.received[head, members] = sum(parts)
            survivors = [*(reply[i] for i in kept), *merged.values()]
            layer.heads[group] = prompt + sorted(survivors, key=lambda entry: entry[0])

    def _merged(self, rest: list[Entry], keys: list[Tensor]) -> dict[Entry, Entry]:
        """Centre -> all positions of its cluster, its own first."""
        if self.method.merge is None or not rest:
            return {}
        clusters = density_peaks(torch.stack(keys), math.ceil(len(rest) / self.method.merge))
        return {
            rest[centre]: rest[centre] + tuple(p for i in members if i != centre for p in rest[i])
            for centre, members in clusters.items()
        }


def density_peaks(points: Tensor, clusters: int) -> dict[int, list[int]]:
    """Centre -> members, by the definition: density among 5 nearest neighbours times distance to a denser point."""
    count = len(points)
    apart = [[float((a - b).norm()) / points.shape[1] ** 0.5 for b in points] for a in points]
    density = []
    for i in range(count):
        near = sorted(apart[i][j] for j in range(count) if j != i)[:5]
        density.append(math.exp(-sum(d * d for d in near) / max(1, len(near))))
    remote = []
    for i in range(count):
        denser = [apart[i][j] for j in range(count) if (density[j], -j) > (density[i], -i)]
        remote.append(min(denser) if denser else max(apart[i]))
    centres = sorted(range(count), key=lambda i: (-density[i] * remote[i], i))[:clusters]
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in range(count):
        if i not in members:
            members[min(sorted(centres), key=lambda centre: apart[i][centre])].append(i)
    return members


def replies(
    model: PreTrainedModel,
    batch: dict[str, Any],
    method: VASparse,
    turns: list[Tensor],
    questions: list[Tensor],
    dropped: Tensor | None = None,
    exit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and processed log-probabilities [tokens, V] of given replies to one row.

    Args:
        turns: the tokens of each reply, int64 [n].
        questions: what the user says between two replies, int64 [m].
        dropped: rows of the prompt that never reach the decoder, bool [T].
        exit: the layer behind which nobody sees visual tokens.
    """
    model = copy.deepcopy(model).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    given = decoder_inputs(model, batch)
    visual = batch["input_ids"][0] == model.config.image_token_id
    if dropped is not None:
        kept = ~dropped
        given = {"inputs_embeds": given["inputs_embeds"][:, kept], "position_ids": given["position_ids"][..., kept]}
        visual = visual[kept]
    oracle, cache, head = Oracle(method, visual, exit), DynamicCache(config=model.get_decoder().config), model.lm_head
    banned = torch.tensor(model.generation_config.suppress_tokens)
    logits, scores = [], []
    with running(model, oracle):
        for reply, question in zip(turns, [*questions, None], strict=True):
            oracle.decoding = False
            for token in reply:
                mask = torch.ones(1, cache.get_seq_length() + given["inputs_embeds"].shape[1], dtype=torch.long)
                output = model.get_decoder()(**given, attention_mask=mask, past_key_values=cache).last_hidden_state
                logits.append(head(output[0, -1]))
                allowed = logits[-1].index_fill(0, banned, -math.inf)
                scores.append(contrasted(allowed, head(given["inputs_embeds"][0, -1]), method))
                given = following(model, given, token[None])
                oracle.decoding = True
            if question is not None:
                given = following(model, given, question, also=given["inputs_embeds"])
    return torch.stack(logits), torch.stack(scores)


def following(model: PreTrainedModel, given: dict[str, Any], ids: Tensor, also: Tensor | None = None) -> dict[str, Any]:
    """Inputs of the decoder for tokens after ``given``, or beside it where ``also`` was not run yet."""
    embeddings = model.get_input_embeddings()(ids)[None]
    positions = given["position_ids"][..., -1:] + torch.arange(1, len(ids) + 1)
    if also is None:
        return {"inputs_embeds": embeddings, "position_ids": positions}
    positions = torch.cat([given["position_ids"], positions], dim=-1)
    return {"inputs_embeds": torch.cat([also, embeddings], dim=1), "position_ids": positions}


def contrasted(logits: Tensor, second: Tensor, method: VASparse) -> Tensor:
    """Eq. 6 with the plausibility constraint, as log-probabilities [V]."""
    if method.alpha == 0:
        return logits
    probability = logits.softmax(0)
    mixed = (1 + method.alpha) * logits - method.alpha * second
    mixed = mixed.masked_fill(probability < method.plausibility * probability.max(), -math.inf)
    return mixed.log_softmax(0)
