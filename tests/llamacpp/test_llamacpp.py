"""A real llama.cpp on our GGUF files computes what transformers computes on the folders they came from."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llamacpp_server import CONTEXT, serve
from mla_jax.bridge.gguf import export as bridge
from mla_jax.bridge.gguf.export import export_gguf
from mla_jax.bridge.gguf.tokenizer import _NAMES
from mla_jax.bridge.hf.export import export
from mla_jax.config import YarnConfig
from mla_jax.data.byte_bpe import SPECIAL_TOKENS
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.model.transformer import abstract_params
from tiny import MODEL
from tiny_llama import convert_exactly

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.llamacpp

TOKENIZER = load_tokenizer("needle-bpe")
NEW_TOKENS = 16
# Large weights, so that attention is far from uniform and a wrong rotation or temperature shows.
W320 = dataclasses.replace(
    MODEL, hidden_size=64, intermediate_size=64, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64,
    v_head_dim=128, q_lora_rank=64, initializer_range=0.15, rope_theta=100.0, tie_word_embeddings=False,
)  # fmt: skip
W576 = dataclasses.replace(W320, kv_lora_rank=512, qk_nope_head_dim=128)
W256 = dataclasses.replace(W320, kv_lora_rank=192, v_head_dim=64, tie_word_embeddings=True)
# llama.cpp rounds activations to the type of the weights before it multiplies.
TOLERANCES = {"f16": 0.05, "bf16": 0.25, "q8_0": 1.0}
SOURCE = {"f16": "float16", "bf16": "bfloat16", "q8_0": "float16"}


def random_params(config):
    """Norms differ from 1, so that one left out shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean, spread = (1.0, 0.2) if "norm" in path[-1].key else (0.0, config.initializer_range)
        return rng.normal(mean, spread, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def export_both(config, folder, type="f16"):
    hf_dir = export(config, random_params(config), TOKENIZER, folder / "hf", dtype=SOURCE[type])
    return hf_dir, export_gguf(hf_dir, folder / "model.gguf", type=type)


def hf_greedy(hf_dir, ids):
    """Greedy tokens and the log-probabilities [steps, vocabulary] of transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    logits = torch.stack(out.logits)[:, 0]
    return out.sequences[0, len(ids) :].tolist(), torch.log_softmax(logits, -1).numpy()


def compare(hf_dir, model, config, tolerance, lengths=(1, 80)):
    """Where both chose the same so far, log-probabilities agree; where they part, two tokens were as good as equal."""
    prompts = [np.random.default_rng(length).integers(0, 250, length).tolist() for length in lengths]
    with serve(model) as llama:
        answers = [llama.complete(ids, NEW_TOKENS, config.vocab_size) for ids in prompts]
    for length, ids, (ours, steps) in zip(lengths, prompts, answers, strict=True):
        theirs, log_probs = hf_greedy(hf_dir, ids)
        parted = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        differences = [np.abs(np.array(p) - log_probs[i]).max() for i, p in steps.items() if i <= parted]
        assert differences and max(differences) < tolerance, (length, differences)
        if parted < len(theirs):
            gap = log_probs[parted, theirs[parted]] - log_probs[parted, ours[parted]]
            assert gap <= 2 * tolerance, (length, parted, gap)
        else:
            assert ours == theirs


@pytest.mark.parametrize("type", TOLERANCES)
@pytest.mark.parametrize("config", [W320, W576], ids=["320", "576"])
def test_tokens_and_log_probabilities(config, type, tmp_path):
    hf_dir, model = export_both(config, tmp_path, type)
    compare(hf_dir, model, config, TOLERANCES[type])


def test_queries_of_one_matrix(tmp_path):
    config = dataclasses.replace(W320, q_lora_rank=None)
    hf_dir, model = export_both(config, tmp_path)
    compare(hf_dir, model, config, TOLERANCES["f16"])


def test_a_llama_that_was_converted(tmp_path):
    """It answers as the Llama itself does in transformers."""
    config, params, tokenizer = convert_exactly(tmp_path / "llama")
    hf_dir = export(config, params, tokenizer, tmp_path / "hf", dtype="float16")
    compare(tmp_path / "llama", export_gguf(hf_dir, tmp_path / "model.gguf"), config, TOLERANCES["f16"])


def test_width_256_with_a_tied_head(tmp_path):
    hf_dir, model = export_both(W256, tmp_path)
    compare(hf_dir, model, W256, TOLERANCES["f16"])
    cache = re.search(
        r"llama_kv_cache: size = +([\d.]+) MiB .* V \(f32\): +0.00 MiB",
        model.with_suffix(".log").read_text(errors="replace"),
    )
    assert cache, "only the latent is cached, which is keys and values at once"
    assert float(cache[1]) == CONTEXT * W256.cache_bytes_per_token(4) / 2**20


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim"), [(None, None), (0.7, None), (None, 0.7), (1.0, 1.0), (1.3, 0.7)]
)  # fmt: skip
def test_yarn(mscale, mscale_all_dim, tmp_path):
    yarn = YarnConfig(
        factor=8.0, original_max_position_embeddings=64, mscale=mscale, mscale_all_dim=mscale_all_dim
    )  # fmt: skip
    config = dataclasses.replace(W320, rope_scaling=yarn)
    hf_dir, model = export_both(config, tmp_path)
    compare(hf_dir, model, config, TOLERANCES["f16"], lengths=[80])
    plain = export_gguf(export_both(W320, tmp_path / "plain")[0], tmp_path / "plain.gguf")
    with pytest.raises(AssertionError):  # or the test would not notice YaRN at all
        compare(hf_dir, plain, config, TOLERANCES["f16"], lengths=[80])


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"num_hidden_layers": 26}, {"num_hidden_layers": 27}])
def test_what_is_refused_would_not_load(changes, tmp_path, monkeypatch):
    import gguf

    monkeypatch.setattr(bridge, "check_representable", lambda config: None)
    monkeypatch.setattr(bridge, "WithQueryLatent", lambda checkpoint: checkpoint)
    write = gguf.GGUFWriter.add_q_lora_rank
    monkeypatch.setattr(gguf.GGUFWriter, "add_q_lora_rank", lambda self, rank: rank and write(self, rank))
    _, model = export_both(dataclasses.replace(MODEL, **{"q_lora_rank": 8, **changes}), tmp_path)
    with pytest.raises(RuntimeError, match="does not load"), serve(model):
        pass


def test_betas_that_are_refused_would_be_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "check_representable", lambda config: None)
    yarn = YarnConfig(factor=8.0, original_max_position_embeddings=64, beta_slow=2.0, mscale=1.0, mscale_all_dim=1.0)
    config = dataclasses.replace(W320, rope_scaling=yarn)
    with pytest.raises(AssertionError):
        compare(*export_both(config, tmp_path), config, TOLERANCES["f16"], lengths=[80])


TEXTS = (
    "The pass key is 71432.\nWhat is the pass key? It's 12345678, they'll say.",
    "  leading,  double   and trailing spaces  \n\n\n\ttabs\r\nand lines \n",
    "żółć 🌍 日本語 ½ ² Ⅻ ١٢٣ e\u0301 naïve",
    "x = {'a': [1, 2.5e-3]}; // comment?!... --flag",
    "<|user|>hi<|eos|><|assistant|>",
    "a",
    "",
)  # fmt: skip


def trained(name, rule):
    """A BPE of 320 tokens that cuts words by a rule of the table."""
    ours = load_tokenizer("bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }.get(name) or [
        pre_tokenizers.Split(tokenizers.Regex(rule[0]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.model.ignore_merges = name == "llama-bpe"
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, ours._config, name)


@pytest.mark.parametrize("tokenizer", ["bytes", "needle-bpe", *_NAMES.values()])
def test_texts_are_cut_alike(tokenizer, tmp_path):
    rules = {name: rule for rule, name in _NAMES.items()}
    ours = trained(tokenizer, rules[tokenizer]) if tokenizer in rules else load_tokenizer(tokenizer)
    config = dataclasses.replace(MODEL, q_lora_rank=8)
    hf_dir = export(config, random_params(config), ours, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_dir)
    turns = ("system", "Be brief."), ("user", "Where?"), ("assistant", "There."), ("user", "Sure?")
    messages = [{"role": role, "content": content} for role, content in turns]
    with serve(export_gguf(hf_dir, tmp_path / "model.gguf")) as llama:
        for text in TEXTS:
            assert llama.tokenize(text) == theirs.encode(text, add_special_tokens=False), text
            assert llama.tokenize(text, add_special=True) == theirs.encode(text), text
        prompt = llama.post("/apply-template", messages=messages)["prompt"]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Where it adds a bos token when it tokenizes, llama.cpp takes it off here.
        assert prompt.removeprefix(theirs.bos_token) == expected.removeprefix(theirs.bos_token)
