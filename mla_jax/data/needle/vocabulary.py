"""Words and sentences of the synthetic data; the built-in `needle-bpe` tokenizer is trained on exactly these.

Key and haystack words are short and share letters, so that all of them are single tokens of a 512-token vocabulary.
Every text here begins and ends where a tokenizer splits words, so that texts join without changing their ids.
"""

ADJECTIVES = tuple(
    f" {word}"
    for word in (
        "red old new big hot cold wet dry raw sad mad shy bad fat thin fast slow dark wild calm bold rich poor hard"
    ).split()
)
NOUNS = tuple(
    f" {word}"
    for word in (
        "fox owl cat bat rat hen bee ant cow pig dog ram cup pot pan hat map pen car bus bed box bag jar"
    ).split()
)
"""A key is an adjective and a noun: 576 keys. Both lists name the variables of variable tracking."""

FILLER_WORDS = (
    *ADJECTIVES,
    *NOUNS,
    *" grass| green| sky| blue| sun| yellow| go| back| text| key| hidden| inside| we| you| it| and| or| the| an".split(
        "|"
    ),
)
"""Words of the `words` haystack: key words too, so that a key's words alone give nothing away."""

NOISE = (
    "The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""The filler of the landmark-attention passkey task (arXiv 2305.16300); the first begins a line."""

NEWLINE, STOP, COMMA = "\n", ".", ","

PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSKEY_NEEDLE = ("The pass key is", ". Remember it.", " is the pass key.")
PASSKEY_QUESTION = "What is the pass key? The pass key is"
PASSKEY_MAX = 50_000
"""Pass keys are drawn from 1 to this, as landmark-attention draws them."""

MAGIC_NEEDLE = " One of the special magic numbers for"
MAGIC_QUESTION, MAGIC_QUESTIONS = "The special magic number for", "The special magic numbers for"
IS, ARE, NOT_FOUND = " is:", " are:", " not found"

VARIABLE, EQUALS, VARIABLE_QUESTION = " VAR", " =", "The variables with value"

LINE_ENDS = (".", " is the pass key.")
"""Pieces before a line break: some tokenizers (Llama-3's, GPT-4's) write their full stop and the break as one token."""

PIECES = (
    NEWLINE,
    STOP,
    COMMA,
    PASSKEY_INTRO,
    *PASSKEY_NEEDLE,
    PASSKEY_QUESTION,
    MAGIC_NEEDLE,
    MAGIC_QUESTION,
    MAGIC_QUESTIONS,
    IS,
    ARE,
    NOT_FOUND,
    VARIABLE,
    EQUALS,
    VARIABLE_QUESTION,
    *NOISE,
    " " + NOISE[0],
    *FILLER_WORDS,
)
"""Everything that sequences are put together from, except numbers."""
