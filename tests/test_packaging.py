"""What gets installed: our packages under their names, and no shadow over Hugging Face's `kernels`."""

import subprocess
import sys
import zipfile
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("mla_jax", "kernels", "experiments", "tools", "conf", "pyproject.toml", "README.md", "LICENSE"):
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
    kept = {file.relative_to(ROOT / folder) for file in files if file.suffix in (".py", ".json", ".jinja")}
    return {f"{package}/{file.as_posix()}" for file in kept}


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("mla_jax", "mla_jax"),
        ("experiments", "experiments"),
        ("tools", "tools"),
        ("kernels/latent_attention", "latent_attention"),
    ],
)
def test_wheel_holds_every_source_file(wheel_files, folder, package):
    expected = sources(folder, package)
    assert f"{package}/__init__.py" in expected
    assert {name for name in wheel_files if name.startswith(f"{package}/")} == expected


def test_wheel_holds_nothing_else(wheel_files):
    tops = {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name}
    assert tops == {"mla_jax", "experiments", "tools", "latent_attention"}
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_files)
