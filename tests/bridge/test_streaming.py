"""Models of any size on their way between runs and Hugging Face folders: a part at a time, and nothing half-done."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mla_jax.bridge.hf import reader
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint import manager, streaming
from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.checkpoint.streaming import chunk_slices
from mla_jax.config import MeshConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.mesh import make_mesh, with_concrete_shardings
from mla_jax.model.transformer import abstract_params, init_params
from tiny import MODEL

TOKENIZER = load_tokenizer("bytes")
CONFIG = dataclasses.replace(MODEL, tie_word_embeddings=False, q_lora_rank=12, max_position_embeddings=128)
LARGE = dataclasses.replace(
    CONFIG,
    vocab_size=8192,
    hidden_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    kv_lora_rank=256,
    q_lora_rank=None,
    intermediate_size=2560,
)
"""223 MB of float32 parameters, of which 34 MB are the embedding table."""
SMALLER_THAN_THE_EMBEDDINGS = 20_000
MIB = 2**20
ALLOWANCE = 32 * MIB
"""Chunks being read, decoded and converted, and what the C library keeps of freed memory."""


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


@pytest.fixture(scope="module")
def exported(params, tmp_path_factory):
    return export(CONFIG, params, TOKENIZER, tmp_path_factory.mktemp("exports") / "hf", max_shard_bytes=5000)


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right))


def imported(hf_dir, run_dir):
    checkpoint = reader.open_checkpoint(hf_dir)
    return save_imported(run_dir, checkpoint.config, checkpoint.params(), checkpoint.tokenizer)


MEASURED = '''
import ctypes, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.model.transformer import init_params
from tiny import MODEL
from tools import export_hf, import_hf

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

def growth(tool, *args):
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not hide anything
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    sys.argv = ["", *map(str, args)]
    tool.main()
    return memory("VmHWM") - before

def least_growth(tool, source, target, *options):
    """Of two runs, as on a busy machine threads that fall behind hold more."""
    again = target.with_name(target.name + "_again")
    return min(growth(tool, source, to, *options) for to in (target, again))

folder = Path(sys.argv[2])
save_imported(folder / "small", MODEL, init_params(MODEL, 0), load_tokenizer("bytes"))
growth(export_hf, folder / "small", folder / "small_hf")  # imports, threads, compilation
growth(import_hf, folder / "small_hf", folder / "small_imported")
for source, dtype in (("run", "float32"), ("float32", "bfloat16")):
    hf = folder / f"{dtype}_hf"
    exporting = least_growth(export_hf, folder / source, hf, "--dtype", dtype, "--max-shard-size", "32MiB")
    importing = least_growth(import_hf, hf, folder / dtype)
    largest = max(path.stat().st_size for path in hf.glob("*.safetensors"))
    print(json.dumps({"dtype": dtype, "largest": largest, "export": exporting, "import": importing}), file=sys.stderr)
'''


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_memory_is_bounded_by_the_largest_shard(tmp_path):
    rng = np.random.default_rng(0)

    def random(leaf):
        return jnp.asarray(rng.integers(-(2**15), 2**15, leaf.shape, np.int16).astype(np.float32) / 2**15)

    params = jax.tree.map(random, abstract_params(LARGE))
    save_imported(tmp_path / "run", LARGE, params, TOKENIZER)
    command = [sys.executable, "-c", MEASURED, str(Path(__file__).parents[1]), str(tmp_path)]
    # What threads have freed depends on which ran together, unless they share one arena of the C library.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    print(*measured, sep="\n")
    assert len(measured) == 2
    for each in measured:
        assert max(each["export"], each["import"]) < 1.5 * each["largest"] + ALLOWANCE, measured
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert equal(load_run(tmp_path / "bfloat16").params, rounded)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("chunk_bytes", [300, MIB])
def test_an_import_in_parts_is_that_of_the_whole(chunk_bytes, interleaved, exported, tmp_path, monkeypatch):
    hf_dir = tmp_path / "hf"
    hf_dir.mkdir()
    for path in exported.iterdir():
        (hf_dir / path.name).write_bytes(path.read_bytes())
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**config, "rope_interleave": interleaved}))
    monkeypatch.setattr(streaming, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(streaming, "SLICE_BYTES", 3 * chunk_bytes)
    run = imported(hf_dir, tmp_path / "run")
    _, whole, _ = reader.load(hf_dir)
    assert equal(load_run(run).params, whole)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert equal(jax.device_get(load_run(run).params), whole)
    on_disk = load_run(run, on_disk=True)
    again = export(on_disk.model, on_disk.params, TOKENIZER, tmp_path / "again", max_shard_bytes=5000)
    assert (weights(again) == weights(exported)) == interleaved


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_come_back_as_they_were(dtype, params, tmp_path):
    out = export(CONFIG, params, TOKENIZER, tmp_path / "hf", dtype=dtype)
    run = load_run(imported(out, tmp_path / "run"), on_disk=True)
    again = export(run.model, run.params, TOKENIZER, tmp_path / "again", dtype=dtype)
    assert weights(again) == weights(out)


def saved_in_layers(run_dir, params, monkeypatch):
    return save_imported(run_dir, CONFIG, params, TOKENIZER)


def saved_whole(run_dir, params, monkeypatch):
    """As earlier versions did: a chunk for all layers."""
    monkeypatch.setattr(manager, "params_save", ocp.args.StandardSave)
    return save_imported(run_dir, CONFIG, params, TOKENIZER)


def saved_on_a_mesh(run_dir, params, monkeypatch):
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        sharded = jax.device_put(
            params, jax.tree.map(lambda x: x.sharding, with_concrete_shardings(abstract_params(CONFIG)))
        )
        return save_imported(run_dir, CONFIG, sharded, TOKENIZER)


@pytest.mark.parametrize("saved", [saved_in_layers, saved_whole, saved_on_a_mesh])
def test_runs_are_exported_from_disk_however_they_were_saved(saved, params, exported, tmp_path, monkeypatch):
    run = load_run(saved(tmp_path / "run", params, monkeypatch), on_disk=True)
    out = export(CONFIG, run.params, TOKENIZER, tmp_path / "hf", max_shard_bytes=5000)
    assert weights(out) == weights(exported)


def test_layers_are_read_one_by_one(params, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SLICE_BYTES", 1)
    leaf = load_run(saved_in_layers(tmp_path / "run", params, monkeypatch), on_disk=True).params["layers"]["mlp"]
    assert list(chunk_slices(leaf["up_proj"])) == [(slice(i, i + 1), slice(0, 32), slice(0, 32)) for i in range(2)]


def test_values_that_do_not_fit_are_named_from_disk(params, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 300)
    monkeypatch.setattr(streaming, "SLICE_BYTES", 600)
    large = {**params, "lm_head": params["lm_head"].at[31, 500].set(1e5)}
    hf_dir = export(CONFIG, large, TOKENIZER, tmp_path / "hf")
    run = load_run(imported(hf_dir, tmp_path / "large"), on_disk=True)
    with pytest.raises(InputError, match=r"lm_head.weight reaches 1e\+05, too large for float16"):
        export(run.model, run.params, TOKENIZER, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_another_model_than_the_checkpoint_is_an_error(params, tmp_path, monkeypatch):
    run = saved_in_layers(tmp_path / "run", params, monkeypatch)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("intermediate_size: 32", "intermediate_size: 64"))
    with pytest.raises(InputError, match=r"checkpoint .*0 cannot be read \(layers\.mlp\.down_proj is \[2, 32, 32\]"):
        load_run(run, on_disk=True)


def test_a_full_disk_leaves_nothing(exported, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLER_THAN_THE_EMBEDDINGS, hard))
    try:
        with pytest.raises(InputError, match="could not"):
            imported(exported, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt("Ctrl-C"), InputError("model-00001.safetensors is missing")])
@pytest.mark.parametrize("at", [1, 20])
def test_an_interrupted_import_leaves_nothing(failure, at, exported, tmp_path, monkeypatch):
    checkpoint = reader.open_checkpoint(exported)
    read, calls = reader.SafetensorsFolder.read, []

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise failure
        return read(*args)

    monkeypatch.setattr(reader.SafetensorsFolder, "read", failing)
    with pytest.raises(type(failure), match=str(failure)):
        save_imported(tmp_path / "run", checkpoint.config, checkpoint.params(), checkpoint.tokenizer)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "run.partial" / "checkpoints").mkdir(parents=True)  # as a killed import leaves it
    assert load_run(imported(exported, tmp_path / "run")).step == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
