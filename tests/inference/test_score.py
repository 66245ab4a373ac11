"""Log-likelihoods through the cache equal those of the whole forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import mesh
from mla_jax.bridge.hf import verify
from mla_jax.bridge.hf.export import export
from mla_jax.config import MeshConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.inference.generator import Generator
from mla_jax.inference.memory import MemoryPlan
from mla_jax.inference.score import hidden_log_probs, rolling_log_probs, score, score_continuations
from mla_jax.inference.session import Session
from mla_jax.model.transformer import bind, init_params
from tiny import MODEL

CONFIG = dataclasses.replace(MODEL, initializer_range=0.5, tie_word_embeddings=False, max_position_embeddings=200)
PARAMS = init_params(CONFIG, 0)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, CONFIG.vocab_size, n).tolist() for n in (2, 151, 70, 200, 65, 129)]
CONTEXTS = [1, 100, 69, 1, 64, 65]
"""Tokens of each text that are its context: one, to a boundary of chunks, all but one."""
ROWS = (
    [text[:n] for text, n in zip(TEXTS, CONTEXTS, strict=True)],
    [text[n:] for text, n in zip(TEXTS, CONTEXTS, strict=True)],
)


@functools.cache
def expected_log_probs():
    """float64 [text, position], of each token of each text given those before it; the first of a text is left out."""
    tokens = np.zeros((len(TEXTS), max(map(len, TEXTS))), np.int32)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = text
    model = bind(CONFIG, PARAMS)
    logits = np.asarray(jax.jit(lambda x: model.logits(model(x)))(tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits.max(-1, keepdims=True)
    return [log_probs[i, np.arange(len(text) - 1), text[1:]] for i, text in enumerate(TEXTS)]


def expected_of_continuations():
    return [row[n - 1 :] for row, n in zip(expected_log_probs(), CONTEXTS, strict=True)]


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG, PARAMS, prefill_chunk=64 * len(TEXTS))


def assert_close(scores, expected, tolerance=2e-4):
    for got, row in zip(scores, expected, strict=True):
        assert got.log_probs.dtype == np.float32
        np.testing.assert_allclose(got.log_probs, row, atol=tolerance)
        assert got.log_likelihood == pytest.approx(row.sum(), abs=tolerance * len(row))


@pytest.mark.parametrize("chunk", [1, 100, 1024])
def test_ragged_continuations_score_as_in_the_whole_forward_pass(generator, chunk):
    expected = expected_of_continuations()
    assert np.std(np.concatenate(expected)) > 1, "the test would not notice much"
    assert_close(score(generator, *ROWS, chunk=chunk), expected)


def test_scores_are_those_of_transformers(generator, tmp_path):
    torch, transformers = verify.import_transformers()
    folder = export(CONFIG, PARAMS, load_tokenizer("bytes"), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, got in zip(TEXTS[:3], score(generator, *ROWS)[:3], strict=True):
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([text])).logits[0].double(), -1)
        expected = log_probs[torch.arange(len(text) - 1), torch.tensor(text[1:])].numpy()
        np.testing.assert_allclose(got.log_probs, expected[-len(got.log_probs) :], atol=2e-4)


def test_the_greedy_continuation_is_greedy_and_no_other(generator):
    contexts = [text[:n] for text, n in zip(TEXTS[:3], (1, 100, 69), strict=True)]
    greedy = generator.generate(contexts, max_new_tokens=70)  # more than a chunk of prefill
    other = [
        [*row[:i], (row[i] + 1) % CONFIG.vocab_size, *row[i + 1 :]] for row, i in zip(greedy, (0, 30, 69), strict=True)
    ]
    assert [got.is_greedy for got in score(generator, contexts, greedy)] == [True] * 3
    assert [got.is_greedy for got in score(generator, contexts, other)] == [False] * 3
    assert [got.is_greedy for got in score(generator, contexts, [row[:1] for row in greedy])] == [True] * 3


@pytest.mark.parametrize("prefill_chunk", [64, 8192])
def test_a_long_text_is_scored_in_one_pass(prefill_chunk):
    generator = Generator(CONFIG, PARAMS, prefill_chunk=prefill_chunk)
    for text, expected in zip(TEXTS, expected_log_probs(), strict=True):
        got = rolling_log_probs(generator, text, chunk=50)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_continuations_of_one_context_read_it_once(generator, batch, monkeypatch):
    context, session = TEXTS[1][:100], Session.empty(1)
    continuations = [TEXTS[1][100:], TEXTS[2][:1], TEXTS[2][:30], TEXTS[1][100:102], TEXTS[2][:64]]
    expected = score(generator, [context] * 5, continuations)
    got = score_continuations(generator, context, continuations, session=session, batch=batch)
    assert_close(got, [row.log_probs.astype(float) for row in expected], 1e-4)
    assert session.tokens == [context[:-1]]
    read = []
    generator.read(session, [context], on_prefill=lambda done, total: read.append(total))
    assert read == [1]


def test_one_haystack_serves_many_questions(generator):
    haystack, session, read = TEXTS[1][:100], Session.empty(1), []
    generator.read(session, [haystack], on_prefill=lambda done, total: read.append((done, total)))
    before = session.layers[0].c_BSC.shape
    for question, answers in ((TEXTS[2][:20], [[1, 2], [3]]), (TEXTS[2][20:60], [[4] * 10, [5]])):
        context = haystack + question
        got = score_continuations(generator, context, answers, session=session)
        expected = score(generator, [context] * 2, answers)
        assert_close(got, [row.log_probs.astype(float) for row in expected], 1e-4)
        assert session.tokens == [context[:-1]]
    assert read[-1] == (100, 100) and session.layers[0].c_BSC.shape[1] > before[1]


def test_a_session_that_has_read_a_part_gives_the_same_scores(generator):
    session = Session.empty(len(TEXTS))
    generator.read(session, [context[: len(context) // 2] for context in ROWS[0]])
    assert_close(score(generator, *ROWS, session=session), expected_of_continuations())
    assert session.tokens == [text[:-1] for text in TEXTS]
    assert_close(score(generator, *ROWS, session=session), expected_of_continuations())


@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32", "int8"), ("bfloat16", None), ("bfloat16", "int8")])
def test_scores_with_a_cache_of_16_or_8_bits_are_off_by_its_roundings(dtype, cache_dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype, initializer_range=0.1, tie_word_embeddings=True)
    params = init_params(config, 0)
    exact = score(Generator(dataclasses.replace(config, dtype="float32"), params), *ROWS)
    got = score(Generator(config, params, cache_dtype=cache_dtype), *ROWS)
    difference = np.concatenate([a.log_probs - b.log_probs for a, b in zip(exact, got, strict=True)])
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.05


def test_scores_do_not_depend_on_the_mesh():
    expected = expected_of_continuations()
    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=2, fsdp=4))):
        generator = Generator(CONFIG, init_params(CONFIG, 0), prefill_chunk=512)
        assert_close(score(generator, *ROWS, chunk=30), expected)
        with pytest.raises(UsageError, match="copied on one device"):
            score_continuations(generator, [1, 2], [[3], [4]])


def test_logits_exist_for_a_chunk_of_tokens_at_a_time():
    h_BTD, targets = jnp.zeros((2, 64, CONFIG.hidden_size)), jnp.zeros((2, 64), jnp.int32)
    weights = {name: x for name, x in Generator(CONFIG, PARAMS).weights.items() if name != "layers"}
    program = str(jax.make_jaxpr(lambda h, t: hidden_log_probs(CONFIG, weights, h, t, 16))(h_BTD, targets))
    assert "f32[2,8,512]" in program and "f32[2,64,512]" not in program


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    plan = functools.partial(MemoryPlan.of, CONFIG, cache_dtype=None, int8_weights=False, prefill_chunk=64)
    logits = 2 * 4 * 16 * CONFIG.vocab_size
    generator = Generator(CONFIG, PARAMS, prefill_chunk=64, memory_limit=plan(rows=1, tokens=128).total + logits)
    context, answers = TEXTS[1][:100], [TEXTS[2][:20], TEXTS[2][20:48]]
    alone = score_continuations(Generator(CONFIG, PARAMS), context, answers)
    got = score_continuations(generator, context, answers, chunk=16)  # one after the other: a copy would not fit
    assert_close(got, [row.log_probs.astype(float) for row in alone], 1e-4)
    monkeypatch.setattr("mla_jax.inference.generator.init_layer", lambda *_: pytest.fail("allocated"))
    with pytest.raises(InputError, match="1 x 128 tokens need .*; not even one token fits"):
        score_continuations(generator, context, answers, chunk=40)
    with pytest.raises(InputError, match="2 x 128 tokens need"):
        score(generator, [context] * 2, answers, chunk=16)
    both = plan(tokens=128, rows=2).total + logits // 16  # the logits of one token, but each row has one at a time
    with pytest.raises(InputError, match="2 x 128 tokens need"):
        score(Generator(CONFIG, PARAMS, prefill_chunk=64, memory_limit=both), [context] * 2, answers, chunk=1)


def test_a_text_may_fill_the_model_to_the_last_position(generator):
    limit = CONFIG.max_position_embeddings
    context, answer = TEXTS[3][: limit - 1], [4, 5]  # of which the last token is predicted, but not read
    (got,) = score(generator, [context], [answer])
    (without,) = score(generator, [context], [answer[:1]])
    np.testing.assert_allclose(got.log_probs[:1], without.log_probs, atol=1e-4)
    model = bind(CONFIG, PARAMS)
    last = jax.nn.log_softmax(jax.jit(lambda x: model.logits(model(x)))(np.array([[*context, 4]]))[0, -1])
    np.testing.assert_allclose(got.log_probs[1], last[5], atol=2e-4)
    assert len(rolling_log_probs(generator, [3] * (limit + 1))) == limit


def test_nothing_to_score_gives_nothing(generator):
    assert score(generator, [], []) == []
    assert score_continuations(generator, [1], []) == []


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([[1], []], [[1], [1]], "context 1 is empty, but nothing predicts the first token of a text"),
        ([[1]], [[]], "continuation 0 is empty"),
        ([[1]], [[1], [2]], "1 contexts do not go with 2 continuations"),
        ([[1] * 150], [[1] * 52], "context 0 of 150 tokens and its continuation of 52 exceed .* 200"),
        ([[1, 512]], [[1]], "context 0 has token 512, outside the vocabulary of 512"),
        ([[1]], [[1, -1]], "continuation 0 has token -1, outside the vocabulary"),
    ],
)
def test_bad_input_is_named(generator, contexts, continuations, message):
    with pytest.raises(InputError, match=message):
        score(generator, contexts, continuations)


def test_other_bad_input_is_named(generator):
    with pytest.raises(InputError, match="at least two tokens, the first of which has no prediction; got 1"):
        rolling_log_probs(generator, [1])
    with pytest.raises(InputError, match="context 0 is empty"):
        score_continuations(generator, [], [[1]])
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        score(generator, [[1]], [[1]], chunk=0)
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        score_continuations(generator, [1], [[1]], batch=0)
    with pytest.raises(InputError, match="the session has 2 rows, but there are 1 prompts"):
        score(generator, [[1]], [[1]], session=Session.empty(2))
