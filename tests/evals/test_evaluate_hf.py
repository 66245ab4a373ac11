"""Evaluation of a Hugging Face folder: the same answers as of the run that it was exported from."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from experiments import evaluate
from key_reader import KeyReader
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.config import EvaluateConfig, MultikeyConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals import runner
from tiny import MODEL, random_params

CONFIG = MultikeyConfig(lengths=[128], keys=[2], samples=4, questions=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with random weights and its export."""
    folder, tokenizer, params = tmp_path_factory.mktemp("models"), load_tokenizer("needle-bpe"), random_params(MODEL)
    run = save_imported(folder / "run", MODEL, params, tokenizer)
    return run, export(MODEL, params, tokenizer, folder / "hf")


def test_a_folder_is_as_good_as_a_run(folders):
    written = []
    for folder in folders:
        evaluate.main(EvaluateConfig(run=str(folder), eval=dataclasses.replace(CONFIG, cache_dtype="int8")))
        written.append(json.loads((folder / "eval" / "multikey.json").read_text()))
    assert written[0]["cells"] == written[1]["cells"] and written[0]["cells"][0]["answers"][0]["generated"]
    assert [each["model"]["name"] for each in written] == ["run", "hf"] and written[1]["model"]["step"] == 0
    bytes_per_token = MODEL.num_hidden_layers * (16 + 8 + 2 * 4)
    assert [each["model"]["cache_bytes_per_token"] for each in written] == 2 * [bytes_per_token]


class Interrupted(KeyReader):
    """Is interrupted at the second haystack."""

    asked = 0

    def generate(self, prompts, **options):
        if self.asked == 1:
            raise KeyboardInterrupt
        self.asked += 1
        return super().generate(prompts, **options)


@pytest.mark.parametrize("other", [False, True])
def test_other_weights_in_the_folder_are_another_model(folders, tmp_path, monkeypatch, other):
    folder = shutil.copytree(folders[1], tmp_path / "hf")
    config = EvaluateConfig(run=str(folder), eval=dataclasses.replace(CONFIG, lengths=[128, 192], samples=2))
    monkeypatch.setattr(runner, "provenance", lambda: {"git_revision": "same"})
    monkeypatch.setattr(runner, "Generator", Interrupted(lambda key, numbers: numbers[key]))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + int(other)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = KeyReader(lambda key, numbers: numbers[key] if other else "1")
    monkeypatch.setattr(runner, "Generator", again)
    evaluate.main(config)
    cells = json.loads((folder / "eval" / "multikey.json").read_text())["cells"]
    assert [cell["correct"] for cell in cells] == ([2, 2] if other else [2, 0])


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match="is neither a run .* nor a Hugging Face folder"):
        evaluate.main(EvaluateConfig(run=str(tmp_path), eval=CONFIG))
