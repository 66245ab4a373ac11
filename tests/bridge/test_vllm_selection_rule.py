"""What the vLLM plugin replaces, by mode and GPU; `make test-vllm` asks vLLM itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_jax.bridge.vllm.selection import choose

ROOT = Path(__file__).resolve().parent.parent.parent
TURING, BEFORE_TURING = (7, 5), (7, 0)
NEWER = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]


def cuda(mode, capability):
    return choose(mode, "cuda", capability, interpreted=False)


@pytest.mark.parametrize("capability", [BEFORE_TURING, TURING, *NEWER])
def test_off_is_off(capability):
    choice = cuda("off", capability)
    assert (choice.decode, choice.prefill) == ((), ())
    assert "INFINITECONTEXT_VLLM=off" in str(choice)


@pytest.mark.parametrize("capability", NEWER)
def test_auto_replaces_nothing_from_ampere_on(capability):
    choice = cuda("auto", capability)
    assert (choice.decode, choice.prefill) == (("CUSTOM",), ("CUSTOM",))
    assert f"sm_{capability[0]}{capability[1]}" in str(choice)


def test_auto_replaces_the_prefill_that_turing_lacks():
    choice = cuda("auto", TURING)
    assert (choice.decode, choice.prefill) == (("CUSTOM",), ("CUSTOM", "FLASH_ATTN"))
    assert "sm_75 has no FlashAttention" in str(choice)


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        (TURING, "FLASH_ATTN_MLA"),
        *((c, "FLASH_ATTN_MLA") for c in NEWER[:5]),
        *((c, "FLASHINFER_MLA") for c in NEWER[5:7]),
    ],
)
def test_on_puts_the_kernel_first(capability, first):
    choice = cuda("on", capability)
    assert choice.decode == ("CUSTOM", first)
    assert choice.prefill == (("CUSTOM", "FLASH_ATTN") if capability == TURING else ("CUSTOM",))


def test_on_leaves_the_only_backend_there_is():
    choice = cuda("on", (12, 0))
    assert choice.decode == ("CUSTOM",)
    assert "does not replace" in str(choice)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_nothing_where_triton_does_not_run(mode):
    for choice in (cuda(mode, BEFORE_TURING), choose(mode, "rocm", None, interpreted=False), cuda(mode, None)):
        assert (choice.decode, choice.prefill) == ((), ())
    assert "sm_70" in str(cuda(mode, BEFORE_TURING))


@pytest.mark.parametrize(("mode", "interpreted"), [("auto", False), ("auto", True), ("on", False), ("on", True)])
def test_a_cpu_needs_both(mode, interpreted):
    choice = choose(mode, "cpu", None, interpreted=interpreted)
    both = mode == "on" and interpreted
    assert choice.decode == (("CPU_MLA",) if both else ())
    assert choice.prefill == (("CPU",) if both else ())


def test_other_models_are_never_touched():
    names = set()
    for capability in (BEFORE_TURING, TURING, *NEWER):
        for mode in ("auto", "on"):
            names |= set(cuda(mode, capability).decode)
    assert all(name == "CUSTOM" or name.endswith("_MLA") for name in names)


@pytest.mark.parametrize("mode", ["", "ON", "1", "true"])
def test_unknown_modes(mode):
    with pytest.raises(ValueError, match="expected off, auto or on"):
        cuda(mode, TURING)


@pytest.mark.parametrize("installed", [True, False])
def test_nothing_imports_jax(installed, tmp_path):
    """Neither where it is installed nor where it is not."""
    code = (
        f"import sys; {'' if installed else 'sys.modules.update(jax=None, jaxlib=None);'}"
        "import mla_jax.bridge.vllm, mla_jax.bridge.vllm.ragged, latent_attention.decode.triton_torch;"
        "assert not sys.modules.get('jax')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
