"""Our models in EleutherAI's lm-evaluation-harness, as its model `mla_jax`; tools/lm_eval.py is the command line.

Importing this module registers the model. Tokens, truncation and sums are those of the harness' own model `hf`, so an
exported folder gets the same figures from both. Batches are made of texts of about the same length, longest first, and
share one cache, so that few shapes are compiled and what texts have in common is read once.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoTokenizer

from mla_jax.bridge.harness_options import GenerationOptions
from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.checkpoint.run_folder import TOKENIZER
from mla_jax.config import require_choice
from mla_jax.config.evaluate import CACHE_DTYPES
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError
from mla_jax.evals.provenance import provenance
from mla_jax.inference.generator import Generator
from mla_jax.inference.score import Score, score
from mla_jax.inference.session import Session
from mla_jax.inference.text_stream import TextStream, special_stops

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of what follows it."""


@register_model("mla_jax")
class HarnessLM(TemplateLM):
    """A run or a Hugging Face folder as a model of the harness; the arguments are its `--model_args`.

    Args:
        run: folder of either.
        tokenizer: a folder that AutoTokenizer loads, which must hold the model's tokenizer; None for the model's own.
            Tasks that make prompts of a length, RULER's, read this argument too, and need it.
        step: which checkpoint of a run: latest, best or a number.
        dtype: compute type; None for the model's.
        cache_dtype: type of the KV cache, int8 for instance; None for the compute type.
        truncation: cut what is longer than the model from the left, as `hf` does; else it is an error.
        batch_size: texts at one time.
        max_batch_size: the harness' argument for `batch_size=auto`, which we do not have.
        device: ignored, since the harness always sends one; JAX_PLATFORMS chooses.
        unknown: refused.

    Raises:
        InputError: an argument that is wrong, or a model or tokenizer that cannot be read.
    """

    def __init__(
        self, run: str = "", tokenizer: str | None = None, step: str | int = "latest", dtype: str | None = None,
        cache_dtype: str | None = None, truncation: bool = False, batch_size: int | str = 1,
        max_batch_size: int | None = None, device: str | None = None, **unknown: Any,
    ):  # fmt: skip
        super().__init__()
        known = "run, tokenizer, step, dtype, cache_dtype and truncation"
        if unknown or not run:
            wrong = f"model_args has {', '.join(unknown)}" if unknown else "model_args needs run=RUN_OR_HF_FOLDER"
            raise InputError(f"{wrong}; the model mla_jax takes {known}")
        if not str(batch_size).isdigit() or int(batch_size) < 1 or max_batch_size is not None:
            raise InputError(f"batch_size must be a number of texts (no max_batch_size, no auto), got {batch_size}")
        require_choice("model_args dtype", dtype or "float32", ("bfloat16", "float16", "float32"))
        require_choice("model_args cache_dtype", cache_dtype or "int8", CACHE_DTYPES)
        loaded = load_run_or_hf(str(run), str(step))
        self._parameters = sum(x.size for x in jax.tree.leaves(loaded.params))
        self._run = dataclasses.replace(loaded, params={})  # the generator has them
        own = self._run.path / TOKENIZER
        self.tokenizer: Any = self._read_tokenizer(Path(tokenizer or (own if own.is_dir() else self._run.path)))
        config = dataclasses.replace(self._run.model, dtype=dtype or self._run.model.dtype)
        self._generator = Generator(config, loaded.params, cache_dtype=cache_dtype)
        self._truncation, self._batch_size, self._batches = truncation, int(batch_size), 0

    def _read_tokenizer(self, folder: Path) -> Any:
        """The tokenizer as transformers loads it, which tasks use too."""
        if load_tokenizer(str(folder)).fingerprint != self._run.tokenizer.fingerprint:
            raise InputError(f"tokenizer={folder} is not the tokenizer of {self._run.path}; name an export of it")
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else folder.parent)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: bos, or eos where there is none."""
        bos = self._run.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._generator.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests made with this tokenizer."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template writes it; without the prompt, its last message goes on."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """Facts that the harness writes beside its results."""
        return {
            "model_num_parameters": self._parameters,
            "model_dtype": self._generator.config.dtype,
            "model_revision": f"step {self._run.step}",
            "cache_dtype": self._generator.cache_dtype or self._generator.config.dtype,
            "provenance": provenance(),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are those that the tokenizer adds, unless the text begins with bos."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        for number, found in self._scores(pairs, disable_tqdm):
            answers[number] = found.log_likelihood, found.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows as long as the model, of which each token is in one."""
        pairs: list[Pair] = []
        texts: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs += map(make_disjoint_window, windows)
            texts += [number] * (len(pairs) - len(texts))
        left, sums = Counter(texts), [0.0] * len(requests)
        for pair, found in self._scores(pairs, disable_tqdm):
            number = texts[pair]
            sums[number] += found.log_likelihood
            left[number] -= 1
            if left[number] == 0:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, sums[number])
        return sums

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair, its context cut from the left if it must and may be: the model does not read the last token."""
        too_many = len(context) + len(continuation) - 1 - self.max_length
        if too_many <= 0:
            return context, continuation
        if not self._truncation or too_many >= len(context):
            raise self._too_long(f"a context of {len(context)} tokens and an answer of {len(continuation)}")
        return context[too_many:], continuation

    def _too_long(self, what: str) -> InputError:
        return InputError(
            f"{what} exceed the model's max_position_embeddings {self.max_length}; choose a shorter task, or cut "
            "contexts from the left, as the harness' hf does, by model_args truncation=True"
        )

    def _scores(self, pairs: Sequence[Pair], quiet: bool) -> Iterator[tuple[int, Score]]:
        """Numbers of pairs and their scores, as they are found."""
        if not pairs:
            return
        session = self._session(len(pairs), max(len(context) + len(continuation) for context, continuation in pairs))
        rows = len(session.tokens)
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=quiet) as bar:
            for batch in _batches(_of_one_context(pairs, rows), rows):
                for turn in range(len(batch[0])):
                    numbers = [group[min(turn, len(group) - 1)] for group in batch]
                    numbers += numbers[-1:] * (rows - len(numbers))
                    contexts, continuations = zip(*(pairs[number] for number in numbers), strict=True)
                    scores = score(self._generator, contexts, continuations, session=session)
                    found = {group[turn]: each for group, each in zip(batch, scores, strict=False) if turn < len(group)}
                    yield from found.items()
                    bar.update(len(found))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model writes after the prompts, up to the stop strings of the task."""
        asked: list[Any] = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for number, (_, generation_kwargs) in enumerate(asked):
            groups.setdefault(json.dumps(generation_kwargs, sort_keys=True), []).append(number)
        options = {key: GenerationOptions.of(asked[group[0]][1]) for key, group in groups.items()}
        prompts = {
            number: self._prompt(asked[number][0], options[key].max_new_tokens)
            for key, group in groups.items()
            for number in group
        }
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for key, group in groups.items():
                longest = max(len(prompts[number]) for number in group) + options[key].max_new_tokens
                session = self._session(len(group), longest)
                by_length = sorted(group, key=lambda number: len(prompts[number]), reverse=True)
                for batch in _batches(by_length, len(session.tokens)):
                    written = self._write([prompts[number] for number in batch], options[key], session)
                    for number, text in zip(batch, written, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", asked[number], text)
                    bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        ids, room = self.tok_encode(text), self.max_length - max_new_tokens
        if len(ids) <= room:
            return ids
        if not self._truncation or room < 1:
            raise self._too_long(f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones")
        return ids[-room:]

    def _write(self, prompts: list[list[int]], options: GenerationOptions, session: Session) -> list[str]:
        """Continuations of the prompts, which fill the session's rows with repetitions of the last one."""
        tokenizer, rows = self._run.tokenizer, len(session.tokens)
        stops = special_stops(tokenizer, options.stops)
        streams = [TextStream(tokenizer, options.stops) for _ in range(rows)]

        def stopped(row: int, ids: list[int]) -> bool:
            streams[row].add(ids)
            return streams[row].stopped

        self._batches += 1
        self._generator.generate(
            prompts + prompts[-1:] * (rows - len(prompts)), max_new_tokens=options.max_new_tokens,
            eos_id=[*stop_ids(tokenizer), *stops], session=session, on_tokens=stopped,
            sampling=dataclasses.replace(options.sampling, seed=self._batches),
        )  # fmt: skip
        return [stream.text for stream in streams[: len(prompts)]]

    def _session(self, texts: int, capacity: int) -> Session:
        """One session for all batches: its capacity, and so what is compiled, does not change."""
        session = Session.empty(min(texts, self._batch_size))
        if texts:
            self._generator.reserve(session, capacity)
        return session


def _of_one_context(pairs: Sequence[Pair], rows: int) -> list[list[int]]:
    """Numbers of pairs in groups of one context each, which is then read once; large groups and long texts first.

    A row of a batch scores a group one by one, so none has more than the share of a row.
    """
    groups: dict[Any, list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        shared = len(context) > len(continuation)  # or there is little to gain
        groups.setdefault(tuple(context) if shared else number, []).append(number)
    share, pieces = -(-len(pairs) // rows), []
    for group in groups.values():
        parts = -(-len(group) // share)
        pieces += [group[part::parts] for part in range(parts)]
    longest = [max(sum(map(len, pairs[number])) for number in piece) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i]), longest[i]), reverse=True)
    return [pieces[i] for i in order]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
