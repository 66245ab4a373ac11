"""How processes end: one line and the exit code that a shell expects, with real pipes, signals and a full device."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.model.transformer import init_params
from tiny import MODEL

ROOT = Path(__file__).resolve().parent.parent
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
BODY = """
import os, sys, time
from mla_jax.errors import InputError, one_line_errors
def main():
    {body}
with one_line_errors():
    main()
"""


def python(body: str, **options) -> subprocess.Popen:
    """A process that runs `body` in `one_line_errors`."""
    return start(["-c", BODY.format(body=body)], **options)


def start(arguments: list, **options) -> subprocess.Popen:
    environment = os.environ | PATH | {"PYTHONUNBUFFERED": ""} | options.pop("env", {})
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **options)


def ended(process: subprocess.Popen, **options) -> tuple[int, str]:
    """The exit code, and what the process wrote to stderr."""
    _, err = process.communicate(timeout=300, **options)
    return process.returncode, (err or b"").decode()


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


UNBUFFERED = {"PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize("env", [{}, UNBUFFERED], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "body", ["print('x')", "print('x', flush=True)", "print('x'); sys.exit(3)", "print('x' * 10**6)"]
)
def test_a_reader_that_went_away_is_no_error(body, env):
    pipe = closed_pipe()
    assert ended(python(body, stdout=pipe, env=env)) == (141, "")
    os.close(pipe)


def test_a_reader_of_both_outputs_that_went_away_is_no_error():
    pipe = closed_pipe()
    assert python("print('x', file=sys.stderr)", stdout=pipe, stderr=pipe).wait(60) == 141
    assert python("print('x', file=sys.stderr, flush=True)", stderr=pipe).wait(60) == 141
    assert python("raise InputError('bad')", stderr=pipe).wait(60) == 1
    os.close(pipe)


def test_another_broken_pipe_keeps_its_traceback():
    code, err = ended(python("r, w = os.pipe(); os.close(r); os.write(w, b'x')"))
    assert code == 1 and "Traceback" in err and "BrokenPipeError" in err


@pytest.mark.parametrize("env", [{}, UNBUFFERED], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x'); sys.exit(0)"])
def test_a_full_device_is_one_line(body, env):
    with open("/dev/full", "wb") as full:
        code, err = ended(python(body, stdout=full, env=env))
    assert (code, err) == (
        1, "error: could not write the output (No space left on device); free space or name another place\n"
    )  # fmt: skip


def test_an_input_error_stays_itself_where_nothing_can_be_written():
    with open("/dev/full", "wb") as full:
        assert ended(python("print('x'); raise InputError('two\\nlines')", stdout=full)) == (1, "error: two lines\n")


def test_an_interrupt_is_one_line():
    process = python("print('ready', flush=True); time.sleep(300)")
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted\n")


def test_every_entry_point_ends_so():
    files = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
    mains = [file for file in files if '__name__ == "__main__"' in file.read_text()]
    assert len(mains) > 10
    for file in mains:
        assert "one_line_errors()" in file.read_text() or "    run(" in file.read_text(), file


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save_imported(folder, MODEL, init_params(MODEL, 0), load_tokenizer("needle-bpe"))


def generate(*arguments, **options) -> subprocess.Popen:
    return start(["-m", "tools.generate", *arguments], **options)


INTERRUPTED_WRITING = """
import os, signal
from mla_jax.inference.text_stream import TextStream
from tools import generate

def add(self, ids):  # the first tokens have come; a signal from outside might come too late on a busy machine
    os.kill(os.getpid(), signal.SIGINT)
    return "x"

TextStream.add = add
generate.main()
"""


def test_generation_is_interrupted_in_one_line(run_dir):
    process = start(["-c", INTERRUPTED_WRITING, run_dir, "The grass is green.", "--max-new-tokens", "400", "--quiet"])
    assert ended(process) == (130, "interrupted\n")


@pytest.mark.integration
def test_the_text_for_a_reader_that_goes_away_ends_quietly(run_dir):
    pipe = closed_pipe()
    assert ended(generate(run_dir, "The grass", "--max-new-tokens", "4", "--quiet", stdout=pipe)) == (141, "")
    os.close(pipe)


@pytest.mark.parametrize(("chat", "locale"), [([], "C"), (["--chat"], "C.UTF-8")], ids=["text", "chat"])
def test_bytes_on_stdin_that_are_no_utf8_are_one_line(run_dir, chat, locale):
    process = generate(run_dir, *chat, "--max-new-tokens", "1", stdin=subprocess.PIPE, env={"LC_ALL": locale})
    code, err = ended(process, input=b"caf\xe9\n")
    assert code == 1 and err.startswith("error: stdin cannot be read as UTF-8 text (") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "tools.generate", "nowhere", b"caf\xe9"],
        ["-m", "experiments.sft", b"name=caf\xe9"],
        ["-m", "tools.plan_memory", b"model.dtype=\xe9"],
    ],
    ids=lambda arguments: arguments[1],
)
def test_arguments_that_are_no_utf8_are_one_line(arguments):
    code, err = ended(start(arguments))
    assert code == 2 and err.startswith("error: argument '") and err.endswith("' is not UTF-8 text\n")
    assert err.count("\n") == 1


@pytest.mark.integration
def test_a_table_for_a_full_device_is_one_line():
    with open("/dev/full", "wb") as full:
        code, err = ended(start(["-m", "tools.plan_memory", "model=nano", "gpu=3"], stdout=full))
    assert code == 1 and err.startswith("error: could not write the output (No space left") and err.count("\n") == 1
