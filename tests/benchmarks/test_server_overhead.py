"""What the comparison of a live server with an offline engine is set up with."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.server_overhead import server_flags
from benchmarks.small_model import NAMED, write_small_model
from fastserve.settings.command_line import add_arguments
from fastserve.settings.engine import EngineConfig
from fastserve.text.tokenizer import Tokenizer


def test_the_server_gets_the_settings_of_the_offline_engine():
    """The flags, read as the command line reads them, give the same configuration."""
    config = EngineConfig(
        model="some/where", load_format="dummy", num_threads=2, max_num_batched_tokens=4096
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    args, others = parser.parse_known_args(server_flags(config))
    assert EngineConfig(**vars(args)) == config
    assert others == ["--disable-log-requests", "--log-level", "warning"]


@pytest.mark.parametrize("name", NAMED)
def test_every_id_of_a_small_model_has_text(name, tmp_path):
    """So the server holds nothing back, whatever random weights say."""
    write_small_model(tmp_path, NAMED[name])
    tokenizer = Tokenizer.load(tmp_path)
    texts = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    assert tokenizer.vocab_size == NAMED[name]["vocab_size"]
    assert len(set(texts)) == len(texts)
    assert all(text.isascii() and text.isprintable() and text for text in texts)
