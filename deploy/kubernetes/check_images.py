"""Refuses manifests whose images are not pinned.

`kubectl kustomize OVERLAY | python deploy/kubernetes/check_images.py`

An image is pinned by a digest (NAME@sha256:...) that is not all one figure, in a registry that is not an example.
"""

import re
import sys
from collections.abc import Iterable, Iterator

import yaml

EXAMPLE = re.compile(r"(^|\.)example\.(com|org|net)(/|:|$)")


def images(node: object) -> Iterator[str]:
    """The images of containers and of volumes in a manifest."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "image" and isinstance(value, str):
                yield value
            elif key == "image" and isinstance(value, dict) and "reference" in value:
                yield value["reference"]
            else:
                yield from images(value)
    elif isinstance(node, list):
        for item in node:
            yield from images(item)


def why_not_pinned(image: str) -> str | None:
    """The reason why an image's name does not pin what runs; None if it does."""
    name, at, digest = image.partition("@")
    if EXAMPLE.search(name):
        return "its registry is an example: name yours"
    if not at:
        return "it has no digest: what runs could change"
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or len(set(digest.removeprefix("sha256:"))) == 1:
        return "its digest is none"
    return None


def problems(manifests: Iterable[object]) -> list[str]:
    """A line for each image that is not pinned."""
    found = sorted({image for manifest in manifests for image in images(manifest)})
    return [f"{image}: {why}" for image in found if (why := why_not_pinned(image))]


if __name__ == "__main__":
    wrong = problems(yaml.safe_load_all(sys.stdin))
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    sys.exit(1 if wrong else 0)
