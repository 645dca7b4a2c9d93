"""Pickled weights: written as safetensors they are the same, and nothing in a pickle runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastserve.model.pickled import SHARD_BYTES, convert_pickles
from fastserve.settings.option import ConfigError
from tests.checkpoints import make_checkpoint
from tests.model.families.test_architectures import logits_in_chunks, random_ids


def convert(path: Path, shard_bytes: int = SHARD_BYTES) -> list[tuple[int, int]]:
    """Convert a directory in this process; returns what was told of its progress."""
    told: list[tuple[int, int]] = []
    convert_pickles(path, lambda *progress: told.append(progress), shard_bytes)
    return told


def pickle_weights(path: Path, name: str, **options: Any) -> torch.Tensor:
    """Make a checkpoint that exists only as pytorch_model.bin; returns some logits of it."""
    model = make_checkpoint(path, name)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin", **options)
    ids = torch.tensor([random_ids(20)])
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits[0]
    return logits


def assert_nothing_written(path: Path) -> None:
    """Neither weights nor a part of them may be left."""
    assert not [file.name for file in path.iterdir() if "safetensors" in file.name]


@pytest.mark.parametrize("is_old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "mixtral"])
def test_converted_weights_are_the_same(name, is_old_format, tmp_path):
    """Of every family, from both formats of torch.save."""
    logits = pickle_weights(tmp_path, name, _use_new_zipfile_serialization=not is_old_format)
    assert [file.name for file in tmp_path.glob("*.bin")] == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").chmod(0o640)
    convert(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
    ours = logits_in_chunks(tmp_path, random_ids(20), [])
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_large_checkpoints_are_cut(tmp_path):
    """Beyond a size there are several files and an index, whatever the pickles were cut into."""
    logits = pickle_weights(tmp_path, "llama")
    tensors = torch.load(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-{index}.bin"
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
        weight_map.update(dict.fromkeys(part, file))
    index_file = tmp_path / "pytorch_model.bin.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    torch.save({"not": "weights"}, tmp_path / "training_args.bin")
    told = convert(tmp_path, shard_bytes=50_000)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert [total for _, total in told] == [told[-1][0]] * (len(shards) + 1)
    assert [written for written, _ in told] == sorted({written for written, _ in told})
    assert all(file.stat().st_size < 60_000 for file in shards)
    assert set(load_file(shards[0])) < set(names)
    ours = logits_in_chunks(tmp_path, random_ids(20), [])
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_tensors_that_share_memory(tmp_path):
    """A tied head is not stored again; other tensors with common memory become separate ones."""
    pickle_weights(tmp_path, "opt")
    content = torch.load(tmp_path / "pytorch_model.bin")
    assert (
        content["lm_head.weight"].data_ptr()
        == content["model.decoder.embed_tokens.weight"].data_ptr()
    )
    rows = torch.arange(12.0).view(4, 3)
    content |= {"rows": rows, "first": rows[0], "columns": rows.t()}
    torch.save(content, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(content) - set(written) == {"lm_head.weight"}
    for name in ("rows", "first", "columns"):
        assert torch.equal(written[name], content[name])


def test_a_head_that_only_happens_to_be_shared_is_kept(tmp_path):
    """Where config.json does not say that the head is tied, the network asks for it."""
    pickle_weights(tmp_path, "llama")
    content = torch.load(tmp_path / "pytorch_model.bin")
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    torch.save(content, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    logits_in_chunks(tmp_path, random_ids(5), [])


class Malicious:
    """A pickle that runs a command where it is opened."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        """Fit pickle."""
        return os.system, (self.command,)


def test_a_malicious_pickle_does_not_run(tmp_path):
    """What asks for more than tensors is refused by name, and nothing of it happens."""
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    trace = tmp_path / "it-ran"
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(3), "evil": Malicious(f"touch {trace}")}, file)
    with pytest.raises(ConfigError, match=r"refused.*system") as caught:
        convert(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    assert_nothing_written(tmp_path)
    torch.load(file, weights_only=False)  # the test could have failed: opened trustingly it runs
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a pickle", "refused, for it is no pickle of tensors"),
        (b"PK\x03\x04 not a zip", "cannot be read: .*not a ZIP archive"),
        ({"state_dict": {"weight": torch.zeros(3)}}, "something else than names"),
        ([torch.zeros(3)], "something else than names"),
    ],
    ids=["empty", "text", "zip", "nested", "list"],
)
def test_files_that_hold_no_weights(content, message, tmp_path):
    """Each is one line that names the file, and nothing is written."""
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ConfigError, match=message) as caught:
        convert(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_nothing_written(tmp_path)


def test_a_truncated_file(tmp_path):
    """Half a download is told from weights."""
    pickle_weights(tmp_path, "opt")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        convert(tmp_path)
    assert_nothing_written(tmp_path)


def test_what_cannot_be_converted(tmp_path):
    """No pickles, a broken index, a missing shard, a shard elsewhere."""
    torch.save({"step": torch.zeros(1)}, tmp_path / "optimizer.bin")
    with pytest.raises(ConfigError, match=r"no \.bin weights"):
        convert(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    for text, message in (
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "gone.bin"}}', r"shard gone\.bin"),
        ('{"weight_map": {"a": "../a.bin"}}', "outside"),
    ):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path)
