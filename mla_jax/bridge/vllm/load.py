"""The load of a vLLM server, beside vLLM's own metrics: `vllm serve ... --middleware mla_jax.bridge.vllm.load.Load`.

vLLM counts the tokens of its queue for --max-num-queued-tokens and exports requests only; prompts differ in length by a
thousand times here, so autoscaling needs the tokens. And what vLLM has finished may not be sent yet: a pod that drains
needs to know when it is.
"""

from prometheus_client import Gauge  # pyright: ignore[reportMissingImports]

QUEUED = Gauge(
    "infinitecontext_queued_prompt_tokens",
    "Prompt tokens of requests whose answer has not begun. One that is partly read counts in full.",
    multiprocess_mode="livesum",
)
IN_FLIGHT = Gauge(
    "infinitecontext_http_requests_in_flight",
    "Requests to /v1 whose answer is not sent in full.",
    multiprocess_mode="livesum",
)


class Load:
    """ASGI middleware that counts requests, and sets the other gauge before `/metrics` is answered."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Passes every request on."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path.rstrip("/").endswith("/metrics"):
            QUEUED.set(scope["app"].state.engine_client.get_num_queued_tokens())
        if not path.startswith("/v1/"):
            return await self.app(scope, receive, send)
        with IN_FLIGHT.track_inprogress():
            await self.app(scope, receive, send)
