"""Generation through the cache equals asking the whole model for one token after another."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax.inference.generator
from latent_attention import dequantize, quantize
from mla_jax import mesh
from mla_jax.bridge.hf import verify
from mla_jax.bridge.hf.export import export
from mla_jax.config import MeshConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.inference.generator import Generator, generate
from mla_jax.inference.memory import MemoryPlan
from mla_jax.inference.sampling import SamplingParams
from mla_jax.inference.session import Session
from mla_jax.model import decoder, fused_decode
from mla_jax.model.cache import init_layer, resize
from mla_jax.model.rope import rope_cos_sin
from mla_jax.model.transformer import bind, init_params
from tiny import MODEL, empty_cache

CONFIG = dataclasses.replace(MODEL, initializer_range=0.5, tie_word_embeddings=False, max_position_embeddings=200)
PARAMS = init_params(CONFIG, 0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 150, 2, 64, 65)]
NEW = 12


@functools.cache
def one_after_another():
    """Greedy continuations from the whole forward pass, padded to one length so that it compiles once."""
    forward = jax.jit(lambda tokens: bind(CONFIG, PARAMS).logits(bind(CONFIG, PARAMS)(tokens)))
    rows = np.zeros((len(PROMPTS), 170), np.int32)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for i in range(NEW):
        best = np.argmax(forward(rows), -1)
        for row, prompt, choice in zip(rows, PROMPTS, best, strict=True):
            row[len(prompt) + i] = choice[len(prompt) + i - 1]
    return [row[len(p) : len(p) + NEW].tolist() for row, p in zip(rows, PROMPTS, strict=True)]


def test_greedy_tokens_of_a_ragged_batch_are_those_of_the_whole_model():
    expected = one_after_another()
    assert len({token for row in expected for token in row}) > 20, "the test would not notice much"
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize("chunk", [1, 64, 100])
def test_the_prefill_chunk_changes_nothing(chunk):
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, prefill_chunk=chunk) == one_after_another()


@pytest.mark.parametrize("block", [5, 32])
def test_a_row_ends_before_eos_and_the_others_go_on(monkeypatch, block):
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", block)
    expected = one_after_another()
    eos = expected[1][4]
    cut = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, eos_id=eos) == cut
    assert generate(CONFIG, PARAMS, PROMPTS[1:2], max_new_tokens=NEW, eos_id=expected[1][0]) == [[]]
    late = [row[-1] for row in expected]
    assert generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, eos_id=[*late, eos]) == [
        list(itertools.takewhile(lambda token: token not in (*late, eos), row)) for row in expected
    ]


def test_one_compiled_loop_serves_all_tokens_seeds_and_eos(monkeypatch):
    generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW)
    monkeypatch.delattr(decoder, "extend")  # nothing can be traced any more
    assert generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW, eos_id=3)
    with pytest.raises(AttributeError):
        generate(CONFIG, PARAMS, PROMPTS[3:4], max_new_tokens=NEW + 1)


def test_samples_are_a_function_of_the_seed():
    def sample(seed):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=NEW, sampling=sampling)

    assert sample(1) == sample(1) != sample(2)


def test_memory_of_prefill_does_not_grow_with_the_cache():
    weights = jax.eval_shape(lambda params: decoder.inference_weights(CONFIG, params), PARAMS)["layers"][0]

    def temporaries(capacity):
        cache = jax.eval_shape(lambda: init_layer(CONFIG, 2, capacity))
        h, lengths = jnp.zeros((2, 64, CONFIG.hidden_size)), jnp.zeros(2, int)
        lowered = decoder.prefill_layer.lower(CONFIG, weights, h, cache, lengths, lengths, False)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(65536) == temporaries(16384)


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG, PARAMS, prefill_chunk=64)


def continued(generator, prompts, **options):
    return generator.generate(prompts, max_new_tokens=NEW, **options)


def test_tokens_are_those_of_transformers(generator, tmp_path):
    torch, transformers = verify.import_transformers()
    tokenizer = load_tokenizer("bytes")
    folder = export(CONFIG, PARAMS, tokenizer, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        theirs.append(out[0, len(prompt) :].tolist())
    assert continued(generator, PROMPTS) == theirs


def test_a_chat_reads_only_what_is_new(generator):
    session, read = Session.empty(1), []
    history = list(PROMPTS[3])
    for turn in ([], [5, 6, 7], PROMPTS[4][:40]):
        history += turn
        new = continued(
            generator, [history], session=session, on_prefill=lambda done, total: read.append((done, total))
        )
        assert new == continued(generator, [history])
        assert session.tokens == [(history + new[0])[:-1]]
        history += new[0]
    # All but the last token of the first prompt; then the last one generated and all but the last one of the turn.
    assert read == [(63, 63), (3, 3), (40, 40)]


def test_questions_about_one_text_read_it_once(generator):
    text, session, read = PROMPTS[1][:100], Session.empty(1), []
    questions = [text + PROMPTS[i] for i in (2, 3, 0)]
    expected = continued(generator, questions)

    def on_prefill(done, total):
        if done == total:
            read.append(total)

    for question, answer in zip(questions, expected, strict=True):
        assert continued(generator, [question], session=session, on_prefill=on_prefill) == [answer]
    assert read == [101, 63]  # the third has nothing left to read
    # The same, all at a time: copies of what has been read.
    session = Session.empty(1)
    continued(generator, [text], session=session)
    copies = generator.fork(session, 3)
    read.clear()
    assert continued(generator, questions, session=copies, on_prefill=on_prefill) == expected
    assert read == [1 + 63 + 0]
    assert len(session.tokens) == 1, "the original is as it was"
    assert continued(generator, questions[:1], session=session) == expected[:1]


def test_a_prompt_unlike_the_session_is_read_whole(generator):
    session = Session.empty(2)
    continued(generator, PROMPTS[1:3], session=session)
    assert continued(generator, PROMPTS[3:5], session=session) == continued(generator, PROMPTS[3:5])
    same = continued(generator, PROMPTS[3:5], session=session)  # all but the last token of each is cached
    assert same == continued(generator, PROMPTS[3:5])


def test_the_cache_grows_and_keeps_what_it_holds(generator):
    session, capacities = Session.empty(1), []
    for length in (20, 60, 100, 150):
        prompt = PROMPTS[1][:length]
        assert continued(generator, [prompt], session=session) == continued(generator, [prompt])
        capacities.append(session.capacity)
    assert capacities == [64, 128, 128, 192]


def test_tokens_are_streamed_and_rows_are_ended(generator, monkeypatch):
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", 5)
    expected, streamed = continued(generator, PROMPTS), [[] for _ in PROMPTS]

    def on_tokens(row, ids):
        assert 0 < len(ids) <= 5
        streamed[row] += ids
        return row == 1 and len(streamed[row]) >= 5

    got = continued(generator, PROMPTS, on_tokens=on_tokens)
    assert got == streamed == [expected[0], expected[1][:5], *expected[2:]]


def test_a_call_is_under_way_while_the_tokens_of_the_one_before_are_shown(generator, monkeypatch):
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", 5)
    decode_block, events, prompt = mla_jax.inference.generator.decode_block, [], PROMPTS[:1]

    def recorded(*args, **kwargs):
        events.append("call")
        return decode_block(*args, **kwargs)

    monkeypatch.setattr("mla_jax.inference.generator.decode_block", recorded)
    continued(generator, prompt, on_tokens=lambda row, ids: events.append(len(ids)))
    assert events == ["call", "call", 5, "call", 5, 2]
    events.clear()
    continued(generator, prompt, on_tokens=lambda row, ids: events.append(len(ids)) or True)
    assert events == ["call", "call", 5]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(temperature=1.0, seed=3), SamplingParams(repetition_penalty=1e6)],
    ids=str,
)
def test_the_fused_loop_adds_the_same_tokens(generator, monkeypatch, sampling):
    """A step of XLA stands in for the fused kernels, which need a GPU."""
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", 5)
    expected = continued(generator, PROMPTS[1:2], sampling=sampling)

    def step(config, weights, tokens_1, cos_sin, cache, workspace):
        right = [(x == y).all() for x, y in zip(cos_sin, rope_cos_sin(config, cache.lengths_B[0]), strict=True)]
        h_B1D, cache = decoder.extend(config, weights, tokens_1[:, None], cache, jnp.ones(1, jnp.int32), absorbed=True)
        scores = decoder.logits(config, weights, h_B1D[:, 0])
        return jnp.where(right[0] & right[1] & (workspace < 5), scores, jnp.nan), cache, workspace + 1

    monkeypatch.setattr(fused_decode, "why_not", lambda config, layers, int8_weights: None)
    monkeypatch.setattr(fused_decode, "init_workspace", lambda config, weights, layers: jnp.int32(0))
    monkeypatch.setattr(fused_decode, "step", step)
    monkeypatch.setattr("mla_jax.inference.decode_loop.xla_loop", None)  # the other loop
    assert continued(generator, PROMPTS[1:2], sampling=sampling) == expected


@pytest.mark.parametrize("end", ["stop", "error"])
def test_a_session_goes_on_after_a_call_whose_tokens_were_dropped(generator, monkeypatch, end):
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", 5)
    session, prompts = Session.empty(2), PROMPTS[:2]

    def on_tokens(row, ids):
        if end == "error":
            raise KeyboardInterrupt
        return row == 0

    with contextlib.nullcontext() if end == "stop" else pytest.raises(KeyboardInterrupt):
        continued(generator, prompts, on_tokens=on_tokens, session=session)
    following = [prompt + new[:3] + [7] for prompt, new in zip(prompts, one_after_another(), strict=False)]
    assert continued(generator, following, session=session) == continued(generator, following)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_of_decoding_change_nothing(generator, monkeypatch, temperature):
    sampling = SamplingParams(temperature=temperature, seed=3)
    expected = continued(generator, PROMPTS, sampling=sampling)
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", 5)  # 5 + 5 + 2
    assert continued(generator, PROMPTS, sampling=sampling) == expected


@pytest.mark.parametrize("block", [5, 32])
def test_a_repetition_penalty_keeps_tokens_from_coming_again(generator, monkeypatch, block):
    monkeypatch.setattr("mla_jax.inference.generator.DECODE_BLOCK", block)
    once = continued(generator, PROMPTS, sampling=SamplingParams(repetition_penalty=1e6))
    for prompt, new in zip(PROMPTS, once, strict=True):
        assert len(set(new)) == NEW and not set(new) & set(prompt)


def test_int8_weights_compute_what_they_stand_for():
    def rounded(path, x):
        if "norm" in path[-1].key or path[0].key != "layers":
            return x
        units, scale = quantize(x.swapaxes(1, 2))
        return dequantize(units, scale, "float32").swapaxes(1, 2)

    rounded_params = jax.tree.map_with_path(rounded, PARAMS)
    got = continued(Generator(CONFIG, PARAMS, int8_weights=True), PROMPTS)
    assert got == generate(CONFIG, rounded_params, PROMPTS, max_new_tokens=NEW) != one_after_another()


def test_weights_take_the_bytes_that_are_planned(generator):
    for int8 in (False, True):
        weights = decoder.inference_weights(CONFIG, PARAMS, int8)
        planned = MemoryPlan.of(
            CONFIG, rows=1, tokens=1, cache_dtype=None, int8_weights=int8, prefill_chunk=64
        ).weights  # fmt: skip
        assert sum(x.nbytes for x in jax.tree.leaves(weights)) == planned


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    plan = functools.partial(MemoryPlan.of, CONFIG, rows=1, cache_dtype=None, int8_weights=False, prefill_chunk=64)
    limit = plan(tokens=128).total
    generator = Generator(CONFIG, PARAMS, prefill_chunk=64, memory_limit=limit)
    monkeypatch.setattr("mla_jax.inference.generator.init_layer", lambda *_: pytest.fail("allocated"))
    with pytest.raises(InputError, match=r"1 x 192 tokens need .* the longest that fits is 128 tokens a row"):
        continued(generator, [PROMPTS[1]])
    with pytest.raises(InputError, match="3 x 64 tokens need .* not even one token fits"):
        continued(Generator(CONFIG, PARAMS, memory_limit=plan(tokens=64).total - 64), [[1]] * 3)
    with pytest.raises(InputError, match="1 x 1 tokens need"):
        Generator(CONFIG, PARAMS, memory_limit=1000)
    monkeypatch.undo()
    fits = PROMPTS[1][: 128 - NEW]
    session = Session.empty(1)
    assert continued(generator, [fits], session=session) == continued(Generator(CONFIG, PARAMS), [fits])
    with pytest.raises(InputError, match="5 x 128 tokens need"):
        generator.fork(session, 5)


@pytest.mark.parametrize("tokens", [2368, 3000])
def test_what_is_named_as_the_longest_that_fits_is_accepted(tokens):
    """Capacities are coarser than what fits."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=4096)
    limit = MemoryPlan.of(
        config, rows=1, tokens=tokens, cache_dtype=None, int8_weights=False, prefill_chunk=64
    ).total  # fmt: skip
    generator = Generator(config, PARAMS, prefill_chunk=64, memory_limit=limit)
    with pytest.raises(InputError) as refusal:
        generator.generate([[1] * 4000], max_new_tokens=1)
    longest = int(re.search(r"longest that fits is ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    assert longest == tokens // 64 * 64
    session = Session.empty(1)
    generator.reserve(session, longest)
    assert session.capacity == longest


def test_a_session_whose_growth_was_interrupted_loses_nothing(generator, monkeypatch):
    session, calls = Session.empty(1), []
    prompt = PROMPTS[1]
    continued(generator, [prompt[:20]], session=session)

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return resize(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mla_jax.inference.generator.resize", fail_at_the_second)
        continued(generator, [prompt], session=session)
    assert continued(generator, [prompt], session=session) == continued(generator, [prompt])


def test_an_int8_cache_is_off_by_its_roundings(generator):
    """The error is half a quantisation step in each latent: logits are close to the exact ones, and not equal."""
    tokens = np.array([PROMPTS[1]])
    weights = generator.weights
    exact = None
    for dtype in ("float32", "int8"):
        cache = empty_cache(CONFIG, 1, 192, dtype)
        for part in (tokens[:, :80], tokens[:, 80:]):
            h, cache = decoder.extend(CONFIG, weights, part, cache, absorbed=False)
        scores = np.asarray(decoder.logits(CONFIG, weights, h))
        exact = scores if exact is None else exact
    difference = np.linalg.norm(scores - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.1
    halves = Generator(CONFIG, PARAMS, cache_dtype="int8", prefill_chunk=64)
    session = Session.empty(1)
    for length in (20, 150):  # grows
        new = continued(halves, [PROMPTS[1][:length]], session=session)
        assert len(new[0]) == NEW
    assert session.layers[0].c_BSC.dtype == "int8"


def test_sessions_fit_their_prompts(generator):
    with pytest.raises(InputError, match="the session has 1 rows, but there are 2 prompts"):
        continued(generator, PROMPTS[:2], session=Session.empty(1))
    with pytest.raises(InputError, match="only a session of one row can be copied, this has 2"):
        generator.fork(Session.empty(2), 3)
    with jax.set_mesh(mesh.make_mesh(MeshConfig())), pytest.raises(UsageError, match="copied on one device"):
        generator.fork(Session.empty(1), 3)


def test_nothing_to_do_gives_nothing():
    assert generate(CONFIG, PARAMS, [], max_new_tokens=3) == []


def test_a_prompt_may_fill_the_model_to_the_last_position():
    prompt = [3] * (CONFIG.max_position_embeddings - 2)
    assert len(generate(CONFIG, PARAMS, [prompt], max_new_tokens=2)[0]) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 198], {}, "prompt 0 of 198 tokens and 3 new ones exceed .* max_position_embeddings 200"),
        ([[1, 512]], {}, "token 512, outside the vocabulary of 512"),
        ([[1, -1]], {}, "token -1, outside the vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(CONFIG, PARAMS, prompts, **{"max_new_tokens": 3, **options})
