"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.adakv import AdaKV as AdaKV
from llm_accel.methods.attend import Attend as Attend
from llm_accel.methods.base import MethodConfig as MethodConfig
from llm_accel.methods.base import MethodInfo as MethodInfo
from llm_accel.methods.catalog import list_methods as list_methods
from llm_accel.methods.catalog import method_class as method_class
from llm_accel.methods.catalog import register_method as register_method
from llm_accel.methods.claims import Claim as Claim
from llm_accel.methods.context import ContextCompression as ContextCompression
from llm_accel.methods.context import Lead as Lead
from llm_accel.methods.context import PassView as PassView
from llm_accel.methods.dense import Dense as Dense
from llm_accel.methods.downsample import Downsample as Downsample
from llm_accel.methods.dyvte import DyVTE as DyVTE
from llm_accel.methods.exit_profile import ExitProfile as ExitProfile
from llm_accel.methods.exit_profile import load_exit_profile as load_exit_profile
from llm_accel.methods.fastv import FastV as FastV
from llm_accel.methods.flowcut import FlowCut as FlowCut
from llm_accel.methods.h2o import H2O as H2O
from llm_accel.methods.head_profile import HeadProfile as HeadProfile
from llm_accel.methods.head_profile import load_profile as load_profile
from llm_accel.methods.head_roles import HeadMask as HeadMask
from llm_accel.methods.head_roles import HeadMethod as HeadMethod
from llm_accel.methods.head_roles import HeadSplit as HeadSplit
from llm_accel.methods.head_roles import ModelHeads as ModelHeads
from llm_accel.methods.hip import HiP as HiP
from llm_accel.methods.kvzip import KVzip as KVzip
from llm_accel.methods.prompt_view import Depth as Depth
from llm_accel.methods.prompt_view import PromptView as PromptView
from llm_accel.methods.pyramidkv import PyramidKV as PyramidKV
from llm_accel.methods.random_kv import RandomKV as RandomKV
from llm_accel.methods.random_tokens import RandomTokens as RandomTokens
from llm_accel.methods.reply import ReplyDecoding as ReplyDecoding
from llm_accel.methods.retrieval_heads import RetrievalHeads as RetrievalHeads
from llm_accel.methods.roles import PromptCompression as PromptCompression
from llm_accel.methods.roles import ScoreAndKeep as ScoreAndKeep
from llm_accel.methods.roles import StepEviction as StepEviction
from llm_accel.methods.roles import StepView as StepView
from llm_accel.methods.roles import WholeCache as WholeCache
from llm_accel.methods.routers import Routers as Routers
from llm_accel.methods.routers import load_routers as load_routers
from llm_accel.methods.shard import WHOLE as WHOLE
from llm_accel.methods.shard import HeadShard as HeadShard
from llm_accel.methods.snapkv import SnapKV as SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM as StreamingLLM
from llm_accel.methods.stride_tokens import StrideTokens as StrideTokens
from llm_accel.methods.tower import TowerCut as TowerCut
from llm_accel.methods.tower import TowerMerge as TowerMerge
from llm_accel.methods.tower import TowerTokens as TowerTokens
from llm_accel.methods.tower import TowerView as TowerView
from llm_accel.methods.vasparse import VASparse as VASparse
from llm_accel.methods.visionzip import VisionZip as VisionZip
from llm_accel.methods.visual import Cut as Cut
from llm_accel.methods.visual import CutModel as CutModel
from llm_accel.methods.visual import CutView as CutView
from llm_accel.methods.visual import LastQuery as LastQuery
from llm_accel.methods.visual import LayerCut as LayerCut
from llm_accel.methods.visual import SmallerImage as SmallerImage
from llm_accel.methods.visual import VisualInput as VisualInput
from llm_accel.methods.visual import VisualTokens as VisualTokens

# in the order of the table; the one line that makes a method known
BUILT_IN: tuple[type[MethodConfig], ...] = (
    SnapKV,
    PyramidKV,
    AdaKV,
    KVzip,
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
