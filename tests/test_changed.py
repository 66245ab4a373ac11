"""Which tests `make test-fast` takes for a change."""

import pytest

from changed import MOST, select

TEST_FILES = {
    "tests/evals/test_report.py": "import json\n\nfrom mla_jax.evals.report import format_table\n",
    "tests/evals/test_niah.py": "from mla_jax.evals import niah, report_on\n",
    "tests/kernels/decode/test_decode.py": "from latent_attention.decode import xla\n",
    "tests/model/test_rope.py": "from tiny import CONFIG\nfrom mla_jax.config import ModelConfig\n",
    "tests/test_files.py": "def test():\n    from mla_jax.files import atomic_file\n",
    **{f"tests/model/test_many{i}.py": "from mla_jax.model.transformer import bind\n" for i in range(MOST)},
    "tests/training/test_train.py": "from mla_jax.model.transformer import bind\n",
}
IMPORTS = "tests/test_imports.py"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("mla_jax/evals/report.py", [IMPORTS, "tests/evals/test_report.py"]),  # not by report_on
        ("mla_jax/evals/niah.py", [IMPORTS, "tests/evals/test_niah.py"]),
        ("mla_jax/files.py", [IMPORTS, "tests/test_files.py"]),  # imported within a function
        ("kernels/latent_attention/decode/xla.py", [IMPORTS, "tests/kernels/decode/test_decode.py"]),
        ("kernels/latent_attention/decode/mosaic_smem.py", [IMPORTS, "tests/kernels/decode/"]),  # nobody imports it
        ("kernels/latent_attention/hopper/mlir.py", [IMPORTS, "tests/kernels/"]),
        ("mla_jax/model/mla.py", [IMPORTS, "tests/model/"]),
        ("mla_jax/model/transformer.py", [IMPORTS, *(f"tests/model/test_many{i}.py" for i in range(MOST))]),
        ("mla_jax/config/model.py", ["tests/test_config.py", IMPORTS]),
        ("tests/tiny.py", [IMPORTS, "tests/model/test_rope.py"]),
        ("tests/evals/test_niah.py", ["tests/evals/test_niah.py"]),
        ("docs/training.md", ["tests/test_docs.py"]),
        ("setup.py", [IMPORTS, "tests/test_packaging.py"]),
        ("LICENSE", []),
    ],
)
def test_select_a_change(changed, expected):
    assert select([changed], TEST_FILES) == sorted(expected)


def test_several_changes_add_up():
    assert select(["README.md", "mla_jax/files.py"], TEST_FILES) == [
        "tests/test_docs.py",
        "tests/test_files.py",
        IMPORTS,
    ]
