"""The strongest heads as a text table."""

from __future__ import annotations

from llm_accel.methods.kv.head_profile import HeadProfile

ROWS = 16


def render(profile: HeadProfile, rows: int = ROWS) -> str:
    """Top query heads with their KV head, score, and what they count as."""
    layers, heads, kv_heads = profile.shape
    detected, circuit = set(profile.detected()), set(profile.circuit or ())
    every = range(layers)
    share = profile.full_share(every)
    full = set(profile.full_heads(share, every))
    lines = [
        f"heads: {profile.model}, {profile.method}, {layers} layers x {heads} query heads ({kv_heads} KV heads), "
        f"n = {profile.n_instances}",
        "layer  head  KV head  score  retrieval  circuit  keeps all",
        "----------------------------------------------------------",
    ]
    for layer, head in profile.query_heads()[:rows]:
        owner = head * kv_heads // heads
        marks = [(layer, head) in detected, (layer, head) in circuit, (layer, owner) in full]
        yes = ["yes" if mark else "" for mark in marks]
        if profile.circuit is None:
            yes[1] = "-"
        score = profile.q_head_scores[layer][head]
        lines.append(
            f"{layer:>5}  {head:>4}  {owner:>7}  {score:>5.3f}  {yes[0]:>9}  {yes[1]:>7}  {yes[2]:>9}".rstrip()
        )
    lines.append(
        f"retrieval heads: {len(detected)} of {layers * heads}; KV heads that keep all: {len(full)} of"
        f" {layers * kv_heads} (full={share:g})"
    )
    return "\n".join(lines)
