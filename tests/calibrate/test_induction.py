"""The data-free detector against scores from whole attention matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llm_accel import ConfigError
from llm_accel.calibrate.heads.induction import induction_scores, make_repetition
from llm_accel.calibrate.heads.profile import kv_scores
from tests.tiny import tiny_model


class Tokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return 100


TOKENIZER = Tokenizer(bos_token_id=1, all_special_ids=[0, 1, 2])


def test_the_input_is_one_segment_four_times() -> None:
    model = tiny_model("llama")
    made = make_repetition(model, TOKENIZER, 7, seed=3)
    ids = made.ids[0].tolist()
    assert ids[0] == 1
    assert len(ids) == 29
    assert ids[1:8] == ids[8:15] == ids[15:22] == ids[22:]
    assert len(set(ids[1:8])) == 7
    assert not set(ids[1:]) & {0, 1, 2}
    assert torch.equal(make_repetition(model, TOKENIZER, 7, seed=3).ids, made.ids)
    same, after = made.columns()
    rows = [ids[made.lead + 7 + i] for i in range(21)]
    for row, columns in enumerate(same.tolist()):
        assert [ids[c] for c in columns if c >= 0] == [rows[row]] * (row // 7 + 1)
    assert torch.equal(after[after >= 0], same[same >= 0] + 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_scores_equal_those_from_attention_matrices(family: str) -> None:
    model = tiny_model(family)
    induction, echo = induction_scores(model, TOKENIZER, 9, samples=2, seed=1)
    model.set_attn_implementation("eager")
    for kind, ours in ((1, induction), (0, echo)):
        expected = torch.zeros_like(ours)
        for sample in range(2):
            ids = make_repetition(model, TOKENIZER, 9, seed=1000 + sample).ids
            attentions = model(ids, output_attentions=True).attentions
            for layer, weights in enumerate(attentions):
                if getattr(model.model.layers[layer].self_attn, "sliding_window", None):
                    continue
                for row in range(10, 37):
                    columns = [row - 9 * d + kind for d in (1, 2, 3) if row - 9 * d >= 1]
                    expected[layer] += weights[0, :, row, columns].sum(-1).double() / 27 / 2
        assert (ours - expected).abs().max() < 1e-5


def test_kv_scores_are_the_maximum_of_each_group() -> None:
    assert kv_scores(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2).tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("tokens", [0, 1, 1024])
def test_lengths_that_cannot_work(tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"--tokens .* 2 to 1023"):
        induction_scores(tiny_model("llama"), TOKENIZER, tokens, samples=1, seed=0)
