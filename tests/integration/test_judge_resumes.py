"""A judge's run that is killed, or stopped by Ctrl-C, goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from judge_server import judge_server

pytest.importorskip("inspect_ai")
pytestmark = pytest.mark.integration
ANSWERS, ANSWERED = 12, 5
"""In all, and before the process ends."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_replies_outlive_the_process(tmp_path, how):
    lines = [{"question": f"Number {i}?", "gold": str(i), "prediction": "none"} for i in range(ANSWERS)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(map(json.dumps, lines)))

    gone = threading.Event()

    def reply(*_):
        if len(server.bodies) > ANSWERED:
            gone.wait(600)
        return "GRADE: false refusal"

    with judge_server(reply) as server:
        command = [
            sys.executable, "-m", "experiments.judge", f"answers={answers}", f"judge.base_url={server.url}",
            "judge.model=one", "max_connections=1", "agreement=0", "retest=0", "planted=0", "pairs=0",
        ]  # fmt: skip
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 600
        while len(server.bodies) <= ANSWERED and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == (-how if how == signal.SIGKILL else 130), stderr
        assert how == signal.SIGKILL or stderr.endswith("\ninterrupted\n"), stderr
        assert not (tmp_path / "answers.judge.json").exists()
        before = set(server.prompts)
        gone.set()
        subprocess.run(command, env=environment, check=True, capture_output=True)
    report = json.loads((tmp_path / "answers.judge.json").read_text())
    assert len(before) == ANSWERED + 1 and len(set(server.prompts)) == ANSWERS
    assert len(server.prompts) == ANSWERS + 1, "only what was on its way is asked again"
    assert report["usage"]["one"]["kept"] == ANSWERED and report["classes"]["false refusal"]["rate"] == 1
