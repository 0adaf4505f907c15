"""Files of the bundled models: weights, tokenizers and profiles. Data only; every layer may read them."""

from pathlib import Path

NEEDLE = Path(__file__).parent / "needle"
VISION = Path(__file__).parent / "vision"  # trained on images with gaps; those of before that in "plain"
