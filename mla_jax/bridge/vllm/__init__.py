"""A vLLM plugin: MLA of any width through our Triton kernel, and MLA prefill for GPUs without FlashAttention.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); docs/serving.md says how to install
and use it. `selection` chooses which of vLLM's backends `decode` and `prefill` replace; `ragged` is the attention of
prefill. Nothing here imports JAX: vLLM's environment needs none.
"""

import os

from mla_jax.bridge.vllm.selection import VARIABLE, choose

_PACKAGE = "mla_jax.bridge.vllm"


def register() -> None:
    """Registers our backends as `choose` says; a second call changes nothing.

    Raises:
        ValueError: INFINITECONTEXT_VLLM has an unknown value.
    """
    from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention.backends.mla.prefill.registry import (  # pyright: ignore[reportMissingImports]
        MLAPrefillBackendEnum,
        register_mla_prefill_backend,
    )
    from vllm.v1.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
        AttentionBackendEnum,
        register_backend,
    )

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    choice = choose(
        os.environ.get(VARIABLE, "auto"),
        current_platform.device_type,
        None if capability is None else (capability.major, capability.minor),
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
    )
    decode = f"{_PACKAGE}.decode.{'CpuBackend' if current_platform.is_cpu() else 'Backend'}"
    for name in choice.decode:
        if not AttentionBackendEnum[name].is_overridden():  # by us, or by another plugin that came first
            register_backend(AttentionBackendEnum[name], decode)
    for name in choice.prefill:
        if not MLAPrefillBackendEnum[name].is_overridden():
            register_mla_prefill_backend(MLAPrefillBackendEnum[name], f"{_PACKAGE}.prefill.Prefill")
    # vLLM shows what its own loggers say.
    init_logger("vllm.infinitecontext").info(str(choice))
