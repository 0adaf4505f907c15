"""Copy-paste scores: a scripted model whose heads look where the test says."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_accel import ConfigError
from llm_accel.calibrate.heads.copy_paste import Copies, find_copies, mean_share, value_span
from llm_accel.patches.probe import Callback, Observed
from llm_accel.patches.wiring import Wiring

PROMPT = [5, 6, 21, 22, 23, 7, 8, 22, 9]  # the needle is 21 22 23 at positions 2 to 4; 22 stands elsewhere too
ANSWER = [21, 22, 23, 22, 1]  # copies one needle token twice, then ends
LOOKS = {  # query head -> position that it attends to most, in each step
    0: [2, 3, 4, 3, 0],
    1: [0, 0, 0, 0, 0],
    2: [4, 2, 3, 2, 0],  # at needle tokens, but never at the one being written
    3: [2, 7, 7, 7, 0],  # at the same token outside the needle
}


class Scripted(torch.nn.Module):
    """Writes ``ANSWER`` whatever it reads; one layer, four query heads on two KV heads."""

    _supports_attention_backend = True

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
        self.config._attn_implementation_internal = "sdpa"
        self.device, self.steps = torch.device("cpu"), 0

    def get_decoder(self) -> Scripted:
        return self

    def forward(self, ids: torch.Tensor, llm_accel_probe: Callback, **kwargs: object) -> CausalLMOutputWithPast:
        slots = 16
        key = torch.eye(slots).expand(1, 2, -1, -1)
        query = torch.zeros(1, 4, ids.shape[1], slots)
        logits = torch.zeros(1, ids.shape[1], 32)
        if ids.shape[1] == 1:
            for head, looks in LOOKS.items():
                query[0, head, 0, looks[self.steps]] = 1.0
            logits[0, 0, ANSWER[self.steps]] = 1.0
            self.steps += 1
        llm_accel_probe(Observed(0, query, key, 1.0, None, None, None))
        return CausalLMOutputWithPast(logits=logits)


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted model has no attention whose wiring a trial call could find."""
    monkeypatch.setattr("llm_accel.patches.probe.wiring_of", lambda decoder: Wiring())


def test_a_head_that_copies_each_token_scores_one_and_others_nothing() -> None:
    copies = find_copies(Scripted(), PROMPT, [(2, 5)], steps=20, ends=[1])
    assert copies.answer == (21, 22, 23, 22)
    assert mean_share([copies], 1, 4).tolist() == [[1.0, 0.0, 0.0, pytest.approx(1 / 3)]]


def test_repeated_copies_count_only_where_asked_for() -> None:
    copies = find_copies(Scripted(), PROMPT, [(2, 5)], steps=20, ends=[1])
    assert mean_share([copies], 1, 4, compat=True)[0, 0] == pytest.approx(4 / 3)


def test_scores_are_means_over_prompts() -> None:
    one, other = Copies((3,), 2, {(0, 1, 5): 1}), Copies((3,), 4, {(0, 1, 5): 2, (0, 1, 6): 1, (1, 0, 5): 1})
    assert mean_share([one, other], 2, 2).tolist() == [[0.0, 0.5], [0.125, 0.0]]
    assert mean_share([], 2, 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_values_are_found_on_the_tokens_after_the_needle_began() -> None:
    texts = ["42", " is", " ", "41", "42", "7", ".", "42"]

    def decode(ids: list[int]) -> str:
        return "".join(texts[i] for i in ids)

    assert value_span(decode, list(range(8)), 1, "41427") == (3, 6)
    assert value_span(decode, list(range(8)), 1, "42") == (4, 5)
    with pytest.raises(ConfigError, match="do not spell"):
        value_span(decode, list(range(8)), 1, "99")
