"""A judge for tests: an OpenAI-compatible server on loopback that replies what a function says, or fails as told."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELD = r"\[{}\]: (.*)\n"


def field(prompt: str, name: str) -> str:
    """What the prompt says after [NAME]."""
    return re.search(FIELD.format(name), prompt).group(1)


class JudgeServer:
    """Counts requests and keeps their bodies and headers.

    `reply(prompt, model)` is the content of a reply, or (status, body) to send as it is; a list of the latter in
    `first` comes before all others.
    """

    def __init__(self, reply: Callable[[str, str], str | tuple[int, str]]):
        self.reply = reply
        self.first: list[tuple[int, str]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.url = ""
        self._lock = threading.Lock()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def answer(self, body: dict, headers: dict) -> tuple[int, str]:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            if self.first:
                return self.first.pop(0)
        reply = self.reply(body["messages"][0]["content"], body["model"])
        if isinstance(reply, tuple):
            return reply
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        usage["prompt_tokens_details"] = {"cached_tokens": 60}
        return 200, json.dumps({
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice],
            "usage": usage,
        })  # fmt: skip


@contextlib.contextmanager
def judge_server(reply: Callable[[str, str], str | tuple[int, str]]) -> Iterator[JudgeServer]:
    """Serves until the block ends; requests that are waiting then are left alone."""
    judge = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = judge.answer(body, {name.lower(): text for name, text in self.headers.items()})
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After-Ms", "10")  # so that tests need not wait as OpenAI's client does
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked may be gone
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
