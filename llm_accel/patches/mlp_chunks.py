"""The MLP of long prompts, some tokens at a time: exact, because it computes each token from that token alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_accel.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from llm_accel.patches.hook import DecoderHook

_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


class ChunkedCall:
    """Lies in ``_compiled_call_impl`` of an MLP, as :class:`llm_accel.patches.compiled.call.DecodeCall` does in the
    decoder's, so that hooks and replaced forwards of other libraries run as ever.

    The intermediate activations of a prompt, [B, T, intermediate], are what long prompts need most memory for beside
    the cache. ``apply_chunking_to_forward`` of transformers wants T to be a multiple of the chunk and holds all pieces
    and their copy at once; here each piece goes to its place at once.
    """

    def __init__(self, module: nn.Module, hook: DecoderHook, tokens: int) -> None:
        self._module, self._hook, self._tokens = module, hook, tokens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the MLP's own call; whole where gradients are on, and inside ``Handle.disabled()``."""
        whole: Callable[..., Any] = self._module._call_impl
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._hook.enabled
        if plain or kwargs or len(args) != 1 or args[0].ndim != 3:
            return whole(*args, **kwargs)
        hidden: Tensor = args[0]
        step = max(1, self._tokens // hidden.shape[0])
        if hidden.shape[1] <= step:
            return whole(hidden)
        output: Tensor | None = None
        for begin in range(0, hidden.shape[1], step):
            piece = whole(hidden[:, begin : begin + step].contiguous())
            if output is None:
                output = piece.new_empty(hidden.shape)
            output[:, begin : begin + step] = piece
        return output


def check_mlps(decoder: Any, tokens: int | None) -> None:
    """Raises :class:`ConfigError` for an impossible number, :class:`UnsupportedModelError` where the model has no MLPs
    that can be divided."""
    if tokens is None:
        return
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(f"mlp_chunk={tokens!r} is not allowed; give a number of tokens such as 4096, or None.")
    family, mlps = decoder.config.model_type, _mlps(decoder)
    if not mlps:
        raise UnsupportedModelError(f"mlp_chunk: the layers of {family} have no MLP by a known name; leave it out.")
    width = int(decoder.config.hidden_size)
    for module in {type(module): module for module in mlps}.values():
        if module._compiled_call_impl is not None:
            raise UnsupportedModelError(f"mlp_chunk: {type(module).__name__} is compiled on its own; leave it out.")
        parameter = next((p for p in module.parameters() if p.device.type != "meta"), None)
        if parameter is None:
            continue
        with torch.no_grad():
            output = module(torch.zeros(1, 1, width, dtype=decoder.dtype, device=parameter.device))
        if not isinstance(output, Tensor) or output.shape[-1] != width:
            raise UnsupportedModelError(
                f"mlp_chunk: {type(module).__name__} returns more than one tensor and cannot be divided; leave it out."
            )


def arm_mlps(decoder: Any, hook: DecoderHook) -> None:
    """Divides the MLPs where the plan says so; looks at the first one only, so that it may be called at each step."""
    tokens = hook.plan.mlp_chunk
    if tokens is None or _mlps(decoder, 1)[0]._compiled_call_impl is not None:
        return
    for module in _mlps(decoder):
        module._compiled_call_impl = ChunkedCall(module, hook, tokens)


def disarm_mlps(decoder: Any) -> None:
    """Exact undo of :func:`arm_mlps`."""
    for module in _mlps(decoder):
        if isinstance(module._compiled_call_impl, ChunkedCall):
            del module._compiled_call_impl


def _mlps(decoder: Any, layers: int | None = None) -> list[nn.Module]:
    """The MLPs of the first ``layers``, of all of them without."""
    found = (getattr(layer, name, None) for layer in list(getattr(decoder, "layers", ()))[:layers] for name in _NAMES)
    return [module for module in found if isinstance(module, nn.Module)]
