"""The pod's preStop: ends when every request is answered, so that SIGTERM finds nothing to lose.

vLLM 0.32 drains after SIGTERM too (--shutdown-timeout), but answers what comes meanwhile with status 200 and no text,
and cancels its HTTP server when its engine has ended, whether answers are sent or not. So this waits first until
gateways know that the pod goes; vLLM takes requests meanwhile, as ever.
"""

import os
import re
import time
import urllib.request

NOTICE = 15
"""Seconds until gateways know. As `PRE_STOP` in mla_jax/inference/serving_plan.py."""
OURS = r"^infinitecontext_http_requests_in_flight (\S+)$"
STOCK = r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$"


def in_flight(port: str) -> float:
    """Requests that are not answered; 0 if the server is gone."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            metrics = response.read().decode()
    except OSError as e:
        gone = isinstance(getattr(e, "reason", e), ConnectionError)
        return 0 if gone else 1  # or it is too busy to say
    return sum(map(float, re.findall(OURS, metrics, re.M) or re.findall(STOCK, metrics, re.M)))


def main() -> None:
    """Waits as long as serve.yaml allows."""
    with open(os.environ.get("CONFIG", "/etc/vllm/serve.yaml")) as file:
        settings = dict(re.findall(r"^([\w-]+): *(\d+)$", file.read(), re.M))
    time.sleep(NOTICE)
    end = time.monotonic() + int(settings["shutdown-timeout"])
    while in_flight(settings["port"]) and time.monotonic() < end:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
