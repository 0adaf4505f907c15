"""Methods, a file each in ``kv``, ``sparse`` and ``visual``, and what a method of one's own derives from."""

from llm_accel.methods.attention import AttentionMethod as AttentionMethod
from llm_accel.methods.base import MethodConfig as MethodConfig
from llm_accel.methods.base import MethodInfo as MethodInfo
from llm_accel.methods.catalog import list_methods as list_methods
from llm_accel.methods.catalog import method_class as method_class
from llm_accel.methods.catalog import register_method as register_method
from llm_accel.methods.claims import Claim as Claim
from llm_accel.methods.context import ContextCompression as ContextCompression
from llm_accel.methods.context import Lead as Lead
from llm_accel.methods.context import PassView as PassView
from llm_accel.methods.kv.head_profile import HeadProfile as HeadProfile
from llm_accel.methods.kv.head_profile import load_profile as load_profile
from llm_accel.methods.kv.head_roles import HeadMask as HeadMask
from llm_accel.methods.kv.head_roles import HeadSplit as HeadSplit
from llm_accel.methods.kv.head_roles import ModelHeads as ModelHeads
from llm_accel.methods.prompt_view import Depth as Depth
from llm_accel.methods.prompt_view import PromptView as PromptView
from llm_accel.methods.roles import PromptCompression as PromptCompression
from llm_accel.methods.roles import ScoreAndKeep as ScoreAndKeep
from llm_accel.methods.roles import StepEviction as StepEviction
from llm_accel.methods.roles import StepView as StepView
from llm_accel.methods.shard import WHOLE as WHOLE
from llm_accel.methods.shard import HeadShard as HeadShard
from llm_accel.methods.visual.base import Cut as Cut
from llm_accel.methods.visual.base import CutModel as CutModel
from llm_accel.methods.visual.base import CutView as CutView
from llm_accel.methods.visual.base import EntranceTokens as EntranceTokens
from llm_accel.methods.visual.base import LastQuery as LastQuery
from llm_accel.methods.visual.base import LayerCut as LayerCut
from llm_accel.methods.visual.base import VideoTokens as VideoTokens
from llm_accel.methods.visual.base import VisualInput as VisualInput
from llm_accel.methods.visual.base import VisualTokens as VisualTokens
from llm_accel.methods.visual.exit_profile import ExitProfile as ExitProfile
from llm_accel.methods.visual.exit_profile import load_exit_profile as load_exit_profile
from llm_accel.methods.visual.grounding import Columns as Columns
from llm_accel.methods.visual.grounding import Grounding as Grounding
from llm_accel.methods.visual.grounding import HeadScaling as HeadScaling
from llm_accel.methods.visual.grounding import WeightShift as WeightShift
from llm_accel.methods.visual.routers import Routers as Routers
from llm_accel.methods.visual.routers import load_routers as load_routers
from llm_accel.methods.visual.tower import TowerCut as TowerCut
from llm_accel.methods.visual.tower import TowerMerge as TowerMerge
from llm_accel.methods.visual.tower import TowerTokens as TowerTokens
from llm_accel.methods.visual.tower import TowerView as TowerView

# in the order of the table; its line here is all that makes a method known
# isort: off
from llm_accel.methods.kv.auto import Auto as Auto
from llm_accel.methods.kv.snapkv import SnapKV as SnapKV
from llm_accel.methods.kv.pyramidkv import PyramidKV as PyramidKV
from llm_accel.methods.kv.adakv import AdaKV as AdaKV
from llm_accel.methods.kv.kvzip import KVzip as KVzip
from llm_accel.methods.kv.h2o import H2O as H2O
from llm_accel.methods.kv.streaming_llm import StreamingLLM as StreamingLLM
from llm_accel.methods.kv.retrieval_heads import RetrievalHeads as RetrievalHeads
from llm_accel.methods.sparse.hip import HiP as HiP
from llm_accel.methods.kv.random_kv import RandomKV as RandomKV
from llm_accel.methods.visual.flowcut import FlowCut as FlowCut
from llm_accel.methods.visual.visionzip import VisionZip as VisionZip
from llm_accel.methods.visual.fastv import FastV as FastV
from llm_accel.methods.visual.divprune import DivPrune as DivPrune
from llm_accel.methods.visual.cdpruner import CDPruner as CDPruner
from llm_accel.methods.visual.prunesid import PruneSID as PruneSID
from llm_accel.methods.visual.dart import DART as DART
from llm_accel.methods.visual.evs import EVS as EVS
from llm_accel.methods.visual.vidcom2 import VidCom2 as VidCom2
from llm_accel.methods.visual.dyvte import DyVTE as DyVTE
from llm_accel.methods.visual.vasparse import VASparse as VASparse
from llm_accel.methods.visual.vhr import VHR as VHR
from llm_accel.methods.visual.paint import PAINT as PAINT
from llm_accel.methods.visual.var import VAR as VAR
from llm_accel.methods.visual.downsample import Downsample as Downsample
from llm_accel.methods.visual.stride_tokens import StrideTokens as StrideTokens
from llm_accel.methods.visual.random_tokens import RandomTokens as RandomTokens
from llm_accel.methods.dense import Dense as Dense
# isort: on

BUILT_IN: tuple[type[MethodConfig], ...] = tuple(
    register_method(kind) for kind in list(globals().values()) if hasattr(kind, "name") and hasattr(kind, "info")
)
