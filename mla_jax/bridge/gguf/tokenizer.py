"""The tokenizer of a Hugging Face folder as GGUF keys, for llama.cpp's byte-level BPE."""

import json
import logging
from pathlib import Path
from typing import Any

from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError

# Pre-tokenizers, and llama.cpp's names for them (src/llama-vocab.cpp). llama.cpp has the rules in its code and takes
# only a name, so a pre-tokenizer without a name cannot be expressed.
_WORDS, _DIGITS = "GPT-2's words", "single digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMES = {
    (_WORDS,): "gpt-2",
    (_DIGITS, _WORDS): "smollm",  # the tokenizers trained here
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Adds vocabulary, merges, special tokens and chat template to a `gguf.GGUFWriter`.

    Args:
        writer: the writer of the file.
        folder: the folder with tokenizer.json and tokenizer_config.json.
        vocab_size: rows of the embedding table; ids that the tokenizer lacks become unused tokens.

    Raises:
        InputError: llama.cpp would split texts into other tokens.
    """
    import gguf  # an extra

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content, folder))
    texts = {token_id: text for text, token_id in content["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in content.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list([texts.get(i, f"[UNUSED{i}]") for i in range(vocab_size)])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in range(vocab_size)])
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates for pairs of texts
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # llama.cpp wants merges; this one never applies, since a text has no token of several characters to begin with.
    special.merges = special.merges or ["<|merged|> <|merged|>"]
    special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
    special.add_to_gguf(writer, quiet=True)
    for end_of_turn in stop_ids(load_tokenizer(str(folder)))[1:]:
        writer.add_eot_token_id(end_of_turn)


def _pre_tokenizer(content: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises InputError if it has none."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{folder}: llama.cpp gets byte-level BPE tokenizers only, this one is {model.get('type')}")
    steps = tuple(_step(step) for step in _flat(content.get("pre_tokenizer")))
    name = _NAMES.get(tuple(step for step in steps if step))
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise InputError(
            f"{folder}: llama.cpp has no name for the pre-tokenizer of this tokenizer; "
            f"those that can be expressed are {', '.join(_NAMES.values())}"
        )
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer is not None and (name, normalizer) != ("qwen2", "NFC"):
        raise InputError(f"{folder}: llama.cpp does not normalize texts, and this tokenizer does ({normalizer})")
    return name


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for s in step["pretokenizers"] for inner in _flat(s)] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> str:
    """The rule by which a step splits text: one of the table, a regular expression, "" for none."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _WORDS if use_regex else ""
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return repr(step)
