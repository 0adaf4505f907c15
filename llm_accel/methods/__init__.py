"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.adakv import AdaKV
from llm_accel.methods.base import MethodConfig, MethodInfo
from llm_accel.methods.h2o import H2O
from llm_accel.methods.pyramidkv import PyramidKV
from llm_accel.methods.random_kv import RandomKV
from llm_accel.methods.roles import Depth, PromptCompression, PromptView, ScoreAndKeep, StepEviction, StepView
from llm_accel.methods.snapkv import SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM

ALL: tuple[type[MethodConfig], ...] = (SnapKV, PyramidKV, AdaKV, H2O, StreamingLLM, RandomKV)

__all__ = [
    "ALL",
    "H2O",
    "AdaKV",
    "Depth",
    "MethodConfig",
    "MethodInfo",
    "PromptCompression",
    "PromptView",
    "PyramidKV",
    "RandomKV",
    "ScoreAndKeep",
    "SnapKV",
    "StepEviction",
    "StepView",
    "StreamingLLM",
]
