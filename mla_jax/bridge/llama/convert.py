"""Converts a Llama-style checkpoint to MLA, layer by layer, with the calibration texts propagated along.

The residual stream is scaled so that norms with the epsilon of the source do the same with that of DeepSeek-V3: a norm
of s h with epsilon s^2 e is the norm of h with epsilon e.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mla_jax.bridge.hf.layout import EMBEDDING, HEAD
from mla_jax.bridge.llama.attention import convert_attention
from mla_jax.bridge.llama.calibration import Calibration, in_batches, perplexity, read_calibration
from mla_jax.bridge.llama.config import WHOLE_METHOD, Method, Ranks, frequency_error, target_config
from mla_jax.bridge.llama.layer import LlamaLayer, attention, cos_sin, gated, latent_heads, norm
from mla_jax.bridge.llama.refit import follow, refit
from mla_jax.bridge.llama.report import Report
from mla_jax.bridge.llama.rope import decouple
from mla_jax.bridge.llama.source import FINAL_NORM, LlamaCheckpoint
from mla_jax.checkpoint.run_folder import check_tokenizer
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError
from mla_jax.hardware import GIB, available_host_memory
from mla_jax.mesh import with_concrete_shardings
from mla_jax.model.rope import inv_freq
from mla_jax.model.transformer import abstract_params, bind

_COPIES = 2
"""Copies of the parameters at one time: being filled, and on the device."""
_HIDDEN_ARRAYS = 8
"""Arrays as wide as the hidden state that exist of every token at one time."""


def convert(
    hf_dir: str | Path,
    ranks: Ranks,
    texts: str | Path,
    *,
    tokens: int = 65_536,
    length: int = 1024,
    method: Method = WHOLE_METHOD,
) -> tuple[ModelConfig, dict, Tokenizer, Report]:
    """Reads and converts a checkpoint, and measures what the conversion costs.

    Args:
        hf_dir: folder with config.json, safetensors and tokenizer.json.
        ranks: widths of the latent attention.
        texts: file of UTF-8 text, of the kind that the model is for.
        tokens: the most tokens of the text to use.
        length: tokens of a calibration sequence.
        method: what is left out, for comparison.

    Returns:
        Config, parameters and tokenizer as `bridge.hf.reader.load` returns them, and the report.

    Raises:
        InputError: the checkpoint cannot be read or represented, the text is too short, or the memory too small.
        UsageError: ranks that this checkpoint cannot have.
    """
    source = LlamaCheckpoint(Path(hf_dir))
    target = _target(source, ranks)
    source.check(target)
    check_tokenizer(source.tokenizer, target)
    length = min(length, target.max_position_embeddings)
    calibration = read_calibration(texts, source.tokenizer, tokens, length, least=target.hidden_size)
    _check_memory(target, calibration.tokens_BT.size)
    if ranks.rope_theta is None:
        target = _target(source, choose_theta(source, ranks, calibration.tokens_BT.shape[1]))
    params, report = _Conversion(source, target, calibration, method).run()
    return target, params, source.tokenizer, report


def _target(source: LlamaCheckpoint, ranks: Ranks) -> ModelConfig:
    return target_config(source.hf, source.config, ranks, tied=source.tied, dtype=source.dtype)


def _check_memory(target: ModelConfig, tokens: int) -> None:
    """Raises InputError if the parameters and what is kept of all tokens do not fit the memory that is left."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(target)))
    widths = _HIDDEN_ARRAYS * target.hidden_size + 2 * target.intermediate_size
    needed, left = 4 * (_COPIES * parameters + tokens * widths), available_host_memory()
    if left is not None and needed > left:
        raise InputError(
            f"converting needs about {needed / GIB:.1f} GiB of memory, and {left / GIB:.1f} are left: "
            f"{4 * _COPIES * parameters / GIB:.1f} for {parameters:,} parameters in float32, the rest for {tokens:,} "
            "tokens of calibration, which --calibration-tokens makes fewer"
        )


def choose_theta(source: LlamaCheckpoint, ranks: Ranks, length: int) -> Ranks:
    """The ranks with the base of RoPE, of the source's and its square root, that explains more of the source's scores.

    The root has the faster half of the frequencies, two slots each where the RoPE key is as wide as a head: better
    where the slower half hardly turn over `length` tokens. Three layers are looked at, for inputs of all directions.
    """
    theta = source.config.rope_theta
    if source.config.kv_heads == 1:  # the source's own frequencies are exact
        return dataclasses.replace(ranks, rope_theta=theta)
    last = source.hf["num_hidden_layers"] - 1
    layers = [source.layer(i) for i in {0, last // 2, last}]

    def share(theta: float) -> float:
        slots = inv_freq(_target(source, dataclasses.replace(ranks, rope_theta=theta)))
        return sum(
            decouple(
                layer.q_HND, layer.k_GND, np.eye(layer.q_HND.shape[-1]), source.config.inv_freq, slots, length
            ).share
            for layer in layers
        )

    return dataclasses.replace(ranks, rope_theta=max(theta, theta**0.5, key=share))


class _Conversion:
    """The conversion of one checkpoint: what its layers share, and the parameters being filled."""

    def __init__(self, source: LlamaCheckpoint, target: ModelConfig, calibration: Calibration, method: Method):
        self.method = method
        self.source, self.target, self.calibration = source, target, calibration
        self.scale = (target.rms_norm_eps / source.config.rms_norm_eps) ** 0.5
        self.norm_and_scale = {"eps": source.config.rms_norm_eps, "scale": source.config.softmax_scale}
        length = calibration.tokens_BT.shape[1]
        self.source_rope = cos_sin(source.config.inv_freq, length)
        self.target_rope = cos_sin(inv_freq(target), length)
        self.params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_params(target))

    def run(self) -> tuple[dict, Report]:
        """Converts all layers. Returns parameters as `init_params` lays them out, and the report."""
        embedding_XD, final_norm_D = self.source.read(EMBEDDING), self.source.read(FINAL_NORM)
        head_XD = embedding_XD if self.source.tied else self.source.read(HEAD)
        fitted, held_out = self.calibration.fitted, self.calibration.tokens_BT[self.calibration.fitted :]
        source_BTD = h_BTD = embedding_XD[self.calibration.tokens_BT]
        errors = []
        for i in tqdm(range(self.target.num_hidden_layers), desc="converting layers", leave=False):
            layer = self.source.layer(i)
            source_BTD, h_BTD, layer_errors = self._layer(i, layer, source_BTD, h_BTD)
            errors.append(layer_errors)

        self.params["embed_tokens"][:] = embedding_XD * self.scale
        # A tied head is scaled with the embedding; the norm before it takes that back.
        self.params["norm"][:] = final_norm_D / (self.scale if self.source.tied else 1)
        if not self.source.tied:
            self.params["lm_head"][:] = head_XD.T
        leaves = with_concrete_shardings(abstract_params(self.target))
        params = jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), self.params, leaves)

        def held_out_perplexity(h_BTD: np.ndarray) -> float:
            return perplexity(norm(h_BTD, self.norm_and_scale["eps"]) * final_norm_D, head_XD.T, held_out)

        perplexities = {
            "source": held_out_perplexity(source_BTD[fitted:]),
            "converted": converted_perplexity(self.target, params, held_out),
        }
        return params, self._report(errors, perplexities)

    def _layer(self, i: int, layer: LlamaLayer, source_BTD: np.ndarray, h_BTD: np.ndarray):
        """Converts layer i.

        Args:
            i: its number.
            layer: its weights.
            source_BTD: hidden states before it, of the source.
            h_BTD: those of the layers that are converted already.

        Returns:
            The two kinds of hidden states after it, and its errors.
        """
        eps, fitted = self.norm_and_scale["eps"], self.calibration.fitted
        x_ND, held_out_ND = (_rows(norm(h, eps)) for h in np.split(h_BTD, [fitted]))
        seen = layer
        if self.method.refit:
            map_DD = follow(x_ND, _rows(norm(source_BTD[:fitted], eps)))
            seen = layer._replace(q_HND=layer.q_HND @ map_DD, k_GND=layer.k_GND @ map_DD, v_GND=layer.v_GND @ map_DD)
        weights, errors = convert_attention(
            self.source.config, self.target, seen, h_BTD.shape[1], x_ND, held_out_ND, self.method
        )

        wanted_BTD = in_batches(lambda h: attention(h, layer, self.source_rope, **self.norm_and_scale), source_BTD)
        heads_BTX = in_batches(lambda h: latent_heads(h, weights, self.target_rope, config=self.target, eps=eps), h_BTD)
        weights["o_proj"] = self._refit(weights["o_proj"], heads_BTX, h_BTD, wanted_BTD)
        h_BTD = h_BTD + heads_BTX @ weights["o_proj"]
        wanted_BTD += in_batches(lambda h: gated(h, layer, eps=eps), wanted_BTD) @ layer.down_DF.T
        gated_BTF = in_batches(lambda h: gated(h, layer, eps=eps), h_BTD)
        down_FD = self._refit(layer.down_DF.T, gated_BTF, h_BTD, wanted_BTD)
        h_BTD = h_BTD + gated_BTF @ down_FD
        errors["hidden_error"] = float(
            np.square(h_BTD[fitted:] - wanted_BTD[fitted:]).sum() / np.square(wanted_BTD[fitted:]).sum()
        )

        layers = self.params["layers"]
        for name, weight in weights.items():
            layers["self_attn"][name][i] = weight * (self.scale if name == "o_proj" else 1)
        layers["input_layernorm"][i] = 1
        layers["post_attention_layernorm"][i] = layer.mlp_norm_D
        layers["mlp"]["gate_proj"][i] = layer.gate_FD.T
        layers["mlp"]["up_proj"][i] = layer.up_FD.T
        layers["mlp"]["down_proj"][i] = down_FD * self.scale
        return wanted_BTD, h_BTD, errors

    def _refit(self, w_XD: np.ndarray, *arrays_BTX: np.ndarray) -> np.ndarray:
        if not self.method.refit:
            return w_XD
        return refit(w_XD, *(_rows(rows[: self.calibration.fitted]) for rows in arrays_BTX))

    def _report(self, errors: list[dict[str, float]], perplexities: dict[str, float]) -> Report:
        sequences, length = self.calibration.tokens_BT.shape
        return Report(
            model_type=self.source.config.model_type,
            kv_lora_rank=self.target.kv_lora_rank,
            qk_rope_head_dim=self.target.qk_rope_head_dim,
            q_lora_rank=self.target.q_lora_rank,
            cache_width={"source": self.source.config.cache_width, "converted": self.target.cache_width},
            sequence_length=length,
            fitted_tokens=self.calibration.fitted * length,
            held_out_tokens=(sequences - self.calibration.fitted) * length,
            frequency_error=frequency_error(self.source.config, self.target),
            perplexity=perplexities,
            layers=errors,
        )


def _rows(x_BTX: np.ndarray) -> np.ndarray:
    return x_BTX.reshape(-1, x_BTX.shape[-1])


def converted_perplexity(config: ModelConfig, params: dict, tokens_BT: np.ndarray) -> float:
    """Perplexity of a model of ours, as `perplexity` measures it."""
    run = jax.jit(lambda params, tokens: bind(config, params)(tokens))
    h_BTD = in_batches(lambda tokens: run(params, tokens), tokens_BT)
    return perplexity(h_BTD, np.asarray(bind(config, params).head()), tokens_BT)
