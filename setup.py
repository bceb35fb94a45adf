"""Hands the dependencies of settings.ini to setuptools; everything else stands in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
config = config["DEFAULT"]


def lines(key: str) -> list[str]: return [line.strip() for line in config[key].splitlines() if line.strip()]


demo = lines("demo_requirements")
transformers, diffusers, experiments, notebooks = (lines(f"{name}_requirements") for name in ("transformers", "diffusers", "experiments", "notebooks"))
docs = notebooks + lines("docs_requirements")
dev = demo + transformers + diffusers + experiments + notebooks + lines("dev_requirements")
setup(
    version=config["version"],
    description=config["description"],
    keywords=config["keywords"].split(),
    install_requires=lines("requirements"),
    extras_require={"demo": demo, "transformers": transformers, "diffusers": diffusers, "experiments": demo + experiments, "docs": docs, "release": lines("release_requirements"), "dev": dev, "all": list(dict.fromkeys(dev + docs))},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["hilbert_attn = hilbert_attn._modidx:d"]},
)
