"""Architecture and initialisation of the bundled needle model.

The initialisation is random but for one thing: four heads of the first layer start out looking 1, 2, 3 and 4 tokens
back. A lookup needs a head that brings a token's predecessors to it before any other head can match them, and the
plateau of the loss ends when both have formed (Singh et al. 2024, arXiv:2404.07129). Starting with local heads shortens
the plateau; they stay trainable like everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

MAX_POSITIONS = 16384
ROPE_THETA = 1e6
LOCAL_OFFSETS = (1, 2, 3, 4)  # query heads 0-3 of layer 0
LOCAL_FREQUENCIES = 6  # the fastest rotary frequencies, the only ones that tell neighbours apart
LOCAL_NORM = 4.5  # of query and key in each of these frequencies: about 0.75 of the attention on the offset


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A small Llama with grouped-query attention and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def initialise(model: LlamaForCausalLM) -> None:
    """Scale the branches down so that a token's own embedding leads at first, and set the local heads.

    All embeddings share a component: it gives queries and keys a part that does not depend on the token, which is what
    a head needs to look at a fixed offset (a shared component shifts all logits alike, so the output is unaffected).
    """
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_(0, 0.1)
        shared = torch.randint(0, 2, (embedding.shape[1],)).float() * 2 - 1
        embedding += 0.1 * shared
        shared = shared / shared.norm()
        for block in model.model.layers:
            assert isinstance(block, LlamaDecoderLayer)
            block.self_attn.o_proj.weight.mul_(0.2)
            block.mlp.down_proj.weight.mul_(0.2)
        first = model.model.layers[0]
        assert isinstance(first, LlamaDecoderLayer)
        size, group = first.self_attn.head_dim, first.self_attn.num_key_value_groups
        for head, offset in enumerate(LOCAL_OFFSETS):
            _aim(first.self_attn.q_proj.weight, head, size, shared, offset)
        for head in range(len(LOCAL_OFFSETS) // group):
            _aim(first.self_attn.k_proj.weight, head, size, shared, 0)


def _aim(weight: Tensor, head: int, size: int, shared: Tensor, offset: int) -> None:
    """Add to a head's projection the vector that the rotary embedding turns back by ``offset`` positions."""
    n = LOCAL_FREQUENCIES
    angle = offset * ROPE_THETA ** (-torch.arange(n) / (size // 2))
    target = torch.zeros(size)
    target[:n], target[size // 2 : size // 2 + n] = angle.cos(), -angle.sin()
    length = shared.shape[0] ** 0.5 / 2**0.5  # of the shared component after RMSNorm: half the energy
    rows = weight[head * size : (head + 1) * size]
    rows.mul_(0.3).add_(torch.outer(target * LOCAL_NORM / length, shared))


def split_parameters(model: LlamaForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden matrices (for Muon) and everything else (embeddings and norms, for AdamW)."""
    matrices: list[Tensor] = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]
