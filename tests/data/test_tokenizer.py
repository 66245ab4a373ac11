"""Tokenizers against transformers, which must read what we save and give the same ids."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from mla_jax.data.byte_bpe import EOS, SPECIAL_TOKENS
from mla_jax.data.chat import render
from mla_jax.data.needle import vocabulary
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mla_jax.errors import InputError

BUILT_IN = ["bytes", "needle-bpe"]
TEXTS = [
    "",
    "The pass key is 48213. Remember it.",
    " leading,  double  and trailing spaces  ",
    "line\nline\n\n\nline\t tab",
    "don't 3.14159 1,000,000 x2y",
    "Größe 日本語 🙂 \u200b zero width",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": " 42 "},
    {"role": "user", "content": "Gewiß?"},
]


@pytest.fixture(scope="module", params=BUILT_IN)
def pair(request, tmp_path_factory):
    ours = load_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    ours.save(folder)
    return ours, AutoTokenizer.from_pretrained(folder), folder


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_gives_the_same_ids_and_text(pair, text):
    ours, theirs, _ = pair
    ids = ours.encode(text)
    assert theirs(text).input_ids == [ours.bos_id, *ids]
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert ours.decode(ids) == text
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_transformers_writes_chats_the_same(pair, add_generation_prompt):
    ours, theirs, _ = pair
    text = render(ours, CHAT, add_generation_prompt=add_generation_prompt)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
    encoded = theirs.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt, return_dict=True)
    assert ours.encode(text) == encoded["input_ids"]


def test_special_ids_are_transformers(pair):
    ours, theirs, _ = pair
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_saving_and_loading_keeps_everything(pair, tmp_path):
    ours, theirs, folder = pair
    theirs.save_pretrained(tmp_path / "theirs")
    for path in (folder, folder / "tokenizer.json", tmp_path / "theirs"):
        loaded = load_tokenizer(str(path))
        assert loaded.fingerprint == ours.fingerprint
        assert loaded.chat_template == ours.chat_template


@pytest.mark.parametrize("spec", BUILT_IN)
@given(text=st.text(max_size=60).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
@settings(max_examples=60)
def test_decode_inverts_encode(spec, text):
    """But for the names of special tokens, which stand for these, as in Hugging Face's tokenizers."""
    tokenizer = load_tokenizer(spec)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_their_own_ids():
    text = "A 🙂\n"
    assert load_tokenizer("bytes").encode(text) == list(text.encode())
    assert load_tokenizer("bytes").vocab_size == 262


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert load_tokenizer("bytes").decode([65, 300, 66, 257, 0xE2]) == "AB\ufffd"


def test_every_word_of_the_needle_data_is_one_token():
    tokenizer = load_tokenizer("needle-bpe")
    assert tokenizer.vocab_size <= 512
    for text in vocabulary.PIECES:
        encoded = tokenizer.encode_with_words(text)
        assert len(set(encoded.words)) == len(encoded.words), text


@pytest.mark.parametrize("spec", BUILT_IN)
def test_digits_are_single_tokens(spec):
    tokenizer = load_tokenizer(spec)
    assert len(tokenizer.encode("1234567890")) == 10
    assert tokenizer.encode(" 907") == tokenizer.encode(" ") + [t for d in "907" for t in tokenizer.encode(d)]


def test_the_needle_tokenizer_is_the_same_in_every_process():
    code = "from mla_jax.data.tokenizer import load_tokenizer; print(load_tokenizer('needle-bpe').fingerprint)"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == load_tokenizer("needle-bpe").fingerprint


def test_fingerprints_tell_tokenizers_apart():
    prints = {
        load_tokenizer("bytes").fingerprint,
        load_tokenizer("needle-bpe").fingerprint,
        train_bpe(vocabulary.PIECES, 300, "small").fingerprint,
        train_bpe(vocabulary.PIECES[::2], 300, "other words").fingerprint,
    }
    assert len(prints) == 4


def test_unknown_roles_are_refused():
    with pytest.raises(InputError, match="unknown role"):
        render(load_tokenizer("bytes"), [{"role": "robot", "content": "beep"}])


def _foreign(folder: Path, config: dict | None, special: tuple[str, ...] = ("<s>", "</s>")) -> Path:
    """A tokenizer that somebody else made."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.enable_truncation(1)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_foreign_folder(tmp_path):
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    config = {"bos_token": bos, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = _foreign(tmp_path / "hf", config)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] | tojson }}{{ eos_token }}")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode("hello world") == [1, 2]  # not truncated
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 4, 4, 5)
    assert render(tokenizer, [{"role": "user", "content": "<é>"}]) == '"<é>"</s>'
    tokenizer.save(tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs("hello").input_ids == [1]
    assert theirs.apply_chat_template([{"role": "user", "content": "<é>"}], tokenize=False) == '"<é>"</s>'


def test_a_tokenizer_json_alone_has_its_usual_special_tokens(tmp_path):
    tokenizer = load_tokenizer(str(_foreign(tmp_path / "hf", None) / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (3, 4)
    with pytest.raises(InputError, match="no chat template"):
        render(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (None, "not found"),
        ({}, "not found"),
        ({"tokenizer.json": ""}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": '{"model": 1}'}, "tokenizer.json is not a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, named):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(InputError, match=named) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"eos_token": "<end>"}', "'<end>' is not in the vocabulary"),
        ("{}", "no eos_token"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, config, named):
    folder = _foreign(tmp_path / "hf", None)
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=named):
        load_tokenizer(str(folder))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    old = tmp_path / "old"
    load_tokenizer("bytes").save(old)
    monkeypatch.setattr(Path, "replace", full)
    for folder in (tmp_path / "new", old):
        with pytest.raises(InputError, match="No space left"):
            load_tokenizer("needle-bpe").save(folder)
    assert not (tmp_path / "new").exists()
    assert load_tokenizer(str(old)).fingerprint == load_tokenizer("bytes").fingerprint
    assert len(list(old.iterdir())) == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not save the tokenizer"):
        load_tokenizer("bytes").save(tmp_path / "file" / "folder")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(InputError, match="at least 262"):
        train_bpe(["text"], 100, "tiny")


def test_special_tokens_in_text_become_their_ids():
    tokenizer: Tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(f"a{EOS}") == [97, tokenizer.eos_id]
    assert tokenizer.decode([97, tokenizer.eos_id]) == "a"
