"""InternVL: four patches of a tile are shuffled into one token; its tower tells its layers nothing."""

from llm_accel.patches.families.base import VisionFamily

INTERNVL = VisionFamily("internvl", blocks="encoder.layer", prunable=False, scored=False)
