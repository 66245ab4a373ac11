"""Attention ops for Multi-Head Latent Attention (MLA), usable without the rest of the project.

`attention` is the expanded form (training, prefill), `decode` the absorbed form over a latent cache, `merge` and
`merge_over` combine partial results, `attention_gradients` is the backward pass of merged ones, `quantize` and
`quantize_cache` make the 8-bit cache. Letters in names: B batch, T queries, S keys (or tokens of a page), P pages of
the cache, N pages of a row, H heads, K query/key width, V value width, C latent width, R rotary width, W = C + R.

Where to find what: `dispatch` documents both ops, lists their implementations and says how to add one;
`attention/NAME.py` and `decode/NAME.py` are the implementations; `decode_layer/` has the fused decoder layer of a
batch-1 decode step; `hopper/` what the Mosaic GPU kernels share; docs/kernels.md explains these kernels.

JAX is imported with the first of these names; `decode.triton_torch` does not import it, for programs in PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_attention.dispatch import (
        IMPLEMENTATIONS,
        UnavailableError,
        attention,
        attention_gradients,
        choices,
        decode,
        resolve,
    )
    from latent_attention.int8 import dequantize, quantize, quantize_cache
    from latent_attention.merging import merge, merge_over

# Two subpackages have the names of ops. Python binds a subpackage as an attribute here when it is first imported: do
# that now and unbind it, so that from then on `latent_attention.decode` is the op, by __getattr__.
for _folder in ("attention", "decode"):
    importlib.import_module(f"{__name__}.{_folder}")
    del globals()[_folder]

__all__ = [
    "IMPLEMENTATIONS",
    "UnavailableError",
    "attention",
    "attention_gradients",
    "choices",
    "decode",
    "dequantize",
    "merge",
    "merge_over",
    "quantize",
    "quantize_cache",
    "resolve",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "int8" if "quantize" in name else "merging" if "merge" in name else "dispatch"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
