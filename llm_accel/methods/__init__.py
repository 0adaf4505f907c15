"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.adakv import AdaKV
from llm_accel.methods.attend import Attend
from llm_accel.methods.base import MethodConfig, MethodInfo
from llm_accel.methods.catalog import list_methods, method_class, register_method
from llm_accel.methods.claims import Claim
from llm_accel.methods.dense import Dense
from llm_accel.methods.downsample import Downsample
from llm_accel.methods.dyvte import DyVTE
from llm_accel.methods.exit_profile import ExitProfile, load_exit_profile
from llm_accel.methods.fastv import FastV
from llm_accel.methods.flowcut import FlowCut
from llm_accel.methods.h2o import H2O
from llm_accel.methods.head_profile import HeadProfile, load_profile
from llm_accel.methods.head_roles import HeadMask, HeadMethod, HeadSplit, ModelHeads
from llm_accel.methods.hip import HiP
from llm_accel.methods.prompt_view import Depth, PromptView
from llm_accel.methods.pyramidkv import PyramidKV
from llm_accel.methods.random_kv import RandomKV
from llm_accel.methods.random_tokens import RandomTokens
from llm_accel.methods.reply import ReplyDecoding
from llm_accel.methods.retrieval_heads import RetrievalHeads
from llm_accel.methods.roles import (
    PromptCompression,
    ScoreAndKeep,
    StepEviction,
    StepView,
    WholeCache,
)
from llm_accel.methods.routers import Routers, load_routers
from llm_accel.methods.shard import WHOLE, HeadShard
from llm_accel.methods.snapkv import SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM
from llm_accel.methods.stride_tokens import StrideTokens
from llm_accel.methods.tower import TowerCut, TowerMerge, TowerTokens, TowerView
from llm_accel.methods.vasparse import VASparse
from llm_accel.methods.visionzip import VisionZip
from llm_accel.methods.visual import (
    Cut,
    CutModel,
    CutView,
    LastQuery,
    LayerCut,
    SmallerImage,
    VisualInput,
    VisualTokens,
)

# in the order of the table; the one line that makes a method known
BUILT_IN: tuple[type[MethodConfig], ...] = (
    SnapKV,
    PyramidKV,
    AdaKV,
    H2O,
    StreamingLLM,
    RetrievalHeads,
    HiP,
    RandomKV,
    FlowCut,
    VisionZip,
    FastV,
    DyVTE,
    VASparse,
    Downsample,
    StrideTokens,
    RandomTokens,
    Dense,
)
for _method in BUILT_IN:
    register_method(_method)

__all__ = [
    "BUILT_IN",
    "H2O",
    "WHOLE",
    "AdaKV",
    "Attend",
    "Claim",
    "Cut",
    "CutModel",
    "CutView",
    "Dense",
    "Depth",
    "Downsample",
    "DyVTE",
    "ExitProfile",
    "FastV",
    "FlowCut",
    "HeadMask",
    "HeadMethod",
    "HeadProfile",
    "HeadShard",
    "HeadSplit",
    "HiP",
    "LastQuery",
    "LayerCut",
    "MethodConfig",
    "MethodInfo",
    "ModelHeads",
    "PromptCompression",
    "PromptView",
    "PyramidKV",
    "RandomKV",
    "RandomTokens",
    "ReplyDecoding",
    "RetrievalHeads",
    "Routers",
    "ScoreAndKeep",
    "SmallerImage",
    "SnapKV",
    "StepEviction",
    "StepView",
    "StreamingLLM",
    "StrideTokens",
    "TowerCut",
    "TowerMerge",
    "TowerTokens",
    "TowerView",
    "VASparse",
    "VisionZip",
    "VisualInput",
    "VisualTokens",
    "WholeCache",
    "list_methods",
    "load_exit_profile",
    "load_profile",
    "load_routers",
    "method_class",
    "register_method",
]
