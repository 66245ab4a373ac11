"""Checks an exported folder against transformers: the same logits, tokens and token ids."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError, UsageError
from mla_jax.inference.generator import generate
from mla_jax.model.layers import rms_norm
from mla_jax.model.transformer import bind

TOLERANCE = 1e-4
"""The largest difference of a float32 logit that is allowed without asking what float32's rounding makes of it."""
ROUNDING = 4
"""How many times as far from float64 as transformers' float32 logits ours may be. Where a token's hidden state is
large, its errors come from few roundings, so those of equally good sums differ by a factor."""
PROMPTS = (
    "The grass is green. The sky is blue. The sun is yellow.",
    "The pass key is 71432. Remember it. 71432 is the pass key.\nWhat is the pass key? The pass key is",
    "Once upon a time",
)
RANDOM_SHAPE = (2, 128)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison with transformers."""

    random_tokens: tuple[int, int]
    """Number and length of the random sequences whose logits were compared."""
    logit_difference: float
    """Largest absolute difference of any logit."""
    prompts: int
    same_ids: int
    """Prompts that AutoTokenizer encodes as the same ids."""
    same_tokens: int
    """Prompts with the same greedy continuation, ties within the tolerance aside."""
    rounding: tuple[float, float] | None = None
    """If logits differ by more than the tolerance, the errors of ours and of transformers' against those in float64:
    RMS over tokens of the largest error of a logit."""
    first_difference: str | None = None
    """If the logits do not agree, the first module, by Hugging Face's name, whose output differs."""

    @property
    def logits_agree(self) -> bool:
        """Whether the logits differ by less than the tolerance, or by no more than rounding."""
        if self.rounding is None:
            return self.logit_difference <= TOLERANCE
        ours, theirs = self.rounding
        return ours <= ROUNDING * theirs

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        return self.logits_agree and self.same_ids == self.same_tokens == self.prompts

    def __str__(self) -> str:
        sequences, tokens = self.random_tokens
        rows = [
            ("transformers against this model, float32", "measured", "required"),
            (
                f"largest logit difference, {sequences} x {tokens} tokens",
                f"{self.logit_difference:.1e}",
                f"{TOLERANCE:.0e}",
            ),
            ("prompts with the same token ids", f"{self.same_ids}/{self.prompts}", "all"),
            (f"prompts with the same {NEW_TOKENS} greedy tokens", f"{self.same_tokens}/{self.prompts}", "all"),
        ]
        if self.rounding is not None:
            ours, theirs = self.rounding
            what = f"or RMS error to float64; transformers' {theirs:.1e}"
            rows.insert(2, (what, f"{ours:.1e}", f"{ROUNDING * theirs:.1e}"))
        table = [f"{what:<48}{measured:>10}{required:>10}" for what, measured, required in rows]
        if self.first_difference is not None:
            table.append(f"the first module that differs: {self.first_difference}")
        return "\n".join(table)


def import_transformers() -> tuple[ModuleType, ModuleType]:
    """torch and transformers, without their progress bars. Raises UsageError if they are not installed."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UsageError(f'--verify needs torch and transformers ({e}); pip install "infinitecontext[hf]"') from e
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return torch, transformers


def verify(
    export_dir: str | Path,
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    prompts: Sequence[str] = PROMPTS,
) -> Verification:
    """Compares the folder, as transformers reads it, with the parameters rounded to `dtype`, both computing in float32.

    Where logits differ, transformers computes them in float64 too, to tell an error from rounding.

    Raises:
        InputError: transformers cannot load the folder.
        UsageError: transformers is not installed.
    """
    torch, transformers = import_transformers()
    try:
        hf_model = transformers.AutoModelForCausalLM.from_pretrained(
            export_dir, dtype=torch.float32, local_files_only=True
        ).eval()
        hf_tokenizer = transformers.AutoTokenizer.from_pretrained(export_dir, local_files_only=True)
    except Exception as e:
        raise InputError(f"transformers cannot load {export_dir} ({e})") from e
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    batch, length = RANDOM_SHAPE
    shape = batch, min(length, config.max_position_embeddings)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    longest = max(config.max_position_embeddings - NEW_TOKENS, 1)
    all_ids = [tokenizer.encode(prompt)[-longest:] for prompt in prompts]
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        ours_BTX = np.asarray(_logits(config, params, tokens_BT))
        with _layer_outputs(hf_model) as theirs_LBTD:
            theirs_BTX = hf_model(torch.from_numpy(tokens_BT)).logits.numpy()
        difference = float(np.abs(ours_BTX - theirs_BTX).max())
        continuations = generate(config, params, all_ids, max_new_tokens=NEW_TOKENS, eos_id=stop_ids(tokenizer))
        same_tokens = sum(
            _same_tokens(torch, hf_model, ids, ours) for ids, ours in zip(all_ids, continuations, strict=True)
        )
        rounding = None
        if not difference <= TOLERANCE:
            exact_BTX = _float64_logits(torch, hf_model, tokens_BT)
            rounding = _token_error(ours_BTX - exact_BTX), _token_error(theirs_BTX - exact_BTX)
        verification = Verification(
            random_tokens=shape,
            logit_difference=difference,
            prompts=len(prompts),
            same_ids=sum(hf_tokenizer.encode(p, add_special_tokens=False) == tokenizer.encode(p) for p in prompts),
            same_tokens=same_tokens,
            rounding=rounding,
        )
        if verification.logits_agree:
            return verification
        first = _first_difference(config, params, tokens_BT, theirs_LBTD)
        return dataclasses.replace(verification, first_difference=first)


def _float64_logits(torch: ModuleType, hf_model, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits in float64, its norms too, which transformers computes in float32 whatever the type; changes the model."""
    hf_model.double()
    for module in hf_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(
                torch.nn.functional.rms_norm,
                normalized_shape=tuple(module.weight.shape),
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return hf_model(torch.from_numpy(tokens_BT)).logits.numpy()


def _token_error(error_BTX: np.ndarray) -> float:
    """RMS over tokens of the largest error of a token."""
    return float(np.sqrt(np.square(np.abs(error_BTX).max(axis=-1)).mean()))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens_BT))


@contextlib.contextmanager
def _layer_outputs(hf_model) -> Iterator[list[np.ndarray]]:
    """A list that receives the embeddings and the output of each layer during a forward pass."""
    outputs = []

    def keep(_module, _inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).numpy())

    modules = [hf_model.model.embed_tokens, *hf_model.model.layers]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _first_difference(config: ModelConfig, params: dict, tokens_BT: np.ndarray, theirs_LBTD: list[np.ndarray]) -> str:
    """The first module whose output differs by more than the tolerance after normalisation of the hidden state."""
    embeddings_BTD, *layers_LBTD = theirs_LBTD
    if np.abs(params["embed_tokens"][tokens_BT] - embeddings_BTD).max() > TOLERANCE:
        return "model.embed_tokens"
    params = {**params, "norm": jnp.ones_like(params["norm"])}
    for i, theirs_BTD in enumerate(layers_LBTD):
        beginning = dataclasses.replace(config, num_hidden_layers=i + 1)
        first_layers = {**params, "layers": jax.tree.map(lambda x, end=i + 1: x[:end], params["layers"])}
        ours_BTD = np.asarray(_hidden(beginning, first_layers, tokens_BT))
        if (
            np.abs(ours_BTD - rms_norm(jnp.asarray(theirs_BTD), nnx.Param(params["norm"]), config.rms_norm_eps)).max()
            > TOLERANCE
        ):
            return f"model.layers.{i}"
    return "model.norm or lm_head"


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    return bind(config, params)(tokens_BT)


def _same_tokens(torch: ModuleType, hf_model, prompt: list[int], ours: list[int]) -> bool:
    """Whether transformers continues the prompt alike; where two logits are a tie, either token will do."""
    ids = torch.tensor([prompt])
    theirs = hf_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = theirs.sequences[0, len(prompt) :].tolist()
    ends = np.ravel(hf_model.generation_config.eos_token_id).tolist()
    if len(ours) < NEW_TOKENS:  # ours ended there, and generate leaves out by which token
        ours = [*ours, *(token for token in new[len(ours) :][:1] if token in ends)]
    for logits_1X, our, their in zip(theirs.logits, ours, new, strict=False):
        if our != their:
            return bool(logits_1X[0, their] - logits_1X[0, our] <= 2 * TOLERANCE)
    return len(theirs.logits) == len(ours)
