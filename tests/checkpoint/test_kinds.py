"""What is taken for a model and is none, told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.checkpoint.locate import locate
from fastserve.checkpoint.model_config import read_model_config
from fastserve.settings.option import ConfigError

BERT = '{"architectures": ["BertModel"]}'


def refusal(model: str, **options) -> str:
    """Return the line that a model is refused with."""
    with pytest.raises(ConfigError) as caught:
        locate(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.split()) < 45
    return message


def write(directory: Path, files: dict[str, str]) -> Path:
    """Write files; returns the directory."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("name", "content", "beside", "message"),
    [
        ("llama.Q4_K_M.gguf", "GGUF\3", {}, "GGUF, llama.cpp's format, is not read"),
        ("blob", "GGUF\3", {}, "GGUF, llama.cpp's format, is not read"),
        ("model.safetensors", "x", {"config.json": "{}"}, "a model is the directory: {dir}"),
        (
            "model.safetensors",
            "x",
            {},
            "a file of weights; a model is a directory with config.json",
        ),
        ("pytorch_model.bin", "x", {"config.json": "{}"}, "a file of weights; a model is the dir"),
        ("config.json", "{}", {}, "a file; a model is the directory: {dir}"),
        ("notes.txt", "", {}, "a file; a model is a directory"),
    ],
)
def test_a_file_is_told_apart(name, content, beside, message, tmp_path):
    """What it is, and what to give instead."""
    write(tmp_path, {name: content, **beside})
    assert message.format(dir=tmp_path) in refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "a LoRA adapter of org/base; adapters are not supported: merge it",
        ),
        (
            {"adapter_config.json": "", "config.json": "{}", "adapter_model.safetensors": ""},
            "a LoRA adapter; adapters are not supported",
        ),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "a diffusers pipeline"),
        ({"modules.json": "[]", "config.json": BERT}, "a sentence-transformers model"),
        ({"quantize_config.json": "{}", "config.json": "{}"}, "GPTQ weights"),
        ({"quant_config.json": "{}", "config.json": "{}"}, "AWQ weights"),
        ({"model.Q8_0.gguf": "GGUF"}, "GGUF, llama.cpp's format"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "in the layout of their makers"),
        ({"step-10/config.json": "{}"}, "did you mean '{dir}/step-10'?"),
        (
            {"refs/main": "abc", "snapshots/abc/config.json": "{}"},
            "did you mean '{dir}/snapshots/abc'?",
        ),
        ({}, "holds no config.json"),
    ],
)
def test_a_directory_is_told_apart(files, message, tmp_path):
    """What it is, where there is no model in it that can be served."""
    assert message.format(dir=tmp_path) in refusal(str(write(tmp_path, files)))


def test_a_merged_adapter_is_a_model(tmp_path):
    """Its adapter_config.json may still lie there."""
    files = {"adapter_config.json": "{}", "config.json": "{}", "model.safetensors": ""}
    assert locate(str(write(tmp_path, files))) == tmp_path.resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq, 4 bits)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "(awq, 4 bits)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "(fp8)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "(bitsandbytes)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "(mlx, 4 bits)"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, an encoder"),
        ({"architectures": ["BertModel"]}, "BertModel, a network without a head"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
        ({"architectures": None, "model_type": "bert"}, "not supported: bert (supported"),
    ],
)
def test_a_config_tells_what_cannot_be_served(settings, message, tmp_path):
    """Quantized weights by their method, other networks by what they do."""
    values = {"architectures": ["LlamaForCausalLM"], **settings}
    write(tmp_path, {"config.json": json.dumps(values)})
    with pytest.raises(ConfigError) as caught:
        read_model_config(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Let any question to the hub fail the test; the working directory is a new one."""

    def fail(*args, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("{dir}/models/lama-7b", "{dir}/models/llama-7b"),
        ("{dir}/modles/llama-7b", "{dir}/models/llama-7b"),
        ("./models/lama-7b", "models/llama-7b"),
        ("models/Llama-7B", "models/llama-7b"),
        ("models/lama-7b/", "models/llama-7b"),
        ("./modles", "models"),
    ],
)
def test_a_mistyped_path_names_the_one_that_is_there(name, meant, no_hub):
    """In a short line, and without a word to the hub."""
    write(no_hub, {"models/llama-7b/config.json": "{}"})
    name, meant = name.format(dir=no_hub), meant.format(dir=no_hub)
    assert refusal(name) == f"model {name!r}: no such directory; did you mean {meant!r}?"


@pytest.mark.parametrize(
    "name", ["/no/such/place", "./x", "../x", "~/no such", "a/b/c", "x/", "model.gguf", "a\\b", "."]
)
def test_what_reads_as_a_path_is_never_asked_of_the_hub(name, no_hub):
    """By its beginning, its end, its separators."""
    assert len(refusal(name).split()) < 12


def test_the_home_of_a_user_is_understood(no_hub, monkeypatch):
    """`~` is the home directory; that of no user is one line."""
    write(no_hub, {"mine/config.json": "{}"})
    monkeypatch.setenv("HOME", str(no_hub))
    assert locate("~/mine") == (no_hub / "mine").resolve()
    assert "home directory" in refusal("~no-such-user/x")


@pytest.mark.parametrize(("name", "message"), [("", "empty"), ("x" * 5000, "too long")])
def test_a_name_that_no_file_can_have(name, message, no_hub):
    """Told as such."""
    assert message in refusal(name)


def test_what_looks_like_the_demo_is_suggested(monkeypatch, tmp_path):
    """After the hub has been asked, which may have a model of that name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert refusal("dmeo").endswith("did you mean 'demo'?")
