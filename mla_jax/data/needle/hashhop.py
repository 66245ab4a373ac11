"""HashHop (github.com/magicproduct/hash-hop): chains of random hashes in shuffled lines, to be followed over some hops.

    jrVmRGqDmpPXMHzk = 'WHzSBfXMBmUdZAqQ'      a line that ends a chain
    ohbLQqIlFvPNVlCW = jrVmRGqDmpPXMHzk        one that does not: two hops lead from ohb... to WHz...
    ...
    COMPLETION:
    Hops=2

    CoT=False

    ohbLQqIlFvPNVlCW = 'WHzSBfXMBmUdZAqQ'      with CoT=True: ohb... = 'jrV... = WHz...'

Random hashes cannot be guessed, and no hash is more alike to another one than chance has it.
"""

import itertools
import string
from dataclasses import dataclass

import numpy as np

_LETTERS = np.frombuffer((string.ascii_lowercase + string.ascii_uppercase).encode(), np.uint8)


@dataclass(frozen=True)
class HashChains:
    """Chains of hashes and the text that hides them, up to where the first hash of a chain asks for the others."""

    text: str
    chains: tuple[tuple[str, ...], ...]
    """Hashes of each chain, one more than it has hops."""
    chain_of_thought: bool

    def question(self, chain: int) -> str:
        """The text after the chains that asks about one of them."""
        return f"{self.chains[chain][0]} ="

    def answer(self, chain: int) -> str:
        """The text that belongs between quotes after the question."""
        hashes = self.chains[chain]
        return " = ".join(hashes[1:]) if self.chain_of_thought else hashes[-1]


def hash_chains(
    rng: np.random.Generator, size: int, hops: int, letters: int = 16, chain_of_thought: bool = False
) -> HashChains:
    """Random chains.

    Args:
        rng: draws all that is random.
        size: chains.
        hops: lines of a chain.
        letters: of a hash; there must be more hashes of so many letters than the chains need.
        chain_of_thought: the answer has all hashes of the chain instead of the last.
    """
    hashes: dict[bytes, None] = {}
    while len(hashes) < size * (hops + 1):
        drawn = _LETTERS[rng.integers(len(_LETTERS), size=(size * (hops + 1) - len(hashes), letters))]
        hashes.update(dict.fromkeys(row.tobytes() for row in drawn))
    names = [name.decode() for name in hashes]
    chains = tuple(tuple(names[i : i + hops + 1]) for i in range(0, len(names), hops + 1))
    lines = [f"{a} = {b}" for chain in chains for a, b in itertools.pairwise(chain[:-1])]
    lines += [f"{chain[-2]} = '{chain[-1]}'" for chain in chains]
    shuffled = "\n".join(lines[i] for i in rng.permutation(len(lines)))
    text = f"{shuffled}\nCOMPLETION:\nHops={hops}\n\nCoT={chain_of_thought}\n\n"
    return HashChains(text, chains, chain_of_thought)
