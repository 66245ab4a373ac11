"""The table of what each part of a conversion brings, on a small Llama."""

import pytest

from tiny_llama import save_llama, stories
from tools import import_hf
from tools.bench import conversion


def rows(out):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


@pytest.mark.integration
def test_ways_of_converting_and_runs_are_compared(call, tmp_path):
    save_llama(tmp_path / "llama", num_key_value_heads=2)
    calibration, fitted, other = (tmp_path / f"{name}.txt" for name in ("calibration", "fitted", "other"))
    calibration.write_text(stories(0, 60))
    fitted.write_text(stories(0, 60))
    other.write_text(stories(1, 60)[::-1])
    texts = fitted, other, "--tokens", 1024, "--length", 64
    ways = "--calibration-tokens", 2048, "--shapes", "24+16", "64+16", "--methods", "plain", "all"
    code, out, err = call(conversion, tmp_path / "llama", *texts, "--calibration", calibration, *ways)
    assert code == 0, err
    _, _, (source, *_), plain, whole, _, exact = rows(out)
    assert source == "source"
    assert plain[:3] == ["24 + 16", "62.5%", "plain"] and whole[2] == "all"
    assert plain[3] != whole[3] and plain[4] != whole[4]

    options = "--kv-lora-rank 64 --calibration-tokens 2048 --calibration-length 64".split()
    code, _, err = call(import_hf, tmp_path / "llama", tmp_path / "run", *options, "--calibration", calibration)
    assert code == 0, err
    code, out, err = call(conversion, tmp_path / "llama", *texts, "--runs", tmp_path / "run")
    assert code == 0, err
    _, _, (source, *perplexities), (run, *converted) = rows(out)
    assert (source, run) == (str(tmp_path / "llama"), str(tmp_path / "run"))
    assert [float(x) for x in converted] == pytest.approx([float(x) for x in perplexities], rel=0.02)
    assert converted == exact[3:5]  # the same conversion, measured the same way
