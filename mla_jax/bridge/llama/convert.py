"""Converts a Llama-style checkpoint to MLA, layer by layer, with the calibration texts propagated along.

The residual stream is scaled so that norms with the epsilon of the source do the same with that of DeepSeek-V3: a norm
of s h with epsilon s^2 e is the norm of h with epsilon e.
"""

from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mla_jax.bridge.hf.layout import EMBEDDING, HEAD
from mla_jax.bridge.llama.attention import convert_attention
from mla_jax.bridge.llama.calibration import Calibration, in_batches, perplexity, read_calibration
from mla_jax.bridge.llama.config import Ranks, frequency_error, target_config
from mla_jax.bridge.llama.layer import LlamaLayer, Rotary, cos_sin, forward, forward_decoupled, norm
from mla_jax.bridge.llama.report import Report
from mla_jax.bridge.llama.source import FINAL_NORM, LlamaCheckpoint
from mla_jax.checkpoint.run_folder import check_tokenizer
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.mesh import with_concrete_shardings
from mla_jax.model.rope import inv_freq
from mla_jax.model.transformer import abstract_params, bind


def convert(
    hf_dir: str | Path, ranks: Ranks, texts: str | Path, *, tokens: int = 65_536, length: int = 1024
) -> tuple[ModelConfig, dict, Tokenizer, Report]:
    """Reads and converts a checkpoint, and measures what the conversion costs.

    Args:
        hf_dir: folder with config.json, safetensors and tokenizer.json.
        ranks: widths of the latent attention.
        texts: file of UTF-8 text, of the kind that the model is for.
        tokens: the most tokens of the text to use.
        length: tokens of a calibration sequence.

    Returns:
        Config, parameters and tokenizer as `bridge.hf.reader.load` returns them, and the report.

    Raises:
        InputError: the checkpoint cannot be read or represented, or the text is too short.
        UsageError: ranks that this checkpoint cannot have.
    """
    source = LlamaCheckpoint(Path(hf_dir))
    target = target_config(source.hf, source.config, ranks, tied=source.tied, dtype=source.dtype)
    source.check(target)
    check_tokenizer(source.tokenizer, target)
    calibration = read_calibration(texts, source.tokenizer, tokens, min(length, target.max_position_embeddings))
    params, report = _Conversion(source, target, calibration).run()
    return target, params, source.tokenizer, report


class _Conversion:
    """The conversion of one checkpoint: what its layers share, and the parameters being filled."""

    def __init__(self, source: LlamaCheckpoint, target: ModelConfig, calibration: Calibration):
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
        h_BTD = embedding_XD[self.calibration.tokens_BT]
        decoupled_BTD = h_BTD[fitted:]
        errors = []
        for i in tqdm(range(self.target.num_hidden_layers), desc="converting layers", leave=False):
            layer = self.source.layer(i)
            h_BTD, decoupled_BTD, layer_errors = self._layer(i, layer, h_BTD, decoupled_BTD)
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
            "source": held_out_perplexity(h_BTD[fitted:]),
            "positions_decoupled": held_out_perplexity(decoupled_BTD),
            "converted": converted_perplexity(self.target, params, held_out),
        }
        return params, self._report(errors, perplexities)

    def _layer(self, i: int, layer: LlamaLayer, h_BTD, decoupled_BTD):
        """Converts layer i. Returns the hidden states after it, of the source and with decoupled RoPE, and errors."""
        x_BTD = norm(h_BTD, self.norm_and_scale["eps"])
        x_ND, held_out_ND = (
            x.reshape(-1, x.shape[-1]) for x in (x_BTD[: self.calibration.fitted], x_BTD[self.calibration.fitted :])
        )
        attention, decoupled, errors = convert_attention(
            self.source.config, self.target, layer, h_BTD.shape[1], x_ND, held_out_ND
        )

        layers = self.params["layers"]
        for name, weight in attention.items():
            layers["self_attn"][name][i] = weight * (self.scale if name == "o_proj" else 1)
        layers["input_layernorm"][i] = 1
        layers["post_attention_layernorm"][i] = layer.mlp_norm_D
        layers["mlp"]["gate_proj"][i] = layer.gate_FD.T
        layers["mlp"]["up_proj"][i] = layer.up_FD.T
        layers["mlp"]["down_proj"][i] = layer.down_DF.T * self.scale

        rotary = Rotary(
            decoupled.q_rope_HRD.astype(np.float32), decoupled.k_rope_RD.astype(np.float32), self.target_rope
        )
        k_nope_GND = decoupled.k_nope_GND.astype(np.float32)
        after = in_batches(lambda h: forward(h, layer, self.source_rope, **self.norm_and_scale), h_BTD)
        decoupled_after = in_batches(
            lambda h: forward_decoupled(h, layer, k_nope_GND, rotary, **self.norm_and_scale), decoupled_BTD
        )
        return after, decoupled_after, errors

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


def converted_perplexity(config: ModelConfig, params: dict, tokens_BT: np.ndarray) -> float:
    """Perplexity of a model of ours, as `perplexity` measures it."""
    run = jax.jit(lambda params, tokens: bind(config, params)(tokens))
    h_BTD = in_batches(lambda tokens: run(params, tokens), tokens_BT)
    return perplexity(h_BTD, np.asarray(bind(config, params).head()), tokens_BT)
