"""The Triton kernels of the batch-1 decoder layer against PyTorch; run by test_triton_layer.py, TRITON_INTERPRET=1.

The interpreter runs one program after the other, so no program can wait at a grid barrier: each phase of a kernel is
launched on its own here, without the barrier before it.
"""

import pytest
import torch
import triton
import triton.language as tl

from latent_attention.decode_layer import triton_gemv
from latent_attention.decode_layer import triton_kernels as kernels

EPS = 1e-6
DIGITS = 5e-4
"""Tolerance where x is split in two digits; rounded to bfloat16 it would be off by ten times as much."""
WIDTHS = {
    "even": dict(D=64, Q=32, C=32, R=16, N=16, V=16, H=2, F=64),
    # No width is a multiple of a tile, and the programs' partitions end within tiles and within heads.
    "few latents": dict(D=64, Q=96, C=16, R=8, N=16, V=16, H=2, F=64),
    "odd": dict(D=96, Q=40, C=48, R=8, N=12, V=20, H=3, F=112),
}
TILE = dict(ROWS=4, CHUNK=32)


def draw(*shape):
    return torch.randn(*shape) / shape[-1] ** 0.5


def matrix(rows, columns, int8):
    """A random matrix: as stored, its scales, and their product."""
    w = draw(rows, columns)
    if not int8:
        return w, w, w
    scale = w.abs().amax(1) / 127
    units = torch.clamp((w / scale[:, None]).round(), -127, 127).to(torch.int8)
    return units, scale, units * scale[:, None]


def unset(*shape):
    return torch.full(shape, float("nan"))


def norm(x, gamma):
    return x * torch.rsqrt((x * x).mean() + EPS) * gamma


def apply_rope(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def power(n):
    return 1 << (n - 1).bit_length()


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


@triton.jit
def dot4(a, b, sums):
    for place in tl.static_range(0, 32, 8):
        sums += ((a << (24 - place)) >> 24) * ((b << (24 - place)) >> 24)
    return sums


@pytest.fixture(autouse=True)
def seed_and_no_ptx(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_gemv, "dot4", dot4)  # the interpreter knows no PTX


@pytest.mark.parametrize("programs", [2, 5])
@pytest.mark.parametrize(("int8", "cache_int8"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_before_attention(widths, int8, cache_int8, programs, capacity=9, length=5):
    D, Q, C, R, N, V, H, _ = widths.values()
    q_a, kv_a, q_b = matrix(Q, D, int8), matrix(C + R, D, int8), matrix(H * (N + R), Q, int8)
    kv_b = matrix(H * (N + V), C, int8)
    h, input_norm, q_norm, kv_norm = torch.randn(D), 1 + draw(D), 1 + draw(Q), 1 + draw(C)
    cos, sin = torch.randn(R // 2), torch.randn(R // 2)
    cache_type = torch.int8 if cache_int8 else torch.float32
    c, k_rope = torch.zeros(capacity, C, dtype=cache_type), torch.zeros(capacity, R, dtype=cache_type)
    scales, counter = torch.zeros(2, capacity), torch.zeros(1, dtype=torch.int32)
    q_out, q_latent, kv, q = unset(H, C + R), unset(Q), unset(C + R), unset(H * (N + R))

    def run(length):
        launch, sizes = (programs,), {"C": C, "R": R, "C_PADDED": power(C), "INT8": int8}
        kernels.down_projections[launch](
            h, input_norm, q_a[0], q_a[1], kv_a[0], kv_a[1], q_latent, kv, counter, EPS, D=D, Q=Q, C=C, R=R, INT8=int8,
            **TILE,
        )  # fmt: skip
        kernels.query_up_projection[launch](
            q_latent, q_norm, q_b[0], q_b[1], q, kv, kv_norm, cos, sin, torch.tensor([length], dtype=torch.int32),
            capacity, c, k_rope, scales, counter, EPS, Q=Q, N=N, H=H, CACHE_INT8=cache_int8, SYNC=False, **sizes,
            **TILE,
        )  # fmt: skip
        kernels.absorb_queries[launch](
            q, kv_b[0], kv_b[1], cos, sin, q_out, N=N, V=V, H=H, N_PADDED=power(N), COLUMNS=16, **sizes
        )

    run(length)
    x = norm(h, input_norm)
    latent, key = (kv_a[2] @ x).split([C, R])
    queries = (q_b[2] @ norm(q_a[2] @ x, q_norm)).reshape(H, N + R)
    k_b = kv_b[2].reshape(H, N + V, C)[:, :N]
    absorbed = torch.einsum("hn,hnc->hc", queries[:, :N], k_b)
    close(q_out, torch.cat([absorbed, apply_rope(queries[:, N:], cos, sin)], -1), DIGITS if int8 else 1e-5)
    for ours, scale, expected in [
        (c, scales[0], norm(latent, kv_norm)),
        (k_rope, scales[1], apply_rope(key, cos, sin)),
    ]:
        if cache_int8:
            close(scale[length], expected.abs().max() / 127)
            close(ours[length] * scale[length], expected, tolerance=0.51 * scale[length].item())
        else:
            close(ours[length], expected, DIGITS if int8 else 1e-5)
        others = [i for i in range(capacity) if i != length]
        assert not ours[others].any()

    before = c.clone(), k_rope.clone(), scales.clone()
    run(capacity)  # a full cache stays as it is
    assert all(torch.equal(now, then) for now, then in zip((c, k_rope, scales), before, strict=True))


@pytest.mark.parametrize("programs", [2, 5])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_after_attention(widths, int8, programs):
    D, _, C, _, N, V, H, F = widths.values()
    kv_b, o = matrix(H * (N + V), C, int8), matrix(D, H * V, int8)
    gate, up, down = matrix(F, D, int8), matrix(F, D, int8), matrix(D, F, int8)
    h, latents, gamma = torch.randn(D), torch.randn(H, C), 1 + draw(D)
    out, values, middle, inner = unset(D), unset(H * V), unset(D), unset(F)
    counter = torch.zeros(1, dtype=torch.int32)
    launch, options = (programs,), {"INT8": int8, "ROWS": TILE["ROWS"]}
    kernels.value_up_projection[launch](
        latents, kv_b[0], kv_b[1], values, C=C, N=N, V=V, H=H, C_PADDED=power(C), **options
    )
    options |= {"SYNC": False, "CHUNK": TILE["CHUNK"]}
    kernels.projection_and_residual[launch](values, o[0], o[1], h, middle, counter, EPS, OUT=D, K=H * V, **options)
    kernels.gate_and_up_projection[launch](
        middle, gamma, gate[0], gate[1], up[0], up[1], inner, counter, EPS, D=D, F=F, **options
    )
    kernels.projection_and_residual[launch](inner, down[0], down[1], middle, out, counter, EPS, OUT=D, K=F, **options)
    v_b = kv_b[2].reshape(H, N + V, C)[:, N:]
    h = h + o[2] @ torch.einsum("hc,hvc->hv", latents, v_b).flatten()
    x = norm(h, gamma)
    close(out, h + down[2] @ (torch.nn.functional.silu(gate[2] @ x) * (up[2] @ x)), DIGITS if int8 else 1e-5)


def test_logits():
    h, gamma, head, logits = torch.randn(96), 1 + draw(96), draw(77, 96), unset(77)
    kernels.logits_kernel[(5,)](h, gamma, head, EPS, logits, D=96, X=77, **TILE)
    close(logits, head @ norm(h, gamma))
