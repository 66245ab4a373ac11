"""The errors of a conversion, as text and as JSON. `docs/importing.md` says what the figures mean."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mla_jax.files import write_json

REPORT = "conversion.json"
_COLUMNS = {
    "key_error": "keys",
    "value_error": "values",
    "query_error": "queries",
    "rotary_share": "rotary share",
    "latent_rms_variation": "latent RMS",
    "hidden_error": "hidden state",
}


@dataclass(frozen=True)
class Report:
    """The shape that was made and its errors, which are shares of energy on held-out text."""

    model_type: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    q_lora_rank: int | None
    cache_width: dict[str, int]
    """Cached elements per token and layer, `source` and `converted`."""
    sequence_length: int
    fitted_tokens: int
    held_out_tokens: int
    frequency_error: float
    perplexity: dict[str, float]
    """On the held-out text: `source`, `converted`."""
    layers: list[dict[str, float]]

    def write(self, run_dir: Path) -> None:
        """Puts conversion.json into a run folder. Raises InputError if it cannot be written."""
        write_json(run_dir / REPORT, dataclasses.asdict(self), parents=False)

    def __str__(self) -> str:
        names = [name for name in _COLUMNS if name in self.layers[0]]
        lines = [f"{'layer':>5}" + "".join(f"{_COLUMNS[name]:>14}" for name in names)]
        for i, errors in enumerate(self.layers):
            lines.append(f"{i:>5}" + "".join(f"{errors[name]:>14.3%}" for name in names))
        before, after = self.cache_width["source"], self.cache_width["converted"]
        lines += [
            "",
            f"{'perplexity of ' + format(self.held_out_tokens, ',') + ' held-out tokens':<44}",
            f"  {'source':<42}{self.perplexity['source']:>10.3f}",
            f"  {'converted':<42}{self.perplexity['converted']:>10.3f}",
            f"cached elements per token and layer: {before} before, {after} after ({after / before:.1%})",
        ]
        if self.frequency_error > 1e-6:
            lines.append(f"rotary frequencies differ by up to {self.frequency_error:.1%} (YaRN for Llama 3's scaling)")
        return "\n".join(lines)
