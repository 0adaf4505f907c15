"""LLaVA-1.5: CLIP, the features of one layer, the class token left out. VipLLaVA: those of several layers."""

from llm_accel.patches.families.base import VisionFamily

LLAVA = VisionFamily("llava")
VIPLLAVA = VisionFamily("vipllava", prunable=False)
