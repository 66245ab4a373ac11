"""What vLLM selects on GPUs that are not here, as `test_vllm_selection.py` asks in vLLM's environment.

Arguments like `75:auto` are compute capabilities and values of INFINITECONTEXT_VLLM. Prints a JSON object: for each,
the classes that vLLM's own code for CUDA comes to, by width and type of the cache, or its error.
"""

import json
import os
import sys
import types

import torch
from vllm.platforms.interface import DeviceCapability

sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("compiled")  # which the build for CPUs lacks
from vllm import platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions  # noqa: E402
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum  # noqa: E402
from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from mla_jax.bridge.vllm import decode, prefill, register  # noqa: E402, F401 - imported while this is a CPU to vLLM

DIMENSIONS = {576: (128, 64, 128), 320: (64, 64, 128), 256: (64, 64, 64)}


class Gpu(CudaPlatformBase):
    """A CUDA device."""

    capability = DeviceCapability(0, 0)

    @classmethod
    def get_device_capability(cls, device_id=0):
        return cls.capability

    @classmethod
    def get_device_name(cls, device_id=0):
        return "a GPU that is not here"


def attempt(select) -> str:
    try:
        return select().rsplit(".", 1)[-1]
    except ValueError as e:
        return f"error: {e}"


def selections(capability: int, mode: str) -> dict[str, str]:
    Gpu.capability = DeviceCapability(capability // 10, capability % 10)
    os.environ["INFINITECONTEXT_VLLM"] = mode
    for backend in (*AttentionBackendEnum, *MLAPrefillBackendEnum):
        backend.clear_override()
    register()
    register()  # as vLLM may

    def decode_backend(width: int, cache: str, chosen=None, mla=True) -> str:
        config = AttentionSelectorConfig(width, torch.float16, cache, None, use_mla=mla)
        return attempt(lambda: Gpu.get_attn_backend_cls(chosen, config, 32))

    results = {"another model": decode_backend(128, "auto", mla=False)}
    for width, dims in DIMENSIONS.items():
        names = dict(zip(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), dims, strict=True))
        config = MLAPrefillSelectorConfig(torch.float16, MLADimensions(**names))
        results[f"{width} prefill"] = attempt(lambda config=config: Gpu.get_mla_prefill_backend_cls(config).__name__)
        results |= {f"{width} {cache}": decode_backend(width, cache) for cache in ("auto", "fp8")}
        if mode != "off":
            results[f"{width} custom"] = decode_backend(width, "auto", AttentionBackendEnum.CUSTOM)
    return results


def main() -> None:
    platforms._current_platform = Gpu()
    cases = {case: selections(int(case.split(":")[0]), case.split(":")[1]) for case in sys.argv[1:]}
    has_jax = any(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules)
    print("RESULT " + json.dumps({"cases": cases, "jax": has_jax}))


main()
