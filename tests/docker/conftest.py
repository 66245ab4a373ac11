"""Builds the images of deploy/docker for CPUs, on a Docker daemon that is there or one that the tests start."""

import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from throwaway_debian import run

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def docker(tmp_path_factory) -> Iterator[None]:
    """A daemon that answers. Skips where none does and none can be started."""
    if shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True).returncode:
        yield
        return
    if os.geteuid() or not shutil.which("dockerd"):
        pytest.skip("no Docker daemon answers, and to start one needs root and dockerd: make docker")
    state = tmp_path_factory.mktemp("docker")
    os.environ["DOCKER_HOST"] = f"unix://{state}/socket"
    # Without a bridge nothing of this machine's network is touched; builds use its network, containers have none.
    network = ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    folders = [f"--data-root={state}/data", f"--exec-root={state}/exec", f"--pidfile={state}/pid"]
    with (state / "log").open("w") as log:
        command = ["dockerd", *network, *folders, "-H", os.environ["DOCKER_HOST"]]
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        run("timeout", "60", "sh", "-c", "until docker info; do sleep 0.5; done")
        yield
    finally:
        daemon.terminate()
        daemon.wait(60)
        subprocess.run(["umount", state / "exec" / "netns" / "default"], capture_output=True)
        shutil.rmtree(state)  # gigabytes
        del os.environ["DOCKER_HOST"]


@pytest.fixture(scope="session")
def base(docker, tmp_path_factory) -> str:
    """The image that BASE in the environment names, else a Debian 12 with Python, made here: no registry is asked."""
    if named := os.environ.get("BASE"):
        return named
    if not shutil.which("debootstrap"):
        pytest.skip("needs debootstrap, or BASE=IMAGE with Debian and Python: make docker")
    root = tmp_path_factory.mktemp("base") / "root"
    run("debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root)
    for folder in ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    # pip inside trusts whom this machine trusts.
    certificates = Path("etc/ssl/certs/ca-certificates.crt")
    shutil.copyfile("/" / certificates, root / certificates)
    run("sh", "-c", 'tar -C "$0" -c . | docker import - infinitecontext-test-base', root)
    shutil.rmtree(root)
    return "infinitecontext-test-base"


@pytest.fixture(scope="session")
def wheels() -> Iterator[str]:
    """Where this machine's pip finds wheels beside its index, as a container can reach it; empty if nowhere."""
    ask = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = os.environ.get("PIP_FIND_LINKS") or subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    if not os.path.isdir(found):
        yield found
        return
    handler = functools.partial(SimpleHTTPRequestHandler, directory=found)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def build(name: str, **arguments: str) -> str:
    """Builds an image of this repository. Returns its name."""
    image = f"infinitecontext-test-{name}"
    options = [f"--build-arg={key}={value}" for key, value in arguments.items() if value]
    file = ROOT / "deploy" / "docker" / f"{name}.Dockerfile"
    # BuildKit wants a bridge for the network of a build; the classic builder does not.
    environment = os.environ | {"DOCKER_BUILDKIT": "0"}
    run("docker", "build", "--network=host", f"--file={file}", f"--tag={image}", *options, ROOT, env=environment)
    return image


@pytest.fixture(scope="session")
def train(base) -> str:
    return build("train", BASE=base, DEVICE="cpu", PIP_EXTRA_INDEX_URL=os.environ.get("PIP_EXTRA_INDEX_URL", ""))


@pytest.fixture(scope="session")
def serve(base, wheels) -> str:
    index = os.environ.get("PIP_EXTRA_INDEX_URL", "")
    return build("serve", BASE=base, VLLM="cpu", PIP_FIND_LINKS=wheels, PIP_EXTRA_INDEX_URL=index)
