"""Text haystacks: encoded in windows as in one piece, kept in the cache, and read around the end to an exact length."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from mla_jax.data import text_folder, workers
from mla_jax.data.needle import haystack, ring
from mla_jax.data.needle.haystack import TextHaystack
from mla_jax.data.needle.ring import Ring, mark_text, ring_arrays
from mla_jax.data.text_folder import read_windows
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError

PARAGRAPHS = (
    "It was late. Nobody spoke!\n\n  Was it 1234567 over?\n",
    "Ünïcödé, 日本語の文。 And \U0001f642\U0001f642 at 3.14; so on...\r\n",
    "\tdef f(x):\n\t\treturn x  # why?   \n\n\n",
    "a-very-long-word-without-a-space/" * 9 + " and then one.\n",
    "Several sentences. In one line. That goes on and on. " * 5,
)
TEXT = "\n \t" + "".join(PARAGRAPHS[i % 5] * (1 + i % 2) for i in range(60)) + "   \n\n"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _trained(kind: str) -> Tokenizer:
    """A BPE of 600 tokens that cuts texts as GPT-2, Llama 3 or Mistral (a "▁" before the text) do, or not at all."""
    sentencepiece = kind.startswith("▁")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=sentencepiece))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if sentencepiece:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        alphabet = []
    else:
        split = pre_tokenizers.Split(Regex(GPT2 if kind == "gpt2" else LLAMA3), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if kind == "▁llama2":
        backend.pre_tokenizer = None  # type: ignore
    return Tokenizer(backend, {"eos_token": "</s>"}, kind)


TOKENIZERS = {name: load_tokenizer(name) for name in ("bytes", "needle-bpe")} | {
    kind: _trained(kind) for kind in ("gpt2", "llama3", "▁mistral", "▁llama2")
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8", newline="")
    (folder / "b.md").write_text("\ufeff \n\n", encoding="utf-8")
    (folder / "c.md").write_text("\ufeffThe second. File.", encoding="utf-8")
    return folder


def _whole(tokenizer, folder) -> dict[str, np.ndarray]:
    texts = [(folder / name).read_text(encoding="utf-8-sig").strip() for name in ("a.txt", "c.md")]
    return ring_arrays([mark_text(tokenizer, "\n" + text) for text in texts])


@pytest.mark.parametrize(
    ("name", "window"),
    # A word of Mistral's goes on over lines until a space, so that what is around it must be longer than words are.
    [(name, window) for name in TOKENIZERS for window in (64, 1000, 100_000) if window > 64 or "▁" not in name],
)
def test_windows_give_the_tokens_cuts_and_sentences_of_the_whole_text(folder, monkeypatch, name, window):
    monkeypatch.setattr(text_folder, "WINDOW_CHARS", window)
    windows = [each for together in read_windows([folder / "a.txt", folder / "c.md"]) for each in together]
    assert (len(windows) > 10) == (window <= 1000)
    found = ring_arrays([mark_text(TOKENIZERS[name], *each) for each in windows])
    whole = _whole(TOKENIZERS[name], folder)
    for array in ("ids", "cuts", "gaps", "starts"):
        assert found[array].tolist() == whole[array].tolist(), array
    assert len(whole["gaps"]) > 100


@given(text=st.text(alphabet=" \n.a1é\r\t", max_size=300), window=st.integers(1, 40))
@settings(max_examples=150)
def test_windows_of_any_text(tmp_path_factory, text, window):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_folder, "WINDOW_CHARS", window)
        windows = [each for together in read_windows([path]) for each in together]
    stripped = path.read_text(encoding="utf-8").strip()
    assert "".join(each.text[each.start : each.end] for each in windows) == ("\n" + stripped if stripped else "")


@pytest.mark.parametrize("name", ["bytes", "needle-bpe"])
def test_a_haystack_from_the_cache_is_that_of_the_text(folder, tmp_path, monkeypatch, name):
    tokenizer, cache = TOKENIZERS[name], str(tmp_path / "cache")
    expected = Ring(tokenizer, _whole(tokenizer, folder))
    TextHaystack(tokenizer, str(folder), cache)
    monkeypatch.setattr(haystack, "_build", _encoded_again)
    found = TextHaystack(tokenizer, str(folder), cache)
    pickled = pickle.dumps(found._ring._arrays)
    assert len(pickled) < 300  # what workers get is a path
    for i in range(50):
        start = expected.random_start(np.random.default_rng(i))
        ours, theirs = found.take(np.random.default_rng(i), 500), expected.take(start, 500)
        assert ours.ids.dtype == np.int32 and ours.ids.tolist() == theirs.ids.tolist()
        assert ours.gaps.tolist() == theirs.gaps.tolist()
    (folder / "c.md").write_text("Something else. And more.")
    with pytest.raises(AssertionError, match="encoded again"):
        TextHaystack(tokenizer, str(folder), cache)


def _encoded_again(*_) -> None:
    raise AssertionError("encoded again")


def test_several_processes_encode_as_one_does(folder, tmp_path, monkeypatch):
    tokenizer = TOKENIZERS["needle-bpe"]
    monkeypatch.setattr(text_folder, "WINDOW_CHARS", 2000)
    monkeypatch.setattr(text_folder, "TOGETHER_CHARS", 5000)
    monkeypatch.setattr(workers, "BYTES_A_PROCESS", 1)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(2))
    arrays = TextHaystack(tokenizer, str(folder), str(tmp_path / "cache"))._ring._arrays
    for name, array in _whole(tokenizer, folder).items():
        assert arrays[name].tolist() == array.tolist()


@pytest.mark.parametrize("name", ["bytes", "needle-bpe"])
def test_fillers_go_around_the_end_of_the_texts(name):
    tokenizer = TOKENIZERS[name]
    arrays = ring_arrays([mark_text(tokenizer, "\nOne two three. Four five!"), mark_text(tokenizer, "\nSix. Seven")])
    size, texts = len(arrays["ids"]), Ring(tokenizer, arrays)
    endless = {key: np.tile(arrays[key], 9) for key in ("ids", "cuts")}
    gaps = (arrays["gaps"] + size * np.arange(9)[:, None]).ravel()
    for start in (0, *arrays["gaps"]):
        for length in (1, 2, 3, size - 1, size, size + 1, 3 * size, 7 * size + 5):
            filler = texts.take(int(start), length)
            last = np.flatnonzero(endless["cuts"][: start + length])
            end = max(int(last[-1]) + 1 if len(last) else 0, start)
            assert len(filler.ids) == length
            assert filler.ids[: end - start].tolist() == endless["ids"][start:end].tolist()
            assert (filler.ids[end - start :] == texts._topping).all()
            assert filler.gaps.tolist() == [0, *(gaps[(gaps > start) & (gaps <= end)] - start)]


@given(cuts=st.lists(st.booleans(), max_size=50), most=st.integers(0, 50))
def test_the_last_cut(cuts, most):
    cuts = np.array([*cuts, *[False] * 1000, *cuts], bool)
    most = min(most + len(cuts) // 2, len(cuts))
    assert ring.last_cut(cuts, most) == max((i + 1 for i in range(most) if cuts[i]), default=0)


@pytest.mark.parametrize("name", ["no.py", "a.txt"])
def test_a_folder_whose_files_hold_no_text_is_named_and_leaves_nothing(tmp_path, name):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text(" \n" * 100)
    with pytest.raises(InputError, match="texts has no .txt or .md file with text in it"):
        TextHaystack(TOKENIZERS["bytes"], str(tmp_path / "texts"), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


PROGRAM = """
import sys
import numpy as np
from mla_jax.data import workers
from mla_jax.data.needle.haystack import TextHaystack
from mla_jax.data.tokenizer import load_tokenizer

workers.MOST_PROCESSES = 1
haystack = TextHaystack(load_tokenizer("needle-bpe"), sys.argv[1], sys.argv[2])
assert all(len(haystack.take(np.random.default_rng(i), 1000).ids) == 1000 for i in range(20))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss begins with that of pytest
"""


@pytest.mark.integration
def test_memory_does_not_grow_with_the_text(tmp_path):
    words = " ".join(f"{PARAGRAPHS[i % 3].strip()} {i}." for i in range(3000))
    peaks = []
    for copies in (3, 40):  # 0.4 and 6 MB
        folder = tmp_path / str(copies)
        folder.mkdir()
        (folder / "a.txt").write_text("\n".join([words] * copies))
        for _ in ("made", "from the cache"):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "cache")],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, text=True, capture_output=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            peaks.append(int(done.stdout) / 1024)  # MiB
    assert max(peaks) - min(peaks) < 150, peaks
    assert Path(tmp_path / "cache").is_dir()
