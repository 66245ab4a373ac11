r"""Synthetic retrieval data of an exact length: facts hidden in a haystack, then questions about all of them.

    passkey     <bos>introduction \n filler \n needle \n filler \n question answer.<eos>
    all others  <bos>filler with needles between its sentences \n question answer. \n question answer. ...<eos>
    but hashhop and ruler_vt, whose formats are those of `text_tasks`

An example is a pure function of the config, the tokenizer and a random generator, which `make_rng` makes from a seed
and indices. Evaluation prompts are held out: they come from generators that training never uses, whatever the seeds.
"""

import enum
import functools
import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from mla_jax.config import NeedleMixtureConfig
from mla_jax.data.needle import tasks
from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.haystack import Haystack, NeedlesHaystack, NoiseHaystack, TextHaystack, WordsHaystack
from mla_jax.data.needle.lexicon import Lexicon, make_lexicon
from mla_jax.data.needle.ring import Filler
from mla_jax.data.needle.text_tasks import TEXT_TASK_CLASSES, text_example
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError


class Purpose(enum.IntEnum):
    """Uses of random numbers; generators of different purposes are independent, whatever the seeds."""

    EXAMPLE = 0
    BATCH = 1
    EPOCH = 2
    EVALUATION = 3
    SKIPS = 4
    PAIRS = 5
    VALIDATION = 6
    MINED = 7


def make_rng(seed: int, purpose: Purpose, *index: int) -> np.random.Generator:
    """The random generator of a seed, a purpose and at most three non-negative indices; all are independent."""
    counter = [0, *index, *[0] * (3 - len(index))]  # the first word counts what is drawn
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, purpose], np.uint64), counter=counter))


class Example(NamedTuple):
    """A sequence [length] of token ids int32 and what of it is learned."""

    tokens: np.ndarray
    learned: np.ndarray
    """Bool, true for each token of an answer, its full stop and <eos>."""
    answers: np.ndarray
    """Bool, true for the learned tokens that write the first answer itself: no white space, comma, full stop or <eos>.

    The first alone shows retrieval: what is left over when all other needles were asked about is the last answer.
    """


class NeedleGenerator:
    """Makes examples of the tasks and haystacks that a config mixes."""

    def __init__(self, config: NeedleMixtureConfig, tokenizer: Tokenizer):
        """Encodes the vocabulary and the text folder.

        Raises:
            InputError: the text folder holds no text.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._lexicon = make_lexicon(tokenizer)
        self._tasks = {name: weight for name, weight in config.tasks.items() if weight > 0}
        self._weights = {name: weight for name, weight in config.haystacks.items() if weight > 0}
        self._haystacks = {name: self._make_haystack(name) for name in self._weights}
        self._text_tasks = {task: make(tokenizer) for task, make in TEXT_TASK_CLASSES.items() if task in self._tasks}
        self._shortest = {
            task: self._text_tasks[task].shortest if task in self._text_tasks
            else _shortest(tokenizer, self._lexicon, task)
            for task in self._tasks
        }  # fmt: skip

    def _make_haystack(self, name: str) -> Haystack:
        match name:
            case "noise":
                return NoiseHaystack(self._tokenizer)
            case "words":
                return WordsHaystack(self._tokenizer, self._lexicon)
            case "needles":
                return NeedlesHaystack(self._tokenizer, self._lexicon)
            case _:
                assert self._config.text_folder is not None
                return TextHaystack(self._tokenizer, self._config.text_folder, self._config.cache_dir)

    def draw_haystack(self, rng: np.random.Generator, task: str) -> Haystack:
        """A haystack of the mixture for a task."""
        haystack = self._haystacks[draw(rng, self._weights)]
        return passkey_noise(self._tokenizer) if task == "passkey" and isinstance(haystack, NoiseHaystack) else haystack

    def check_length(self, length: int) -> None:
        """Raises UsageError if no task of the mixture is sure to fit into `length` tokens."""
        shortest = min(self._shortest.values())
        if length < shortest:
            raise UsageError(
                f"{length} tokens are too short for data.tasks {', '.join(self._tasks)}: "
                f"the shortest possible with tokenizer {self._tokenizer.source} is {shortest}"
            )

    def example(self, rng: np.random.Generator, length: int) -> Example:
        """An example of exactly `length` tokens.

        Tasks that do not fit into `length` are not drawn; of the others, as many needles as fit.

        Raises:
            UsageError: no task fits.
        """
        self.check_length(length)
        task = draw(rng, {task: weight for task, weight in self._tasks.items() if self._shortest[task] <= length})
        if task in self._text_tasks:
            return Example(*text_example(rng, self._text_tasks[task], self._tokenizer, length))
        haystack = self.draw_haystack(rng, task)
        names = tasks.RandomNames(rng, self._lexicon)
        beginning = head(self._tokenizer, task)
        room = length - len(beginning) - 1
        units = tasks.draw_units(
            rng, names, self._lexicon, task, room, self._config.max_needles, self._config.near_duplicate_fraction
        )
        needles = sum(self._lexicon.count(needle) for unit in units for needle in unit.needles)
        filler = room - needles - len(self._dialogue(units).tokens)
        body = bury(rng, haystack, task, self._lexicon, [unit.needles for unit in units], filler, names.used)
        dialogue = self._dialogue([units[number] for number in rng.permutation(len(units))])
        tokens = np.concatenate([beginning, *body, dialogue.tokens, [self._tokenizer.eos_id]]).astype(np.int32)
        before = np.zeros(length - 1 - len(dialogue.tokens), bool)
        learned = np.concatenate([before, dialogue.learned, [True]])
        return Example(tokens, learned, np.concatenate([before, dialogue.answers, [False]]))

    def _dialogue(self, units: list[tasks.Unit]) -> Example:
        """The questions and answers about units, in this order."""
        parts = [part for unit in units for part in (unit.question, unit.answer)]
        pieces = self._lexicon.with_lines([piece for part in parts for piece in part])
        # A line break that is one token with the full stop before it is no longer in the question.
        joined = bool(np.isin(pieces, self._lexicon.pieces(v.STOP + v.NEWLINE)).any())
        sizes = [len(part) - int(joined and 0 < i and i % 2 == 0) for i, part in enumerate(parts)]
        learned = np.repeat([False, True] * (len(parts) // 2), sizes)
        first = np.arange(len(pieces)) < sum(sizes[:2])
        answers = first & learned & ~np.isin(pieces, self._lexicon.pieces(v.COMMA, v.STOP, v.STOP + v.NEWLINE))
        tokens, lengths = self._lexicon.ids(pieces), self._lexicon.lengths[pieces]
        return Example(
            tokens, np.repeat(learned, lengths), np.repeat(answers, lengths) & ~self._tokenizer.blank[tokens]
        )


def passkey_prompt(tokenizer: Tokenizer, length: int, depth: float, seed: int, index: int) -> tuple[list[int], str]:
    """A held-out passkey prompt in repeated noise: exactly `length` ids, ending with "The pass key is", and the key.

    The needle stands behind the sentence that ends nearest to `depth` (0 to 1) of the noise.

    Raises:
        UsageError: `length` does not hold introduction, needle and question.
    """
    lexicon = make_lexicon(tokenizer)
    shortest = _shortest(tokenizer, lexicon, "passkey", with_answer=False)
    if length < shortest:
        raise UsageError(
            f"a passkey prompt of {length} tokens is too short: "
            f"the shortest possible with tokenizer {tokenizer.source} is {shortest}"
        )
    rng = make_rng(seed, Purpose.EVALUATION, index)
    unit = tasks.make_unit("passkey", 1, tasks.RandomNames(rng, lexicon), lexicon)
    beginning = head(tokenizer, "passkey")
    needle, question = lexicon.ids_of_each([*unit.needles, unit.question])
    filler = length - len(beginning) - len(needle) - len(question)
    ids = np.concatenate([beginning, *around(rng, passkey_noise(tokenizer), lexicon, needle, filler, depth), question])
    return ids.tolist(), str(unit.answer[0])


@functools.lru_cache(maxsize=4)
def passkey_noise(tokenizer: Tokenizer) -> NoiseHaystack:
    """The filler of passkey prompts; each of its two parts is a line."""
    return NoiseHaystack(tokenizer, begins_line=True)


@functools.lru_cache(maxsize=16)
def head(tokenizer: Tokenizer, task: str) -> np.ndarray:
    """The beginning of an example: bos if there is one, and the introduction of passkey."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.array(bos + (tokenizer.encode(v.PASSKEY_INTRO + v.NEWLINE) if task == "passkey" else []), np.int32)


def _shortest(tokenizer: Tokenizer, lexicon: Lexicon, task: str, *, with_answer: bool = True) -> int:
    """Tokens that hold the smallest unit of a task whatever its names are."""
    unit = tasks.make_unit(task, tasks.SIZES[task][0], tasks.LongestNames(lexicon), lexicon)
    without = 0 if with_answer else lexicon.count(unit.answer) + 1
    return len(head(tokenizer, task)) + unit.count(lexicon) + 1 - without


def draw(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """A key of `weights`, with probability proportional to its weight."""
    shares = np.cumsum(list(weights.values()))
    return list(weights)[np.searchsorted(shares, rng.random() * shares[-1], side="right")]


def bury(
    rng: np.random.Generator, haystack: Haystack, task: str, lexicon: Lexicon, groups: list[list[list[int]]],
    length: int, taken: Collection[tasks.Key],
) -> list[np.ndarray]:  # fmt: skip
    """Filler of `length` tokens and all needles, as `hide` has them, or as `around` for passkey.

    `groups` are the needles that belong together, in pieces; the filler says nothing about the `taken` keys.
    """
    needles = lexicon.ids_of_each([needle for group in groups for needle in group])
    if task == "passkey":
        return around(rng, haystack, lexicon, needles[0], length, rng.random())
    return hide(rng, haystack.take(rng, length, taken), lexicon, needles, [len(group) for group in groups])


def around(
    rng: np.random.Generator, haystack: Haystack, lexicon: Lexicon, needle: np.ndarray, length: int, depth: float
) -> list[np.ndarray]:
    """Filler of `length` tokens, a part before `needle`, a line, that ends with a sentence and a part after it."""
    before = haystack.take(rng, length)
    gaps = before.gaps
    if lexicon.joins_lines and len(gaps) > 1:  # not two line breaks after each other
        gaps = gaps[gaps > 0]
    gap = int(gaps[np.argmin(np.abs(gaps - depth * length))])
    parts = Filler(before.ids[:gap], before.gaps), haystack.take(rng, length - gap)
    first, second = (_before_line(part, lexicon).ids for part in parts)
    return [first, needle, second]


def _before_line(filler: Filler, lexicon: Lexicon) -> Filler:
    """`filler` as it may stand before a line break; the same unless the tokenizer joins full stops to line breaks.

    Then a word takes the place of a last full stop, and no needle, which would end with one, goes to the end.
    """
    if not len(filler.ids) or not lexicon.joins_lines:
        return filler
    stop, word = (lexicon.ids([lexicon[text]])[-1:] for text in (v.STOP, v.FILLER_WORDS[-1]))
    ids = np.concatenate([filler.ids[:-1], word]) if filler.ids[-1] == stop else filler.ids
    return Filler(ids, filler.gaps[filler.gaps < len(ids)])


def hide(
    rng: np.random.Generator, filler: Filler, lexicon: Lexicon, needles: list[np.ndarray], sizes: list[int]
) -> list[np.ndarray]:
    """`filler` with all needles at random places between its sentences; a line break may follow.

    `sizes` are the numbers of needles that belong together: they stay in their order.
    """
    filler = _before_line(filler, lexicon)
    places = filler.gaps[rng.integers(len(filler.gaps), size=len(needles))]
    for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        places[start:end].sort()
    parts, last = [], 0
    for number in np.argsort(places, kind="stable"):
        parts += [filler.ids[last : places[number]], needles[number]]
        last = places[number]
    return [*parts, filler.ids[last:]]
