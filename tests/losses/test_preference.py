"""Losses of preference pairs: TRL's own code on the same log-probabilities, papers' formulas in float64, gradients."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.config import MeshConfig, PreferenceLossConfig
from mla_jax.errors import UsageError
from mla_jax.losses.branch_log_probs import TokenStatistics
from mla_jax.losses.preference import PreferenceLoss, pair_losses, preference_sums
from mla_jax.mesh import make_mesh, place_batch

NAMES = ("sigmoid", "hinge", "ipo", "robust", "cdpo", "sigmoid_norm", "dpop")
SIZE = 48
"""Tokens of the branch region."""
SMOOTHED = {"robust": 0.2, "cdpo": 0.2}


def config_of(name: str, **changes) -> PreferenceLossConfig:
    return PreferenceLossConfig(**{"name": name, "beta": 0.3, "label_smoothing": SMOOTHED.get(name, 0.0)} | changes)


class Pair:
    """A pair's answers, each a dictionary of statistics [tokens] as a model and its reference give them."""

    def __init__(self, rng: np.random.Generator, chosen: int, rejected: int):
        self.answers = [
            {
                "log_probs": -rng.exponential(2.0, n),
                "reference": -rng.exponential(2.0, n),
                "entropy": rng.exponential(1.0, n),
                "mean_logit": rng.normal(size=n),
                "is_greedy": rng.random(n) < 0.5,
            }
            for n in (chosen, rejected)
        ]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [Pair(rng, *lengths) for lengths in ((3, 5), (1, 1), (4, 2), (6, 6), (2, 3))]


def branch_arrays(rows: list[list[Pair]], size: int, dtype=np.float32):
    """The arrays of `preference_sums`, with padding between answers that must not count."""
    shape = len(rows), size
    stats = {name: np.full(shape, 9.0, dtype) for name in ("log_probs", "entropy", "mean_logit", "reference")}
    stats["is_greedy"] = np.ones(shape, bool)
    completion, branches = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        start = 0
        for number, answer in enumerate([answer for pair in row for answer in pair.answers], 1):
            end = start + len(answer["log_probs"])
            completion[b, start:end] = True
            branches[b, start : end + 1] = number  # a token of the branch that is no completion
            for name in stats:
                stats[name][b, start:end] = answer[name]
            start = end + 1
    found = TokenStatistics(stats["log_probs"], stats["is_greedy"], stats["entropy"], stats["mean_logit"])
    arrays = completion, branches, stats["reference"]
    return jax.tree.map(jnp.asarray, found), tuple(map(jnp.asarray, arrays))


def our_means(config: PreferenceLossConfig, rows: list[list[Pair]], most: int) -> dict[str, float]:
    found, arrays = branch_arrays(rows, SIZE)
    sums = preference_sums(config, most, found, *arrays)
    return PreferenceLoss(config, SIZE, most, False, 8).means({name: float(x) for name, x in sums.items()})


def trl_means(pairs: list[Pair], loss_types: list[str], weights: list[float], beta: float, smoothing: float):
    """Loss and metrics that TRL's trainer computes of these answers, chosen ones first, as it batches them."""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs pip install '.[dev]'").DPOTrainer
    answers = [pair.answers[i] for i in (0, 1) for pair in pairs]
    longest = max(len(answer["log_probs"]) for answer in answers)

    def padded(name: str):  # after a prompt of one token
        rows = [np.pad(answer[name].astype(np.float32), (0, longest - len(answer[name]))) for answer in answers]
        return torch.tensor(np.stack(rows))

    mask = torch.tensor([[0] + [i < len(answer["log_probs"]) for i in range(longest)] for answer in answers]).int()
    reference = padded("reference").sum(1).chunk(2)
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    outputs = SimpleNamespace(
        log_probs=padded("log_probs"), entropy=padded("entropy"), mean_logits=padded("mean_logit"),
        is_top1=padded("is_greedy").bool(),
    )  # fmt: skip
    metrics: dict[str, dict[str, list]] = {"train": {name: [] for name in METRICS}}
    self = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=loss_types, loss_weights=weights, beta=beta, use_weighting=False,
        label_smoothing=smoothing, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    loss = trainer._compute_loss(self, lambda **_: outputs, inputs, False)
    return {"loss": float(loss)} | {name: metrics["train"][name][0] for name in METRICS}


METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_loss_and_metrics_are_those_of_trl(pairs, name, beta):
    smoothing = SMOOTHED.get(name, 0.0)
    expected = trl_means(pairs, [name], [1.0], beta, smoothing)
    for rows, most in (([[pair] for pair in pairs], 1), ([pairs[:2], pairs[2:]], 3), ([pairs], 6)):  # packed, or not
        found = our_means(config_of(name, beta=beta), rows, most)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_sft_term_is_that_of_trl_where_answers_are_equally_long():
    """TRL takes a mean over all tokens of a batch, the paper (2404.19733) one over each answer."""
    pairs = [Pair(np.random.default_rng(i), 4, n) for i, n in enumerate((4, 2, 5))]
    expected = trl_means(pairs, ["sigmoid", "sft"], [1.0, 0.7], 0.3, 0.0)["loss"]
    found = our_means(config_of("sigmoid", sft_weight=0.7), [[pair] for pair in pairs], 1)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(found["preference_loss"] + 0.7 * found["sft_loss"], rel=1e-6)


def papers_loss(name: str, pair: Pair, beta: float, smoothing: float, dpop_lambda: float, sft_weight: float) -> float:
    """The formulas as their papers have them, in float64."""
    (chosen, ref_chosen), (rejected, ref_rejected) = (
        (answer["log_probs"].sum(), answer["reference"].sum()) for answer in pair.answers
    )
    lengths = [len(answer["log_probs"]) for answer in pair.answers]
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    by_token = (chosen - ref_chosen) / lengths[0] - (rejected - ref_rejected) / lengths[1]

    def log_sigmoid(x):
        return -np.log(1 + np.exp(-x))

    penalty = dpop_lambda * max(0.0, ref_chosen - chosen)
    loss = {
        "sigmoid": -log_sigmoid(beta * delta),
        "hinge": max(0.0, 1 - beta * delta),
        "ipo": (by_token - 1 / (2 * beta)) ** 2,
        "robust": -((1 - smoothing) * log_sigmoid(beta * delta) - smoothing * log_sigmoid(-beta * delta))
        / (1 - 2 * smoothing),
        "cdpo": -(1 - smoothing) * log_sigmoid(beta * delta) - smoothing * log_sigmoid(-beta * delta),
        "sigmoid_norm": -log_sigmoid(beta * by_token),
        "dpop": -log_sigmoid(beta * (delta - penalty)),
    }[name]
    return loss - sft_weight * pair.answers[0]["log_probs"].mean()


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_their_papers(pairs, name):
    config = config_of(name, dpop_lambda=3.0, sft_weight=0.5)
    expected = [papers_loss(name, pair, 0.3, SMOOTHED.get(name, 0.0), 3.0, 0.5) for pair in pairs]
    found = our_means(config, [pairs[:2], [], pairs[2:]], 3)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(pairs, name):
    with jax.enable_x64(True):
        config = config_of(name, dpop_lambda=3.0, sft_weight=0.5)
        found, arrays = branch_arrays([pairs[:2], pairs[2:]], SIZE, np.float64)

        def loss(log_probs):
            return preference_sums(config, 3, found._replace(log_probs_BR=log_probs), *arrays)["loss"]

        direction = np.random.default_rng(1).normal(size=found.log_probs_BR.shape)
        gradient = jax.grad(loss)(found.log_probs_BR)
        assert gradient.dtype == np.float64 and not np.any(gradient[~arrays[0]])
        step = 1e-6 * direction
        difference = (loss(found.log_probs_BR + step) - loss(found.log_probs_BR - step)) / 2e-6
        assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "cdpo", "sigmoid_norm", "dpop"])
def test_where_the_model_is_its_reference_the_loss_is_ln_2(name):
    ratios, tokens = jnp.zeros((3, 2)), jnp.array([[3, 5], [1, 1], [4, 2]], jnp.float32)
    np.testing.assert_allclose(pair_losses(config_of(name), ratios, tokens), np.log(2), rtol=1e-6)


def test_dpop_penalises_a_chosen_answer_only_where_it_became_less_likely():
    tokens = jnp.ones((2, 2))
    ratios = jnp.array([[-1.0, -2.0], [1.0, 0.0]])
    dpo, dpop = (pair_losses(config_of(name, dpop_lambda=5.0), ratios, tokens) for name in ("sigmoid", "dpop"))
    assert dpop[0] > dpo[0] and dpop[1] == dpo[1]


def test_the_normalizer_counts_pairs_and_a_mesh_of_eight_changes_nothing(pairs):
    rows = [pairs[:2], pairs[2:3], [], pairs[3:]]
    config = config_of("sigmoid", sft_weight=0.5)
    loss = PreferenceLoss(config, SIZE, 2, False, 8)
    found, (completion, branches, reference) = branch_arrays(rows, SIZE)
    assert loss.normalizer({"branches": branches[None]}) == 5
    expected = jax.device_get(preference_sums(config, 2, found, completion, branches, reference))
    named = found._asdict() | {"completion": completion, "branches": branches, "reference": reference}
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        batch = place_batch({name: np.asarray(x) for name, x in named.items()}, 1)
        assert jax.jit(loss.normalizer)(batch) == 5
        batch = {name: x[0] for name, x in batch.items()}
        statistics = TokenStatistics(*(batch.pop(name) for name in TokenStatistics._fields))
        sums = jax.jit(lambda s, b: preference_sums(config, 2, s, **b))(statistics, batch)
    assert sums.keys() == expected.keys()
    for name, x in sums.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, err_msg=name)


def test_a_window_in_which_chosen_answers_became_less_likely_names_what_prevents_it():
    loss = PreferenceLoss(config_of("sigmoid", beta=0.1), SIZE, 2, False, 8)
    before, now = ({"rewards/chosen": 0.1 * ratio, "logps/chosen": -5.0 + ratio} for ratio in (-0.05, -2.0))
    warning = loss.warning(before, now)
    assert warning and "2.00 nats below the reference" in warning
    assert "loss=rpo" in warning and "loss.sft_weight" in warning and "loss=dpop" in warning
    assert loss.warning(now, before) is None, "it rises"
    assert loss.warning({"rewards/chosen": 0.0}, {"rewards/chosen": -0.005, "logps/chosen": -5.0}) is None, "noise"
    nothing = loss.means({})
    assert np.isnan(nothing["rewards/chosen"]) and loss.warning(nothing, nothing) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "kto"}, "loss.name must be one of sigmoid, hinge, ipo"),
        ({"beta": 0.0}, "loss.beta must be positive"),
        ({"sft_weight": -1.0}, "loss.sft_weight must be at least 0"),
        ({"name": "cdpo", "label_smoothing": 0.5}, r"loss.label_smoothing must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "label_smoothing is of the losses robust and cdpo; loss.name=sigmoid ignores it"),
    ],
)
def test_impossible_losses_are_named(changes, named):
    with pytest.raises(UsageError, match=named):
        dataclasses.replace(config_of("sigmoid"), **changes)
