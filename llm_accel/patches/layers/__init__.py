"""Cache layers: one file per way to store the entries of a layer."""

from llm_accel.patches.layers.append import AccelLayer
from llm_accel.patches.layers.attending import AttendingLayer
from llm_accel.patches.layers.grouped import GroupedLayer
from llm_accel.patches.layers.hiding import HidingLayer
from llm_accel.patches.layers.ragged import RaggedLayer
from llm_accel.patches.layers.relative import RelativeSlotLayer
from llm_accel.patches.layers.reply import ReplyLayer
from llm_accel.patches.layers.slots import SlotLayer

__all__ = [
    "AccelLayer",
    "AttendingLayer",
    "GroupedLayer",
    "HidingLayer",
    "RaggedLayer",
    "RelativeSlotLayer",
    "ReplyLayer",
    "SlotLayer",
]
