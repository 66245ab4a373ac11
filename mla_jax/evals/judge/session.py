"""Asks judges through Inspect: every reply is kept the moment it is there, so nothing is asked twice.

Replies are in Inspect's cache, in the folder judge of the user's cache folder, by endpoint, model, prompt and settings.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.event import ModelEvent
from inspect_ai.log import EvalLog, EvalSample
from inspect_ai.model import CachePolicy, GenerateConfig, Model, ModelOutput, ResponseSchema, get_model
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import JSONSchema
from tqdm import tqdm

from mla_jax.config import EndpointConfig, JudgeConfig
from mla_jax.errors import InputError, UsageError, first_line
from mla_jax.evals.judge import verdicts as v
from mla_jax.files import user_cache_folder


@dataclass
class Usage:
    """Tokens and requests of a judge's replies, kept ones among them."""

    replies: int = 0
    kept: int = 0
    """Replies from the cache, which were not asked for by this process."""
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """The outcome for a sample."""

    verdict: str | None
    """None: a reply had no verdict in it."""
    decided_by: str
    """The stage of a cascade; "judge" without one."""
    orders: tuple[str | None, ...]
    """Of a pair: what was said in each order."""
    text: str
    """What the judge wrote."""


@dataclass
class Session:
    """The judges of a config, and what they took."""

    config: JudgeConfig
    log_dir: Path
    """Inspect's logs, for `inspect view`."""
    usage: dict[str, Usage] = field(default_factory=dict)
    """By name of the model."""

    def judges(self, key: str, choices: tuple[str, ...], *, again: bool = False) -> list[Model]:
        """The endpoints as models for Inspect.

        Args:
            key: the word before a verdict.
            choices: the verdicts.
            again: ask again what was asked before, and keep those replies apart.

        Raises:
            UsageError: the environment variable of a key is not set.
        """
        config = self.config
        schema = ResponseSchema(name=key, json_schema=JSONSchema.model_validate(v.schema(key, choices)), strict=True)
        generate = GenerateConfig(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            max_connections=config.max_connections,
            max_retries=config.max_retries,
            attempt_timeout=config.timeout,
            response_schema=schema if config.structured else None,
            cache=CachePolicy(expiry=None, per_epoch=False, scopes={"again": "yes"} if again else {}),
        )
        return [_model(endpoint, generate) for endpoint in config.judges]

    def ask(self, name: str, samples: Sequence[Sample], how: Scorer) -> list[Reply]:
        """The replies to samples, in their order; none without samples.

        Args:
            name: of the log.
            samples: their output is metadata `answer`.
            how: one of `scorers`.

        Raises:
            InputError: an endpoint did not answer as it should, after the configured retries.
        """
        if not samples:
            return []
        os.environ.setdefault("INSPECT_CACHE_DIR", str(user_cache_folder() / "judge"))
        numbered = [sample.model_copy(update={"id": number}) for number, sample in enumerate(samples)]
        pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
        with tqdm(total=len(samples), desc=f"judging: {name}", mininterval=pause) as bar:
            task = Task(name=name, dataset=MemoryDataset(numbered), solver=given_answer(), scorer=counted(how, bar))
            logs = eval(
                task, model="none/none", display="log", log_level="critical", log_dir=str(self.log_dir),
                log_realtime=False, ctl_server=False, score_display=False, max_samples=2 * self.config.max_connections,
            )  # fmt: skip
        if not logs or logs[0].status == "cancelled":  # Inspect handles Ctrl-C
            raise KeyboardInterrupt
        log = logs[0]
        self._count(log)
        if log.status != "success":
            raise InputError(self._what_happened(log))
        by_id = {sample.id: sample for sample in log.samples or []}
        return [_reply(by_id[number]) for number in range(len(samples))]

    def _count(self, log: EvalLog) -> None:
        for event in (event for sample in log.samples or [] for event in sample.events):
            if isinstance(event, ModelEvent) and event.output.choices and event.error is None:
                usage = self.usage.setdefault(event.model.removeprefix(_PROVIDER), Usage())
                usage.replies += 1
                usage.kept += event.cache == "read"
                tokens = event.output.usage
                if tokens is not None:
                    # Inspect counts apart what the endpoint had in its own cache.
                    cached = (tokens.input_tokens_cache_read or 0) + (tokens.input_tokens_cache_write or 0)
                    usage.input_tokens += tokens.input_tokens + cached
                    usage.output_tokens += tokens.output_tokens

    def _what_happened(self, log: EvalLog) -> str:
        """One line: which endpoint, what it did, and that nothing is lost."""
        endpoints = ", ".join(f"{each.model} at {each.base_url}" for each in self.config.judges)
        message = log.error.message if log.error else log.status
        named = re.search(r"raised (\w+)", message) or re.match(r"(\w+)\(", message)  # RetryError(... raised X)
        cause = _CAUSES.get(named[1]) if named else None
        cause = cause.format(self.config) if cause else first_line(Exception(message))
        return f"judge {endpoints}: {cause}; its replies so far are kept, and the same command goes on from there"


_CAUSES = {
    "APIConnectionError": "it cannot be reached",
    "AttemptTimeoutError": "no reply within {0.timeout} s (timeout), {0.max_retries} retries included",
    "RateLimitError": "too many requests (429), {0.max_retries} retries included; lower max_connections",
    "InternalServerError": "server error (5xx), {0.max_retries} retries included",
    "OpenAIResponseError": "what it replies is no chat completion; does base_url end as it should, with /v1 mostly?",
    "JSONDecodeError": "what it replies is not JSON",
    "TypeError": "what it replies is no chat completion; does base_url end as it should, with /v1 mostly?",
}
"""What Inspect's and OpenAI's exceptions mean to who configured the judge."""
_PROVIDER = "openai-api/judge/"


def _model(endpoint: EndpointConfig, config: GenerateConfig) -> Model:
    key = "none"
    if endpoint.api_key_env is not None:
        key = os.environ.get(endpoint.api_key_env, "")
        if not key:
            raise UsageError(f"api_key_env names {endpoint.api_key_env}, which is not set; put the key there")
    name = _PROVIDER + endpoint.model
    return get_model(name, base_url=endpoint.base_url, api_key=key, config=config, memoize=False)


@solver
def given_answer() -> Solver:
    """Takes metadata `answer` for the output: what is judged was generated before."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = ModelOutput.from_content("evaluated", state.metadata["answer"])
        return state

    return solve


@scorer(metrics=[accuracy(), stderr()])
def counted(inner: Scorer, bar: tqdm) -> Scorer:
    """Another scorer, and a bar that shows how far it is."""

    async def score(state: TaskState, target: Target) -> Score | None:
        found = await inner(state, target)
        bar.update()
        return found

    return score


def _reply(sample: EvalSample) -> Reply:
    (score,) = (sample.scores or {}).values()
    metadata: dict[str, Any] = score.metadata or {}
    verdict = metadata.get("verdict")
    return Reply(
        verdict, metadata.get("decided_by", "judge"), tuple(metadata.get("orders", ())), score.explanation or ""
    )
