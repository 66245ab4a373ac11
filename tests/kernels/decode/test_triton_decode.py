"""The Triton decode kernels as far as a machine without a GPU can tell."""

import re

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import latent_attention
from latent_attention.call_shapes import DecodeShape
from latent_attention.decode.triton import why_not_decode
from latent_attention.decode.triton_heuristic import Tiling, content_tiles, launch_config, select_tiling, why_not
from latent_attention.gpu import make_gpu
from triton_checks import check_interpreted, spilled_bytes

HOPPER = make_gpu((9, 0), 132)
SHAPE = DecodeShape(1, 1, 32, 256, 64, 4096, 64, "bfloat16", "bfloat16", True)
INT8 = SHAPE._replace(cache_dtype="int8")
WIDE = SHAPE._replace(c_width=512)


@pytest.mark.parametrize("which", ["int8", "not int8"])  # two, for two processors
def test_in_the_interpreter(which):
    check_interpreted("decode/triton_decode_interpreted.py", "-k", which)


def strides(shape: DecodeShape) -> dict[str, int]:
    """Strides of contiguous arrays, as far as they matter for compilation."""
    width, page = shape.c_width + shape.rope_width, shape.page_size
    heads = {"Q": width, "OUT": shape.c_width, "LSE": 1}
    result = {"C_P": page * shape.c_width, "C_S": shape.c_width, "TABLE_B": shape.pages_per_row}
    result |= {"ROPE_P": page * shape.rope_width, "ROPE_S": shape.rope_width}
    result |= {"SCALES_P": 2 * page, "SCALES_2": page, "SCALES_S": 1}
    for name, size in heads.items():
        rows = {"H": size, "T": shape.heads * size, "B": shape.queries * shape.heads * size}
        result |= {f"{name}_{axis}": stride for axis, stride in rows.items()}
    return result


def compiled(shape: DecodeShape, capability: tuple[int, int], kernel: str = "split"):
    """The kernel, compiled for a GPU that need not be here, with what the front ends tell Triton."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from latent_attention.decode import triton_kernels

    function = getattr(triton_kernels, f"{kernel}_kernel")
    launch = getattr(launch_config(shape, make_gpu(capability, 1), strides(shape)), kernel)
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8"}
    types = {f"{name}_ptr": f"*{names[shape.cache_dtype]}" for name in ("c", "rope")}
    types |= {f"{name}_ptr": f"*{names[shape.q_dtype]}" for name in ("q", "out")}
    types |= {f"{name}_ptr": "*fp32" for name in ("scales", "partial", "partial_lse", "lse")}
    types |= {"table_ptr": "*i32", "lengths_ptr": "*i32", "scale_log2e": "fp32"}
    source = ASTSource(
        function,
        {name: "constexpr" if name in launch.constants else types.get(name, "i32") for name in function.arg_names},
        {name: value for name, value in launch.constants.items() if name in function.arg_names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name.endswith("_ptr")},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options={"num_warps": launch.warps, "num_stages": launch.stages})


def targets():
    """One call for each tiling of each GPU."""
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]:
        for c_width in (256, 512):
            for cache_dtype in ("bfloat16", "int8"):
                seen = set()
                for heads in (16, 32, 128):
                    shape = SHAPE._replace(c_width=c_width, heads=heads, cache_dtype=cache_dtype)
                    if capability == (7, 5):  # no bfloat16 there
                        shape = shape._replace(q_dtype="float16", cache_dtype=cache_dtype.replace("b", ""))
                    tiling = select_tiling(shape, make_gpu(capability, 1))
                    if tiling is not None and tiling not in seen:
                        seen.add(tiling)
                        yield pytest.param(
                            shape, capability, id=f"sm_{capability[0]}{capability[1]}-{c_width}-{cache_dtype}-{heads}"
                        )


@pytest.mark.parametrize(("shape", "capability"), list(targets()))
def test_it_fits_the_gpu(shape, capability, tmp_path):
    kernel = compiled(shape, capability)
    assert 0 < kernel.metadata.shared <= make_gpu(capability, 1).shared_memory
    int8 = shape.cache_dtype == "int8"
    if capability == (7, 5):
        return  # no tensor cores, no asynchronous copies, and int8 spills
    assert re.search(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])
    # Latents and rotary keys are loaded ahead of their use, 8 or 16 bytes a thread.
    loads = 3 if content_tiles(shape)[1] else 2
    copies = re.findall(r"async_copy_global_to_local .*contiguity = (?:8|16) ", kernel.asm["ttgir"])
    assert len(copies) == loads * launch_config(shape, make_gpu(capability, 1), strides(shape)).split.stages
    assert spilled_bytes(kernel, tmp_path) <= (320 if int8 else 64)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_merge_compiles(capability, tmp_path):
    for shape in (SHAPE, SHAPE._replace(batch=64, c_width=192)):
        kernel = compiled(shape._replace(q_dtype="float16", cache_dtype="float16"), capability, "combine")
        assert kernel.metadata.shared <= make_gpu(capability, 1).shared_memory
        assert spilled_bytes(kernel, tmp_path) == 0


def test_float32_compiles(tmp_path):
    for shape, capability in [(SHAPE, (7, 5)), (WIDE, (8, 6))]:
        kernel = compiled(shape._replace(q_dtype="float32", cache_dtype="float32"), capability)
        assert kernel.metadata.shared <= make_gpu(capability, 1).shared_memory


def test_int8_compiles_for_blackwell():
    """Not with tcgen05, which Triton uses from 64 rows on: that cannot convert int8."""
    kernel = compiled(INT8._replace(heads=128), (10, 0))
    assert "tcgen05" not in kernel.asm["ptx"]


@pytest.mark.parametrize("shape", [SHAPE, INT8, SHAPE._replace(batch=3, paged=False, pages_per_row=1), WIDE])
def test_jax_lowers_it_for_a_gpu_that_is_not_here(shape):
    pytest.importorskip("jax_triton", reason="needs JAX's CUDA plugin", exc_type=ImportError)
    device = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    arrays = {
        "q_BTHW": ((shape.batch, shape.queries, shape.heads, shape.c_width + shape.rope_width), shape.q_dtype),
        "c_PSC": ((shape.batch * shape.pages_per_row, shape.page_size, shape.c_width), shape.cache_dtype),
        "k_rope_PSR": ((shape.batch * shape.pages_per_row, shape.page_size, shape.rope_width), shape.cache_dtype),
        "lengths_B": ((shape.batch,), "int32"),
    }
    if shape.paged:
        arrays["block_table_BN"] = ((shape.batch, shape.pages_per_row), "int32")
    if shape.cache_dtype == "int8":
        arrays["scales_P2S"] = ((shape.batch * shape.pages_per_row, 2, shape.page_size), "float32")
    structs = {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        op = jax.jit(lambda arrays: latent_attention.decode(**arrays, scale=0.1, implementation="triton"))
        text = op.trace(structs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call(") == 2


def test_reasons(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not_decode(SHAPE, HOPPER) is None
    for shape, gpu, words in [
        (SHAPE, None, "needs an NVIDIA GPU"),
        (SHAPE, make_gpu((7, 0), 80), "this GPU is sm_70"),
        (WIDE, make_gpu((7, 5), 40), "width 576 does not fit the 64 KiB of shared memory of this GPU (sm_75)"),
        (SHAPE._replace(c_width=96), HOPPER, "C a multiple of 64 up to 512 and R 32 or 64, not 96 and 64"),
        (SHAPE._replace(c_width=576), HOPPER, "not 576 and 64"),
        (SHAPE._replace(rope_width=128), HOPPER, "not 256 and 128"),
        (SHAPE._replace(q_dtype="float64"), HOPPER, "not float64"),
        (SHAPE._replace(cache_dtype="float16"), HOPPER, "the type of the queries or int8 with 16 bits, not float16"),
        (INT8._replace(q_dtype="float32"), HOPPER, "int8 with 16 bits"),
    ]:
        assert words in (why_not_decode(shape, gpu) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in (why_not_decode(SHAPE, HOPPER) or "")


def test_every_gpu_and_shape_gets_a_tiling():
    for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]:
        for c_width in range(64, 513, 64):
            for heads in (1, 5, 16, 33, 128):
                for shape in (SHAPE, INT8, SHAPE._replace(q_dtype="float32", cache_dtype="float32")):
                    assert why_not(shape._replace(c_width=c_width, heads=heads), make_gpu(capability, 1)) is None


def test_content_is_split_into_two_powers_of_two():
    tiles = {c: content_tiles(SHAPE._replace(c_width=c)) for c in range(64, 513, 64)}
    assert tiles == {
        64: (64, 0), 128: (128, 0), 192: (128, 64), 256: (256, 0), 320: (256, 64), 384: (256, 128), 448: (256, 256),
        512: (256, 256),
    }  # fmt: skip
    assert content_tiles(INT8) == (128, 128)


def test_programs_fill_the_gpu_but_no_more_than_there_is_to_do():
    def programs(**changes):
        return launch_config(SHAPE._replace(**changes), HOPPER, {}, Tiling(32, 64, 4, 3, 2))

    assert programs().split.grid == (1, 264)
    assert programs(heads=128).split.grid == (4, 66)
    assert programs(pages_per_row=3).split.grid == (1, 3)
    assert programs(batch=7, pages_per_row=1, page_size=65).split.grid == (1, 14)
    assert programs(heads=128, queries=128).split.grid == (512, 1)
    assert programs(batch=300).splits == 564
    assert programs().combine.grid == (4, 32, 1)  # few rows: 64 columns a program
    assert programs(batch=300).combine.grid == (1, 32, 300)
