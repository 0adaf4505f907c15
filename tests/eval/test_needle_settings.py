"""Arguments: what they parse to, and that wrong ones are refused with what is allowed."""

from __future__ import annotations

import pytest

from llm_accel import ConfigError, LlmAccelError
from llm_accel.common.arguments import parse_shard
from llm_accel.eval.lengths import length_label, parse_lengths
from llm_accel.eval.tasks.needle.settings import DEFAULT_METHODS, NeedleSettings, parse_depths
from tests.common.options_helpers import from_words


def _settings(*argv: str) -> NeedleSettings:
    return from_words(NeedleSettings, argv)


def test_defaults_of_the_command_are_the_defaults_of_the_settings():
    assert _settings() == NeedleSettings()


def test_lengths():
    assert parse_lengths("1k, 512,2K,1m") == (512, 1024, 2048, 1 << 20)
    assert [length_label(n) for n in (512, 1000, 1024, 131072, 1 << 20)] == ["512", "1000", "1k", "128k", "1m"]
    for text in ("", ",", "0", "-5", "4.5k", "4kk", "four"):
        with pytest.raises(ConfigError, match="--lengths"):
            parse_lengths(text)


def test_depths():
    assert parse_depths("11") == tuple(10.0 * i for i in range(11))
    assert parse_depths("3") == (0.0, 50.0, 100.0)
    assert parse_depths("1") == (50.0,)
    assert parse_depths("100,0,12.5,0") == (0.0, 12.5, 100.0)
    assert parse_depths("25,") == (25.0,)
    for text in ("0", "102", "-1", "a", "0,101", "-1,5", "nan,1", ",", "0,x"):
        with pytest.raises(ConfigError, match="--depths"):
            parse_depths(text)


def test_shards():
    assert parse_shard("2/4") == (2, 4)
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="--shard"):
            parse_shard(text)


def test_methods_get_one_spelling():
    settings = _settings("--method", "dense", "--method", "snapkv:window=32,budget=64")
    assert settings.methods == ("dense", "snapkv:budget=64")  # a default that is spelled out is left out
    assert _settings().methods == DEFAULT_METHODS
    with pytest.raises(ConfigError, match="twice"):
        _settings("--method", "snapkv:budget=64", "--method", "snapkv:budget=64,window=32")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--needles", "0"], "--needles 0"),
        (["--distractors", "-1"], "--distractors -1"),
        (["--task", "multikeys"], "Did you mean 'multikey'"),
        (["--task", "single", "--needles", "3"], "--distractors"),
        (["--task", "multivalue", "--needles", "1"], "at least 2"),
        (["--key-kind", "numbers"], "Did you mean 'number'"),
        (["--dtype", "bf16"], "bfloat16"),
        (["--method", "snapkw:budget=64"], "Did you mean 'snapkv'"),
        (["--method", "snapkv:budgets=64"], "Did you mean 'budget'"),
        (["--method", "snapkv:budget=-3"], "budget=-3"),
        (["--method", "dense:budget=3"], "dense: unknown option 'budget'"),
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(argv, message):
    with pytest.raises(LlmAccelError) as error:
        _settings(*argv)
    assert message in str(error.value)
