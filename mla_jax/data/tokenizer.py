"""Tokenizers: byte-level, the small BPE of the needle data, or any Hugging Face `tokenizer.json`.

The two built-in ones give byte b the id b and the special tokens the ids from 256; merges follow. A saved folder loads
in transformers' AutoTokenizer with the same ids, chat template included.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from mla_jax.data.byte_bpe import BOS, CHAT_TEMPLATE, EOS, PAD, byte_bpe, train_merges
from mla_jax.data.needle import vocabulary
from mla_jax.errors import InputError
from mla_jax.files import atomic_file

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps the templates beside the default one, NAME.jinja each."""

USUAL_SPECIAL_TOKENS = {
    "bos_token": (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<bos>"),
    "eos_token": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos>"),
    "pad_token": (PAD, "<pad>", "[PAD]", "<｜▁pad▁｜>"),
}
"""Usual names of special tokens, tried in this order where a tokenizer.json comes alone."""


SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name a special token, and variables of chat templates."""


class Encoded(NamedTuple):
    """Token ids int32, and for each the number of its word (-1 for a special token) and its characters [start, end)."""

    ids: np.ndarray
    words: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special ids and the chat template that Hugging Face keeps beside it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], source: str):
        """`config` is the content of tokenizer_config.json; `source` names the tokenizer in errors.

        Raises:
            InputError: the config names a special token that the vocabulary does not have, or no eos token.
        """
        self._backend = backend
        self._config = config
        self.source = source
        template = config.get("chat_template")
        named = {t.get("name"): t.get("template") for t in template} if isinstance(template, list) else {}
        self.chat_template: str | None = named.get("default") if isinstance(template, list) else template
        self.tool_use_template: str | None = named.get("tool_use", self.chat_template)
        """The template for conversations that come with tools."""
        self.special_tokens: dict[str, str] = {}
        """Texts of bos_token, eos_token, pad_token, ..., as far as there are such tokens; chat templates use them."""
        for name in SPECIAL_TOKEN_NAMES:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if backend.token_to_id(token) is None:
                    raise InputError(f"tokenizer {source}: {name} {token!r} is not in the vocabulary")
                self.special_tokens[name] = token
        if "eos_token" not in self.special_tokens:
            raise InputError(f"tokenizer {source} has no eos_token; name it in a {CONFIG_FILE} beside {TOKENIZER_FILE}")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self._id("bos_token") if "bos_token" in self.special_tokens else None

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer."""
        return self._id("eos_token")

    @property
    def pad_id(self) -> int:
        """Id that fills up rows; the eos token's if there is none of its own."""
        return self._id("pad_token" if "pad_token" in self.special_tokens else "eos_token")

    def _id(self, name: str) -> int:
        token_id = self._backend.token_to_id(self.special_tokens[name])
        assert token_id is not None
        return token_id

    @functools.cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for themselves in any text, such as special tokens and the marks of turns."""
        return frozenset(self._backend.get_added_tokens_decoder())

    @functools.cached_property
    def blank(self) -> np.ndarray:
        """Bool [vocab_size], true for ids whose text is nothing but white space: special tokens, too, have none."""
        texts = self._backend.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=True)
        return np.array([not text.strip() for text in texts])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added; special tokens written out in the text become their ids."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_words(self, text: str) -> Encoded:
        """`encode` with the word and the characters of each token."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts, ends = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2).T
        words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
        return Encoded(np.array(encoding.ids, np.int32), words, starts, ends)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; ids beyond the vocabulary give nothing, broken UTF-8 gives U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that turns text into ids; equal for a tokenizer and its saved copy."""
        content = json.loads(self._backend.to_str())
        model = content["model"]
        canonical = {
            "vocabulary": self._backend.get_vocab(with_added_tokens=True),
            "merges": model.get("merges"),
            "model": [model.get(key) for key in ("type", "ignore_merges", "byte_fallback")],
            "added_tokens": sorted((t["id"], t["content"]) for t in content["added_tokens"]),
            "normalizer": content["normalizer"],
            "pre_tokenizer": content["pre_tokenizer"],
            "special_ids": [self.bos_id, self.eos_id, self.pad_id],
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    @property
    def definition(self) -> str:
        """Everything that decides what a text or a conversation becomes, as one text; no name or path is in it."""
        return json.dumps([self._backend.to_str(), self.chat_template, self.tool_use_template, self.special_tokens])

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, both or neither, creating the folder if needed.

        Raises:
            InputError: the folder cannot be written (no permission, full disk).
        """
        folder = Path(folder)
        created = not folder.exists()
        files = {
            TOKENIZER_FILE: self._backend.to_str(pretty=True),
            CONFIG_FILE: json.dumps(self._config, indent=2, ensure_ascii=False) + "\n",
        }
        try:
            with contextlib.ExitStack() as both:
                for name, content in files.items():
                    both.enter_context(atomic_file(folder / name)).write_text(content, encoding="utf-8")
        except InputError as e:
            if created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise InputError(f"could not save the tokenizer: {e}") from e


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, `needle-bpe`, a tokenizer.json, or a Hugging Face folder.

    Raises:
        InputError: no such file, or one that is not a tokenizer.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if spec == "needle-bpe":
        return needle_tokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise InputError(f"tokenizer {spec!r} not found: expected bytes, needle-bpe, a {TOKENIZER_FILE} or its folder")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise InputError(f"{path} is not a tokenizer.json that the tokenizers library reads ({e})") from e
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, _read_config(path.parent, backend), spec)


def _read_config(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Content of tokenizer_config.json with the chat templates in it; guessed special tokens if there is none."""
    path = folder / CONFIG_FILE
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise InputError(f"{path} is not JSON ({e})") from e
        if not isinstance(config, dict):
            raise InputError(f"{path} is not a JSON object")
    else:
        for name, usual in USUAL_SPECIAL_TOKENS.items():
            token = next((t for t in usual if backend.token_to_id(t) is not None), None)
            if token is not None:
                config[name] = token
    files = {"default": folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    templates = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    return config


@functools.lru_cache(maxsize=1)
def byte_tokenizer() -> Tokenizer:
    """Byte b is token b; the special tokens follow. 262 ids."""
    return _built_in(merges=[], source="bytes")


@functools.lru_cache(maxsize=1)
def needle_tokenizer() -> Tokenizer:
    """The BPE in which every word of the synthetic data is one token and numbers are single digits; 507 ids."""
    return train_bpe(vocabulary.PIECES, 512, source="needle-bpe")


def train_bpe(texts: Iterable[str], vocab_size: int, source: str) -> Tokenizer:
    """Byte-level BPE with digits split singly, like SmolLM's and StarCoder's; the same texts give the same tokenizer.

    Raises:
        UsageError: `vocab_size` does not hold the 256 bytes and the special tokens.
    """
    return _built_in(train_merges(texts, vocab_size), source)


def _built_in(merges: list[tuple[str, str]], source: str) -> Tokenizer:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(byte_bpe(merges), config, source)
