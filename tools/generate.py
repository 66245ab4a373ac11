"""Continues text: `python -m tools.generate RUN_OR_HF_DIR ["PROMPT" | --file FILE | --chat]`, or a prompt on stdin."""

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.compilation_cache import keep_compiled
from mla_jax.data.chat import render
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError, UsageError, check_text, one_line_errors
from mla_jax.hardware import GIB, peak_memory
from mla_jax.inference.generator import PREFILL_CHUNK, Generator
from mla_jax.inference.sampling import SamplingParams
from mla_jax.inference.session import Session
from mla_jax.inference.text_stream import TextStream, special_stops


class Conversation:
    """One conversation or text: streams what the model writes, and keeps the session with what it has read."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, args: argparse.Namespace):
        self.generator, self.tokenizer, self.args = generator, tokenizer, args
        self.session, self.turn = Session.empty(1), 0
        self.stop_ids = (*stop_ids(tokenizer), *special_stops(tokenizer, args.stop))

    def write(self, prompt: list[int]) -> str:
        """Streams the continuation to stdout, and statistics to stderr; returns it."""
        args, stream = self.args, TextStream(self.tokenizer, self.args.stop)
        started, arrivals = time.perf_counter(), []

        def show(_: int, ids: list[int]) -> bool:
            arrivals.append((time.perf_counter(), len(ids)))
            print(stream.add(ids), end="", flush=True)
            return stream.stopped

        bar = tqdm(total=len(prompt), unit=" tokens", desc="reading", disable=None, leave=False, delay=1.0)
        reading = 0

        def progress(done: int, total: int) -> None:
            nonlocal reading
            bar.total, reading = total, total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        try:
            self.generator.generate(
                [prompt], max_new_tokens=args.max_new_tokens, eos_id=self.stop_ids,
                sampling=_sampling(args, self.turn), session=self.session, on_tokens=show, on_prefill=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not args.chat:
                raise
            self.session = Session.empty(1)  # some of its arrays may be gone
            print(file=sys.stderr)
        finally:
            bar.close()
        print(stream.finish())
        self.turn += 1
        if not args.quiet:
            print(_summary(len(prompt), reading, started, arrivals), file=sys.stderr)
        return stream.text


def _summary(prompt: int, read: int, started: float, arrivals: list[tuple[float, int]]) -> str:
    """One line of statistics. The speed leaves out the first tokens, which arrive together after the prompt is read."""
    written = sum(tokens for _, tokens in arrivals)
    text = f"{prompt:,} tokens in, {read:,} of them read now; {written:,} tokens out"
    if arrivals:
        text += f", the first {arrivals[0][1]} after {arrivals[0][0] - started:.2f} s"
    if len(arrivals) > 1:
        seconds = arrivals[-1][0] - arrivals[0][0]
        text += f", then {(written - arrivals[0][1]) / seconds:.1f} tokens/s"
    peak = peak_memory()
    return text + (f"; peak {peak / GIB:.2f} GiB of device memory" if peak else "")


def _sampling(args: argparse.Namespace, turn: int = 0) -> SamplingParams:
    """The arguments' sampling parameters; each turn of a chat has a seed of its own."""
    sampling = SamplingParams(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingParams)})
    return dataclasses.replace(sampling, seed=sampling.seed + turn)


def _chat(conversation: Conversation) -> None:
    """Turns until the end of the input; `/new` forgets the conversation."""
    messages = [{"role": "system", "content": conversation.args.system}] if conversation.args.system else []
    start = list(messages)
    for line in _lines():
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        text = render(conversation.tokenizer, messages, add_generation_prompt=True)
        try:
            answer = conversation.write(conversation.tokenizer.encode(text))
        except InputError as e:  # too long now: the conversation up to here stays usable
            print(f"error: {e}; /new starts a new conversation", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except UnicodeDecodeError as e:
                raise InputError(f"stdin cannot be read as UTF-8 text ({e})") from e
            if line:
                yield line


def _text(args: argparse.Namespace) -> str:
    """The prompt. Raises InputError or UsageError for arguments that do not go together, before anything is loaded."""
    _sampling(args)
    if args.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {args.max_new_tokens}")
    if "" in args.stop:
        raise InputError("a stop string must not be empty")
    check_text(*(text for text in (args.prompt, args.system, *args.stop) if text is not None))
    if args.prompt is not None and args.file is not None:
        raise UsageError("give a prompt or --file, not both")
    if args.chat:
        if args.prompt is not None or args.file is not None:
            raise UsageError("--chat reads its turns from stdin; leave out the prompt and --file")
        return ""
    if args.system is not None:
        raise UsageError("--system is for --chat")
    try:
        if args.prompt is not None:
            return args.prompt
        return args.file.read_text(encoding="utf-8-sig") if args.file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{args.file or 'stdin'} cannot be read as UTF-8 text ({e})") from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description="Continues text, or chats.")
    add = parser.add_argument
    add("model", type=Path, help="folder of a run, or of a dense DeepSeek-V2 or -V3 in Hugging Face format")
    add("prompt", nargs="?", help="text to continue (default: stdin)")
    add("--file", type=Path, help="text file to continue")
    add("--chat", action="store_true", help="a conversation, one line a turn, by the tokenizer's chat template")
    add("--system", help="system message of a chat")
    add("--max-new-tokens", type=int, default=256)
    add("--stop", action="append", default=[], help="text or special token that ends the continuation (repeatable)")
    for field in dataclasses.fields(SamplingParams):
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    add("--step", default="latest", help="of a run: latest, best or a number")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="compute type (default: the model's); float16 on Turing",
    )
    add("--int8-weights", action="store_true", help="8-bit weights")
    add("--int8-cache", action="store_true", help="8-bit cache")
    add("--prefill-chunk", type=int, default=PREFILL_CHUNK, help="prompt tokens at one time; fewer take less memory")
    add("--quiet", action="store_true", help="only the text")
    return parser


def main() -> None:
    """The command line; exit code 1 for what cannot be read or does not fit, 130 for Ctrl-C, 141 for a closed pipe."""
    args = _parser().parse_args()
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale says, prompts are UTF-8
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    with one_line_errors():
        text = _text(args)
        keep_compiled()
        run = load_run_or_hf(args.model, args.step)
        config = dataclasses.replace(run.model, dtype=args.dtype or run.model.dtype)
        generator = Generator(
            config, run.params, int8_weights=args.int8_weights, cache_dtype="int8" if args.int8_cache else None,
            prefill_chunk=args.prefill_chunk,
        )  # fmt: skip
        conversation = Conversation(generator, run.tokenizer, args)
        if args.chat:
            _chat(conversation)
        else:
            bos = [] if run.tokenizer.bos_id is None else [run.tokenizer.bos_id]
            conversation.write(bos + run.tokenizer.encode(text))


if __name__ == "__main__":
    main()
