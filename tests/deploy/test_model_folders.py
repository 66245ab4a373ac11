"""The scripts of the manifests: a pod serves what the export Job wrote, and refuses anything else by name."""

import os
import subprocess
import sys

import pytest

from manifests import FOLDER
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.model.transformer import init_params
from tiny import MODEL

pytestmark = pytest.mark.kubernetes


@pytest.fixture
def verify(tmp_path):
    """(exit code, message that `kubectl describe pod` shows) of the pod's first container for a model folder."""

    def run(model, config: str | None = None) -> tuple[int, str]:
        settings, log = tmp_path / "serve.yaml", tmp_path / "termination-log"
        settings.write_text(f"model: {model}\nport: 8000\n" if config is None else config)
        log.write_text("")
        environment = {**os.environ, "CONFIG": str(settings), "TERMINATION_LOG": str(log)}
        ran = subprocess.run(
            ["sh", FOLDER / "base" / "verify_model.sh"], env=environment, capture_output=True, text=True
        )
        return ran.returncode, log.read_text() or ran.stdout

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that exports a run as the Job does, and the model folder that it writes."""
    folder = tmp_path_factory.mktemp("volume")
    run, model = folder / "runs" / "mine", folder / "models" / "mine"
    save_imported(run, MODEL, init_params(MODEL, 0), load_tokenizer("bytes"))
    (model.with_name("mine.incoming")).mkdir(parents=True)  # as an interrupted Job leaves it
    (model.with_name("mine.incoming") / "half").write_text("x")

    def export(**environment: str) -> subprocess.CompletedProcess:
        variables = {"RUN": str(run), "MODEL": str(model), "PYTHON": sys.executable, "DTYPE": "float32"}
        command = ["sh", FOLDER / "export" / "export_model.sh"]
        return subprocess.run(
            command, env={**os.environ, **variables, **environment}, capture_output=True, text=True,
            cwd=FOLDER.parents[1],
        )  # fmt: skip

    ran = export()
    assert ran.returncode == 0, ran.stderr
    return export, model


@pytest.fixture
def model(exported, tmp_path):
    """A copy of the exported folder, to damage."""
    subprocess.run(["cp", "-r", exported[1], tmp_path / "model"], check=True)
    return tmp_path / "model"


def test_what_the_job_exports_is_served(exported, verify):
    _, model = exported
    assert not model.with_name("mine.incoming").exists() and not (model / "half").exists()
    code, message = verify(model)
    assert code == 0 and "files are as they were exported" in message


def test_the_job_never_writes_over_a_model(exported):
    export, model = exported
    before = (model / "SHA256SUMS").read_text()
    again = export(RUN="/nowhere")
    assert again.returncode == 0 and "needs a name of its own" in again.stdout
    assert (model / "SHA256SUMS").read_text() == before


def test_the_job_refuses_a_damaged_model_and_a_run_that_is_not_there(exported, model, tmp_path):
    export, _ = exported
    (model / "config.json").write_text("{}")
    refused = export(MODEL=str(model))
    assert refused.returncode == 1 and "differs from its SHA256SUMS" in refused.stderr
    none = export(RUN="/nowhere", MODEL=str(tmp_path / "new"))
    assert none.returncode == 1 and "there is no run /nowhere" in none.stderr
    assert not (tmp_path / "new").exists()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: truncate(model / "model.safetensors"), "model.safetensors: FAILED"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors: No such file"),
        (lambda model: (model / "SHA256SUMS").unlink(), "its export did not end: run the export Job again"),
        (lambda model: (model / "SHA256SUMS").write_text(""), "its export did not end"),
        (lambda model: (model / "SHA256SUMS").write_text("nonsense\n"), "does not list config.json"),
        (lambda model: truncate(model / "SHA256SUMS"), "SHA256SUMS"),
    ],
)
def test_a_damaged_folder_keeps_the_pod_from_starting(model, verify, damage, message):
    damage(model)
    code, shown = verify(model)
    assert code == 1 and message in shown


def test_a_folder_that_is_not_there_and_a_config_without_a_model(tmp_path, verify):
    code, shown = verify(tmp_path / "none")
    assert code == 1 and f"there is no folder {tmp_path / 'none'}: run the export Job" in shown
    code, shown = verify(None, config="port: 8000\n")
    assert code == 1 and "names no model" in shown
