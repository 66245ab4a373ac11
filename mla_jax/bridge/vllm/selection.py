"""Choice of the attention backends of vLLM that the plugin overrides."""

from typing import NamedTuple

VARIABLE = "INFINITECONTEXT_VLLM"
"""Environment variable: off, auto (the default), on."""

CUSTOM = "CUSTOM"
"""vLLM's name of a third-party backend, which runs only if the command line names it."""
_FLASH_ATTENTION = (8, 0)
"""The lowest compute capability that FlashAttention supports."""
_TRITON = (7, 5)
"""The lowest compute capability that Triton supports."""
_FIRST_TRIED = {7: "FLASH_ATTN_MLA", 8: "FLASH_ATTN_MLA", 9: "FLASH_ATTN_MLA", 10: "FLASHINFER_MLA"}
"""The first MLA backend in vLLM's order, by major compute capability, where others follow it (platforms/cuda.py)."""


class Choice(NamedTuple):
    """Names of vLLM's backends to override with ours, and the reason."""

    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        decode = ", ".join(("none",) if not self.decode else self.decode)
        prefill = ", ".join(("none",) if not self.prefill else self.prefill)
        return f"infinitecontext plugin: decode as {decode}; prefill as {prefill}: {self.reason}"


def choose(mode: str, device: str, capability: tuple[int, int] | None, *, interpreted: bool) -> Choice:
    """Chooses what to register.

    `auto` replaces only what cannot run: MLA prefill before Ampere, where there is no FlashAttention. `on` puts our
    decode kernel first; for a model that it does not support, vLLM falls back to its next backend.

    Args:
        mode: off, auto or on.
        device: vLLM's name of the kind of device: cuda, cpu, ...
        capability: of the CUDA device.
        interpreted: True if Triton kernels run in its interpreter.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("off", "auto", "on"):
        raise ValueError(f"{VARIABLE} is {mode!r}; expected off, auto or on")
    if mode == "off":
        return Choice((), (), f"{VARIABLE}=off")
    if device == "cpu":
        if mode == "on" and interpreted:
            return Choice(("CPU_MLA",), ("CPU",), f"{VARIABLE}=on, in Triton's interpreter")
        return Choice((), (), f"a CPU needs {VARIABLE}=on and TRITON_INTERPRET=1, which is for tests")
    if device != "cuda" or capability is None:
        return Choice((), (), f"there is nothing for {device} devices")
    gpu = f"sm_{capability[0]}{capability[1]}"
    if capability < _TRITON:
        return Choice((), (), f"Triton needs Turing (sm_75) or newer, this GPU is {gpu}")
    prefill, reason = (CUSTOM,), f"for --attention-backend {CUSTOM} on {gpu}"
    if capability < _FLASH_ATTENTION:
        prefill, reason = (CUSTOM, "FLASH_ATTN"), f"{gpu} has no FlashAttention"
    if mode == "auto":
        return Choice((CUSTOM,), prefill, reason)
    first = _FIRST_TRIED.get(capability[0])
    if first is None:  # if ours replaced vLLM's only backend, models that ours does not support would have none
        return Choice((CUSTOM,), prefill, f"{reason}, which {VARIABLE}=on does not replace")
    return Choice((CUSTOM, first), prefill, f"{VARIABLE}=on, {reason}")
