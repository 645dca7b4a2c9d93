"""`fastserve convert`: the verb and its second process; what is written is tested in model/."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import torch

from fastserve import cli
from fastserve.model.loader import open_weights
from fastserve.settings.option import ConfigError
from fastserve.verbs.convert import convert, follow
from tests.checkpoints import make_checkpoint
from tests.model.families.test_architectures import logits_in_chunks, random_ids
from tests.model.test_pickled import Malicious, pickle_weights


def test_refused_converted_and_served(tmp_path, capfd):
    """Loading names the command that helps, which says what it wrote, and then loading works."""
    logits = pickle_weights(tmp_path, "opt")
    with pytest.raises(ConfigError, match=f"`fastserve convert {tmp_path}`"):
        open_weights(tmp_path, "auto", torch.float32, torch.device("cpu"))
    assert cli.main(["convert", str(tmp_path)]) == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert "converting" not in said.err  # the bar is for a terminal
    assert "model.safetensors" in said.err
    assert (tmp_path / "pytorch_model.bin").is_file()
    ours = logits_in_chunks(tmp_path, random_ids(20), [])
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_a_malicious_pickle_is_one_line(tmp_path, capfd):
    """Its process ends without running it, and the verb says why."""
    trace = tmp_path / "it-ran"
    torch.save({"evil": Malicious(f"touch {trace}")}, tmp_path / "pytorch_model.bin")
    assert cli.main(["convert", str(tmp_path)]) == 2
    assert "refused, for it asks for posix.system" in capfd.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_no_process_is_started_in_vain(tmp_path):
    """A missing directory, and weights that are there already, are told at once."""
    with pytest.raises(ConfigError, match="no such directory"):
        convert(str(tmp_path / "nowhere"))
    make_checkpoint(tmp_path, "opt")
    with pytest.raises(ConfigError, match=r"model\.safetensors is there already"):
        convert(str(tmp_path))


def test_what_the_other_process_says_is_not_trusted(tmp_path):
    """A pickle does not run, what is no message ends it, and so does silence."""
    trace = tmp_path / "it-ran"
    evil = pickle.dumps(Malicious(f"touch {trace}"))
    names = (b"3", b'"../a"')
    for content in (evil, b"", *(b'{"type": "finished", "names": [%b]}' % name for name in names)):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with receiver, sender:
            sender.send_bytes(content)
            with pytest.raises(ConfigError, match="cannot be read"):
                follow(receiver, print)
    assert not trace.exists()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    with receiver, pytest.raises(EOFError):
        follow(receiver, print)
    pickle.loads(evil)  # the test could have failed
    assert trace.exists()
