"""A model's tokenizer: where it is, and whether it fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastserve import LLM
from fastserve.launch.tokenizer import open_tokenizer
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests import tiny_tokenizers
from tests.launch.engines import SMALL


def test_a_tokenizer_of_another_format_is_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tokenizer.model alone: the model is served for token ids, and a line says why."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert open_tokenizer(dataclasses.replace(SMALL, model=str(tmp_path))) is None
    assert "tokenizer.model is not read" in caplog.text
    assert "only token ids can be prompts" in caplog.text


def test_a_model_without_a_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    """No tokenizer.json is no tokenizer; one that is named must be there."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert open_tokenizer(EngineConfig(model=str(tmp_path))) is None
    named = open_tokenizer(EngineConfig(model=str(tmp_path), tokenizer="demo"))
    assert named is not None
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        open_tokenizer(EngineConfig(tokenizer=str(tmp_path)))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line, at the start, for LLM too; single added tokens beyond it are only told of."""
    backend = tiny_tokenizers.byte_level(300)
    tiny_tokenizers.save(backend, tmp_path)
    config = EngineConfig(model=str(tmp_path))
    for size in (300, 299):
        (tmp_path / "config.json").write_text(f'{{"vocab_size": {size}}}')
        if size == 300:
            assert open_tokenizer(config) is not None
            continue
        with pytest.raises(ConfigError, match=r"has 300 ids and the model 299; --tokenizer names"):
            open_tokenizer(config)
        with pytest.raises(ConfigError, match="has 300 ids"):
            LLM(str(tmp_path))
    assert not caplog.records
    backend.add_tokens(["<pad>"])
    tiny_tokenizers.save(backend, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    assert open_tokenizer(config) is not None
    assert "none of 1 added tokens, '<pad>' for one" in caplog.text
