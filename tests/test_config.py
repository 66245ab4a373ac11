"""Configuration errors end at composition, as one line that names the key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_jax.config import (
    DpoConfig,
    JsonlDataConfig,
    MinedPairsConfig,
    NeedleDataConfig,
    NeedlePairsConfig,
    PreferenceJsonlConfig,
    SftConfig,
    register_schemas,
)
from mla_jax.config.loss import SFT_LOSSES
from mla_jax.errors import UsageError

ROOT = Path(__file__).parent.parent


def _compose(*overrides: str, entry: str = "sft") -> Any:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = OmegaConf.to_object(compose(entry, overrides=list(overrides)))
    assert isinstance(config, {"sft": SftConfig, "dpo": DpoConfig}[entry])
    return config


def test_the_default_trains_nano_on_needles():
    config = _compose()
    assert config.model.num_hidden_layers == 2 and isinstance(config.data, NeedleDataConfig)


def test_jsonl_is_one_override_away():
    config = _compose("data=jsonl", "data.path=chats.jsonl")
    assert isinstance(config.data, JsonlDataConfig) and config.data.path == "chats.jsonl"


@pytest.mark.parametrize(("name", "kind"), [("needle_pairs", NeedlePairsConfig), ("mined", MinedPairsConfig)])
def test_pairs_about_needles_are_one_override_away_and_their_mixture_adds_up(name, kind):
    data = _compose(f"data={name}", "train=needle").data
    assert type(data) is kind and not data.packed
    assert sum(data.rejected.values()) == pytest.approx(1) == pytest.approx(sum(data.tasks.values()))


@pytest.mark.parametrize("data", ["needle", "needle_pairs", "mined"])
def test_your_own_texts_are_two_overrides_away(data):
    config = _compose(f"data={data}", "train=needle", "data.haystacks.text=1", "data.text_folder=texts").data
    assert (config.haystacks["text"], config.text_folder) == (1, "texts")


def test_preference_jsonl_is_one_override_away():
    data = _compose("data=preference_jsonl", "data.path=pairs.jsonl", "train=needle").data
    assert isinstance(data, PreferenceJsonlConfig) and data.packed


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes(path):
    _compose(f"experiment={path.stem}", entry="dpo" if path.stem.startswith("dpo") else "sft")


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "loss").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_loss_composes(path):
    """Of the losses of pairs, the default is that of the file rpo."""
    if path.stem in SFT_LOSSES:
        source = ["loss.source=folder"] if path.stem == "distill" else []
        assert _compose(f"loss={path.stem}", *source).loss.name == path.stem
        return
    loss = _compose("init_from=run", f"loss={path.stem}", entry="dpo").loss
    assert loss.name == {"rpo": "sigmoid"}.get(path.stem, path.stem)
    assert (loss == _compose("init_from=run", entry="dpo").loss) == (path.stem == "rpo")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("tracker=none", []),
        ("tracker=tensorboard", ["tensorboard"]),
        ("tracker=wandb", ["wandb"]),
        ("tracker=mlflow", ["mlflow"]),
        ("tracker=prometheus", ["tensorboard", "prometheus"]),
        ("tracker=all", ["tensorboard", "wandb", "mlflow"]),
        ("tracker.names=[wandb,mlflow]", ["wandb", "mlflow"]),
    ],
)
def test_trackers_are_chosen_singly_or_together(override, names):
    assert _compose(override).tracker.names == names


@pytest.mark.parametrize("model", ["nano", "small", "infinite_1b"])
def test_every_model_composes(model):
    assert _compose(f"model={model}").model.qk_rope_head_dim % 2 == 0


def test_yarn_is_a_choice_whose_factor_is_checked():
    yarn = _compose("+model/rope_scaling=yarn", "model.rope_scaling.factor=40").model.rope_scaling
    assert yarn is not None and yarn.factor == 40 and yarn.mscale_all_dim == 1
    with pytest.raises(UsageError, match=r"rope_scaling\.factor must be at least 1"):
        _compose("+model/rope_scaling=yarn", "model.rope_scaling.factor=0.5")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.qk_rope_head_dim=31", "qk_rope_head_dim must be even"),
        ("model.num_attention_heads=0", "num_attention_heads must be at least 1"),
        ("model.max_position_embeddings=60", "beyond model.max_position_embeddings"),
        ("train.stages=[]", "at least one stage"),
        ("train.grad_accumulation=7", "must divide"),
        ("data.tasks.passkey=-1", "non-negative"),
        ("+data.tasks.paskey=1", "paskey"),
        ("data=needle_pairs train=needle +data.rejected.near=1", "data.rejected key must be one of near_key"),
        ("data=needle_pairs train=needle data.branch_tokens=1", "data.branch_tokens must be at least 2"),
        ("data=mined train=needle data.temperature=0", "data.temperature must be above 0"),
        ("data=mined train=needle data.samples=0", "data.samples must be at least 1"),
        ("data=needle_pairs train=needle data.pairs_per_row=0", "data.pairs_per_row must be at least 1"),
        ("data.lm_loss_weight=1", r"data.lm_loss_weight must be in \[0, 1\), got 1"),
        ("data.lm_loss_weight=-0.1", r"data.lm_loss_weight must be in \[0, 1\), got -0.1"),
        ("data.lm_loss_weight=nan", r"data.lm_loss_weight must be in \[0, 1\), got nan"),
        ("train.best_metric=speed", "train.best_metric must be one of answer_accuracy, loss"),
        ("train.keep_best=-1", "train.keep_best must be at least 0"),
        ("optim.schedule=linear", "optim.schedule must be one of"),
        ("mesh.fsdp=0", "mesh sizes"),
        (
            "tracker.names=[wandb,comet]",
            "tracker.names must be one of tensorboard, wandb, mlflow, prometheus; got 'comet'",
        ),
        ("tracker.names=[wandb,wandb]", "tracker.names has a name twice"),
        ("tracker.prometheus_port=70000", "tracker.prometheus_port=70000 is no port"),
        ("tracker.wandb_mode=dryrun", "tracker.wandb_mode must be one of"),
        ("train.profile=[0,3]", "train.profile must be"),
        ("train.profile=[13,10]", "train.profile must be"),
        ("train.profile=[10]", "train.profile must be"),
    ],
)
def test_impossible_values_are_named(override, named):
    with pytest.raises(UsageError, match=named):
        _compose(*override.split())


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["init_from=null"], "init_from is not set: preference optimisation starts from a run"),
        (["loss.label_smoothing=0.1"], "loss.label_smoothing is of the losses robust and cdpo"),
        (["train.best_metric=answer_accuracy"], "train.best_metric must be one of rewards/accuracies"),
        (["model.max_position_embeddings=60"], "beyond model.max_position_embeddings"),
    ],
)
def test_impossible_values_of_preference_optimisation_are_named(overrides, named):
    with pytest.raises(UsageError, match=named):
        _compose("init_from=run", *overrides, entry="dpo")


def test_distillation_wants_whole_sequences():
    with pytest.raises(UsageError, match=r"loss=distill needs mesh\.context=1, got 2"):
        _compose("loss=distill", "loss.source=folder", "mesh.context=2")


def test_a_step_to_evaluate_is_a_number_or_a_name():
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        for step in ("400", "best", "latest"):
            assert OmegaConf.to_object(compose("evaluate", overrides=["run=r", f"step={step}"])).step == step
        with pytest.raises(UsageError, match="step must be latest, best or a number, got 'newest'"):
            OmegaConf.to_object(compose("evaluate", overrides=["run=r", "step=newest"]))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.hiden_size=64"], "hiden_size"),
        (["model.hidden_size=wide"], "model.hidden_size"),
        (["model=nanno"], "nanno"),
        (["model.qk_rope_head_dim=31"], "qk_rope_head_dim must be even"),
        (["data=jsonl"], "data.path"),
    ],
)
def test_the_command_line_prints_one_line_and_exits_2(overrides, named, tmp_path):
    command = [sys.executable, "-m", "experiments.sft", f"run_dir={tmp_path}/run", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert not (tmp_path / "run").exists()
