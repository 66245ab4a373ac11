"""vLLM's own selection, for GPUs that are not here: ours where it is needed or asked for, vLLM's elsewhere."""

import json
import subprocess

import pytest

from vllm_server import MARKS, PYTHON, ROOT

pytestmark = MARKS


@pytest.fixture(scope="module")
def selected():
    cases = [f"{gpu}:{mode}" for gpu in (75, 80, 86, 89, 90, 120) for mode in ("off", "auto", "on")]
    ran = subprocess.run(
        [PYTHON, ROOT / "tests" / "vllm_selection.py", *cases], capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def of_ours(selections: dict[str, str]) -> set[str]:
    return {what for what, name in selections.items() if name in ("Backend", "Prefill")}


def test_jax_is_not_imported(selected):
    assert selected["jax"] is False


def test_another_model_has_the_same_backend_in_every_mode(selected):
    for gpu in (75, 80, 86, 89, 90, 120):
        names = {selected["cases"][f"{gpu}:{mode}"]["another model"] for mode in ("off", "auto", "on")}
        assert names in ({"FlashAttentionBackend"}, {"TritonAttentionBackend"})


PREFILL = {f"{width} prefill" for width in (256, 320, 576)}
CUSTOM = {f"{width} custom" for width in (256, 320, 576)}
AUTO = {f"{width} auto" for width in (256, 320, 576)}
EXPECTED = {
    "75:auto": PREFILL | CUSTOM - {"576 custom"},  # too wide for the shared memory of Turing
    "75:on": PREFILL | CUSTOM - {"576 custom"} | AUTO - {"576 auto"},
    "120:on": CUSTOM,
    **{f"{gpu}:off": set() for gpu in (75, 80, 86, 89, 90, 120)},
    **{f"{gpu}:auto": CUSTOM for gpu in (80, 86, 89, 90, 120)},
    **{f"{gpu}:on": CUSTOM | AUTO for gpu in (80, 86, 89, 90)},
}


@pytest.mark.parametrize(("case", "ours"), EXPECTED.items(), ids=EXPECTED)
def test_where_ours_is_selected(selected, case, ours):
    selections = selected["cases"][case]
    assert of_ours(selections) == ours
    # What ours cannot do falls to vLLM's own.
    for what in ("256 fp8", "320 fp8", "576 fp8", *(AUTO - ours)):
        assert selections[what].endswith("MLABackend"), (what, selections[what])


def test_stock_vllm_has_no_prefill_on_turing(selected):
    assert selected["cases"]["75:off"]["320 prefill"].startswith("error: No valid MLA prefill backend")
