"""Methods: one file each, with its configuration and its pure scoring or selection on tensors."""

from llm_accel.methods.base import MethodConfig, MethodInfo
from llm_accel.methods.random_kv import RandomKV
from llm_accel.methods.roles import PromptView, ScoreAndKeep
from llm_accel.methods.snapkv import SnapKV
from llm_accel.methods.streaming_llm import StreamingLLM

ALL: tuple[type[MethodConfig], ...] = (SnapKV, StreamingLLM, RandomKV)

__all__ = ["ALL", "MethodConfig", "MethodInfo", "PromptView", "RandomKV", "ScoreAndKeep", "SnapKV", "StreamingLLM"]
