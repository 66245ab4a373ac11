"""What blocks of the layer kernel read, and that who fills the ring and who empties it never lose each other."""

from collections import Counter, deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import consumer
from latent_attention.decode_layer import producer as ring
from latent_attention.decode_layer.consumer import Consumer
from latent_attention.decode_layer.producer import (
    CONSUMERS,
    IN_FLIGHT,
    SLOT,
    SLOTS,
    TOKENS,
    owner,
    parts_of_rows,
    readings,
    rows_of_tile,
    rows_of_tiles,
    shares,
    tiles_ahead,
    turns,
)
from latent_attention.decode_layer.smem_layout import shared

INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
SMALL = LayerShape(D=1280, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)
BLOCKS = 132


class Place:
    """A reference that knows its name and index."""

    def __init__(self, name: str, index=()):
        self.name, self.index, self.at, self.shape = name, index, self, (1, 131_072)

    def __getitem__(self, index):
        return Place(self.name, index)

    def numbers(self) -> list:
        """Of its index; of a slice (start, size)."""
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        return [(int(x.start), x.size) if isinstance(x, pl.Slice) else int(np.asarray(x)) for x in parts]

    def slot(self) -> tuple[str, int]:
        """Of a barrier: its name and number; 0 if there is one only."""
        return self.name, (self.numbers() or [0])[0]


class Places:
    """Whatever reference is asked for; so many tokens are held, which to read is a step."""

    def __init__(self, held: int = 0, steps: list | None = None):
        self.held, self.steps, self.length = held, steps, self

    def __getitem__(self, index):
        assert self.steps is not None
        self.steps.append(LENGTH_READ)
        return jnp.int32(self.held)

    def __getattr__(self, name):
        return Place(name)


@pytest.mark.parametrize("blocks", [132, 114, 78])
@pytest.mark.parametrize("held", [0, 1, 1000, 131_072])
def test_each_tile_is_dealt_to_one_block_and_slots_follow_each_other(blocks, held):
    of = readings(INFINITE_1B, blocks, Places(), jnp.int32(held))

    @jax.vmap
    def dealt(block):
        return {name: share[1:] for name, share in shares(of, block, blocks)}

    first_count_number = jax.jit(dealt)(jnp.arange(blocks))
    taken = np.zeros(blocks, int)
    for name, reading in of.items():
        first, count, number = map(np.asarray, first_count_number[name])
        tiles = np.concatenate([np.arange(n) * blocks + start for start, n in zip(first, count, strict=True)])
        assert sorted(tiles) == list(range(int(reading.tiles)))
        assert count.max() - count.min() <= 1
        assert np.all(number == taken + taken % reading.slots)
        taken = number + count * reading.slots
    # All tiles are one list: a block has one more than another at most, of all of them together.
    together = sum(np.asarray(count) for _, count, _ in first_count_number.values())
    assert together.max() - together.min() <= 1


class Step(NamedTuple):
    kind: str
    """To wait for a barrier, to arrive at it or to start a copy that does."""
    barrier: tuple[str, int]
    what: Any = None
    """Of a copy, source and place; of a consumer's wait, which tile it then takes."""


def everything_produced(shape: LayerShape, held: int, block: int, monkeypatch, blocks: int = BLOCKS) -> list[Step]:
    """What the producer does, run without a GPU: it waits, for a barrier or for the end of the kernel before, or starts
    a copy that a barrier counts.
    """
    does = []

    def copy(source, place, full, **_):
        does.append(Step("copy", full.slot(), (source, place)))

    with monkeypatch.context() as patch, jax.disable_jit():
        patch.setattr(ring.plgpu, "copy_gmem_to_smem", copy)
        patch.setattr(ring.plgpu, "barrier_wait", lambda it: does.append(Step("wait", it.slot())))
        patch.setattr(ring.plgpu, "griddepcontrol_wait", lambda: does.append(KERNEL_BEFORE))
        patch.setattr(ring, "fence_proxy_async", lambda: None)
        ring.produce(shape, blocks, jnp.int32(block), Places(held, does), Places())
    return does


def produced(*args) -> list[Step]:
    """Of `everything_produced`, what has to do with the ring."""
    return [step for step in everything_produced(*args) if step.barrier[0] in ("full", "tokens_full", "empty")]


KERNEL_BEFORE = Step("wait", ("kernel before", 0))
LENGTH_READ = Step("read", ("length", 0))


def consumed(of: dict, block: int, blocks: int) -> list[list[Step]]:
    """What each consumer does: it takes the n-th tile that has been copied, and tells that its slots are empty."""
    does: list[list[Step]] = [[Step("arrive", ("empty", slot)) for slot in range(SLOTS)], []]
    n = 0
    for share in dict(shares(of, jnp.int32(block), blocks)).values():
        (reading, _, count, number), slots = share, share.reading.slots
        for wg in range(CONSUMERS):
            skipped, steps = map(int, turns(wg, share))
            for i in range(skipped, skipped + CONSUMERS * steps, CONSUMERS):
                at = int(number) + i * slots
                assert owner(at // slots) == wg
                full = ("tokens_full", at % SLOTS // 2) if slots == 2 else ("full", at % SLOTS)
                does[wg].append(Step("wait", full, n + i))
                does[wg] += [Step("arrive", ("empty", (at + j) % SLOTS)) for j in range(reading.slots)]
        n += int(count)
    return does


class Ring:
    """Who fills it and who empties it, as the hardware does it: a wait tells odd from even turns of a barrier only."""

    def __init__(self, agents: list[list[Step]], arrivals: dict[str, int]):
        self.agents, self.needed = [deque(agent) for agent in agents], arrivals
        self.arrivals, self.turned, self.waits = Counter(), Counter(), [Counter() for _ in agents]
        self.landing, self.content, self.copies = deque(), {}, 0

    def _arrive(self, barrier) -> None:
        self.arrivals[barrier] += 1
        if self.arrivals[barrier] % self.needed[barrier[0]] == 0:
            self.turned[barrier] += 1

    @staticmethod
    def _slots(barrier) -> list[int]:
        name, number = barrier
        return [number] if name == "full" else [2 * number, 2 * number + 1]

    def land(self) -> bool:
        """The oldest copy, if there is one."""
        if not self.landing:
            return False
        barrier, tile = self.landing.popleft()
        self.content.update(dict.fromkeys(self._slots(barrier), tile))
        self._arrive(barrier)
        return True

    def move(self, agent: int) -> bool:
        """One step, unless it must wait or is done."""
        if not self.agents[agent]:
            return False
        kind, barrier, what = self.agents[agent][0]
        if kind == "wait":
            if self.turned[barrier] % 2 == self.waits[agent][barrier] % 2:
                return False
            self.waits[agent][barrier] += 1
            if what is not None:
                assert [self.content[slot] for slot in self._slots(barrier)] == [what] * len(self._slots(barrier))
        elif kind == "copy":
            tile = self.copies // 2
            assert all(self.content.get(slot, tile) == tile for slot in self._slots(barrier))
            self.copies += 1
            self.landing.append((barrier, tile))
            assert len({tile for (name, _), tile in self.landing if name == "full"}) <= IN_FLIGHT
        else:
            self.content.pop(barrier[1], None)
            self._arrive(barrier)
        self.agents[agent].popleft()
        return True


def moves_of(ring: Ring) -> list:
    """Of the producer, of the consumers, and the landing of a copy."""
    return [lambda agent=agent: ring.move(agent) for agent in range(len(ring.agents))] + [ring.land]


ORDERS = {
    "producer first, copies late": lambda moves, _: moves,
    "producer first": lambda moves, _: [moves[3], *moves[:3]],
    "consumer 0 first": lambda moves, _: [moves[1], moves[3], moves[0], moves[2]],
    "consumer 1 first": lambda moves, _: [moves[2], moves[3], moves[0], moves[1]],
    "any": lambda moves, random: random.permutation(np.array(moves, object)),
}
CASES = [(INFINITE_1B, 0), (INFINITE_1B, 1000), (INFINITE_1B, 60_000), (SMALL, 1), (SMALL, 20_000)]


@pytest.mark.parametrize(
    ("blocks", "block"), [(BLOCKS, 0), (BLOCKS, 15), (BLOCKS, 16), (BLOCKS, 57), (BLOCKS, 131), (114, 3), (78, 77)]
)
@pytest.mark.parametrize(("shape", "held"), CASES)
def test_the_ring_is_filled_and_emptied_without_losing_count(shape, held, blocks, block, monkeypatch):
    of = readings(shape, blocks, Places(), jnp.int32(held))
    barriers = shared(shape, blocks, jnp.bfloat16)
    arrivals = {name: barriers[name].num_arrivals for name in ("full", "tokens_full", "empty")}
    agents = [produced(shape, held, block, monkeypatch, blocks), *consumed(of, block, blocks)]
    for name, order in ORDERS.items():
        ring, random = Ring(agents, arrivals), np.random.default_rng(block)
        while any(ring.agents):
            assert any(move() for move in order(moves_of(ring), random)), f"{name}: all wait for each other"
        assert ring.copies == 2 * sum(int(share.count) for _, share in shares(of, jnp.int32(block), blocks))
        assert not ring.content


@pytest.mark.parametrize("blocks", [132, 114, 78])
@pytest.mark.parametrize("shape", [INFINITE_1B, SMALL])
def test_consumers_always_have_more_tiles_than_they_take_ahead(shape, blocks):
    of = readings(shape, blocks, Places(), jnp.int32(1000))
    matrices = {name: reading for name, reading in of.items() if reading.slots == 1}

    @jax.vmap
    def fewest(block):
        dealt = dict(shares(of, block, blocks))
        return {name: jnp.minimum(*(turns(wg, dealt[name])[1] for wg in range(CONSUMERS))) for name in matrices}

    for name, steps in fewest(jnp.arange(blocks)).items():
        assert 0 <= tiles_ahead(matrices[name], blocks) < max(int(steps.min()), 1), name
    if shape is INFINITE_1B:
        assert all(tiles_ahead(matrices[name], blocks) > 0 for name in ("o", "gate_up", "down"))


@pytest.mark.parametrize(("shape", "held"), CASES)
@pytest.mark.parametrize("block", [0, 131])
def test_each_tile_is_copied_from_where_it_lies_to_its_slot(shape, held, block, monkeypatch):
    C, R = shape.C, shape.R
    of = readings(shape, BLOCKS, Places(), jnp.int32(held))
    copies = iter([step for step in produced(shape, held, block, monkeypatch) if step.kind == "copy"])
    for name, (reading, first, count, number) in shares(of, jnp.int32(block), BLOCKS):
        for i in range(int(count)):
            tile, slot = int(first) + i * BLOCKS, (int(number) + i * reading.slots) % SLOTS
            rows, size = tile * reading.rows, reading.rows * reading.width // 2
            for half, step in enumerate((next(copies), next(copies))):
                source, place = step.what
                if name == "tokens":
                    assert step.barrier == ("tokens_full", slot // 2)
                    assert (source.name, place.name) == (("c", "c_tiles"), ("rope", "rope_tiles"))[half]
                    assert source.numbers() == [0, (tile * TOKENS, TOKENS)]
                    # Behind the latents, which fill so many numbers of the pair of slots.
                    assert place.numbers() == [slot // 2, ((0, TOKENS * C // R)[half], TOKENS)]
                    continue
                assert step.barrier == ("full", slot)
                assert (place.name, place.numbers()) == ("ring", [slot, (half * size, size)])
                if name == "gate_up":
                    assert (source.name, source.numbers()) == (("gate", "up")[half], [(tile * size, size)])
                else:
                    assert source.name == name
                    assert source.numbers() == [(rows * reading.width + half * size, size)]
    assert next(copies, None) is None


@pytest.mark.parametrize(("shape", "held"), CASES)
@pytest.mark.parametrize("block", [0, 131])
def test_until_the_kernel_before_is_done_only_weights_are_read(shape, held, block, monkeypatch):
    does = everything_produced(shape, held, block, monkeypatch)
    end = does.index(KERNEL_BEFORE)
    assert {step.what[0].name for step in does[:end] if step.kind == "copy"} <= {"q_a", "kv_a", "q_b"}
    assert "q_b" in {step.what[0].name for step in does[:end] if step.kind == "copy"}
    assert [x.name for x in does[end + 1].what] == ["h", "residual"]
    assert LENGTH_READ not in does[:end] and LENGTH_READ in does and KERNEL_BEFORE not in does[end + 1 :]


def test_until_the_kernel_before_is_done_consumers_read_nothing_but_gains(monkeypatch):
    does = []
    monkeypatch.setattr(Consumer, "vector", lambda self, ref, width: does.append(ref.name))
    monkeypatch.setattr(consumer.plgpu, "griddepcontrol_wait", lambda: does.append(KERNEL_BEFORE))
    monkeypatch.setattr(consumer.grid_barrier, "load_counter", lambda ref: does.append("counter") or jnp.int32(0))
    Consumer(SMALL, BLOCKS, jnp.bfloat16, 1e-6, 0.1, jnp.int32(0), 0, Places(1000, does), Places())
    end = does.index(KERNEL_BEFORE)
    assert does[:end] == ["input_gain", "q_gain", "kv_gain"]
    assert set(does[end + 1 :]) == {LENGTH_READ, "counter"}


def test_tiles_that_nobody_waits_for_come_one_at_a_time(monkeypatch):
    of = readings(INFINITE_1B, BLOCKS, Places(), jnp.int32(0))
    does = produced(INFINITE_1B, 0, 0, monkeypatch)
    in_flight, most = 0, []  # when each tile has been started
    for kind, (barrier, _), _ in does:
        in_flight += {"copy": 0.5, "wait": -1}[kind] if barrier == "full" else 0
        if kind == "copy" and in_flight % 1 == 0:
            most.append(in_flight)
    counts = {name: int(share.count) for name, share in shares(of, jnp.int32(0), BLOCKS)}
    before = sum(count for name, count in counts.items() if name not in ("o", "gate_up", "down"))
    hurried = before + of["o"].unhurried
    assert most[before:hurried] == [1] * of["o"].unhurried
    assert all(x <= IN_FLIGHT for x in most)
    assert most[hurried + IN_FLIGHT :] == [IN_FLIGHT] * (sum(counts.values()) - hurried - IN_FLIGHT)


@pytest.mark.parametrize("blocks", [132, 78])
@pytest.mark.parametrize("shape", [INFINITE_1B, INFINITE_1B._replace(D=5120), SMALL])
def test_a_block_has_no_more_parts_of_sums_than_there_is_room_for(shape, blocks):
    of, (_, most) = readings(shape, blocks, Places(), jnp.int32(0)), parts_of_rows(shape, blocks)

    @jax.vmap
    def parts(block):
        counts = {name: share.count * of[name].rows * of[name].parts for name, share in shares(of, block, blocks)}
        return counts | {"a": counts.pop("q_a") + counts.pop("kv_a")}

    assert max(int(n.max()) for n in parts(jnp.arange(blocks)).values()) <= most


def test_tiles_fit_the_ring_and_finish_the_busiest_block_first():
    assert SLOTS % 4 == 0 and TOKENS * (256 + 64) <= 2 * SLOT
    rows = rows_of_tiles(INFINITE_1B, 132)
    assert rows == (4, 8, 2, 2, 1)
    assert rows_of_tile((2560,), 4096, 132) == 2  # the busiest block has 10 tiles; of one row, 20
    assert rows_of_tile((7,), 4096, 132) == 1
    assert rows_of_tile((100,), 2 * SLOT, 132) == 0
    assert rows_of_tile((12,), 256, 132) == 0  # narrow rows come in eights
