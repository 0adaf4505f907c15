"""The strongest heads as a text table."""

from __future__ import annotations

from llm_accel.eval.table import aligned
from llm_accel.methods.kv.head_profile import HeadProfile

ROWS = 16


def render(profile: HeadProfile, rows: int = ROWS) -> str:
    """Top query heads with their KV head, score, and their roles."""
    layers, heads, kv_heads = profile.shape
    detected, circuit = set(profile.detected()), set(profile.circuit or ())
    every = range(layers)
    share = profile.full_share(every)
    full = set(profile.full_heads(share, every))
    lines = [
        f"heads: {profile.model}, {profile.method}, {layers} layers x {heads} query heads ({kv_heads} KV heads), "
        f"n = {profile.n_instances}",
    ]
    table = [["layer", "head", "KV head", "score", "retrieval", "circuit", "keeps all"]]
    for layer, head in profile.query_heads()[:rows]:
        owner = head * kv_heads // heads
        marks = [(layer, head) in detected, (layer, head) in circuit, (layer, owner) in full]
        yes = ["yes" if mark else "" for mark in marks]
        if profile.circuit is None:
            yes[1] = "-"
        table.append([str(layer), str(head), str(owner), f"{profile.q_head_scores[layer][head]:.3f}", *yes])
    lines += aligned(table)
    lines.append(
        f"retrieval heads: {len(detected)} of {layers * heads}; KV heads that keep all: {len(full)} of"
        f" {layers * kv_heads} (full={share:g})"
    )
    return "\n".join(lines)
