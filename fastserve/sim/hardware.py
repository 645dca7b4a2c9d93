"""Hardware by name: what a step of a model costs there and how much KV fits.

Three sources, the most direct first: a profile that `fastserve profile` wrote; a published fit of
this very model on this very device; else the roofline with efficiencies fitted to published
tables (hardware_fits.json, written by experiments/fit_hardware.py; docs/cost_models.md has the
errors). Every answer says which it is. Must not know: schedulers, workloads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastserve.core.cost_model import CostModel
from fastserve.model.parallel import Parts
from fastserve.settings.option import ConfigError
from fastserve.sim.engines import resolve_engine
from fastserve.sim.models import ModelShape, resolve_model
from fastserve.sim.roofline import COPY_LATENCY_S, Efficiency, Hardware, Roofline
from fastserve.sim.sim_executor import StepOverhead

FITS_FILE = Path(__file__).with_name("hardware_fits.json")
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
PROFILE_SWAP_BANDWIDTH = 10.0
"""GB/s of each direction of the link of a profile that says nothing of it: an assumption."""

_GIB = 2**30

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="a100-40g",
            chip="a100",
            memory_bytes=40 * _GIB,
            bandwidth=1.555e12,
            flops=312e12,
            nvlink=300e9,
            pcie=32e9,
        ),
        Hardware(
            name="a100-80g",
            chip="a100",
            memory_bytes=80 * _GIB,
            bandwidth=2.039e12,
            flops=312e12,
            nvlink=300e9,
            pcie=32e9,
        ),
        Hardware(
            name="h100",
            chip="h100",
            memory_bytes=80 * _GIB,
            bandwidth=3.35e12,
            flops=989e12,
            nvlink=450e9,
            pcie=64e9,
        ),
        # The Hopper chip of the H100 with other memory: no table of its own is published.
        Hardware(
            name="h200",
            chip="h100",
            memory_bytes=140 * _GIB,
            bandwidth=4.8e12,
            flops=989e12,
            nvlink=450e9,
            pcie=64e9,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFit:
    """What the simulator needs of a model on some devices.

    `cost_model` is of the whole model: the executor divides it by the pipeline's stages.
    `block_bytes` counts all devices' shards of a block, `shard_bytes` the largest one of them.
    """

    cost_model: CostModel
    num_device_blocks: int
    block_bytes: int
    shard_bytes: int
    max_model_len: int
    overhead: StepOverhead
    source: str

    def num_host_blocks(self, swap_space: float) -> int:
        """Return the blocks that the host holds where each device has so many GiB there."""
        return int(swap_space * _GIB) // self.shard_bytes


@dataclass(frozen=True, slots=True)
class Fits:
    """What experiments/fit_hardware.py found, as data.

    `direct` maps model, hardware and number of devices to whole-model coefficients.
    """

    efficiency: Mapping[str, Efficiency]
    direct: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
    activation_bytes_per_hidden: float
    source: Mapping[str, str]


@functools.cache
def load_fits() -> Fits:
    """Read the fitted coefficients."""
    values = json.loads(FITS_FILE.read_text(encoding="utf-8"))
    return Fits(
        {chip: Efficiency(**item) for chip, item in values["efficiency"].items()},
        values["direct"],
        values["activation_bytes_per_hidden"],
        values["source"],
    )


def resolve_cost_model(
    model: str,
    hardware: str,
    *,
    dtype: str = "float16",
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    block_size: int = 16,
    memory_utilization: float = 0.9,
    num_device_blocks: int | None = None,
    swap_bandwidth: float | None = None,
    engine: str | None = None,
) -> HardwareFit:
    """Return costs and capacity of a model on named hardware, or as a profile measured them.

    `swap_bandwidth` is GB/s of each direction of every device's link, in place of what it has; of a
    profile without costs of copies PROFILE_SWAP_BANDWIDTH.
    Raises ConfigError with one line for what is unknown, does not fit or cannot be divided so.
    """
    shape = resolve_model(model)
    dtype_bytes = DTYPE_BYTES.get(dtype)
    if dtype_bytes is None:
        raise ConfigError(f"--dtype {dtype}: not one of: {', '.join(DTYPE_BYTES)}")
    _check_division(shape, tensor_parallel_size, pipeline_parallel_size)
    if hardware.endswith(".json") or Path(hardware).is_file():
        fit = _from_profile(
            Path(hardware),
            shape,
            dtype_bytes,
            block_size,
            num_device_blocks,
            (
                ("tensor_parallel_size", tensor_parallel_size),
                ("pipeline_parallel_size", pipeline_parallel_size),
                ("block_size", block_size),
            ),
        )
    else:
        found = HARDWARE.get(hardware.lower())
        if found is None:
            raise ConfigError(
                f"--hardware {hardware}: unknown (known: {', '.join(HARDWARE)}, "
                "or a profile written by `fastserve profile`)"
            )
        fits = load_fits()
        roofline = Roofline(
            shape=shape,
            hardware=found,
            efficiency=fits.efficiency[found.chip],
            dtype_bytes=dtype_bytes,
            tensor_parallel_size=tensor_parallel_size,
        )
        cost_model, source = _cost_model(roofline, fits, block_size, pipeline_parallel_size)
        fit = HardwareFit(
            cost_model=cost_model,
            num_device_blocks=num_device_blocks
            or num_blocks_that_fit(
                roofline, pipeline_parallel_size, block_size, memory_utilization
            ),
            block_bytes=(
                block_size * shape.num_layers * roofline.layer_kv_bytes * tensor_parallel_size
            ),
            shard_bytes=roofline.shard_bytes(block_size, pipeline_parallel_size),
            max_model_len=shape.max_model_len,
            overhead=StepOverhead(),
            source=source,
        )
    if swap_bandwidth is None and not fit.cost_model.copy_block_s:
        swap_bandwidth = PROFILE_SWAP_BANDWIDTH
    if swap_bandwidth is not None:
        fit = _over_link(swap_bandwidth, fit)
    return fit if engine is None else _under(engine, fit)


def num_blocks_that_fit(
    roofline: Roofline, pipeline_parallel_size: int, block_size: int, memory_utilization: float
) -> int:
    """Return the blocks that the fullest device has room for beside weights and activations."""
    shape, hardware = roofline.shape, roofline.hardware
    num_layers = -(-shape.num_layers // pipeline_parallel_size)
    # One stage embeds and another one computes logits, unless there is but one.
    num_tables = 1 if pipeline_parallel_size > 1 or shape.is_tied else 2
    params = num_layers * shape.layer_params + num_tables * shape.head_params
    weight_bytes = params * roofline.dtype_bytes / roofline.tensor_parallel_size
    activation_bytes = load_fits().activation_bytes_per_hidden * shape.hidden_size
    usable_bytes = hardware.memory_bytes * memory_utilization
    shard_bytes = roofline.shard_bytes(block_size, pipeline_parallel_size)
    num_blocks = int((usable_bytes - weight_bytes - activation_bytes) // shard_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"--hardware {hardware.name}: {shape.name} needs {weight_bytes / 1e9:.0f} GB of "
            f"weights per device, and {usable_bytes / 1e9:.0f} GB are usable: raise "
            "--tensor-parallel-size or --pipeline-parallel-size"
        )
    return num_blocks


def _cost_model(
    roofline: Roofline, fits: Fits, block_size: int, pipeline_parallel_size: int
) -> tuple[CostModel, str]:
    """Return the costs and one line on where they come from."""
    shape, hardware = roofline.shape, roofline.hardware
    ranks = roofline.tensor_parallel_size
    cost_model = roofline.cost_model(block_size, pipeline_parallel_size)
    where = f"{shape.name} on {hardware.name}, tensor parallel {ranks}"
    direct = fits.direct.get(shape.name, {}).get(hardware.name, {}).get(str(ranks))
    if direct is None or roofline.dtype_bytes != 2:
        return cost_model, f"{where}: roofline, {fits.source[hardware.chip]}"
    hand_over_s, hand_over_token_s = roofline.hand_over_s(pipeline_parallel_size)
    coefficients = dict(direct)
    coefficients["base_s"] += hand_over_s
    coefficients["prefill_token_s"] += hand_over_token_s
    coefficients["decode_seq_s"] += hand_over_token_s
    return replace(cost_model, **coefficients), f"{where}: {fits.source['direct']}"


def _over_link(swap_bandwidth: float, fit: HardwareFit) -> HardwareFit:
    """Return the fit with links of so many GB/s in each direction."""
    costs = replace(
        fit.cost_model,
        copy_base_s=fit.cost_model.copy_base_s or COPY_LATENCY_S,
        copy_block_s=fit.shard_bytes / (swap_bandwidth * 1e9),
    )
    source = f"{fit.source}; copies at {swap_bandwidth:g} GB/s each way"
    return replace(fit, cost_model=costs, source=source)


def _under(engine: str, fit: HardwareFit) -> HardwareFit:
    overhead, origin = resolve_engine(engine)
    note = f"{overhead.fixed_s * 1e3:g} ms a pass and {overhead.per_seq_s * 1e3:g} ms a sequence"
    source = f"{fit.source}; engine {engine}: {note}, {origin}"
    return replace(fit, overhead=overhead, source=source)


def _check_division(shape: ModelShape, num_ranks: int, num_stages: int) -> None:
    Parts(shape.num_heads, shape.num_kv_heads, shape.intermediate_size).check(num_ranks)
    if not 1 <= num_stages <= shape.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {num_stages}: {shape.name} has {shape.num_layers} layers"
        )


def _from_profile(
    path: Path,
    shape: ModelShape,
    dtype_bytes: int,
    block_size: int,
    num_device_blocks: int | None,
    expected: tuple[tuple[str, int], ...],
) -> HardwareFit:
    """Take over what `fastserve profile` measured; of memory a profile says nothing."""
    fingerprint, cost_model = _read_profile(path)
    for key, value in expected:
        if fingerprint.get(key) != value:
            raise ConfigError(
                f"--hardware {path}: measured with {key} {fingerprint.get(key)}, not {value}"
            )
    if num_device_blocks is None:
        raise ConfigError(
            f"--hardware {path}: a profile holds no memory size; give --num-device-blocks"
        )
    measured_bytes = DTYPE_BYTES.get(str(fingerprint.get("dtype")), dtype_bytes)
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * measured_bytes
    block_bytes = block_size * shape.num_layers * kv_bytes
    return HardwareFit(
        cost_model=cost_model,
        num_device_blocks=num_device_blocks,
        block_bytes=block_bytes,
        shard_bytes=block_bytes,
        max_model_len=shape.max_model_len,
        overhead=StepOverhead(),
        source=f"{shape.name} on {fingerprint.get('device')}: measured, {path}",
    )


def _read_profile(path: Path) -> tuple[Mapping[str, Any], CostModel]:
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        fingerprint, coefficients = profile["fingerprint"], profile["cost_model"]
        cost_model = CostModel(**{key: float(value) for key, value in coefficients.items()})
    except OSError as error:
        raise ConfigError(f"--hardware {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--hardware {path}: not a profile: {error!r}") from None
    if not isinstance(fingerprint, dict):
        raise ConfigError(f"--hardware {path}: not a profile: no fingerprint")
    return fingerprint, cost_model
