"""DivPrune, CDPruner, PruneSID, DART and what compares frames written down a second time, in float64 and token by
token."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def divprune(features: Tensor, kept: int) -> list[int]:
    """The tokens of [n, C] that max-min diversity keeps."""
    rows, count = features.double(), len(features)
    apart = [[1 - cosine(a, b) for b in rows] for a in rows]
    least = [min(apart[i][j] for j in range(count) if j != i) for i in range(count)]
    chosen = [max(range(count), key=lambda i: (round(least[i], 8), -i))]
    while len(chosen) < kept:
        rest = [i for i in range(count) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (round(min(apart[i][j] for j in chosen), 8), -i)))
    return sorted(chosen)


def cdpruner(features: Tensor, text: Tensor, kept: int) -> list[int]:
    """Greedy by the determinant itself."""
    rows, words = features.double(), text.double()
    mean = [sum(cosine(row, word) for word in words) / len(words) for row in rows]
    relevance = [max((m - min(mean)) / (max(mean) - min(mean)), 1e-6) for m in mean]
    kernel = torch.tensor(
        [[relevance[i] * cosine(a, b) * relevance[j] for j, b in enumerate(rows)] for i, a in enumerate(rows)],
        dtype=torch.float64,
    )
    chosen: list[int] = []
    while len(chosen) < kept:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (_gain(kernel, chosen, i), -i)))
    return sorted(chosen)


def _gain(kernel: Tensor, chosen: list[int], more: int) -> float:
    """By how much a determinant grows with one more, rounded so that copies are equal."""
    before = float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0
    return round(float(torch.linalg.det(kernel[[*chosen, more]][:, [*chosen, more]])) / before, 8)


def dart(states: Tensor, norms: Tensor, visual: Tensor, kept: int, pivots: int, words: int) -> list[int]:
    """Rows of [T, C] that stay of those under ``visual``; ``norms``: of keys, [T]."""
    tokens, text = visual.nonzero()[:, 0].tolist(), (~visual).nonzero()[:, 0].tolist()
    first = sorted(sorted(tokens, key=lambda t: (-float(norms[t]), t))[: min(pivots, kept)])
    others = sorted(sorted(text, key=lambda t: (-float(norms[t]), t))[:words])
    taken, states = list(first), states.double()
    references = [*first, *others]
    for turn, pivot in enumerate(references):
        count = -(-(kept - len(taken)) // (len(references) - turn))
        rest = sorted((t for t in tokens if t not in taken), key=lambda t: (cosine(states[pivot], states[t]), t))
        taken += rest[:count]
    return sorted(taken)


def prunesid(features: Tensor, kept: int, per_direction: int = 4) -> list[int]:
    """Directions are eigenvectors of the covariance here; the best of all candidates is looked for at each step."""
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    count = len(rows)
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    wide = min(max(1, kept // per_direction), *rows.shape)
    reach = np.abs((rows - rows.mean(0)) @ vectors[:, ::-1][:, :wide])
    group, importance = reach.argmax(1), reach.max(1).round(8)
    others = [float(rows[i] @ rows[j]) for i in range(count) for j in range(count) if i != j]
    limit = (1 + sum(others) / max(1, len(others))) / 2
    queues = []
    for own in range(wide):
        left = sorted((i for i in range(count) if group[i] == own), key=lambda i: (-importance[i], i))
        taken: list[int] = []
        for token in left:
            if all(float(rows[token] @ rows[other]) <= limit for other in taken):
                taken.append(token)
        queues.append(taken + [token for token in left if token not in taken])
    chosen: list[int] = []
    turn = 0
    while len(chosen) < kept:
        here = sorted((queue[turn] for queue in queues if turn < len(queue)), key=lambda i: (-importance[i], i))
        chosen, turn = chosen + here[: kept - len(chosen)], turn + 1
    return sorted(chosen)


def evs(frames: Tensor, kept: int) -> list[tuple[int, int]]:
    """Frame and place of the tokens of [T, n, C] that stay: the first frame, then what changed most."""
    times, places = frames.shape[:2]
    later = [(t, i) for t in range(1, times) for i in range(places)]
    later.sort(key=lambda at: (-(1 - cosine(frames[at].double(), frames[at[0] - 1, at[1]].double())), at))
    return sorted([(0, i) for i in range(places)] + later[: max(0, kept - places)])


def vidcom2(frames: Tensor, kept: int, tau: float) -> tuple[list[float], list[list[int]]]:
    """What each frame wants, and the tokens of each in the order in which they are kept."""
    rows = frames.double()
    times, places = rows.shape[:2]
    whole = sum(rows[t, i] for t in range(times) for i in range(places)) / (times * places)
    unlike = [[-cosine(rows[t, i], whole) for i in range(places)] for t in range(times)]
    frame = [sum(line) / places for line in unlike]
    weights = [math.exp((own - max(frame)) / tau) for own in frame]
    share = kept / (times * places)
    wanted = [share * (1 + weight / (sum(weights) + 1e-8) - 1 / times) * places for weight in weights]
    order = []
    for t in range(times):
        own = sum(rows[t, i] for i in range(places)) / places
        order.append(sorted(range(places), key=lambda i: (-(unlike[t][i] - cosine(rows[t, i], own)), i)))
    return wanted, order
