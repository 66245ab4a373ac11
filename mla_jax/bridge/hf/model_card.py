"""README.md of an exported model: its shape, how to load it, and the results of its evaluations."""

from collections.abc import Iterator, Sequence

from mla_jax.bridge.hf.layout import count_parameters
from mla_jax.config import ModelConfig
from mla_jax.evals.cells import Cell
from mla_jax.evals.report import format_interval, format_percent, format_table, measure_title, measured
from mla_jax.evals.results import Results

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [multi-head-latent-attention, deepseek_v3, long-context]
---

# {name}

A dense DeepSeek-V3 decoder with Multi-Head Latent Attention: its cache holds one latent of {latent} numbers and one
rotary key of {rope} per token and layer, {cache_bytes:,} bytes per token at 16 bits.

| | |
|---|---|
| parameters | {parameters:,} ({dtype}{tied}) |
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| head dimensions (nope, rope, value) | {config.qk_nope_head_dim}, {config.qk_rope_head_dim}, {config.v_head_dim} |
| kv_lora_rank, q_lora_rank | {config.kv_lora_rank}, {query_rank} |
| vocabulary | {config.vocab_size:,} |
| positions | {positions} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
inputs = tokenizer("What is the pass key?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=10)[0]))
```

## Evaluation

{evaluation}
"""

_RESULTS = """\
### {title}

{description}, with 95 % intervals.{details}

| length (tokens) | score | prompts | mean | 95 % interval |
|---|---|---|---|---|
{rows}

By {param}:

```
{table}
```"""


def model_card(name: str, config: ModelConfig, dtype: str, results: Sequence[Results]) -> str:
    """The text of README.md.

    Args:
        name: the folder's.
        config: the model.
        dtype: type of the weights.
        results: the model's evaluations; without any the card says that it was not evaluated.
    """
    yarn = config.rope_scaling
    positions = f"up to {config.max_position_embeddings:,}, RoPE theta {config.rope_theta:,.0f}"
    if yarn is not None:
        positions += f", YaRN factor {yarn.factor:g} over {yarn.original_max_position_embeddings:,}"
    return _CARD.format(
        name=name,
        config=config,
        dtype=dtype,
        parameters=count_parameters(config),
        tied="; embedding table and head are tied, both are in the file" if config.tie_word_embeddings else "",
        latent=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        cache_bytes=config.cache_bytes_per_token(),
        query_rank="none" if config.q_lora_rank is None else config.q_lora_rank,
        positions=positions,
        evaluation="\n\n".join(_evaluation(each, dtype) for each in results) or "Not evaluated.",
    )


def _evaluation(results: Results, dtype: str) -> str:
    lengths = results.by_length
    cells = lengths if len(lengths) == 1 else [*lengths, results.total]
    (param,) = results.cells[0].params.keys() - {"length"}
    return _RESULTS.format(
        title=results.title,
        description=results.description,
        details="".join("\n" + sentence for sentence in _details(results, dtype)),
        rows="\n".join(row for cell in cells for row in _rows(cell)),
        param="depth (0 % is the start)" if param == "depth" else param,
        table=format_table(results.cells),
    )


def _rows(cell: Cell) -> Iterator[str]:
    """A row of the table for each measure and score."""
    length = "all" if cell.length is None else f"{cell.length:,}"
    for name, each in cell.means.items():
        middle, low, high = measured(name, each)
        yield f"| {length} | {measure_title(name)} | {each.n:,} | {middle:.4g} | {low:.4g} to {high:.4g} |"
    for name, rate in cell.all_rates.items():
        score, mean, interval = name.replace("_", " "), format_percent(rate.rate), format_interval(rate)
        yield f"| {length} | {score} | {rate.n:,} | {mean} | {interval} |"


def _details(results: Results, dtype: str) -> list[str]:
    """Sentences on which weights were evaluated, where, when and how, as far as the results say."""
    sentences = []
    if results.model.get("trained_lengths"):
        sentences.append(f"Trained at lengths up to {max(results.model['trained_lengths']):,}.")
    sentences.append(f"Measured at step {results.model['step']:,}.")
    if {"hardware", "date"} <= results.provenance.keys():
        sentences.append("Measured on {hardware}, {date}.".format(**results.provenance))
    if "command" in results.provenance:
        sentences.append("Command: `{command}`.".format(**results.provenance))
    if results.config.get("cache_dtype"):
        sentences.append(f"Measured with a KV cache of {results.config['cache_dtype']}.")
    if dtype != "float32":
        sentences.append(f"Measured before the weights were rounded to {dtype}.")
    return sentences
