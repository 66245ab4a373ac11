"""A run says which implementation of attention it computes with."""

import jax

import latent_attention
from tiny import make_config, train


def test_the_choice_is_said_once_and_a_gpu_without_its_kernels_is_warned_of(tmp_path, capsys, monkeypatch):
    train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 2}]))
    out, err = capsys.readouterr()
    assert out.count("Attention runs on xla (model.attention=auto)") == 1 and "attention" not in err
    monkeypatch.setattr(latent_attention, "choices", lambda op: {"xla": {"cudnn": "head of 12", "triton": "no Triton"}})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 3}]))
    err = capsys.readouterr().err
    assert err.count("warning: attention falls back to xla") == 1
    assert "(cudnn: head of 12; triton: no Triton)" in err
