"""How the native kernels are built: once, by processes at the same time, or clearly not."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastserve.model.kernels.cpu import kernel_choice, native
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.kernels.cpu.native import BuildError, load_native

BUILD = "from fastserve.model.kernels.cpu.native import load_native; print(load_native()._name)"


def test_processes_that_start_together_build_one_library(tmp_path):
    """Both get a whole library of the same name, and nothing else is left behind."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    starting = [
        subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    names = {process.communicate()[0].decode().strip() for process in starting}
    assert [process.returncode for process in starting] == [0, 0]
    assert names == {str(path) for path in (tmp_path / "fastserve").iterdir()}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Build a library of one function, into a fresh cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "kernels.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(native, "SOURCE", source)


@pytest.mark.usefixtures("small")
def test_a_build_is_kept(monkeypatch):
    """The second load does not compile."""
    load_native()
    built = []

    def keep(path: Path, stem: str) -> Path:
        built.append(stem)
        return path

    monkeypatch.setattr(native, "_keep", keep)
    load_native()
    assert not built
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    load_native()
    assert len(built) == 1  # other flags are another library


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "longer"])
@pytest.mark.usefixtures("small")
def test_a_build_that_was_not_written_whole_is_built_again(tmp_path, caplog, damage):
    """A process that mapped it would die of SIGBUS, at every start; a line says what is done."""
    library = Path(load_native()._name)
    whole = library.read_bytes()
    half = len(whole) // 2
    damaged = {
        "cut": whole[:half],
        "zeros": whole[:half] + bytes(half),
        "empty": b"",
        "longer": whole + b"x",
    }
    library.unlink()  # the one that is mapped here stays as it is
    library.write_bytes(damaged[damage])
    assert load_native()._name == str(library)
    assert "is not what was built" in caplog.text
    assert library.read_bytes() == whole
    assert list(library.parent.iterdir()) == [library]


def test_without_a_compiler_plain_torch_is_used(monkeypatch, caplog):
    """`auto` says so in one line; `native` is refused."""
    monkeypatch.setattr(kernel_choice, "load_native", lambda: load_native(("no-such-compiler",)))
    with caplog.at_level(logging.INFO):
        assert choose_kernels("auto", torch.float32) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no fused CPU kernels, plain torch is slower: no C++ compiler (no-such-compiler)"
    ]
    with pytest.raises(BuildError, match="no C"):
        choose_kernels("native", torch.float32)


def test_a_failing_build_says_why(tmp_path, monkeypatch):
    """The message is one line with the compiler's error; nothing half-built is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "kernels.cpp"
    source.write_text("int main() { return nonsense; }\n")
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.raises(BuildError, match=r"^[^\n]*error[^\n]*nonsense[^\n]*$"):
        load_native()
    assert not (tmp_path / "fastserve").exists()


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    """The kernels are there, and will be built again."""
    (tmp_path / "cache").write_text("a file")
    assert load_native().one() == 1
    [record] = caplog.records
    assert "built at every start" in record.getMessage()


@pytest.mark.usefixtures("small")
def test_a_full_cache_disk_only_warns(tmp_path, monkeypatch, caplog):
    """Nothing half-written is left in it."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert load_native().one() == 1
    assert "No space left" in caplog.text
    assert list((tmp_path / "cache" / "fastserve").iterdir()) == []


def test_torch_and_half_have_no_kernels():
    """Plain torch is asked for by name, and serves dtypes without kernels."""
    assert choose_kernels("torch", torch.float32) is None
    assert choose_kernels("auto", torch.float16) is None
