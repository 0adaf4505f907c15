"""DivPrune, CDPruner and DART written down a second time, in float64: every candidate of every step is tried."""

from __future__ import annotations

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
