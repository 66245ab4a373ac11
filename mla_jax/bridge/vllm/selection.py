"""Which of vLLM's attention backends the plugin takes the place of."""

from typing import NamedTuple

VARIABLE = "INFINITECONTEXT_VLLM"
"""Environment variable: off, auto (the default), on."""

CUSTOM = "CUSTOM"
"""vLLM's name for a backend from outside, which it uses only where its command line says so."""
_FLASH_ATTENTION = (8, 0)
_OURS = (7, 5)
_FIRST_TRIED = {7: "FLASH_ATTN_MLA", 8: "FLASH_ATTN_MLA", 9: "FLASH_ATTN_MLA", 10: "FLASHINFER_MLA"}
"""The MLA backend that vLLM tries first and has others behind, by the major compute capability (platforms/cuda.py)."""


class Choice(NamedTuple):
    """The names under which vLLM finds our backends, and why."""

    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        names = ", ".join(("none",) if not self.decode else self.decode)
        prefill = ", ".join(("none",) if not self.prefill else self.prefill)
        return f"infinitecontext plugin: decode as {names}; prefill as {prefill}: {self.reason}"


def choose(mode: str, device: str, capability: tuple[int, int] | None, *, interpreted: bool) -> Choice:
    """What to register.

    `auto` replaces only what cannot run: MLA prefill before Ampere, where there is no FlashAttention. `on` puts our
    decode kernel first; where it cannot do a model, vLLM goes on to the next of its own.

    Args:
        mode: off, auto or on.
        device: vLLM's name of the kind of device: cuda, cpu, ...
        capability: of the CUDA device.
        interpreted: whether Triton kernels run in its interpreter.

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
    if capability < _OURS:
        return Choice((), (), f"Triton needs Turing (sm_75) or newer, this GPU is {gpu}")
    prefill, reason = (CUSTOM,), f"for --attention-backend {CUSTOM} on {gpu}"
    if capability < _FLASH_ATTENTION:
        prefill, reason = (CUSTOM, "FLASH_ATTN"), f"{gpu} has no FlashAttention"
    if mode == "auto":
        return Choice((CUSTOM,), prefill, reason)
    first = _FIRST_TRIED.get(capability[0])
    if first is None:  # in the place of vLLM's only one, models that ours cannot do would have none
        return Choice((CUSTOM,), prefill, f"{reason}, which {VARIABLE}=on does not replace")
    return Choice((CUSTOM, first), prefill, f"{VARIABLE}=on, {reason}")
