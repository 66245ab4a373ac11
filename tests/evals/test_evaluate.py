"""The entry point `experiments.evaluate`: the config of the group `eval` chooses the task."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf

from experiments import evaluate
from mla_jax.checkpoint.run_folder import Run, save_imported
from mla_jax.config import EvalConfig, EvaluateConfig, PasskeyConfig, register_schemas, schema
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import UsageError
from mla_jax.model.transformer import init_params
from tiny import MODEL

CONF = Path(__file__).resolve().parent.parent.parent / "conf"


@schema
class HopsConfig(EvalConfig):
    """Another evaluation, with a key of its own."""

    hops: list[int] = MISSING


def composed(*overrides: str) -> EvaluateConfig:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_object(compose("evaluate", overrides=["run=runs/one", *overrides]))
    assert isinstance(config, EvaluateConfig)
    return config


@pytest.fixture
def hops(monkeypatch):
    """Makes `eval=hops` known to Hydra and to the entry point."""
    register_schemas()
    group = ConfigStore.instance().repo["eval"]
    assert "hops.yaml" not in group
    ConfigStore.instance().store(group="eval", name="hops", node=HopsConfig)
    monkeypatch.setitem(evaluate.TASKS, HopsConfig, lambda *parts: ("task of hops", *parts))
    yield
    del group["hops.yaml"]


def test_passkey_is_the_default():
    config = composed().eval
    assert isinstance(config, PasskeyConfig) and config.lengths == [128, 192, 256] and config.depths[-1] == 1


def test_the_config_of_another_evaluation_chooses_its_task(hops, monkeypatch):
    config = composed("eval=hops", "eval.lengths=[128]", "eval.hops=[1,2]", "eval.samples=3")
    assert config.eval == HopsConfig(lengths=[128], hops=[1, 2], samples=3)
    run = Run(Path("runs/one"), MODEL, {}, load_tokenizer("needle-bpe"), step=1, trained_lengths=())
    evaluated = []
    monkeypatch.setattr(evaluate, "load_run_or_hf", lambda *_: run)
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: evaluated.append(arguments))
    monkeypatch.setattr(evaluate, "report_on", evaluated.append)
    monkeypatch.setattr(evaluate, "track", lambda *_: None)
    evaluate.main(config)
    asked = run, ("task of hops", MODEL, run.tokenizer, config.eval), Path("runs/one/eval")
    assert evaluated == [asked, Path("runs/one/eval")]


def test_results_may_go_elsewhere(monkeypatch, tmp_path):
    run = Run(Path("runs/one"), MODEL, {}, load_tokenizer("needle-bpe"), step=1, trained_lengths=())
    folders = []
    monkeypatch.setattr(evaluate, "load_run_or_hf", lambda *_: run)
    monkeypatch.setattr(evaluate, "evaluate", lambda run, task, folder: folders.append(folder))
    monkeypatch.setattr(evaluate, "report_on", folders.append)
    monkeypatch.setattr(evaluate, "track", lambda *_: None)
    evaluate.main(composed(f"out={tmp_path}"))
    assert folders == [tmp_path] * 2


def test_an_evaluation_leaves_results_a_report_and_metrics(tmp_path, capsys):
    run_dir = save_imported(tmp_path / "run", MODEL, init_params(MODEL, 0), load_tokenizer("needle-bpe"))
    config = OmegaConf.load(run_dir / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"tracker": {"names": ["tensorboard"]}}), run_dir / "config.yaml")
    evaluate.main(composed(f"run={run_dir}", "eval.lengths=[128]", "eval.depths=[0.5]", "eval.samples=2"))
    seen = {path.name for path in (run_dir / "eval").iterdir() if not path.name.startswith(".")}
    assert seen == {"passkey.json", "passkey.png", "report.html"}
    assert "0/2" in (run_dir / "eval" / "report.html").read_text()
    assert list((run_dir / "tensorboard" / "eval").glob("events.*"))
    out = capsys.readouterr().out
    assert f"All tasks of this run: {run_dir / 'eval' / 'report.html'}" in out
    assert "Added to tensorboard: eval/passkey/... at step 0" in out


def test_keys_that_every_evaluation_has_are_checked(hops):
    overrides = ("eval=hops", "eval.hops=[1]", "eval.samples=1")
    with pytest.raises(UsageError, match=r"eval\.lengths needs at least one length"):
        composed(*overrides, "eval.lengths=[]")
    with pytest.raises(UsageError, match=r"eval\.batch_size must be at least 1, got 0"):
        composed(*overrides, "eval.lengths=[128]", "eval.batch_size=0")
    with pytest.raises(UsageError, match=r"eval\.cache_dtype must be one of"):
        composed(*overrides, "eval.lengths=[128]", "eval.cache_dtype=int4")


def test_a_key_of_another_evaluation_is_refused(hops):
    with pytest.raises(HydraException, match="depths"):
        composed("eval=hops", "eval.lengths=[128]", "eval.hops=[1]", "eval.samples=1", "eval.depths=[0.5]")
