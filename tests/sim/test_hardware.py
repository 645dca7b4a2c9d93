"""Cost models by name: against the published tables, and by the laws that any of them must obey."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments import fit_hardware, published_tables, validate_vllm_2023
from experiments.hardware_checks import checks
from fastserve.core.cost_model import CostModel
from fastserve.settings.option import ConfigError
from fastserve.sim.engines import ENGINES
from fastserve.sim.hardware import FITS_FILE, HARDWARE, load_fits, resolve_cost_model
from fastserve.sim.models import MODELS, resolve_model
from fastserve.sim.roofline import Roofline

RESULTS = fit_hardware.RESULTS

needs_tables = pytest.mark.skipif(
    not published_tables.PROFILES.is_dir(),
    reason="the published tables are not beside this checkout",
)


def roofline(model: str, hardware: str = "h100", ranks: int = 1) -> Roofline:
    """A roofline with the fitted efficiencies."""
    found = HARDWARE[hardware]
    return Roofline(
        shape=MODELS[model],
        hardware=found,
        efficiency=load_fits().efficiency[found.chip],
        tensor_parallel_size=ranks,
    )


@needs_tables
def test_fits_reproduce_the_tables_within_the_stated_error():
    """Every table's rows are predicted as well as results/fit_hardware.json says."""
    stated = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]
    found = fit_hardware.table_errors(load_fits())
    assert found.keys() == stated.keys()
    for name, error in found.items():
        assert error["rows"] == stated[name]["rows"], name
        assert error["mean_error"] == pytest.approx(stated[name]["mean_error"], abs=2e-3), name
    whole_model = [
        error["mean_error"] for name, error in found.items() if name.startswith("distserve")
    ]
    layers = [found[name]["mean_error"] for name in published_tables.DENSE]
    assert max(whole_model) < 0.05
    assert max(layers) < 0.10


@needs_tables
def test_the_committed_coefficients_are_what_the_tables_give():
    """Fitting again yields the numbers in the package."""
    fits, _ = fit_hardware.fit_all()
    again = fit_hardware.as_values(fits)
    kept = json.loads(FITS_FILE.read_text(encoding="utf-8"))
    for chip, efficiency in kept["efficiency"].items():
        assert again["efficiency"][chip] == pytest.approx(efficiency, rel=1e-3)
    for model, by_hardware in kept["direct"].items():
        for ranks, coefficients in by_hardware["a100-80g"].items():
            assert again["direct"][model]["a100-80g"][ranks] == pytest.approx(
                coefficients, rel=1e-3
            )


@needs_tables
def test_kv_capacity_is_that_of_distserve():
    """Memory arithmetic gives DistServe's 76 token capacities, at the utilization it used."""
    utilization = json.loads(RESULTS.read_text(encoding="utf-8"))["distserve_memory_utilization"]
    for found in checks(utilization)["distserve_max_num_tokens"].values():
        assert found["q1"] > 0.98
        assert found["q3"] < 1.02


@needs_tables
def test_vllm_as_measured_is_predicted():
    """Under the preset, mean JCT is within 15 % at every rate and TTFT shows the knee."""
    runs = validate_vllm_2023.measured_runs()
    num_blocks = validate_vllm_2023.held_blocks(runs)
    rows = [validate_vllm_2023.replay(run, num_blocks, None) for run in runs]
    assert [row["rate"] for row in rows] == [1, 2, 3, 4]
    assert max(abs(row["jct_error"]) for row in rows) < 0.15
    assert 0.5 < rows[-1]["ttft_ratio"] < 2.0
    assert rows[-1]["simulated_ttft_s"] > 10 * rows[-2]["simulated_ttft_s"]


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_cost_on_all_hardware(model: str, hardware: str):
    """Costs are positive where a device does anything, and grow with what a step holds."""
    ranks = 1 if MODELS[model].num_params < 14e9 else 8
    stages = 2 if MODELS[model].num_params > 1e11 else 1
    fit = resolve_cost_model(
        model, hardware, tensor_parallel_size=ranks, pipeline_parallel_size=stages
    )
    assert fit.num_device_blocks > 0
    assert fit.source.startswith(model)
    costs = fit.cost_model
    prompts = [costs.iteration_s(num_tokens, 0) for num_tokens in (2, 64, 512, 2048)]
    assert prompts == sorted(prompts)
    assert costs.iteration_s(1, 2000) > costs.iteration_s(1, 10)
    assert costs.step_s([(1, 500)] * 200) > costs.step_s([(1, 500)] * 20)
    assert costs.iteration_s(512, 1024) >= costs.iteration_s(512, 0)
    assert costs.copy_s(2) > costs.copy_s(1) > 0.0


def test_faster_hardware_is_faster():
    """A100-40G, A100-80G, H100 and H200 follow in this order for a decode; so do their pools."""
    fits = [resolve_cost_model("llama-2-7b", name) for name in HARDWARE]
    decodes = [fit.cost_model.step_s([(1, 1000)] * 64) for fit in fits]
    assert decodes == sorted(decodes, reverse=True)
    prefills = [fit.cost_model.iteration_s(2048, 0) for fit in fits]
    assert prefills == sorted(prefills, reverse=True)
    assert fits[0].num_device_blocks < fits[1].num_device_blocks < fits[3].num_device_blocks


def test_tensor_parallelism_divides_work_but_not_by_all():
    """Twice the devices speed a long prefill up by less than two, and more than double the pool."""
    alone, two, four = (
        resolve_cost_model("llama-3-8b", "h100", tensor_parallel_size=ranks) for ranks in (1, 2, 4)
    )
    for fewer, more in ((alone, two), (two, four)):
        ratio = fewer.cost_model.iteration_s(4096, 0) / more.cost_model.iteration_s(4096, 0)
        assert 1.2 < ratio < 2.0
        assert more.cost_model.floor_s == pytest.approx(fewer.cost_model.floor_s / 2)
        assert more.num_device_blocks > 2 * fewer.num_device_blocks


def test_pipeline_parallelism_adds_room_and_hand_over():
    """A step takes the same work and the hand-over; the pool more than doubles."""
    one = resolve_cost_model("llama-3-8b", "h100")
    two = resolve_cost_model("llama-3-8b", "h100", pipeline_parallel_size=2)
    added_s = two.cost_model.iteration_s(1000, 0) - one.cost_model.iteration_s(1000, 0)
    assert 0.0 < added_s < 1e-3
    assert two.num_device_blocks > 2 * one.num_device_blocks
    assert two.block_bytes == one.block_bytes


def test_kv_bytes_count_shared_heads():
    """Llama-3-8B's 8 KV heads for 32 heads need a quarter of the bytes; a lone head is copied."""
    assert roofline("llama-2-7b").layer_kv_bytes == 2 * 32 * 128 * 2
    assert roofline("llama-3-8b").layer_kv_bytes == 2 * 8 * 128 * 2
    assert roofline("llama-3-8b", ranks=8).layer_kv_bytes == 2 * 1 * 128 * 2
    assert roofline("llama-3-8b", ranks=16).layer_kv_bytes == 2 * 1 * 128 * 2
    fit = resolve_cost_model("llama-3-8b", "h100")
    assert fit.block_bytes == 16 * 32 * 2 * 8 * 128 * 2


def test_sizes_are_those_of_the_published_models():
    """Parameter counts come out as the names say."""
    sizes = {
        "opt-13b": 12.9, "opt-66b": 65.7, "opt-175b": 174.6, "llama-2-7b": 6.7,
        "llama-2-13b": 13.0, "llama-2-70b": 69.0, "llama-3-8b": 8.0, "llama-3-70b": 70.6,
        "gpt-3-175b": 174.6,
    }  # fmt: skip
    for name, billions in sizes.items():
        assert MODELS[name].num_params / 1e9 == pytest.approx(billions, rel=0.01), name


def test_a_direct_fit_is_preferred_and_named():
    """OPT-13B on one A100-80G comes from DistServe; on the 40 GB board from the roofline."""
    direct = resolve_cost_model("facebook/opt-13b", "A100-80G")
    assert "DistServe" in direct.source
    assert "roofline" in resolve_cost_model("opt-13b", "a100-40g").source
    assert "roofline" in resolve_cost_model("opt-13b", "a100-80g", dtype="float32").source
    # DistServe's formula: 22.05 + 0.1405 · 512 + 8.08e-6 · 512² ms, 23.48 + 0.000593 · 500 + 0.061.
    assert direct.cost_model.iteration_s(512, 0) == pytest.approx(96.1e-3, rel=0.03)
    assert direct.cost_model.iteration_s(1, 499) == pytest.approx(23.8e-3, rel=0.03)


def test_a_config_json_is_a_model(tmp_path):
    """A directory, or the file itself, describes a model in several dialects."""
    opt = {
        "model_type": "opt", "hidden_size": 5120, "num_attention_heads": 40, "ffn_dim": 20480,
        "num_hidden_layers": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(opt), encoding="utf-8")
    for name in (str(tmp_path), str(path)):
        assert dataclasses.replace(resolve_model(name), name="opt-13b") == MODELS["opt-13b"]
    gpt2 = {
        "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257,
        "n_positions": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    path.write_text(json.dumps(gpt2), encoding="utf-8")
    assert resolve_model(str(path)).num_params == pytest.approx(124e6, rel=0.02)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not JSON", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "architecture not supported: none named"),
        ('{"model_type": "opt", "hidden_size": []}', "int() argument"),
        ('{"model_type": "deepseek_v3"}', "architecture not supported"),
        ('{"model_type": "opt", "quantization_config": {"bits": 4}}', "quantized"),
    ],
)
def test_a_broken_config_json_is_one_clear_line(tmp_path, content, complaint):
    """What cannot be understood is said in one line."""
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve_model(str(path))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "gpt-9"}, "opt-13b, opt-30b"),
        ({"model": "missing.json"}, "no such file"),
        ({"hardware": "abacus"}, "a100-40g, a100-80g, h100, h200"),
        ({"hardware": "missing.json"}, "No such file"),
        ({"engine": "vllm-2031"}, "vllm-2023"),
        ({"dtype": "float8"}, "float16, bfloat16, float32"),
        ({"tensor_parallel_size": 3}, "40 attention heads"),
        ({"pipeline_parallel_size": 41}, "40 layers"),
        ({"model": "opt-175b"}, "raise --tensor-parallel-size"),
    ],
)
def test_what_cannot_be_is_one_clear_line(changes, complaint):
    """Unknown names list the known ones; impossible divisions say why."""
    asked = {"model": "opt-13b", "hardware": "a100-80g", **changes}
    with pytest.raises(ConfigError) as caught:
        resolve_cost_model(**asked)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def profile(**changes) -> str:
    """A profile as `fastserve profile` writes it."""
    fingerprint = {
        "dtype": "float32", "device": "some processor", "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1, "block_size": 16, **changes,
    }  # fmt: skip
    costs = dataclasses.asdict(CostModel(base_s=0.002, prefill_token_s=1e-4))
    return json.dumps({"fingerprint": fingerprint, "cost_model": costs})


def test_a_profile_is_hardware(tmp_path):
    """The coefficients of a profile are taken as they are; the pool must be given."""
    path = tmp_path / "profile.json"
    path.write_text(profile(), encoding="utf-8")
    fit = resolve_cost_model("llama-3-8b", str(path), num_device_blocks=100)
    assert (fit.cost_model.base_s, fit.cost_model.prefill_token_s) == (0.002, 1e-4)
    assert fit.num_device_blocks == 100
    assert fit.block_bytes == fit.shard_bytes == 16 * 32 * 2 * 8 * 128 * 4
    assert "some processor" in fit.source
    with pytest.raises(ConfigError, match="--num-device-blocks"):
        resolve_cost_model("llama-3-8b", str(path))
    path.write_text(profile(block_size=32), encoding="utf-8")
    with pytest.raises(ConfigError, match="measured with block_size 32, not 16"):
        resolve_cost_model("llama-3-8b", str(path), num_device_blocks=100)


def test_a_profile_that_says_nothing_of_copies_has_a_stated_link(tmp_path):
    """10 GB/s unless another bandwidth is given; the source says which."""
    path = tmp_path / "profile.json"
    path.write_text(profile(), encoding="utf-8")
    fit, given = (
        resolve_cost_model("llama-3-8b", str(path), num_device_blocks=100, swap_bandwidth=bandwidth)
        for bandwidth in (None, 2.0)
    )
    assert fit.cost_model.copy_block_s == pytest.approx(fit.shard_bytes / 10e9)
    assert fit.source.endswith("copies at 10 GB/s each way")
    assert given.cost_model.copy_block_s == pytest.approx(fit.shard_bytes / 2e9)
    assert given.source.count("GB/s") == 1


def test_a_bandwidth_takes_the_place_of_the_link():
    """A device copies its own shard: tensor ranks and stages share the bytes of a block."""
    plain = resolve_cost_model("opt-13b", "a100-40g")
    assert plain.cost_model.copy_block_s == pytest.approx(plain.block_bytes / (0.8 * 32e9))
    for ranks, stages in ((1, 1), (4, 1), (2, 2), (1, 4)):
        fit = resolve_cost_model(
            "opt-13b", "a100-40g", tensor_parallel_size=ranks, pipeline_parallel_size=stages,
            swap_bandwidth=5.0,
        )  # fmt: skip
        assert fit.block_bytes == plain.block_bytes
        assert fit.shard_bytes == plain.block_bytes // (ranks * stages)
        assert fit.cost_model.copy_block_s == pytest.approx(fit.shard_bytes / 5e9)
        assert fit.cost_model.copy_base_s == plain.cost_model.copy_base_s
        assert "5 GB/s" in fit.source


def test_swap_space_is_counted_per_device():
    """Four devices hold four times as many blocks in four times the host memory, none in none."""
    one, four = (
        resolve_cost_model("opt-13b", "a100-40g", tensor_parallel_size=ranks) for ranks in (1, 4)
    )
    assert one.num_host_blocks(4.0) == 4 * 2**30 // one.block_bytes == 327
    assert four.num_host_blocks(4.0) == pytest.approx(4 * one.num_host_blocks(4.0), abs=4)
    assert one.num_host_blocks(0.0) == 0
    assert one.num_host_blocks(0.5) == 40


@pytest.mark.parametrize("content", ["{}", "[]", "?", '{"fingerprint": 1, "cost_model": {}}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    """Any other JSON is one clear line."""
    path = tmp_path / "profile.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="not a profile"):
        resolve_cost_model("llama-3-8b", str(path), num_device_blocks=100)


def test_an_engine_adds_its_overhead_and_says_so():
    """A preset changes the host's part alone, and is never there unasked."""
    plain = resolve_cost_model("opt-13b", "a100-80g")
    assert plain.overhead == (0.0, 0.0, False)
    fit = resolve_cost_model("opt-13b", "a100-80g", engine="vllm-2023")
    assert fit.cost_model == plain.cost_model
    assert fit.overhead == ENGINES["vllm-2023"].overhead
    assert fit.overhead.fixed_s > 0.0
    assert "vllm-2023" in fit.source
    assert fit.source.startswith(plain.source)
