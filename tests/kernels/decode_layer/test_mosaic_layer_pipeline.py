"""The tile streams of the fused decoder layer, and its pipeline: producer and consumers never lose each other."""

from collections import Counter, deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import consumer, gemv, producer
from latent_attention.decode_layer.smem_layout import Smem
from latent_attention.decode_layer.tile_stream import (
    MAX_TILES_IN_FLIGHT,
    NUM_CONSUMERS,
    NUM_STAGES,
    STAGE_BYTES,
    TILE_TOKENS,
    choose_tile_rows,
    consumer_partition,
    consumer_tile_range,
    num_prefetched,
    owner,
    partition,
    sums_per_row,
    tile_rows,
    tile_streams,
    token_stages,
)
from latent_attention.hopper import grid_barrier

INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
SMALL = LayerShape(D=1280, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)
NUM_CTAS = 132


class FakeRef:
    """A reference that knows its name and index."""

    def __init__(self, name: str, index=()):
        self.name, self.index, self.at, self.shape = name, index, self, (1, 131_072)

    def __getitem__(self, index):
        return FakeRef(self.name, index)

    def indices(self) -> list:
        """Its index as integers; a slice as (start, size)."""
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        return [(int(x.start), x.size) if isinstance(x, pl.Slice) else int(np.asarray(x)) for x in parts]

    def mbarrier(self) -> tuple[str, int]:
        """Name and index of an mbarrier; 0 if there is one only."""
        return self.name, (self.indices() or [0])[0]


class FakeRefs:
    """References by any name; reading `length` gives `kv_len` and is recorded as a step."""

    timeline = None

    def __init__(self, kv_len: int = 0, steps: list | None = None, int8: bool = False, int8_cache: bool = False):
        self.kv_len, self.steps, self.length = kv_len, steps, self
        self.scales, self.cache_scales = self if int8 else None, FakeRef("cache_scales") if int8_cache else None

    def __getitem__(self, index):
        assert self.steps is not None
        self.steps.append(LENGTH_READ)
        return jnp.int32(self.kv_len)

    def __getattr__(self, name):
        return FakeRef(name)


@pytest.mark.parametrize("num_ctas", [132, 114, 78])
@pytest.mark.parametrize("kv_len", [0, 1, 1000, 131_072])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_each_tile_goes_to_one_cta_and_stages_follow_each_other(num_ctas, kv_len, int8_cache):
    streams = tile_streams(INFINITE_1B, num_ctas, FakeRefs(int8_cache=int8_cache), jnp.int32(kv_len))

    @jax.vmap
    def parts_of(cta):
        return {name: part[1:] for name, part in partition(streams, cta, num_ctas)}

    parts = jax.jit(parts_of)(jnp.arange(num_ctas))
    used = np.zeros(num_ctas, int)
    for name, stream in streams.items():
        first, count, index = map(np.asarray, parts[name])
        tiles = np.concatenate([np.arange(n) * num_ctas + start for start, n in zip(first, count, strict=True)])
        assert sorted(tiles) == list(range(int(stream.num_tiles)))
        assert count.max() - count.min() <= 1
        assert np.all(index == used + used % stream.stages)
        used = index + count * stream.stages
    # All tiles are one list: a CTA has at most one more than another, of all of them together.
    together = sum(np.asarray(count) for _, count, _ in parts.values())
    assert together.max() - together.min() <= 1


class Step(NamedTuple):
    kind: str
    """A wait for an mbarrier, an arrival at it, or the start of a copy that arrives."""
    barrier: tuple[str, int]
    what: Any = None
    """Source and target of a copy; the tile that a consumer takes after its wait."""


def run_producer(
    shape: LayerShape, kv_len: int, cta: int, monkeypatch, num_ctas: int = NUM_CTAS, int8: bool = False,
    int8_cache: bool = False,
) -> list[Step]:  # fmt: skip
    """The producer's steps, run without a GPU: waits for mbarriers and the previous kernel, and starts of copies."""
    steps = []

    def copy(source, target, barrier, **_):
        steps.append(Step("copy", barrier.mbarrier(), (source, target)))

    with monkeypatch.context() as patch, jax.disable_jit():
        patch.setattr(producer.plgpu, "copy_gmem_to_smem", copy)
        patch.setattr(producer.plgpu, "barrier_wait", lambda ref: steps.append(Step("wait", ref.mbarrier())))
        patch.setattr(producer.plgpu, "griddepcontrol_wait", lambda: steps.append(PREVIOUS_KERNEL))
        patch.setattr(producer, "fence_proxy_async", lambda: None)
        refs, smem = FakeRefs(kv_len, steps, int8, int8_cache), FakeRefs(int8_cache=int8_cache)
        producer.Producer(shape, num_ctas, jnp.int32(cta), refs, smem).run()
    return steps


def pipeline_steps(*args) -> list[Step]:
    """The steps of `run_producer` on the pipeline's mbarriers."""
    return [step for step in run_producer(*args) if step.barrier[0] in ("produced", "tokens_produced", "consumed")]


PREVIOUS_KERNEL = Step("wait", ("previous kernel", 0))
LENGTH_READ = Step("read", ("length", 0))


def consumer_steps(streams: dict, cta: int, num_ctas: int) -> list[list[Step]]:
    """Steps of each consumer: it takes the n-th tile that has been copied, then arrives at `consumed` of its stages."""
    steps: list[list[Step]] = [[Step("arrive", ("consumed", stage)) for stage in range(NUM_STAGES)], []]
    n = 0
    for part in dict(partition(streams, jnp.int32(cta), num_ctas)).values():
        stages = part.stream.stages
        for wg in range(NUM_CONSUMERS):
            first, count = map(int, consumer_tile_range(wg, part))
            for i in range(first, first + NUM_CONSUMERS * count, NUM_CONSUMERS):
                at = int(part.first_index) + i * stages
                assert owner(at // stages) == wg
                name = "tokens_produced" if part.stream.is_tokens else "produced"
                steps[wg].append(Step("wait", (name, at % NUM_STAGES // stages), n + i))
                steps[wg] += [Step("arrive", ("consumed", (at + j) % NUM_STAGES)) for j in range(stages)]
        n += int(part.num_tiles)
    return steps


class Pipeline:
    """A simulation of producer, consumers and mbarriers: a wait tells odd from even phases only, as in hardware."""

    def __init__(self, agents: list[list[Step]], arrivals: dict[str, int], token_stages: int):
        self.agents, self.needed, self.token_stages = [deque(agent) for agent in agents], arrivals, token_stages
        self.arrivals, self.phases, self.waits = Counter(), Counter(), [Counter() for _ in agents]
        self.in_flight, self.content, self.tile, self.parts = deque(), {}, 0, 0

    def _arrive(self, barrier) -> None:
        self.arrivals[barrier] += 1
        if self.arrivals[barrier] % self.needed[barrier[0]] == 0:
            self.phases[barrier] += 1

    def _stages(self, barrier) -> list[int]:
        name, index = barrier
        return [index] if name == "produced" or self.token_stages == 1 else [2 * index, 2 * index + 1]

    def complete_copy(self) -> bool:
        """The oldest copy completes, if there is one."""
        if not self.in_flight:
            return False
        barrier, tile = self.in_flight.popleft()
        self.content.update(dict.fromkeys(self._stages(barrier), tile))
        self._arrive(barrier)
        return True

    def move(self, agent: int) -> bool:
        """One step of an agent, unless it must wait or is done."""
        if not self.agents[agent]:
            return False
        kind, barrier, what = self.agents[agent][0]
        if kind == "wait":
            if self.phases[barrier] % 2 == self.waits[agent][barrier] % 2:
                return False
            self.waits[agent][barrier] += 1
            if what is not None:
                stages = self._stages(barrier)
                assert [self.content[stage] for stage in stages] == [what] * len(stages)
        elif kind == "copy":
            tile = self.tile
            assert all(self.content.get(stage, tile) == tile for stage in self._stages(barrier))
            self.in_flight.append((barrier, tile))
            self.parts += 1
            if self.parts == self.needed[barrier[0]]:  # all copies of the tile
                self.tile, self.parts = tile + 1, 0
            assert len({tile for (name, _), tile in self.in_flight if name == "produced"}) <= MAX_TILES_IN_FLIGHT
        else:
            self.content.pop(barrier[1], None)
            self._arrive(barrier)
        self.agents[agent].popleft()
        return True


def moves_of(pipeline: Pipeline) -> list:
    """Moves of the producer and the consumers, and the completion of a copy."""
    return [lambda agent=agent: pipeline.move(agent) for agent in range(len(pipeline.agents))] + [
        pipeline.complete_copy
    ]


ORDERS = {
    "producer first, copies late": lambda moves, _: moves,
    "producer first": lambda moves, _: [moves[3], *moves[:3]],
    "consumer 0 first": lambda moves, _: [moves[1], moves[3], moves[0], moves[2]],
    "consumer 1 first": lambda moves, _: [moves[2], moves[3], moves[0], moves[1]],
    "any": lambda moves, random: random.permutation(np.array(moves, object)),
}
CASES = [(INFINITE_1B, 0), (INFINITE_1B, 1000), (INFINITE_1B, 60_000), (SMALL, 1), (SMALL, 20_000)]


@pytest.mark.parametrize(
    ("num_ctas", "cta"),
    [(NUM_CTAS, 0), (NUM_CTAS, 15), (NUM_CTAS, 16), (NUM_CTAS, 57), (NUM_CTAS, 131), (114, 3), (78, 77)],
)
@pytest.mark.parametrize(("shape", "kv_len"), CASES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_the_pipeline_never_deadlocks_nor_loses_a_phase(shape, kv_len, num_ctas, cta, int8, int8_cache, monkeypatch):
    streams = tile_streams(shape, num_ctas, FakeRefs(int8=int8, int8_cache=int8_cache), jnp.int32(kv_len))
    types = Smem.types(shape, num_ctas, jnp.bfloat16, int8, int8_cache)
    arrivals = {name: getattr(types, name).num_arrivals for name in ("produced", "tokens_produced", "consumed")}
    produced = pipeline_steps(shape, kv_len, cta, monkeypatch, num_ctas, int8, int8_cache)
    agents = [produced, *consumer_steps(streams, cta, num_ctas)]
    for name, order in ORDERS.items():
        pipeline = Pipeline(agents, arrivals, token_stages(int8_cache))
        random = np.random.default_rng(cta)
        while any(pipeline.agents):
            assert any(move() for move in order(moves_of(pipeline), random)), f"{name}: deadlock"
        parts = [part for _, part in partition(streams, jnp.int32(cta), num_ctas)]
        assert (pipeline.tile, pipeline.parts) == (sum(int(part.num_tiles) for part in parts), 0)
        assert not pipeline.content


@pytest.mark.parametrize("num_ctas", [132, 114, 78])
@pytest.mark.parametrize("shape", [INFINITE_1B, SMALL])
@pytest.mark.parametrize("int8", [False, True])
def test_consumers_always_have_more_tiles_than_they_prefetch(shape, num_ctas, int8):
    streams = tile_streams(shape, num_ctas, FakeRefs(int8=int8), jnp.int32(1000))
    matrices = {name: stream for name, stream in streams.items() if not stream.is_tokens}

    @jax.vmap
    def fewest(cta):
        parts = dict(partition(streams, cta, num_ctas))
        return {
            name: jnp.minimum(*(consumer_tile_range(wg, parts[name])[1] for wg in range(NUM_CONSUMERS)))
            for name in matrices
        }

    for name, counts in fewest(jnp.arange(num_ctas)).items():
        assert 0 <= num_prefetched(matrices[name], num_ctas) < max(int(counts.min()), 1), name
    if shape is INFINITE_1B and not int8:
        assert all(num_prefetched(matrices[name], num_ctas) > 0 for name in ("o", "gate_up", "down"))


@pytest.mark.parametrize(("shape", "kv_len"), CASES)
@pytest.mark.parametrize("cta", [0, 131])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_each_tile_is_copied_from_its_place_to_its_stage(shape, kv_len, cta, int8, int8_cache, monkeypatch):
    C, R = shape.C, shape.R
    streams = tile_streams(shape, NUM_CTAS, FakeRefs(int8=int8, int8_cache=int8_cache), jnp.int32(kv_len))
    steps = pipeline_steps(shape, kv_len, cta, monkeypatch, NUM_CTAS, int8, int8_cache)
    copies = iter([step for step in steps if step.kind == "copy"])
    for name, (stream, first, count, index) in partition(streams, jnp.int32(cta), NUM_CTAS):
        for i in range(int(count)):
            tile, stage = int(first) + i * NUM_CTAS, (int(index) + i * stream.stages) % NUM_STAGES
            rows, size = tile * stream.rows, stream.rows * stream.width // 2
            for half, step in enumerate([next(copies) for _ in range(4 if stream.is_tokens and int8_cache else 2)]):
                source, target = step.what
                if name == "tokens":
                    place, tokens = stage // stream.stages, (tile * TILE_TOKENS, TILE_TOKENS)
                    assert step.barrier == ("tokens_produced", place)
                    if half >= 2:
                        assert (source.name, target.name) == ("cache_scales", "cache_scales")
                        assert source.indices() == [0, half - 2, tokens] and target.indices() == [place, half - 2]
                        continue
                    assert (source.name, target.name) == (("c", "c_tiles"), ("rope", "rope_tiles"))[half]
                    assert source.indices() == [0, tokens]
                    # Rotary keys are behind the latents in the pair of stages, or the stage.
                    assert target.indices() == [place, ((0, TILE_TOKENS * C // R)[half], TILE_TOKENS)]
                    continue
                assert step.barrier == ("produced", stage)
                assert (target.name, target.indices()) == ("stages", [stage, (half * size, size)])
                if name == "gate_up":
                    assert (source.name, source.indices()) == (("gate", "up")[half], [(tile * size, size)])
                else:
                    assert source.name == name
                    assert source.indices() == [(rows * stream.width + half * size, size)]
    assert next(copies, None) is None


@pytest.mark.parametrize(("shape", "kv_len"), CASES)
@pytest.mark.parametrize("cta", [0, 131])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_the_producer_reads_only_weights_until_the_previous_kernel_is_done(shape, kv_len, cta, int8_cache, monkeypatch):
    steps = run_producer(shape, kv_len, cta, monkeypatch, int8_cache=int8_cache)
    end = steps.index(PREVIOUS_KERNEL)
    assert {step.what[0].name for step in steps[:end] if step.kind == "copy"} <= {"q_a", "kv_a", "q_b"}
    assert "q_b" in {step.what[0].name for step in steps[:end] if step.kind == "copy"}
    assert [x.name for x in steps[end + 1].what] == ["h", "residual"]
    assert LENGTH_READ not in steps[:end] and LENGTH_READ in steps and PREVIOUS_KERNEL not in steps[end + 1 :]


def test_consumers_read_only_norm_weights_until_the_previous_kernel_is_done(monkeypatch):
    steps = []
    monkeypatch.setattr(gemv, "load_vector", lambda ref: steps.append(ref.name))
    monkeypatch.setattr(consumer.plgpu, "griddepcontrol_wait", lambda: steps.append(PREVIOUS_KERNEL))
    monkeypatch.setattr(grid_barrier, "load_counter", lambda ref: steps.append("counter") or jnp.int32(0))
    refs: Any = FakeRefs(1000, steps)
    smem: Any = FakeRefs()
    consumer.Consumer(SMALL, NUM_CTAS, jnp.bfloat16, 1e-6, 0.1, jnp.int32(0), 0, refs, smem)
    end = steps.index(PREVIOUS_KERNEL)
    assert steps[:end] == ["input_gamma", "q_gamma", "kv_gamma"]
    assert set(steps[end + 1 :]) == {LENGTH_READ, "counter"}


def test_throttled_tiles_are_copied_one_at_a_time(monkeypatch):
    streams = tile_streams(INFINITE_1B, NUM_CTAS, FakeRefs(), jnp.int32(0))
    steps = pipeline_steps(INFINITE_1B, 0, 0, monkeypatch)
    in_flight, most = 0, []  # when each tile has been started
    for kind, (barrier, _), _ in steps:
        in_flight += {"copy": 0.5, "wait": -1}[kind] if barrier == "produced" else 0
        if kind == "copy" and in_flight % 1 == 0:
            most.append(in_flight)
    counts = {name: int(part.num_tiles) for name, part in partition(streams, jnp.int32(0), NUM_CTAS)}
    before = sum(count for name, count in counts.items() if name not in ("o", "gate_up", "down"))
    unthrottled = before + streams["o"].throttled
    assert most[before:unthrottled] == [1] * streams["o"].throttled
    assert all(x <= MAX_TILES_IN_FLIGHT for x in most)
    assert most[unthrottled + MAX_TILES_IN_FLIGHT :] == [MAX_TILES_IN_FLIGHT] * (
        sum(counts.values()) - unthrottled - MAX_TILES_IN_FLIGHT
    )


@pytest.mark.parametrize("num_ctas", [132, 78])
@pytest.mark.parametrize("shape", [INFINITE_1B, INFINITE_1B._replace(D=5120), SMALL])
@pytest.mark.parametrize("int8", [False, True])
def test_a_cta_has_no_more_partial_sums_than_there_is_room_for(shape, num_ctas, int8):
    _, room = sums_per_row(shape, num_ctas, int8)

    @jax.vmap
    def partial_sums(cta):
        parts = consumer_partition(shape, num_ctas, FakeRefs(0, [], int8), cta)
        return {name: part.num_tiles * part.stream.rows * part.stream.sums_per_row for name, part in parts.items()}

    assert max(int(n.max()) for n in partial_sums(jnp.arange(num_ctas)).values()) <= room


def test_tiles_fit_a_stage_and_finish_the_busiest_cta_first():
    assert NUM_STAGES % 4 == 0 and 2 * TILE_TOKENS * (256 + 64) <= 2 * STAGE_BYTES
    assert tile_rows(INFINITE_1B, 132, int8=False) == (4, 8, 2, 2, 1)
    assert tile_rows(INFINITE_1B, 132, int8=True) == (4, 16, 5, 4, 2)
    assert tile_rows(INFINITE_1B._replace(H=3, N=4, R=0), 132, int8=False).q_b == 0  # narrow rows come in eights
    assert choose_tile_rows((2560,), 8192, 132) == 2  # the busiest CTA has 10 tiles; of one row, 20
    assert choose_tile_rows((7,), 8192, 132) == 1
    assert choose_tile_rows((100,), STAGE_BYTES + 1, 132) == 0
