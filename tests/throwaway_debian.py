"""A throwaway Debian in a folder, in which roles of deploy/ansible really install packages."""

import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import ANSIBLE, ansible_environment


def run(*command: object, **options) -> str:
    """Standard output of a command; fails if it fails."""
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **options)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
    return ran.stdout


def connection(root: Path, enter: str) -> dict[str, object]:
    """The variables with which Ansible works inside `root`, where the command `enter` leads."""
    return {
        "ansible_connection": "local",
        "ansible_host": "127.0.0.1",
        "ansible_become": True,
        "ansible_become_method": "ansible.builtin.su",
        "ansible_become_exe": f"{enter} su",
        "ansible_remote_tmp": f"{root}/var/tmp/.ansible",
    }


@dataclass
class Debian:
    """The folder of its root file system."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Debian":
        """Installs the smallest Debian 12 that Ansible can work in."""
        run("debootstrap", "--variant=minbase", "--include=python3,python3-apt,ca-certificates", "bookworm", root)
        sources = root / "etc" / "apt" / "sources.list"
        sources.write_text(sources.read_text().replace(" main", " main contrib non-free non-free-firmware"))
        (root / "throwaway").touch()
        inside = root / root.relative_to("/").parent  # so that paths of its files are the same inside
        inside.mkdir(parents=True)
        (inside / root.name).symlink_to("/")
        run("chroot", root, "apt-get", "update")
        return cls(root)

    def play(self, *roles: str, groups: tuple[str, ...] = ("gpu",), **variables: object) -> int:
        """Runs roles inside. Returns how many tasks changed something."""
        hosts = connection(self.root, f"chroot {self.root}")
        inventory = {"all": {"hosts": {"g1": hosts}, "children": {group: {"hosts": {"g1": {}}} for group in groups}}}
        inside = {"ansible.builtin.command": "test -e /throwaway", "changed_when": False}  # else nothing is touched
        plays = [{"hosts": "all", "gather_facts": False, "tasks": [inside]}, {"hosts": "all", "roles": list(roles)}]
        folder = self.root.parent
        (folder / "inventory.json").write_text(json.dumps(inventory))
        (folder / "play.json").write_text(json.dumps(plays))
        environment = ansible_environment() | {
            "ANSIBLE_BECOME_ALLOW_SAME_USER": "1",
            "ANSIBLE_ROLES_PATH": str(ANSIBLE / "roles"),
            "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts"),
        }
        command = ["ansible-playbook", "-i", folder / "inventory.json", folder / "play.json"]
        said = run(*command, f"--extra-vars={json.dumps(variables)}", env=environment)
        return int(re.findall(r"^g1 +: ok=\d+ +changed=(\d+)", said, re.M)[0])

    def version(self, package: str) -> str:
        """The version of an installed package, empty if it is not."""
        shown = subprocess.run(
            ["chroot", self.root, "dpkg-query", "-f", "${db:Status-Abbrev}|${Version}", "-W", package],
            capture_output=True,
            text=True,
        ).stdout
        return shown.partition("|")[2] if shown.startswith("ii") else ""


def make_repository(folder: Path, packages: list[dict[str, str]], files: dict[str, dict[str, str]]) -> None:
    """Makes a signed apt repository of packages that hold next to nothing.

    `packages` are control files; `files` are contents by package name and path. The key is in key.gpg and key.asc.
    """
    home = folder / "gnupg"
    home.mkdir(parents=True, mode=0o700)
    gpg = ["gpg", "--homedir", home, "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase", ""]
    run(*gpg, "--quick-gen-key", "tests@localhost", "rsa2048", "sign", "never")
    (folder / "key.gpg").write_bytes(subprocess.run([*gpg, "--export"], capture_output=True, check=True).stdout)
    (folder / "key.asc").write_text(run(*gpg, "--armor", "--export"))
    index = ""
    for control in packages:
        control = {"Architecture": "all", "Maintainer": "tests", "Description": "for a test"} | control
        tree = folder / "tree" / f"{control['Package']}_{control['Version']}"
        (tree / "DEBIAN").mkdir(parents=True)
        text = "".join(f"{name}: {value}\n" for name, value in control.items())
        (tree / "DEBIAN" / "control").write_text(text)
        for path, content in files.get(control["Package"], {}).items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
        deb = folder / f"{tree.name}.deb"
        run("dpkg-deb", "--build", "--root-owner-group", tree, deb)
        data = deb.read_bytes()
        index += text + f"Filename: ./{deb.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    (folder / "Packages").write_text(index)
    digest = hashlib.sha256(index.encode()).hexdigest()
    (folder / "Release").write_text(f"Suite: ./\nSHA256:\n {digest} {len(index.encode())} Packages\n")
    run(*gpg, "--clearsign", "--output", folder / "InRelease", folder / "Release")
