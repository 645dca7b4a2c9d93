"""How the native kernels are built: once, by processes at the same time, or clearly not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

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


def test_a_build_is_kept(tmp_path, monkeypatch):
    """The second load does not compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_native()
    monkeypatch.setattr(native, "_build", None)
    load_native()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    with pytest.raises(TypeError):  # other flags are another library
        load_native()


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
    assert list((tmp_path / "fastserve").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """It is a BuildError, so that `auto` goes on without."""
    (tmp_path / "fastserve").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="cannot write"):
        load_native()


def test_torch_and_half_have_no_kernels():
    """Plain torch is asked for by name, and serves dtypes without kernels."""
    assert choose_kernels("torch", torch.float32) is None
    assert choose_kernels("auto", torch.float16) is None
