"""Where the packages lie in this repository; everything else about the package is in pyproject.toml.

pyproject.toml can list packages or find them, not both, and `conf` has to be listed: a user may have a top-level module
of that name, so ours is installed as `experiments/conf`.
"""

from setuptools import find_packages, setup

ours = find_packages(include=["mla_jax*", "experiments*", "tools*"])
# kernels/ itself is no package: transformers imports Hugging Face's package of that name, which ours must not shadow.
kernels = find_packages("kernels")
setup(
    packages=[*ours, *kernels, "experiments.conf"],
    package_dir={"latent_attention": "kernels/latent_attention", "experiments.conf": "conf"},
    package_data={"experiments.conf": ["**/*.yaml"], "mla_jax.evals": ["*.jinja", "*.json"]},
)
