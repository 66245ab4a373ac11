"""Times generation: `python -m tools.bench.generate [KEY=VALUE ...] [--decode ...] [--read ...] [--peers ...]`.

Random weights and tokens. *Decode* runs over caches of random latents; *read* lets `Generator.generate` read a
prompt of that length and write new tokens, as a user does. Peers get the same weights in the same run.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.entry import compose_config
from mla_jax.config import ModelConfig
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.files import write_json
from mla_jax.hardware import GIB, nominal_peak, peak_memory
from mla_jax.inference.generator import PREFILL_CHUNK, Generator
from mla_jax.inference.memory import ALIGNMENT, MemoryPlan, most_that_fits
from mla_jax.inference.session import Session
from mla_jax.lengths import format_length, parse_length
from mla_jax.model.transformer import init_params
from mla_jax.observability.flops import forward_flops
from tools.bench import ceilings, generation
from tools.bench.report import origin

DECODE = ["1k", "8k", "32k", "128k", "512k", "1M"]
PEERS = ["eager", "sdpa", "expanded"]
PEER_TOKENS = ["1k", "8k", "32k", "128k"]
NEW = 128


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """FLOPs to read a prompt of one row: a whole forward pass but the head."""
    return forward_flops(config, 1, tokens, logits=0)


class Bench:
    """The measurements of one run; each adds rows to `results` and prints them."""

    def __init__(self, config: ModelConfig, args: argparse.Namespace):
        self.config, self.args = config, args
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            self.params = init_params(config, 0)
        self.read_ceiling, copy = ceilings.read_and_copy() if args.ceilings else (None, None)
        self.results: dict[str, Any] = origin() | {
            "model": dataclasses.asdict(config), "read_ceiling": self.read_ceiling, "copy_ceiling": copy, "rows": []
        }  # fmt: skip
        if self.read_ceiling:
            print(f"{jax.devices()[0].device_kind}: reads {self.read_ceiling / 1e9:,.0f} GB/s", flush=True)

    def generator(self) -> Generator:
        """A generator with the weights, options and memory limit of this run."""
        return Generator(
            self.config, self.params, int8_weights=self.args.int8_weights,
            cache_dtype="int8" if self.args.int8_cache else None, prefill_chunk=self.args.prefill_chunk,
            memory_limit=self.args.memory_limit,
        )  # fmt: skip

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, prints it, writes the file: what comes later may fail."""
        self.results["rows"].append(row)
        print(" | ".join(f"{key} {_shown(key, value)}" for key, value in row.items() if value is not None), flush=True)
        if self.args.json:
            write_json(self.args.json, self.results)

    def decode(self, lengths: list[int]) -> None:
        """Batch 1 over one cache, then the largest batch at each length if asked."""
        generator = self.generator()
        for batch in self.args.batch:
            session = generation.random_session(generator, 1, max(lengths)) if batch == 1 else None
            for tokens in lengths:
                rows = batch or self._largest_batch(generator, tokens)
                if batch != 1:
                    session = None  # its memory goes to the next
                    session = generation.random_session(generator, rows, tokens)
                assert session is not None
                timed = generation.time_decode(generator, session, tokens - ALIGNMENT)
                self.add(
                    {"what": "decode", "name": self._name(), "rows": rows, "tokens": tokens, "ms": timed.seconds * 1e3}
                    | {"tokens_per_second": rows / timed.seconds, "spread": timed.spread}
                    | {"read_bandwidth_share": self._share(timed), "peak_bytes": peak_memory()}
                )

    def read(self, lengths: list[int]) -> None:
        """A prompt of each length (less the new tokens) and NEW tokens; the first, short one compiles."""
        generator, rng = self.generator(), np.random.default_rng(0)
        for tokens in lengths:
            prompt = rng.integers(0, self.config.vocab_size, tokens - NEW).tolist()
            session = Session.empty(1)
            if self.args.cached:  # all but the last chunk is there already
                cached = tokens - NEW - self.args.prefill_chunk
                session = generation.random_session(generator, 1, cached, tokens)
                session.tokens = [prompt[:cached]]
            else:  # compiles at the capacity that will be used
                generator.reserve(session, tokens)
                generation.run_through(generator, session, prompt[: self.args.prefill_chunk], NEW)
                session.tokens = [[]]
            marks = generation.run_through(generator, session, prompt, NEW)
            flops = None if self.args.cached else prefill_flops(self.config, tokens)
            peak, plan = nominal_peak(jax.devices()[0].device_kind), self.plan(1, session.capacity)
            self.add(
                {"what": "read", "name": self._name() + (", cached" if self.args.cached else ""), "tokens": tokens}
                | marks
                | {"of_nominal": flops / marks["prefill_seconds"] / peak if flops and peak else None}
                | {"peak_bytes": peak_memory(), "planned_bytes": plan.total}
                | {"cache_bytes": sum(x.nbytes for x in jax.tree.leaves(session.layers))}
            )

    def peers(self, names: list[str], lengths: list[int]) -> None:
        """Each peer at each length; what fails, as for want of memory, ends that peer with the reason."""
        from tools.bench import generation_peers

        for name in names:
            measure: Callable[[int], dict[str, Any]]
            if name == "expanded":
                weights = self.generator().weights
                measure = lambda tokens: generation_peers.measure_expanded(self.config, weights, tokens)  # noqa: B023, E731
            else:
                measure = generation_peers.Transformers(self.config, self.params, name).measure
            for tokens in lengths:
                try:
                    row = measure(tokens)
                except Exception as e:  # whatever a peer raises, the others shall still be measured
                    self.add(
                        {"what": "peer", "name": name, "tokens": tokens, "reason": f"{type(e).__name__}: {e}"[:200]}
                    )
                    break
                self.add({"what": "peer", "name": name, "tokens": tokens, "ms": row.pop("step_seconds") * 1e3} | row)

    def plan(self, rows: int, tokens: int) -> MemoryPlan:
        """The memory plan of this run's generator."""
        return MemoryPlan.of(
            self.config, rows=rows, tokens=tokens, cache_dtype="int8" if self.args.int8_cache else None,
            int8_weights=self.args.int8_weights, prefill_chunk=self.args.prefill_chunk,
        )  # fmt: skip

    def _largest_batch(self, generator: Generator, tokens: int) -> int:
        if generator.memory_limit is None:
            raise UsageError("--batch 0 needs a device whose memory is known, or --memory-limit")
        limit = generator.memory_limit
        return most_that_fits(lambda rows: self.plan(rows, tokens).total, limit, step=1)

    def _name(self) -> str:
        bits = 8 * jnp.dtype(self.config.dtype).itemsize
        return f"weights {8 if self.args.int8_weights else bits}, cache {8 if self.args.int8_cache else bits} bits"

    def _share(self, timed: generation.Decoding) -> float | None:
        return timed.bytes_read / timed.seconds / self.read_ceiling if self.read_ceiling else None


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / GIB:.3f} GiB"
    if key == "tokens":
        return format_length(value)
    if key in ("read_bandwidth_share", "of_nominal", "spread"):
        return f"{value:.1%}"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.generate", description="Times generation and its peers."
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="model=NAME (default: infinite_1b), model.KEY=VALUE")
    add("--decode", nargs="*", metavar="TOKENS", help=f"steps at these lengths (without any: {' '.join(DECODE)})")
    add("--batch", nargs="+", type=int, default=[1], help="rows of --decode; 0 for the most that fit (default: 1)")
    add(
        "--read", nargs="+", default=[], metavar="TOKENS", help=f"prompt and {NEW} new tokens together of these lengths"
    )
    add("--cached", action="store_true", help="--read finds all but the last chunk in the cache, as random latents")
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="transformers (eager, sdpa), our model with an expanded KV cache (MHA-style)",
    )
    add("--peer-tokens", nargs="+", default=PEER_TOKENS, metavar="TOKENS")
    add("--int8-weights", action="store_true")
    add("--int8-cache", action="store_true")
    add("--prefill-chunk", type=int, default=PREFILL_CHUNK)
    add("--memory-limit", type=int, help="bytes that the plan may use (default: what JAX may take)")
    add("--no-ceilings", dest="ceilings", action="store_false", help="do not measure the read bandwidth of this device")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with one_line_errors():
        if not any(text.startswith("model=") for text in args.overrides):
            args.overrides.insert(0, "model=infinite_1b")
        bench = Bench(compose_config(args.overrides).model, args)
        if args.decode is not None:
            bench.decode([parse_length(text) for text in args.decode or DECODE])
        if args.read:
            bench.read([parse_length(text) for text in args.read])
        if args.peers is not None:
            bench.peers(args.peers or PEERS, [parse_length(text) for text in args.peer_tokens])


if __name__ == "__main__":
    # Peers allocate beside JAX, unless the user has decided about its share.
    if not os.environ.keys() & {"XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    main()
