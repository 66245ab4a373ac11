"""The one line that is shown of somebody else's exception."""

from mla_jax.errors import first_line


def test_the_cause_is_kept_however_long_the_paths_before_it():
    path = "/" + "very_long_folder/" * 60
    error = OSError(f"INTERNAL: Error writing \"{path}\": No space left on device [source locations='a.cc:1\\nb.cc:2']")
    line = first_line(error)
    assert line.startswith("INTERNAL: Error writing") and line.endswith("No space left on device")
    assert len(line) <= 600 and "\n" not in line


def test_short_lines_stay_and_an_empty_message_gives_the_type():
    assert first_line(ValueError("\n\n  one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
