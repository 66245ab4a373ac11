"""Joining the processes of a job: what the environment says, and what can be wrong with it."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_jax.config import flatten
from mla_jax.distributed import join
from mla_jax.distributed.join import Process, first_node, from_environment
from mla_jax.errors import InputError, UsageError
from processes import held_port, printed_by

ROOT = Path(__file__).resolve().parent.parent.parent
STEP = {
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "8195",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("n0,n1", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[007,012-015],login", "gpu007"),
        ("rack1-[3,7]-ib", "rack1-3-ib"),
        ("a.b.c,n[0-1]", "a.b.c"),
    ],
)
def test_first_node_of_a_node_list(nodes, first):
    assert first_node(nodes) == first


def test_what_the_environment_says():
    assert from_environment({}) is None
    assert from_environment(STEP) == Process("gpu07:61443", 12, 5, 1)  # a job's port follows from its id
    assert from_environment(STEP | {"SLURM_NTASKS": "1"}) is None
    assert from_environment(STEP | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:9"}) == Process("10.0.0.1:9", 12, 5, 1)
    assert from_environment(STEP | {"JAX_COORDINATOR_PORT": "77"}) == Process("gpu07:77", 12, 5, 1)
    assert from_environment(JAX) == Process("localhost:1234", 2, 1)
    assert from_environment(JAX | {"JAX_NUM_PROCESSES": "1"}) is None
    # A shell in an allocation: srun has not started anything.
    assert from_environment({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "needs JAX_PROCESS_ID as a number"),
        ({"JAX_NUM_PROCESSES": "two"}, "needs JAX_NUM_PROCESSES as a number.*'two'"),
        ({"JAX_PROCESS_ID": "2"}, "process 2 of 2: numbers go from 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "must be host:port, got 'localhost'"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:222214"}, "must be host:port, got 'localhost:222214'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        from_environment(JAX | changes)


def test_a_node_without_an_address_is_named_at_once():
    with pytest.raises(InputError, match=r"'no-such-node\.invalid' has no address here .*JAX_COORDINATOR_ADDRESS"):
        join.join_job(JAX | {"JAX_COORDINATOR_ADDRESS": "no-such-node.invalid:1"})


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{(port := server.getsockname()[1])}"
        with pytest.raises(InputError, match=f"port {port}, .* is taken on .*JAX_COORDINATOR_PORT"):
            join.join_job(JAX | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "0"})


def test_a_first_process_that_never_comes_is_named():
    with held_port() as port, pytest.raises(InputError, match=f"did not answer at localhost:{port} within 0 s"):
        join.join_job(JAX | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "MLA_JOIN_TIMEOUT_S": "0"})


def test_flatten():
    tree = {"a": {"b": 1, "c": {}}, "d": [{"e": None}, 2], "f": []}
    assert flatten(tree) == {"a.b": 1, "a.c": {}, "d.0.e": None, "d.1": 2, "f": []}


@pytest.fixture
def port() -> Iterator[int]:
    """Where processes meet."""
    with held_port() as port:
        yield port


TINY = (
    "model.hidden_size=32 model.num_attention_heads=2 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8 "
    "model.v_head_dim=8 model.kv_lora_rank=16 model.intermediate_size=32 optim=adamw tracker=none"
).split()


def start_two(port: int, run_dir: Path, steps: int, *second: str, count: int = 2) -> list[subprocess.Popen]:
    """Two processes that train together; `second` are further overrides of the second one."""
    stages = f"train.stages=[{{seq_len: 96, batch_size: 8, steps: {steps}, learning_rate: 0.01}}]"
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    environment |= {"JAX_PLATFORMS": "cpu", "MLA_JOIN_TIMEOUT_S": "300" if count == 2 else "10"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.sft", *TINY, stages, f"run_dir={run_dir}", *(second if rank else ())],
            env=environment | {"JAX_PROCESS_ID": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    printed = printed_by(processes, timeout=900)
    return [(process.returncode, *texts) for process, texts in zip(processes, printed, strict=True)]


@pytest.mark.integration
def test_processes_that_disagree_on_the_config_say_where(port, tmp_path):
    for code, _, errors in ends(start_two(port, tmp_path / "run", 3, "seed=7", "model.kv_lora_rank=24")):
        assert code == 2
        expected = (
            "the processes disagree on the config: model.kv_lora_rank is 16 on process 0 and 24 on process 1; "
            "seed is 0 on process 0 and 7 on process 1; give all the same command"
        )
        assert expected in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_processes_that_never_come_are_missed(port, tmp_path):
    ((code, _, errors),) = ends(start_two(port, tmp_path / "run", 3, count=1))
    assert code == 1 and re.search(r"error: process 0 of 2 waited 10 s at localhost:\d+ for the others", errors), errors


@pytest.mark.integration
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(port, tmp_path):
    processes = start_two(port, tmp_path / "run", 100_000)
    output = iter(processes[0].stdout)
    assert any(line.startswith("step ") for line in output)
    processes[1].send_signal(signal.SIGTERM)
    (code, printed, errors), (other, nothing, _) = ends(processes)
    assert code == other == 130, errors
    stopped = re.search(r"All processes stop at step (\d+)", printed)
    assert stopped and f"Interrupted: step {stopped[1]} is saved" in printed
    assert stopped[1] in [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "step" not in nothing.replace("Reached preemption sync point, step", "")
