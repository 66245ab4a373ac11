"""The Triton kernels of the batch-1 decoder layer as far as a machine without a GPU can tell."""

import re

import pytest

from latent_attention.decode_layer.triton import why_not
from latent_attention.gpu import make_gpu
from triton_checks import check_interpreted, spilled_bytes

WIDTHS = {"D": 2560, "Q": 768, "C": 256, "R": 64, "N": 64, "V": 128, "H": 32, "F": 7680, "X": 32768}
MATRICES = {"q_a", "kv_a", "q_b", "kv_b", "o", "gate", "up", "down"}
CACHE = {"c", "rope", "c_in", "rope_in"}
FLOATS = {"cos", "sin", "logits", "scales", "scales_in", "norm", "input_norm", "q_norm", "kv_norm"}


def test_in_the_interpreter():
    check_interpreted("decode_layer/triton_layer_interpreted.py")


def compiled(kernel: str, capability: tuple[int, int], int8: bool, cache_int8: bool):
    """The kernel for `infinite_1b`, compiled as `triton.py` launches it, for a GPU that need not be here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from latent_attention.decode_layer import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants = WIDTHS | {
        "C_PADDED": 256, "N_PADDED": 64, "COLUMNS": 64, "INT8": int8, "CACHE_INT8": cache_int8, "ROWS": 16,
        "CHUNK": 512 if int8 and kernel != "logits_kernel" else 256,
    }  # fmt: skip

    def type_of(argument: str) -> str:
        name = argument.removesuffix("_ptr")
        if argument in constants:
            return "constexpr"
        if name == argument:
            return "fp32" if name == "eps" else "i32"
        if name in FLOATS or (int8 and name.endswith("_scale")):
            return "*fp32"
        if name in ("counter", "counter_in", "length"):
            return "*i32"
        return "*i8" if (int8 and name in MATRICES) or (cache_int8 and name in CACHE) else "*bf16"

    source = ASTSource(
        function,
        {name: type_of(name) for name in function.arg_names},
        {name: value for name, value in constants.items() if name in function.arg_names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name.endswith("_ptr")},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options={"num_warps": 16})


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kernel", ["before_attention_kernel", "after_attention_kernel", "logits_kernel"])
@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_weights_are_read_16_bytes_a_thread(capability, kernel, int8, tmp_path):
    built = compiled(kernel, capability, int8, cache_int8=not int8)
    assert built.metadata.shared <= make_gpu(capability, 1).shared_memory
    assert re.search(r"ld\.global\.L1::evict_first(\.L2\S*)?\.v4\.b32", built.asm["ptx"])
    assert not re.search(r"ld\.global\.L1::evict_first\.b(8|16)", built.asm["ptx"])
    assert spilled_bytes(built, tmp_path) <= 192


def test_what_it_cannot_run_on():
    assert "needs an NVIDIA GPU" in str(why_not("bfloat16", None))
    assert "not bfloat16 on sm_75" in str(why_not("bfloat16", make_gpu((7, 5), 40)))
    assert "not float32" in str(why_not("float32", make_gpu((9, 0), 132)))
