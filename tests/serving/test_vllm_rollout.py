"""A rollout for real: vLLM servers as the manifests start, drain and end them, behind the gateway that they describe.

The test plays kubelet and controllers: it runs preStop, takes the pod out of the gateway's list late, sends SIGTERM
when preStop has ended, and SIGKILL would follow after the grace period. The servers have the settings of overlays/dev
and a tiny model.
"""

import contextlib
import dataclasses
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envoy_gateway import POD, Gateway, gateway
from manifests import EXPORTED, FOLDER, TOOLS, Manifest, of_overlay, pod, server, settings
from mla_jax.bridge.hf.export import export
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.inference.serving_plan import PRE_STOP
from processes import held_port
from vllm_pod import KEY, Pod, start
from vllm_server import LONGEST, MARKS, WIDTH_576, healthy, random_params

ENVOY = TOOLS / "envoy"
pytestmark = [*MARKS, pytest.mark.skipif(not ENVOY.exists(), reason=f"{ENVOY} is missing; make kubernetes")]
IN_FLIGHT = 100
TOKENS = 64
LATE = 0.5
"""Seconds before the end of the notice when the gateway hears that the pod goes."""


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    """Of overlays/dev, with the gateway of overlays/prod."""
    kinds = ("HTTPRoute", "BackendTrafficPolicy")
    return of_overlay("dev") + [m for m in of_overlay("prod") if m["kind"] in kinds]


@pytest.fixture(scope="module")
def pods(manifests, tmp_path_factory) -> Iterator[list[Pod]]:
    """Four that are ready: two that serve and two that will replace them."""
    folder = tmp_path_factory.mktemp("pods")
    model = export(WIDTH_576, random_params(WIDTH_576), load_tokenizer("bytes"), folder / "tiny")
    with contextlib.ExitStack() as ending:
        started = []
        for _ in range(4):
            started.append(start(manifests, model, folder, ending.enter_context(held_port())))
            ending.callback(started[-1].kill)
        end = time.monotonic() + 1200
        for one in started:
            while not healthy(one.port):
                assert one.process.poll() is None, one.log.read_text()[-6000:]
                assert time.monotonic() < end, one.log.read_text()[-6000:]
                time.sleep(0.5)
        yield started


@dataclasses.dataclass
class Outcome:
    """What became of a request: `pod` is None where the gateway itself answered."""

    begun: float
    ended: float = 0
    pod: int | None = None
    """Known as soon as the answer begins."""
    status: int | None = None
    whole: bool = False
    text: str = ""
    """What came, of an answer that is not whole."""


def ask(
    port: int, host: str, stream: bool, tokens: int = TOKENS, prompt: int = 3, key: str = KEY,
    outcomes: list[Outcome] | None = None,
) -> Outcome:  # fmt: skip
    """A request for so many tokens; whole is an answer that has them all. It is among the outcomes from its start."""
    body = {"model": "tiny", "prompt": [72] * prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Host": host}
    outcome = Outcome(time.monotonic())
    if outcomes is not None:
        outcomes.append(outcome)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        outcome.status = response.status
        if (address := response.headers.get(POD)) and ":" in address:
            outcome.pod = int(address.rpartition(":")[2])
        text = response.read().decode()
        if response.status == 200:
            finished = text.rstrip().endswith("[DONE]") if stream else text.endswith("}")
            outcome.whole = finished and '"finish_reason":"length"' in text
        outcome.text = "" if outcome.whole else text[-300:]
    except (http.client.HTTPException, OSError) as e:
        outcome.text = repr(e)[-300:]
    finally:
        connection.close()
        outcome.ended = time.monotonic()
    return outcome


class Load:
    """IN_FLIGHT clients, every second one streaming, each with a request in flight until the block ends."""

    def __init__(self, running: Gateway):
        self.outcomes: list[Outcome] = []
        self._running, self._stop = running, threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i % 2 == 0,)) for i in range(IN_FLIGHT)]

    def _client(self, stream: bool) -> None:
        while not self._stop.is_set():
            ask(self._running.port, self._running.host, stream, outcomes=self.outcomes)

    def answering(self) -> set[int | None]:
        """Ports of pods that have begun an answer."""
        return {outcome.pod for outcome in list(self.outcomes)}

    def streaming(self, pod: Pod) -> int:
        """Answers of this pod that have begun to come and have not ended."""
        return sum(outcome.pod == pod.port and not outcome.ended for outcome in list(self.outcomes))

    def since(self, then: float) -> list[Outcome]:
        """Requests that began later."""
        return [outcome for outcome in list(self.outcomes) if outcome.begun > then]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)


def wait_until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def refuses(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def replace(running: Gateway, old: Pod, new: list[Pod], manifests: list[Manifest]) -> float:
    """Ends a pod as kubelet does, `new` being the others. Gives the time when that began."""
    begun = time.monotonic()
    end = begun + pod(manifests)["terminationGracePeriodSeconds"]
    interpreter, script = server(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    command = [interpreter, FOLDER / "base" / Path(script).name]
    pre_stop = subprocess.Popen(command, env={**os.environ, "CONFIG": str(old.config)})
    time.sleep(PRE_STOP - LATE)
    running.pods(*(one.port for one in new))
    running.wait_for(*(one.port for one in new))
    assert pre_stop.wait(end - time.monotonic()) == 0
    os.kill(old.process.pid, signal.SIGTERM)
    assert old.process.wait(end - time.monotonic()) == 0, "SIGKILL would have come"
    return begun


def test_the_server_takes_the_settings_and_exports_the_metrics(pods):
    metrics = pods[0].metrics()
    assert {name for name in EXPORTED if not re.search(rf"^{name}[ {{]", metrics, re.M)} == set()
    assert re.search(r'^vllm:inter_token_latency_seconds_bucket\{.*le="0.05"', metrics, re.M)
    assert ask(pods[0].port, "x", False).whole
    assert ask(pods[0].port, "x", False, tokens=300).whole, "cut to the longest answer that is allowed"
    assert ask(pods[0].port, "x", False, key="another").status == 401


def test_a_server_that_cannot_start_ends_and_says_why_last(pods, manifests, tmp_path):
    """`FallbackToLogsOnError` shows the last 2,048 bytes of the log in `kubectl describe pod`."""
    with held_port() as port:
        failing = start(manifests, pods[0].config.parent / "tiny", tmp_path, port, length=1000 * LONGEST)
        try:
            assert failing.process.wait(900) != 0
            assert "max_model_len" in failing.log.read_bytes()[-2048:].decode(errors="replace")
        finally:
            failing.kill()


def test_an_overload_is_answered_with_503_and_counted(pods, manifests):
    """80 prompts of 100 tokens, where the prompt that reaches 4,096 is the last to be let in.

    They come while the engine is held, so that however fast it reads, none leaves the queue.
    """
    limit = settings(manifests)["max-num-queued-tokens"]
    assert limit == 4096
    taken = limit // 100 + 1
    one, outcomes = pods[0], []
    clients = [
        threading.Thread(target=lambda: outcomes.append(ask(one.port, "x", False, prompt=100))) for _ in range(80)
    ]
    with one.engine_held():
        for client in clients:
            client.start()
        wait_until(lambda: len(outcomes) == 80 - taken)
        assert {outcome.status for outcome in outcomes} == {503}
        assert one.metric("vllm:admission_rejections_total") == 80 - taken
        assert one.metric("infinitecontext_queued_prompt_tokens") == 100 * taken
    for client in clients:
        client.join()
    assert [outcome.status for outcome in outcomes].count(200) == taken
    assert one.metric("infinitecontext_queued_prompt_tokens") == 0


def test_a_rollout_loses_no_request(pods, manifests, tmp_path):
    first, second, third, fourth = pods
    ports = [one.port for one in pods]
    begun = []
    with gateway(manifests, tmp_path, *ports[:2]) as running:
        with Load(running) as load:
            wait_until(lambda: load.streaming(first) and load.streaming(second))
            running.pods(*ports[:3])
            begun.append(replace(running, first, [second, third], manifests))
            running.pods(*ports[1:])
            begun.append(replace(running, second, [third, fourth], manifests))
            wait_until(lambda: len(load.outcomes) > 2 * IN_FLIGHT and load.answering() >= set(ports))
        lost = [outcome for outcome in load.outcomes if not outcome.whole]
    ended = [(one.pod, one.ended) for one in load.outcomes]
    late = [
        sum(pod == port and when > then for pod, when in ended) for port, then in zip(ports[:2], begun, strict=True)
    ]
    print(f"{len(ended)} requests, {late} answered by those that went as they went, {len(lost)} lost")
    assert lost == []
    assert sum(late) > 0, "there was nothing to lose"
    assert load.answering() == set(ports)


def test_a_killed_server_takes_only_its_own_requests_along(pods, manifests, tmp_path):
    """After the rollout, in which the first two ended."""
    *_, dies, stays = pods
    with gateway(manifests, tmp_path, dies.port, stays.port) as running:
        with Load(running) as load:
            wait_until(lambda: load.streaming(dies) > IN_FLIGHT / 20)
            dies.kill()
            wait_until(lambda: refuses(dies.port))  # its processes end one by one, within seconds
            killed = time.monotonic()
            wait_until(lambda: len(load.since(killed)) > IN_FLIGHT)
        failed = [outcome for outcome in load.outcomes if not outcome.whole]
        later = [outcome for outcome in load.since(killed) if not outcome.whole]
        print(f"{len(load.outcomes)} requests, {len(failed)} failed: {sorted(str(o.status) for o in failed)}")
        print(f"{len(load.since(killed))} of them began later, {len(later)} of these failed")
        assert failed
        for outcome in failed:
            # A status that clients try again, or a stream that was cut off.
            assert (outcome.status, outcome.pod) in ((503, None), (503, dies.port), (200, dies.port))
        # Until Envoy has missed the pod, all six attempts of a request can meet it, which is rare: none of 208 did.
        assert len(later) <= 2
        again = [ask(running.port, running.host, True) for _ in range(5)]
        assert all(outcome.whole and outcome.pod == stays.port for outcome in again)
