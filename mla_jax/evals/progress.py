"""The progress of an evaluation, with the time that is left: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress in tokens read: one prompt of 128k takes as long as many of 1k."""

    def __init__(self, task: str, prompts: int, tokens: int, shown: bool = True):
        """`prompts` and `tokens` are those of the whole evaluation, of which questions of a haystack share theirs."""
        self._task, self._prompts, self._tokens, self._shown = task, prompts, max(tokens, 1), shown
        self._answered, self._read, self._what = 0, 0.0, task
        self._started = self._printed = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=tokens, unit=" tokens", unit_scale=True, desc=task) if on_terminal else None

    def at(self, length: int) -> None:
        """Prompts of another length follow."""
        self._what = f"{self._task} at {length} tokens"
        if self._bar is not None:
            self._bar.set_description(self._what)

    def add(self, prompts: int, tokens: float) -> None:
        """So many prompts more were answered, for which so many tokens were read."""
        self._answered, self._read = self._answered + prompts, self._read + tokens
        if self._bar is not None:
            self._bar.update(tokens)
        elif self._shown and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            passed = self._printed - self._started
            left = passed * (self._tokens - self._read) / self._read
            share = 100 * self._read / self._tokens
            print(
                f"{self._what}: {self._answered}/{self._prompts} prompts, {share:.0f} % of the tokens in "
                f"{tqdm.format_interval(passed)}, about {tqdm.format_interval(left)} left",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
