"""All CTAs of a grid, and who runs when: control flow, barriers of a CTA, deadlocks (PTX ISA, 9.7.12 and 9.7.13)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx import arithmetic, tensor_cores, transfers
from ptx.memory import DYNAMIC_SHARED, AccessError, Memory
from ptx.operands import THREADS, Operands, Read, Write
from ptx.parser import Instruction, UnsupportedError, parse

_ORDER_ONLY = (
    "fence.",
    "griddepcontrol.",
    "prefetch.",
    "setmaxnreg.",
    "wgmma.fence.",
)
"""Beginnings of opcodes that do nothing here, see the package's docstring."""
_HANDLERS = arithmetic.HANDLERS | transfers.HANDLERS | tensor_cores.HANDLERS
"""By the beginning of an opcode, what makes a function of an instruction."""
_CONVERGED = {**dict.fromkeys(("bar", "elect", "ldmatrix", "mma", "shfl", "stmatrix"), 32), "wgmma": THREADS}
"""By beginnings of opcodes, how many threads wait for each other: those of a warp, or of a warpgroup."""
_TURN = 4000
"""Instructions after which a warpgroup that does not wait hands over."""
_PATIENCE = 200
"""Turns of every warpgroup without any write or arrival, after which all wait in vain."""


class DeadlockError(RuntimeError):
    """No warpgroup can go on; the message says where each one is."""


class Cta:
    """A CTA: its shared memory and barriers."""

    def __init__(self, place: tuple[int, int, int], shared_bytes: int):
        self.place, self.shared = place, np.full(DYNAMIC_SHARED + shared_bytes, 0xFF, np.uint8)
        self.mbarriers: dict[int, transfers.MBarrier] = {}
        """By address."""
        self.barriers: dict[int, list[Arrival]] = {}
        """What waits at a barrier, by its number."""


class Arrival(NamedTuple):
    """Threads that wait at a barrier."""

    warpgroup: "Warpgroup"
    threads: np.ndarray
    term: bool
    """Of a reduction: whether one of them has a predicate that is true."""
    write: Write


class Step(NamedTuple):
    """An instruction, ready to execute."""

    execute: Callable
    """Of a warpgroup and the mask of its threads; if it jumps, also of the place, and returns whether to hand over."""
    jumps: bool
    """Whether it sets the program counter itself."""
    predicate: Read | None
    """The guard, which is `negated` or not."""
    negated: bool


class Machine:
    """A launch of a kernel."""

    def __init__(
        self, ptx: str, grid: tuple[int, int, int], block: int, shared_bytes: int, params: bytes, data: np.ndarray
    ):
        """A launch.

        Args:
            ptx: the module.
            grid: numbers of CTAs along x, y and z.
            block: threads of each.
            shared_bytes: dynamic shared memory of each.
            params: parameters, one after the other.
            data: uint8, global memory from `memory.GLOBAL` on; written to.

        Raises:
            UnsupportedError: an instruction is not known.
        """
        self.program = parse(ptx)
        if block % THREADS:
            raise UnsupportedError(f"{block} threads, which are no whole warpgroups")
        operands = Operands(self.program)
        padded, start = b"", 0
        for size in self.program.params.values():
            padded += params[start : start + size].ljust(-(-size // 128) * 128, b"\0")
            start += size
        self.memory, self.events = Memory(padded, data), 0
        """Events are writes to memory and arrivals, without which nobody who waits can go on."""
        self.copies: list[Callable[[], None]] = []
        """Asynchronous copies that have been issued, and what completes them."""
        self.steps = [self._step(each, operands) for each in self.program.instructions]
        self.converged = [_CONVERGED.get(each.parts[0], 0) for each in self.program.instructions]
        self.warpgroups = [
            Warpgroup(self, cta, index)
            for cta in [Cta(place, shared_bytes) for place in np.ndindex(grid)]
            for index in range(block // THREADS)
        ]

    def _step(self, instruction: Instruction, operands: Operands) -> "Step":
        name, guard = instruction.parts[0], instruction.guard or ""
        predicate = operands.read(guard.removeprefix("!"), "pred") if guard else None
        try:
            if name in _JUMPS:
                execute = _JUMPS[name](instruction, operands, self.program)
            elif instruction.opcode.startswith(_ORDER_ONLY):
                execute = _nothing
            else:
                execute = _HANDLERS[name](instruction, operands)
        except (KeyError, ValueError, IndexError) as e:
            raise UnsupportedError(f"the instruction {instruction}") from e
        return Step(execute, name in _JUMPS, predicate, guard.startswith("!"))

    def run(self, seed: int = 0) -> None:
        """Runs all threads to their end, warpgroups in an order of this seed.

        Raises:
            DeadlockError: some wait for what nobody will do.
            AccessError: one does what memory does not allow.
        """
        order, idle = np.random.default_rng(seed), 0
        while live := [each for each in self.warpgroups if not each.exited.all()]:
            before = self.events
            for i in order.permutation(len(live)):
                self._complete_copies(order)
                try:
                    with np.errstate(all="ignore"):  # infinities and NaN are as on a GPU
                        live[i].run()
                except (AccessError, UnsupportedError) as e:
                    raise type(e)(f"{e}; {live[i]}") from e
            idle = idle + 1 if self.events == before else 0
            if idle > _PATIENCE:
                raise DeadlockError("\n".join(["nobody can go on:", *map(str, live)]))

    def _complete_copies(self, order: np.random.Generator) -> None:
        """Completes about half of the copies that are on their way."""
        copies, self.copies = self.copies, []
        for complete in copies:
            if order.random() < 0.5:
                complete()
            else:
                self.copies.append(complete)


class Warpgroup:
    """128 threads of a CTA, each with a program counter."""

    def __init__(self, machine: Machine, cta: Cta, index: int):
        self.machine, self.cta, self.index = machine, cta, index
        self.registers: dict[str, np.ndarray] = {}
        self.counter = np.zeros(THREADS, np.int64)
        self.blocked, self.exited = np.zeros(THREADS, bool), np.zeros(THREADS, bool)
        self.products: list[list[Callable[[], None]]] = [[]]
        """What completes each wgmma that has been issued, by groups; the last one has not been committed."""
        self.accumulators: dict[str, tuple[np.ndarray, int]] = {}
        """By name of a register of which wgmma are under way: what it will hold, and the number of these."""
        self.polled = False
        """Whether something that may have to change was looked at since the last jump back."""

    def __str__(self) -> str:
        places = {}
        for place in np.unique(self.counter[~self.exited]):
            threads = ~self.exited & (self.counter == place)
            places[f"{self.machine.program.instructions[place]}"] = int(threads.sum())
        listed = ", ".join(f"{count} threads at `{text}`" for text, count in places.items())
        return f"CTA {self.cta.place}, warpgroup {self.index}: {listed or 'has ended'}"

    def require_whole_warps(self, mask: np.ndarray) -> None:
        """Raises UnsupportedError where a warp is active in part."""
        by_warp = mask.reshape(4, 32)
        if not (by_warp.all(1) | ~by_warp.any(1)).all():
            raise UnsupportedError("an instruction of whole warps in a part of one")

    def run(self) -> None:
        """Runs until all threads wait or have ended, or a turn is over."""
        self.polled = False
        for _ in range(_TURN):
            chosen = self._next()
            if chosen is None:
                return
            place, mask = chosen
            step = self.machine.steps[place]
            active = mask if step.predicate is None else mask & (step.predicate(self) != step.negated)
            if not step.jumps:
                if active.any():
                    step.execute(self, active)
                self.counter[mask] = place + 1
            else:
                self.counter[mask & ~active] = place + 1
                if active.any() and step.execute(self, active, place):
                    return
        self.machine.events += 1

    def _next(self) -> tuple[int, np.ndarray] | None:
        """The instruction to execute, of those that threads are at the first, and its threads; None if all wait."""
        free = ~(self.blocked | self.exited)
        if not free.any():
            return None
        place = self.counter[free].min()
        mask = free & (self.counter == place)
        if mask.all() or not self.machine.converged[place]:
            return place, mask
        for place in np.unique(self.counter[free]):
            mask = free & (self.counter == place)
            if size := self.machine.converged[place]:
                groups = (mask | self.exited).reshape(-1, size)
                mask &= np.repeat(groups.all(1), size)
            if mask.any():
                return place, mask
        return None


def _nothing(wg: Warpgroup, mask: np.ndarray) -> None:
    """Does what only orders memory, or changes nothing that is modelled."""


def _return(instruction: Instruction, operands: Operands, program):
    """ret: the end of these threads."""

    def step(wg, mask, place):
        wg.exited |= mask
        wg.machine.events += 1

    return step


def _jump(wg: Warpgroup, mask: np.ndarray, place: int, targets) -> bool:
    """Sets program counters; whether the turn is over, as a loop that waits starts again."""
    wg.counter[mask] = targets
    waits = wg.polled and bool((wg.counter[mask] <= place).any())
    wg.polled &= not waits
    return waits


def _branch(instruction: Instruction, operands: Operands, program):
    """bra to a label."""
    target = program.labels[instruction.operands[0]]
    return lambda wg, mask, place: _jump(wg, mask, place, target)


def _branch_by_index(instruction: Instruction, operands: Operands, program):
    """brx.idx to a label of a table."""
    index, table = operands.read(instruction.operands[0], "u32"), program.branch_tables[instruction.operands[1]]
    targets = np.array([program.labels[label] for label in table])
    return lambda wg, mask, place: _jump(wg, mask, place, targets[index(wg)[mask]])


def _barrier(instruction: Instruction, operands: Operands, program):
    """bar.sync and bar.red.or.pred: threads wait until as many as it says, or all of the CTA, have arrived."""
    if instruction.opcode not in ("bar.sync", "bar.red.or.pred"):
        raise UnsupportedError(f"the instruction {instruction}")
    has_result = instruction.opcode != "bar.sync"
    result, rest = instruction.operands[:has_result], instruction.operands[has_result:]
    write = operands.write(result[0]) if result else _ignore
    term = operands.read(rest[-1], "pred") if result else _no_term
    number, *count = (operands.read(operand, "u32") for operand in (rest[:-1] if result else rest))

    def step(wg, mask, place):
        (barrier,) = np.unique(number(wg)[mask]).tolist()
        ours = [each for each in wg.machine.warpgroups if each.cta is wg.cta]
        needed = int(count[0](wg)[mask][0]) if count else THREADS * len(ours)
        waiting = wg.cta.barriers.setdefault(barrier, [])
        waiting.append(Arrival(wg, mask.copy(), (term(wg) & mask).any(), write))
        wg.blocked |= mask
        arrived = sum(int(each.threads.sum()) for each in waiting)
        if arrived > needed:
            raise AccessError(f"{arrived} threads at barrier {barrier}, which is for {needed}")
        if arrived == needed:
            any_term = np.full(THREADS, any(each.term for each in waiting))
            for each in waiting:
                each.warpgroup.blocked &= ~each.threads
                each.warpgroup.counter[each.threads] += 1
                each.write(each.warpgroup, each.threads, any_term)
            waiting.clear()
        wg.machine.events += 1
        return False

    return step


def _ignore(wg: Warpgroup, mask: np.ndarray, values: np.ndarray) -> None:
    """Writes no result, as `bar.sync` has none."""


def _no_term(wg: Warpgroup) -> np.ndarray:
    return np.zeros(THREADS, bool)


_JUMPS = {"ret": _return, "bra": _branch, "bar": _barrier, "brx": _branch_by_index}
"""By the beginning of an opcode, what makes a function that sets program counters."""
