"""The length of vLLM's queue in tokens, beside vLLM's own metrics.

`vllm serve ... --middleware mla_jax.bridge.vllm.queued_tokens.QueuedTokens`. vLLM counts these tokens for
--max-num-queued-tokens, and exports requests only. Prompts differ in length by a thousand times here, so autoscaling
needs the tokens.
"""

from prometheus_client import Gauge  # pyright: ignore[reportMissingImports]

QUEUED = Gauge(
    "infinitecontext_queued_prompt_tokens",
    "Prompt tokens of requests whose answer has not begun. One that is partly read counts in full.",
    multiprocess_mode="livesum",
)


class QueuedTokens:
    """ASGI middleware that sets the gauge before `/metrics` is answered."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Passes every request on."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            QUEUED.set(scope["app"].state.engine_client.get_num_queued_tokens())
        await self.app(scope, receive, send)
