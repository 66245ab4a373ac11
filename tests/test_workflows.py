"""The workflows of .github: pinned, with no more rights than they need, and of targets that there are.

zizmor (`make lint`) looks for ways to attack them.
"""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JOBS = [
    pytest.param(job, id=f"{path.stem}-{name}")
    for path in WORKFLOWS
    for name, job in yaml.safe_load(path.read_text())["jobs"].items()
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_say_their_version(path):
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_an_action_has_one_version():
    used = {action for path in WORKFLOWS for action in re.findall(r"uses: ([\w-]+/\S+)", path.read_text())}
    assert len({action.split("@")[0] for action in used}) == len(used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_no_rights_of_its_own(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {} and "concurrency" in workflow
    assert "pull_request_target" not in workflow[True]  # YAML's word for `on`


@pytest.mark.parametrize("job", JOBS)
def test_a_job_reads_and_ends(job):
    writes = [right for right, level in job["permissions"].items() if level != "read"]
    steps = job.get("steps", [])
    if writes:  # it may change a release or the site, so it runs nothing from the repository
        assert job["environment"] in ("release", "github-pages")
        assert not any("checkout" in step.get("uses", "") or "make" in step.get("run", "") for step in steps)
    assert "uses" in job or job["timeout-minutes"] <= 60
    for step in steps:
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        # Values of an event in a shell's text are how workflows are attacked.
        assert "${{" not in step.get("run", "")


def test_what_ci_run_tests_is_in_the_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    matrix = set(workflow["jobs"]["make"]["strategy"]["matrix"]["target"])
    assert matrix <= targets
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if re.match(r"(stage )?make ", line)]
    wanted = {word for line in commands for word in line.split() if re.fullmatch(r"lint|integration|test[a-z-]*", word)}
    if "test-both" in wanted:
        wanted = wanted - {"test-both"} | {"test", "integration"}
    assert {"lint", "test", "integration"} <= wanted <= matrix


def test_issue_forms_have_what_github_asks_of_them():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert form["name"] and form["description"]
        ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
        assert len(set(ids)) == len(ids) > 0
        assert all(item["attributes"]["label"] for item in form["body"] if item["type"] != "markdown")
