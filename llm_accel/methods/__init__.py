"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.adakv import AdaKV
from llm_accel.methods.attend import Attend
from llm_accel.methods.base import MethodConfig, MethodInfo
from llm_accel.methods.h2o import H2O
from llm_accel.methods.head_profile import HeadProfile, load_profile
from llm_accel.methods.head_roles import HeadMask, HeadMethod, HeadSplit, ModelHeads
from llm_accel.methods.hip import HiP
from llm_accel.methods.pyramidkv import PyramidKV
from llm_accel.methods.random_kv import RandomKV
from llm_accel.methods.retrieval_heads import RetrievalHeads
from llm_accel.methods.roles import Depth, PromptCompression, PromptView, ScoreAndKeep, StepEviction, StepView
from llm_accel.methods.snapkv import SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM

ALL: tuple[type[MethodConfig], ...] = (SnapKV, PyramidKV, AdaKV, H2O, StreamingLLM, RetrievalHeads, HiP, RandomKV)

__all__ = [
    "ALL",
    "H2O",
    "AdaKV",
    "Attend",
    "Depth",
    "HeadMask",
    "HeadMethod",
    "HeadProfile",
    "HeadSplit",
    "HiP",
    "MethodConfig",
    "MethodInfo",
    "ModelHeads",
    "PromptCompression",
    "PromptView",
    "PyramidKV",
    "RandomKV",
    "RetrievalHeads",
    "ScoreAndKeep",
    "SnapKV",
    "StepEviction",
    "StepView",
    "StreamingLLM",
    "load_profile",
]
