"""What the flags leave open: device, dtype, window, limits, parts of the network, CUDA graphs.

Rules: a flag that would have no effect here is refused in one line, not ignored, but for
`--enforce-eager`: what it asks for is what happens without CUDA.
Dtype `auto`: on CUDA the checkpoint's; on a CPU float32, except for bfloat16 checkpoints of some
size: from a hidden size of 384 where the processor multiplies bfloat16 (half the time of a step,
docs/performance.md; below, too little is gained to give up exactness), from 1024 elsewhere, where
only reading half the bytes counts. With `--quantization` it is bfloat16, in which that computes.
Must not know: plans, requests, weights, KV.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch

from fastserve.checkpoint.model_config import ModelConfig
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.kernel_choice import KernelChoice, choose_kernels
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.kernels.cpu.native import BuildError
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.deterministic_ops import DeterministicOps
from fastserve.model.ops.interfaces import Ops
from fastserve.model.ops.rowwise_ops import RowwiseOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import StepLimits

logger = logging.getLogger(__name__)

DTYPE_SYNONYMS = {"half": "float16", "float": "float32"}
BFLOAT16_HIDDEN_SIZE = 384
BFLOAT16_HIDDEN_SIZE_EMULATED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What all ranks have in common, but for the index of the device."""

    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    limits: StepLimits


def choose(config: EngineConfig, model_config: ModelConfig) -> Choices:
    """Return what a model runs with here, for the first rank. Raises ConfigError."""
    device = choose_device(config.device)
    max_model_len = choose_max_model_len(config.max_model_len, model_config)
    return Choices(
        device=device,
        dtype=choose_dtype(config.dtype, model_config, device, config.quantization),
        max_model_len=max_model_len,
        limits=StepLimits.resolve(config, max_model_len, is_cpu=device.type == "cpu"),
    )


def choose_device(name: str) -> torch.device:
    """Return the device of `--device`, CUDA's first; auto takes CUDA where there is some."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    if name == "cuda" or (name == "auto" and has_cuda):
        return torch.device("cuda", 0)
    return torch.device("cpu")


def choose_dtype(
    name: str, config: ModelConfig, device: torch.device, quantization: str | None = None
) -> torch.dtype:
    """Return the dtype of `--dtype`; see the module docstring for auto."""
    if quantization is not None:
        if name not in ("auto", "bfloat16"):
            raise ConfigError(
                f"--quantization {quantization}: computes in bfloat16, not in --dtype {name}"
            )
        return torch.bfloat16
    if name == "auto":
        is_kept = device.type == "cuda" or (
            config.dtype == "bfloat16" and config.hidden_size >= _least_bfloat16_size()
        )
        name = config.dtype if is_kept else "float32"
    dtype: torch.dtype = getattr(torch, DTYPE_SYNONYMS.get(name, name))
    return dtype


def _least_bfloat16_size() -> int:
    has_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return BFLOAT16_HIDDEN_SIZE if has_products else BFLOAT16_HIDDEN_SIZE_EMULATED


def choose_cpu_kernels(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    *,
    is_deterministic: bool = False,
) -> CpuKernels | None:
    """Return the kernels of `--cpu-kernels`; None: plain torch, or no CPU.

    With `--quantization` there are kernels that compute every product, or a ConfigError.
    """
    if quantization is not None:
        flag = f"--quantization {quantization}"
        return _quantized_kernels(flag, name, dtype, device, is_deterministic)
    if device.type != "cpu":
        if name != "auto":
            raise ConfigError(f"--cpu-kernels {name}: the device is {device.type}, not a CPU")
        return None
    try:
        choice = cast(KernelChoice, name)  # config.py checks it
        kernels = choose_kernels(choice, dtype, is_rowwise=is_deterministic)
    except BuildError as error:
        raise ConfigError(f"--cpu-kernels {name}: {error}") from error
    if kernels is None and name not in ("auto", "torch"):
        raise ConfigError(f"--cpu-kernels {name}: there are none for {dtype}".replace("torch.", ""))
    return kernels


def _quantized_kernels(
    flag: str, name: str, dtype: torch.dtype, device: torch.device, is_deterministic: bool
) -> CpuKernels:
    if device.type != "cpu":
        raise ConfigError(f"{flag}: the device is {device.type}, not a CPU")
    if name == "torch":
        raise ConfigError(f"{flag}: needs compiled kernels, not --cpu-kernels torch")
    try:
        kernels = choose_kernels("native", dtype, max_rows=math.inf, is_rowwise=is_deterministic)
    except BuildError as error:
        raise ConfigError(f"{flag}: needs compiled kernels: {error}") from error
    if kernels is None or kernels.per_lane == 1:
        raise ConfigError(f"{flag}: this processor has no AVX-512 products of bfloat16")
    return kernels


def choose_ops(
    dtype: torch.dtype,
    device: torch.device,
    cpu_kernels: CpuKernels | None,
    is_deterministic: bool,
    quantization: str | None = None,
) -> Ops:
    """Return what the network is made of on this device."""
    parts: Ops = RowwiseOps(dtype) if is_deterministic else TorchOps(dtype)
    if device.type == "cuda" and has_triton():
        from fastserve.model.ops.cuda_ops import CudaOps  # Triton need not be where CUDA is not

        parts = CudaOps(dtype, parts, is_batch_invariant=is_deterministic)
    elif device.type == "cpu":
        parts = CpuOps(cpu_kernels, parts, has_int8_weights=quantization == "int8")
    return DeterministicOps(parts) if is_deterministic else parts


def choose_capture(enforce_eager: bool, config: ModelConfig, device: torch.device) -> bool:
    """Whether decodes become CUDA graphs: plain attention and routing to experts ask the host."""
    if device.type != "cuda" or not has_triton() or config.has_experts or enforce_eager:
        return False
    from fastserve.model.attention.triton import TritonAttention

    return TritonAttention.supports(AttentionShape.of(config))


def has_triton() -> bool:
    """Whether Triton is installed, which comes with torch where that comes with CUDA."""
    return find_spec("triton") is not None


def choose_max_model_len(asked: int | None, config: ModelConfig) -> int:
    """Return the window: the model's, or the shorter one asked for."""
    if asked is None:
        if config.max_model_len < config.num_positions:
            logger.warning(
                "contexts are bounded to the model's sliding window of %d tokens (of %d); "
                "longer ones are not supported",
                config.max_model_len,
                config.num_positions,
            )
        return config.max_model_len
    if asked > config.max_model_len:
        reason = f"the model's window is {config.max_model_len} tokens"
        if config.max_model_len == config.sliding_window:
            reason = (
                f"the model attends to a sliding window of {config.sliding_window} tokens, "
                "and longer contexts are not supported"
            )
        raise ConfigError(f"--max-model-len: {asked} is too long: {reason}")
    return asked
