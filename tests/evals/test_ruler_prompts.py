"""RULER's prompts byte for byte as RULER's own scripts wrote them, given what these drew.

ruler_prompts.json holds what `generate_input_output` of github.com/NVIDIA/RULER at c3f5e3b returned, and for variable
tracking the whole script, with the arguments of its synthetic.yaml and small haystacks. Sentences were those that end
with . ! or ?, nltk's data not being at hand.
"""

import itertools
import json
import re
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.data.needle.ruler.niah import DEPTHS, TASKS, Text, niah_prompt
from mla_jax.data.needle.ruler.variable_tracking import variable_prompt
from mla_jax.data.needle.ruler.word_counts import FREQUENT_SIZE, common_words_prompt, frequent_words_prompt
from mla_jax.data.needle.ruler.words import Words, compound, wonderwords

PUBLISHED = json.loads((Path(__file__).parent / "ruler_prompts.json").read_text(encoding="utf-8"))
ESSAY = " ".join(f"Sentence number {i} of the essay is here, and it ends. Does it end? Yes!" for i in range(50)).split()
NEEDLE = r"One of the special magic (?:numbers|uuids) for (.+?) is: ([\da-f-]+)\."
WORDS = wonderwords()
SINGLE = sorted({*WORDS.adjectives, *WORDS.nouns, *WORDS.verbs})


class Drawn:
    """A random generator that draws what it is told."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def integers(self, *_, **__):
        return next(self.draws)

    choice = bytes = permutation = integers

    def shuffle(self, items):
        items[:] = next(self.draws)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def number_of_pair(key: str) -> int:
    """The number from which `compound` makes a key."""
    adjective = next(a for a in WORDS.adjectives if key.startswith(f"{a}-") and key[len(a) + 1 :] in WORDS.nouns)
    return WORDS.adjectives.index(adjective) * len(WORDS.nouns) + WORDS.nouns.index(key[len(adjective) + 1 :])


def draws_of_niah(name: str, prompt: str, answers: list[str]):
    """What niah_prompt has to draw, in its order."""
    task, found = TASKS[name], re.findall(NEEDLE, prompt)
    key_of = {value: key for key, value in found}
    keys = [*dict.fromkeys(key_of[answer] for answer in answers)]
    keys += [key for key, _ in found if key not in keys][: task.keys - len(keys)]
    draw_value = (lambda value: uuid.UUID(value).bytes) if task.uuid_values else int
    draw_key = (lambda key: uuid.UUID(key).bytes) if task.uuid_keys else number_of_pair
    for key in keys:
        of_key = [value for value in answers if key_of[value] == key] or [v for k, v in found if k == key]
        yield from (draw_key(key), *map(draw_value, of_key))
    needles = [match for match in re.finditer(NEEDLE, prompt) if match[1] in keys]
    yield [match[0] for match in needles]
    lines = prompt.split("\n")[1:-1]
    if task.haystack == "text":
        sentences = re.split(r"(?<=[.!?]) ", " ".join(ESSAY[: PUBLISHED[name]["size"]]))
        before = [re.sub(f" ?{NEEDLE}", "", prompt[prompt.index("\n") + 1 : match.start()]) for match in needles]
        places = [len(re.findall(r"[.!?](?: |$)", text)) for text in before]
        yield [next(d for d in DEPTHS if int(len(sentences) * (d / 100)) == place) for place in places]
    else:
        others = [match for match in map(re.compile(NEEDLE).match, lines) if match and match[1] not in keys]
        for match in others:
            yield from (draw_key(match[1]), draw_value(match[2]))
        yield [lines.index(needles[0][0])]
    yield range(task.asked)


@pytest.mark.parametrize("name", TASKS)
def test_needle_prompts(name):
    published = PUBLISHED[name]
    drawn = Drawn(draws_of_niah(name, published["prompt"], published["answers"]))
    ours = niah_prompt(drawn, published["size"], TASKS[name], WORDS, Text(ESSAY))  # type: ignore
    assert ours.text == published["prompt"] and list(ours.answers) == published["answers"]
    assert next(drawn.draws, None) is None


@given(
    words=st.lists(st.sampled_from(["one", "two.", "three!", "v.1", "four?”"]), min_size=1, max_size=30),
    data=st.data(),
)
def test_needles_stand_where_ruler_puts_them(words, data):
    size = data.draw(st.integers(1, len(words)))
    depths = sorted(data.draw(st.lists(st.sampled_from(DEPTHS.tolist()), min_size=1, max_size=4, unique=True)))
    sentences = re.split(r"(?<=[.!?]) |(?<=[.!?]”) ", " ".join(words[:size]))
    places = [0, *(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = []
    for start, end, needle in itertools.zip_longest(places, places[1:], [f"N{i}" for i in range(len(depths))]):
        if end is not None:
            parts.append(" ".join(sentences[start:end]))
            parts += [needle] if needle else []
    hidden = Text(words).hide([f"N{i}" for i in range(len(depths))], size, depths)
    assert hidden == " ".join(parts)


def test_the_forty_depths():
    assert len(set(DEPTHS.tolist())) == 40 and DEPTHS[:4].tolist() == [0, 3, 5, 8] and DEPTHS[-1] == 100


def test_a_distractor_never_has_the_key_that_is_asked_for():
    few = Words(("red", "old"), ("fox", "owl"), ())
    for seed in range(30):
        made = niah_prompt(rng(seed), 20, TASKS["niah_multikey_2"], few)
        key = re.search(r"number for (\S+) mentioned", made.text)[1]  # type: ignore
        assert [value for found, value in re.findall(NEEDLE, made.text) if found == key] == list(made.answers)


def test_keys_are_pairs_of_all_words_and_values_have_their_form():
    keys = {compound(WORDS, i) for i in (0, len(WORDS.nouns) - 1, len(WORDS.nouns))}
    a, n = WORDS.adjectives, WORDS.nouns
    assert keys == {f"{a[0]}-{n[0]}", f"{a[0]}-{n[-1]}", f"{a[1]}-{n[0]}"}
    assert len(a) > 900 and len(n) > 6000 and len(WORDS.verbs) > 1000
    for seed in range(50):
        (number,) = niah_prompt(rng(seed), 1, TASKS["niah_single_1"], WORDS).answers
        (value,) = niah_prompt(rng(seed), 1, TASKS["niah_multikey_3"], WORDS).answers
        assert re.fullmatch(r"[1-9]\d{6}", number) and uuid.UUID(value).version == 4 and value == value.lower()


def draws_of_chain(prompt: str, names: list[str]):
    lines = prompt.split("\n\n")[1].split("\n")
    yield from ([ord(letter) - ord("A") for letter in name] for name in names)
    yield int(re.search(r"VAR \w+ = (\d+)", prompt)[1])  # type: ignore
    yield [i - number for number, i in enumerate(i for i, line in enumerate(lines) if line.startswith("VAR"))]


def test_variable_tracking():
    published = PUBLISHED["vt"]
    cut = published["prompt"].rindex("Memorize and track")
    example, question = published["prompt"][:cut], published["prompt"][cut:]
    draws = [*draws_of_chain(example, example.split()[-5:]), *draws_of_chain(question, published["answers"])]
    sizes = {"example_size": example.count("The grass"), "size": question.count("The grass")}
    ours = variable_prompt(Drawn(draws), **sizes)  # type: ignore
    assert ours.text == published["prompt"] and list(ours.answers) == published["answers"]


def test_variables_are_five_and_assigned_in_the_order_of_the_text():
    for seed in range(30):
        made = variable_prompt(rng(seed), 5 + seed, 5)
        names = list(made.answers)
        assert len(set(names)) == 5 and all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
        assigned = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", made.text)
        value = re.search(r"assigned the value (\d+), they are: $", made.text)
        assert value and assigned == list(zip(names, [value[1], *names], strict=False))


def listed(context: str) -> list[str]:
    """Words of a numbered list."""
    return re.findall(r"\d+\. (.+?)(?= \d+\. |$)", context)


def draws_of_list(words: list[str], common: list[str]):
    """The words that are drawn, common ones first, and the permutation that puts them in this order."""
    counts = Counter(words)
    drawn = [*common, *(word for word in counts if word not in common)]
    yield [SINGLE.index(word) for word in drawn]
    often, seldom = counts[common[0]], min(counts.values())
    yield order_of(words, common * often + drawn[10:] * seldom)


def order_of(words: list[str], items: list[str]) -> list[int]:
    """The permutation that puts items in the order of words."""
    places: dict[str, list[int]] = {}
    for place, word in enumerate(items):
        places.setdefault(word, []).append(place)
    return [places[word].pop() for word in words]


@pytest.mark.parametrize(("name", "length"), [("cwe", 3000), ("cwe", 4095), ("cwe_4096", 4096), ("cwe_4096", 10**6)])
def test_common_words(name, length):
    published = PUBLISHED[name]
    _, example, solved, _, context, _ = published["prompt"].split("\n")
    solution = solved.rpartition("list are: ")[2]
    draws = [*draws_of_list(listed(example), listed(solution)), *draws_of_list(listed(context), published["answers"])]
    ours = common_words_prompt(Drawn(draws), published["size"], length, WORDS)  # type: ignore
    assert ours.text == published["prompt"] and list(ours.answers) == published["answers"]


def test_a_list_longer_than_all_words_is_of_pairs():
    few = Words(tuple("abcdefg"), tuple("tuvwxyz"), ())
    counts = Counter(listed(common_words_prompt(rng(), 15, 4096, few).text.split("\n")[-2]))
    assert len(counts) == 15 and all("-" in word for word in counts) and set(counts.values()) == {3, 30}


def test_frequent_words():
    published = PUBLISHED["fwe"]
    context = published["prompt"].split("coded words. ")[1].split("\n")[0].split(" ")
    ranked = [word for word, _ in Counter(context).most_common()]
    assert ranked[1:4] == published["answers"]
    letters = [[ord(letter) - ord("a") for letter in word] for word in ranked[1:]]
    unseen = [[i] * 6 for i in range(published["different"] - len(ranked))]
    draws = [*letters, *unseen, order_of(context, sorted(context, key=ranked.index))]
    ours = frequent_words_prompt(Drawn(draws), published["size"], published["different"])  # type: ignore
    assert ours.text == published["prompt"] and list(ours.answers) == published["answers"]


@pytest.mark.parametrize("different", [5, 20, 300])
def test_the_three_most_frequent_words_are_known_in_a_text_of_any_size(different):
    for size in (*range(FREQUENT_SIZE, 200), 5000):
        made = frequent_words_prompt(rng(size), size, different)
        counts = Counter(made.text.split("coded words. ")[1].split("\n")[0].split(" "))
        assert [word for word, _ in counts.most_common(4)] == ["...", *made.answers]
        assert counts.most_common()[3][1] > (counts.most_common()[4][1] if len(counts) > 4 else 0)
