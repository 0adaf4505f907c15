"""Cache layers: one file per way to store the entries of a layer."""

from llm_accel.cache.generated import GeneratedLayer
from llm_accel.cache.grouped import GroupedLayer
from llm_accel.cache.hiding import HidingLayer
from llm_accel.cache.layer import AccelLayer
from llm_accel.cache.marked import MarkedLayer
from llm_accel.cache.ragged import RaggedLayer
from llm_accel.cache.relative import RelativeSlotLayer
from llm_accel.cache.slots import SlotLayer
from llm_accel.cache.sparse import SparseLayer

__all__ = [
    "AccelLayer",
    "GeneratedLayer",
    "GroupedLayer",
    "HidingLayer",
    "MarkedLayer",
    "RaggedLayer",
    "RelativeSlotLayer",
    "SlotLayer",
    "SparseLayer",
]
