"""One vision-language family: KV methods on a prompt with an image, and methods that let visual tokens go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import DyVTE, FastV, FlowCut, RandomTokens, StrideTokens, VASparse, VisionZip
from llm_accel.methods import MethodConfig
from llm_accel.methods.selection import evenly_spaced
from tests import tiny_vlm
from tests.families.calls import Prompt, two_turns
from tests.families.check import Difference, Trial, judge, judged
from tests.families.images import NoImage, image_token, with_image
from tests.families.methods import WHOLE
from tests.families.stock import Stock
from tests.families.verdict import FAILS, NOT_JUDGED, RIGHT, Verdict
from tests.vision_oracle import decoder_inputs

KV = ("snapkv", "h2o", "streaming_llm", "adakv")
SHARE = 0.5
TOKENS: dict[str, Callable[[float], MethodConfig]] = {
    "stride_tokens": lambda share: StrideTokens(ratio=share),
    "random_tokens": lambda share: RandomTokens(ratio=share),
    "fastv": lambda share: FastV(ratio=share),
    "flowcut": lambda share: FlowCut(ratio=share),
    "visionzip": lambda share: VisionZip(ratio=share),
    "dyvte": lambda share: DyVTE(exit=1),
    "vasparse": lambda share: VASparse(prune_every=2),
}
# what they do has no setting that changes nothing
NO_WHOLE = ("dyvte", "vasparse", "visionzip")
METHODS = (*KV, *TOKENS)


def judge_vision(family: str, model: PreTrainedModel) -> tuple[dict[str, Verdict], list[str]]:
    """Verdict by method, and what the stock model cannot do. Without an image, refusals alone can be judged."""
    try:
        batch = _by_hand(model) if family in tiny_vlm.CONFIGS else with_image(model)
    except NoImage as error:
        stock = Stock.of(model)
        return {method: _refusal(stock, method, str(error)) for method in METHODS}, stock.notes
    stock = Stock.of(model, batch)
    return {method: judge(stock, method) if method in KV else _tokens(stock, method) for method in METHODS}, stock.notes


def _by_hand(model: PreTrainedModel) -> Prompt:
    """Prompts of a family that :mod:`tests.tiny_vlm` knows."""
    scenes = (tiny_vlm.Scene((6, 40), 5), tiny_vlm.Scene((4, 22), 6))
    rows = []
    for scene in scenes:
        row = tiny_vlm.inputs(model, [scene])
        ids = row.pop("input_ids")
        row.pop("attention_mask")
        rows.append(Prompt(ids, None, (ids.shape[1],), row))
    rows.sort(key=lambda row: -row.width)
    order = [scene for row in rows for scene in scenes if tiny_vlm.inputs(model, [scene])["input_ids"].equal(row.ids)]
    both = tiny_vlm.inputs(model, order)
    ids, mask = both.pop("input_ids"), both.pop("attention_mask")
    return Prompt(ids, mask, tuple(row.width for row in rows), both, tuple(rows))


def _refusal(stock: Stock, method: str, why: str) -> Verdict:
    """What ``apply`` alone says."""

    def calls(trial: Trial) -> Verdict:
        with llm_accel.apply(stock.model, TOKENS[method](SHARE) if method in TOKENS else WHOLE[method]()):
            pass
        return Verdict(NOT_JUDGED, why)

    return judged(stock, calls)


def _tokens(stock: Stock, method: str) -> Verdict:
    """A method on visual tokens: nothing taken out is dense, and half of them taken out is as without these rows."""

    def calls(trial: Trial) -> Verdict:
        with llm_accel.apply(stock.model, TOKENS[method](SHARE)):
            pass
        for shape, _ in stock.shapes():
            if method not in NO_WHOLE:
                trial.call(f"{shape}, nothing to cut", _whole, method, shape)
            trial.call(shape, _cut, method, shape)
        if stock.independent:
            trial.call("padded rows against each alone", _rows_alone, TOKENS[method](SHARE))
        if method == "stride_tokens" and "image_sizes" not in stock.batch.extra:  # tiles have rows that are no patch
            trial.call("rows taken out by hand", _by_removal)
        if not trial.done:
            return Verdict(FAILS, f"accepted by apply, then every call is refused: {next(iter(trial.refusals))}")
        return Verdict(RIGHT)

    return judged(stock, calls)


def _whole(trial: Trial, name: str, method: str, shape: str) -> None:
    with llm_accel.apply(trial.stock.model, TOKENS[method](1.0)):
        ours = two_turns(trial.stock.model, trial.stock.prompt_of(shape), turns=1)
    trial.compare(name, ours, trial.stock.answers[shape])


def _cut(trial: Trial, name: str, method: str, shape: str) -> None:
    """Visual tokens go, and the answer is another, finite one."""
    with llm_accel.apply(trial.stock.model, TOKENS[method](SHARE)) as handle:
        ours = two_turns(trial.stock.model, trial.stock.prompt_of(shape), turns=1)
        report = handle.report()
    if not bool(torch.isfinite(ours).all()):
        raise Difference(f"{name}: logits are not finite")
    if not report.visual_tokens_before:
        raise Difference(f"{name}: no visual token was found")
    if torch.equal(ours, trial.stock.answers[shape]):
        raise Difference(f"{name}: nothing changed under {report.method}")


def _rows_alone(trial: Trial, name: str, config: MethodConfig) -> None:
    stock = trial.stock
    with llm_accel.apply(stock.model, config):
        together = two_turns(stock.model, stock.batch, turns=1)
        for index, row in enumerate(stock.batch.rows):
            trial.compare(f"{name}, row {index}", together[index : index + 1], two_turns(stock.model, row, turns=1))


def _by_removal(trial: Trial, name: str) -> None:
    """The first logits against the decoder called without the rows that are not evenly spaced."""
    stock, row = trial.stock, trial.stock.single
    with llm_accel.apply(stock.model, StrideTokens(ratio=SHARE)):
        ours = two_turns(stock.model, row, turns=1)
    given = decoder_inputs(stock.model, {"input_ids": row.ids, "attention_mask": torch.ones_like(row.ids), **row.extra})
    visual = (row.ids[0] == image_token(stock.model.config)).nonzero()[:, 0]
    kept = torch.ones(row.width, dtype=torch.bool)
    kept[visual] = False
    kept[visual[evenly_spaced(len(visual), StrideTokens(ratio=SHARE).tokens(len(visual)), visual.device)]] = True
    given["inputs_embeds"] = given["inputs_embeds"][:, kept]
    given["position_ids"] = given["position_ids"][..., kept]
    if "visual_pos_masks" in given:
        shown = kept[given["visual_pos_masks"][0]]
        given["visual_pos_masks"] = given["visual_pos_masks"][:, kept]
        given["deepstack_visual_embeds"] = [features[shown] for features in given["deepstack_visual_embeds"]]
    trial.compare(name, ours[:, :1], _first_logits(stock.model, given))


def _first_logits(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    mask = torch.ones(given["inputs_embeds"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        states = model.get_decoder()(**given, attention_mask=mask, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(states[:, -1:])
