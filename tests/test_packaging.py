"""What gets installed: our packages under their names, and no shadow over Hugging Face's `kernels`."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def in_clean_interpreter(code: str, cwd: Path, *, python_path: str = "") -> str:
    """Output of `python -c code` in `cwd`, which is first on sys.path; without the paths of this process."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": python_path, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_latent_attention_imports_outside_the_repository(tmp_path):
    file = in_clean_interpreter("import latent_attention; print(latent_attention.__file__)", tmp_path)
    assert Path(file).parent.name == "latent_attention"


def test_latent_attention_knows_nothing_of_mla_jax(tmp_path):
    code = "import sys, latent_attention; print(sorted(m for m in sys.modules if m.split('.')[0] == 'mla_jax'))"
    assert in_clean_interpreter(code, tmp_path) == "[]"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("python_path", ["", str(ROOT)])
def test_hugging_face_kernels_is_not_shadowed(python_path):
    code = "import kernels, latent_attention; print(kernels.__file__, kernels.get_kernel, latent_attention.attention)"
    file = Path(in_clean_interpreter(code, ROOT, python_path=python_path).split()[0])
    assert ROOT / "kernels" not in file.parents, "our folder was imported in place of Hugging Face's package"


def test_transformers_imports_from_the_repository_root():
    code = "from transformers import DeepseekV3ForCausalLM; import latent_attention; print('ok')"
    assert in_clean_interpreter(code, ROOT).endswith("ok")


BUILT_FROM = "mla_jax kernels experiments tools conf pyproject.toml setup.py README.md LICENSE".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("infinitecontext-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_files(wheel) -> set[str]:
    """Names of the files in it."""
    return set(zipfile.ZipFile(wheel).namelist())


def test_vllm_finds_its_plugin_in_the_wheel(wheel, tmp_path):
    """As `pip install --no-deps` puts it beside a vLLM, without JAX."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.modules['jax'] = None; from importlib.metadata import entry_points;"
        "(plugin,) = entry_points(group='vllm.general_plugins', name='infinitecontext');"
        "import mla_jax; print(plugin.load().__module__, mla_jax.__file__)"
    )
    module, file = in_clean_interpreter(code, tmp_path, python_path=str(tmp_path / "site")).split()
    assert module == "mla_jax.bridge.vllm"
    assert Path(file).is_relative_to(tmp_path / "site")


def sources(folder: str, package: str) -> set[str]:
    """Paths in a wheel of everything that belongs to `package`, kept in `folder` of the repository."""
    files = (ROOT / folder).rglob("*")
    kept = {file.relative_to(ROOT / folder) for file in files if file.suffix in (".py", ".yaml", ".jinja", ".json")}
    return {f"{package}/{file.as_posix()}" for file in kept}


INSTALLED = [
    ("mla_jax", "mla_jax"),
    ("experiments", "experiments"),
    ("tools", "tools"),
    ("kernels/latent_attention", "latent_attention"),
    ("conf", "experiments/conf"),
]
"""(folder of the repository, where it is in the wheel)."""


@pytest.mark.parametrize(("folder", "package"), INSTALLED)
def test_wheel_holds_every_source_file(wheel_files, folder, package):
    expected = sources(folder, package)
    assert f"{package}/__init__.py" in expected or f"{package}/sft.yaml" in expected
    assert expected <= wheel_files


def test_wheel_holds_nothing_else(wheel_files):
    expected = set.union(*(sources(folder, package) for folder, package in INSTALLED))
    assert {name for name in wheel_files if ".dist-info/" not in name} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_files)


def test_source_distribution_has_no_tests_and_makes_the_same_wheel(wheel_files, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in BUILT_FROM or path.name in ("MANIFEST.in", "tests"):
            (source / path.name).symlink_to(path)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("infinitecontext-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
        files.extractall(tmp_path / "unpacked", filter="data")
    assert {"pyproject.toml", "setup.py", "mla_jax/mesh.py", "conf/sft.yaml"} <= names
    assert not [name for name in names if name.split("/")[0] == "tests"]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("infinitecontext-*.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) == wheel_files


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Callable[..., str]:
    """Runs the Python of a new environment that has the wheel, in an empty folder; not the repository's packages."""
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run(["git", "init", "-q", environment], check=True)  # as an environment in a project of its user
    subprocess.run(
        "git -c user.name=x -c user.email=x commit -q --allow-empty -m x".split(), cwd=environment, check=True
    )
    venv.create(environment)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # Dependencies come from the environment that runs the tests. Of a folder that a .pth file adds, the .pth files do
    # not count: not that of our editable install.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        ran = subprocess.run([python, *arguments], cwd=folder, env=inherited, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    for package in ("mla_jax", "experiments", "tools", "latent_attention"):
        assert Path(run("-c", f"import {package}; print({package}.__file__)").strip()).is_relative_to(site)
    revision = "from mla_jax.observability.environment import git_revision; print(git_revision())"
    assert run("-c", revision) == "None\n", "that of its user's project is not ours"
    return run


TINY = (
    "model.hidden_size=32 model.num_attention_heads=2 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8 "
    "model.v_head_dim=8 model.kv_lora_rank=8 model.q_lora_rank=8 model.intermediate_size=32 tracker=none"
).split()


@pytest.mark.integration
def test_an_installed_wheel_trains_evaluates_and_exports(installed):
    stages = "train.stages=[{seq_len: 96, batch_size: 8, steps: 2, learning_rate: 0.01}]"
    trained = installed("-m", "experiments.sft", "run_dir=run", *TINY, stages)
    assert "Finished at step 2. Next: python -m experiments.evaluate run=run" in trained
    table = installed("-m", "experiments.evaluate", "run=run", "eval.lengths=[128]", "eval.samples=1")
    assert "128 tokens" in table
    assert "wrote step 2 of run" in installed("-m", "tools.export_hf", "run", "export")
    assert "wrote model.gguf" in installed("-m", "tools.export_gguf", "export", "model.gguf")
    assert "imported" in installed("-m", "tools.import_hf", "export", "imported")
    installed("-m", "tools.generate", "imported", "The pass key", "--max-new-tokens=4")
    assert "| 8 | 8 |" in installed("-m", "tools.plan_memory", "model=nano", "gpu=8")
    assert "all-reduce" in installed("-m", "tools.comm_volume", "model=nano", "--devices=2", "--shape=2x128")


@pytest.mark.integration
def test_hydra_finds_the_configs_of_an_installed_wheel(installed, tmp_path):
    helped = installed("-m", "experiments.sft", "--help")
    assert "model: infinite_1b, lookup, nano, schema, small" in helped and "tracker:" in helped
    assert "passkey" in installed("-m", "experiments.evaluate", "--help")
    assert "kv_lora_rank: 256" in installed("-m", "experiments.sft", "experiment=infinite_1b", "--cfg", "job")
    (tmp_path / "own.yaml").write_text("defaults: [sft, _self_]\nname: own\n")
    own = installed("-m", "experiments.sft", f"--config-dir={tmp_path}", "--config-name=own", "--cfg=job")
    assert "name: own\n" in own and "kv_lora_rank: 64" in own
    assert "name: sweep-lr" in installed("-m", "experiments.sft", "--cfg", "job", "experiment=sweep_lr")


@pytest.mark.integration
def test_every_tool_of_an_installed_wheel_has_help(installed):
    files = [path.relative_to(ROOT) for path in (ROOT / "tools").rglob("*.py") if "__main__" in path.read_text()]
    tools = [".".join(path.with_suffix("").parts) for path in sorted(files)]
    assert {"tools.generate", "tools.bench.decode"} <= set(tools)
    for tool in tools:
        usage = "usage: lm-eval" if tool == "tools.lm_eval" else "usage: python -m"  # the harness' own
        assert usage in installed("-m", tool, "--help"), tool


def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / name).read_text().splitlines())


def test_pins_for_cuda_are_those_that_are_tested_but_for_jax():
    tested, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert {n for n in cuda.keys() & tested.keys() if cuda[n] != tested[n]} == {"flax", "jax", "jaxlib", "triton"}
    assert all(name.startswith(("jax-", "nvidia-")) for name in cuda.keys() - tested.keys())
