"""Passkey prompts against those of landmark attention."""

import pytest

from mla_jax.config import NeedleDataConfig
from mla_jax.data.needle.generator import NeedleGenerator, Purpose, make_rng, passkey_prompt
from mla_jax.errors import UsageError
from needle_tokenizers import OURS, SPACES_FIRST, TOKENIZERS


def _landmark(prefix_length: int, suffix_length: int, key: str) -> str:
    """The reference prompt, as landmark-attention's run_test.py builds it."""
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    garbage_inf = " ".join([garbage] * 500)
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        garbage_inf[:prefix_length],
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        garbage_inf[:suffix_length],
        "What is the pass key? The pass key is",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.93, 1])
@pytest.mark.parametrize("length", [260, 300, 777, 2048])
@pytest.mark.parametrize("name", [*OURS, *SPACES_FIRST])
def test_passkey_prompts_are_landmark_attentions(name, length, depth):
    tokenizer = TOKENIZERS[name]
    ids, key = passkey_prompt(tokenizer, length, depth, seed=1, index=5)
    assert len(ids) == length and ids[0] == tokenizer.bos_id and 1 <= int(key) <= 50_000
    text = tokenizer.decode(ids)
    assert ids[1:] == tokenizer.encode(text)
    _, before, _, after, _ = text.split("\n")
    if name == "bytes":
        assert text == _landmark(len(before), len(after), key)
    else:  # where no word fits, other words make up the length
        assert text.startswith(_landmark(len(before), 0, key).rpartition("\n\n")[0])
    # The needle's sentence begins behind the sentence that ends nearest to the depth.
    noise = len(tokenizer.encode(before)) + len(tokenizer.encode(after))
    sentence = len(tokenizer.encode(" There and back again."))
    behind = noise - len(tokenizer.encode(before))
    assert abs(noise - behind - depth * noise) <= sentence / 2 + 1 or behind < sentence
    assert before == "" or before.endswith(".")


def test_passkey_prompts_differ_by_index_and_are_held_out():
    tokenizer = TOKENIZERS["needle-bpe"]
    keys = [passkey_prompt(tokenizer, 128, 0.5, seed=1, index=i)[1] for i in range(50)]
    assert len(set(keys)) > 45
    assert keys[7] == passkey_prompt(tokenizer, 4000, 1.0, seed=1, index=7)[1]
    data = NeedleDataConfig(tokenizer="needle-bpe", tasks={"passkey": 1.0}, haystacks={"noise": 1.0})
    generator = NeedleGenerator(data, tokenizer)
    trained = [generator.example(make_rng(1, Purpose.EXAMPLE, i), 128).tokens for i in range(50)]
    assert not {tokenizer.decode(t).split()[-1].rstrip(".") for t in trained} & set(keys)


def test_too_short_a_passkey_prompt_names_the_shortest():
    for tokenizer in TOKENIZERS.values():
        with pytest.raises(UsageError, match="shortest possible") as error:
            passkey_prompt(tokenizer, 20, 0.5, seed=1, index=0)
        shortest = int(str(error.value).split()[-1])
        assert all(len(passkey_prompt(tokenizer, shortest, 0.5, 1, i)[0]) == shortest for i in range(20))
