"""Clusters by density peaks among k nearest neighbours (Rodriguez and Laio 2014; Du et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 5


def cluster_centres(points: Tensor, clusters: int) -> Tensor:
    """The cluster of each point, named by the point in its middle.

    A point is dense when its nearest neighbours are near, and a centre when it is dense and far from any denser point.
    Every other point joins the nearest centre. Ties go to the lower index.

    Args:
        points: [..., n, D].
        clusters: how many clusters, 1 to n.

    Returns:
        int64 [..., n]: index of each point's centre; a centre's own index is its own.
    """
    count = points.shape[-2]
    points = points.float()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[-1] ** 0.5
    index = torch.arange(count, device=points.device)
    itself = index[:, None] == index
    others = distance.masked_fill(itself, float("inf")).sort(-1).values[..., : min(NEIGHBOURS, count - 1)]
    density = (-others.square().sum(-1) / max(1, others.shape[-1])).exp()
    near, far = density[..., None], density[..., None, :]
    denser = (far > near) | ((far == near) & (index < index[:, None]))
    remoteness = distance.masked_fill(~denser, float("inf")).amin(-1)
    remoteness = torch.where(denser.any(-1), remoteness, distance.amax(-1))  # the densest point has no denser one
    order = (density * remoteness).sort(dim=-1, descending=True, stable=True).indices
    centres = order[..., :clusters].sort(-1).values
    reach = distance.gather(-1, centres[..., None, :].expand(*centres.shape[:-1], count, clusters))
    nearest: Tensor = centres.gather(-1, reach.argmin(-1))
    return nearest.scatter(-1, centres, centres)
