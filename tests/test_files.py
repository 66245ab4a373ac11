"""Files and folders appear complete or not at all, and what was there before stays until then."""

import functools
import json

import pytest

from mla_jax.errors import InputError
from mla_jax.files import atomic_file, atomic_folder, locked, write_json
from mla_jax.observability.goodput import Goodput

REPLACING = functools.partial(atomic_folder, replace=True)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": 1})
    with atomic_file(path) as partial:
        partial.write_text("2")
        assert json.loads(path.read_text()) == {"x": 1}
    assert path.read_text() == "2" and names(path.parent) == ["a.json"]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"x": nan, "y": [1.5, (-inf, {"z": inf})], "n": 3, "text": "nan", "b": True})

    def refuse(constant: str):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content == {"x": None, "y": [1.5, [None, {"z": None}]], "n": 3, "text": "nan", "b": True}


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "full"), InputError)]
)
def test_a_failed_block_leaves_what_was_there(tmp_path, error, raised):
    for atomic, old in ((atomic_file, tmp_path / "file"), (REPLACING, tmp_path / "folder")):
        old.write_text("old") if atomic is atomic_file else old.mkdir()
        with pytest.raises(raised), atomic(old) as partial:
            if atomic is atomic_file:
                partial.write_text("new")
            raise error
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"


def test_the_error_names_the_path_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"could not write .*file/x \(.+\); nothing was left behind"):
        write_json(tmp_path / "file" / "x", {})


@pytest.mark.parametrize(
    ("error", "advised"),
    [
        (OSError(28, "No space left on device"), True),
        (PermissionError(13, "Permission denied"), True),
        (FileNotFoundError(2, "No such file or directory", "source.safetensors"), False),
        (OSError("of a library"), False),
    ],
)
def test_only_a_full_or_forbidden_place_is_advised_against(tmp_path, error, advised):
    with pytest.raises(InputError) as raised, atomic_folder(tmp_path / "out", replace=False):
        raise error
    assert f"({error})" in str(raised.value) and str(raised.value).endswith("name another place") == advised


def test_what_is_kept_of_a_deleted_run_does_not_bring_it_back(tmp_path):
    with pytest.raises(InputError, match=r"could not write .*run/goodput.json \(.*No such file"):
        write_json(tmp_path / "run" / "goodput.json", {}, parents=False)
    Goodput(tmp_path / "run", 0)
    assert names(tmp_path) == []


def test_a_folder_that_came_meanwhile_stays_unless_it_is_to_be_replaced(tmp_path):
    with pytest.raises(InputError, match="not empty"), atomic_folder(tmp_path / "out", replace=False):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "checkpoint").write_text("")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["checkpoint"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", replace=False) as partial:
        (partial / "x").write_text("")
    assert names(tmp_path / "empty") == ["x"]


def test_a_folder_replaces_one_with_content_and_what_a_killed_process_left(tmp_path):
    for stale in ("out", "out.partial", "out.old"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "junk").write_text("")
    with REPLACING(tmp_path / "out") as partial:
        assert names(partial) == []
        (partial / "x").write_text("")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["x"]


def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not write"), locked(tmp_path / "file" / "report.html"):
        pass
