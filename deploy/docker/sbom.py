"""Bill of materials (CycloneDX 1.6) of the image it runs in: Debian's and Python's packages with their versions.

It is given to the image's Python and needs nothing in the image:
docker run --rm --interactive --network=none --entrypoint python3 IMAGE - <deploy/docker/sbom.py >IMAGE.cdx.json
"""

import importlib.metadata
import json
import platform
import re
import subprocess
from urllib.parse import quote


def component(kind: str, name: str, version: str, namespace: str = "", qualifiers: str = "") -> dict:
    """A package with its purl, by which scanners know it."""
    purl = f"pkg:{kind}/{namespace}{quote(name, safe='.-_')}@{quote(version, safe='.-_~')}{qualifiers}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def python_packages() -> list[dict]:
    """Components of the distributions that Python can import."""
    found = {(re.sub(r"[-_.]+", "-", d.name).lower(), d.version) for d in importlib.metadata.distributions()}
    return [component("pypi", name, version) for name, version in sorted(found)]


def debian_packages() -> list[dict]:
    """Components of the packages that dpkg has installed."""
    system = platform.freedesktop_os_release()
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev}|${Package}|${Version}|${Architecture}\n"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("ii")]
    distribution = f"{system['ID']}-{system['VERSION_ID']}"
    return [component("deb", n, v, f"{system['ID']}/", f"?arch={a}&distro={distribution}") for _, n, v, a in rows]


if __name__ == "__main__":
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    print(json.dumps(bill | {"components": python_packages() + debian_packages()}, indent=1))
