"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.adakv import AdaKV
from llm_accel.methods.attend import Attend
from llm_accel.methods.base import MethodConfig, MethodInfo
from llm_accel.methods.dyvte import DyVTE
from llm_accel.methods.fastv import FastV
from llm_accel.methods.flowcut import FlowCut
from llm_accel.methods.h2o import H2O
from llm_accel.methods.head_profile import HeadProfile, load_profile
from llm_accel.methods.head_roles import HeadMask, HeadMethod, HeadSplit, ModelHeads
from llm_accel.methods.hip import HiP
from llm_accel.methods.pyramidkv import PyramidKV
from llm_accel.methods.random_kv import RandomKV
from llm_accel.methods.random_tokens import RandomTokens
from llm_accel.methods.retrieval_heads import RetrievalHeads
from llm_accel.methods.roles import Depth, PromptCompression, PromptView, ScoreAndKeep, StepEviction, StepView
from llm_accel.methods.snapkv import SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM
from llm_accel.methods.stride_tokens import StrideTokens
from llm_accel.methods.visual import CutView, LayerCut, TowerTokens, TowerView, VisualTokens

ALL: tuple[type[MethodConfig], ...] = (
    SnapKV,
    PyramidKV,
    AdaKV,
    H2O,
    StreamingLLM,
    RetrievalHeads,
    HiP,
    RandomKV,
    FlowCut,
    FastV,
    DyVTE,
    StrideTokens,
    RandomTokens,
)

__all__ = [
    "ALL",
    "H2O",
    "AdaKV",
    "Attend",
    "CutView",
    "Depth",
    "DyVTE",
    "FastV",
    "FlowCut",
    "HeadMask",
    "HeadMethod",
    "HeadProfile",
    "HeadSplit",
    "HiP",
    "LayerCut",
    "MethodConfig",
    "MethodInfo",
    "ModelHeads",
    "PromptCompression",
    "PromptView",
    "PyramidKV",
    "RandomKV",
    "RandomTokens",
    "RetrievalHeads",
    "ScoreAndKeep",
    "SnapKV",
    "StepEviction",
    "StepView",
    "StreamingLLM",
    "StrideTokens",
    "TowerTokens",
    "TowerView",
    "VisualTokens",
    "load_profile",
]
