"""Attention ops for Multi-Head Latent Attention (MLA), usable without the rest of the project.

`attention` is the expanded form (training, prefill), `decode` the absorbed form over a latent cache, `merge` and
`merge_over` combine partial results, `quantize` makes the 8-bit cache. Letters in names: B batch, T queries, S keys (or
tokens of a page), P pages of the cache, N pages of a row, H heads, K query/key width, V value width, C latent width,
R rotary width, W = C + R.

JAX is imported with the first of these names; `decode.triton_torch` has none, so that PyTorch programs need none.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_attention.dispatch import IMPLEMENTATIONS, UnavailableError, attention, decode, resolve
    from latent_attention.int8 import dequantize, quantize, quantize_cache
    from latent_attention.merging import merge, merge_over

# Two folders have the names of ops. Python makes a folder an attribute here when it is first imported, so that happens
# now, and is undone: from then on these names are the ops', by __getattr__.
for _folder in ("attention", "decode"):
    importlib.import_module(f"{__name__}.{_folder}")
    del globals()[_folder]

__all__ = [
    "IMPLEMENTATIONS",
    "UnavailableError",
    "attention",
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
