"""Hands the dependencies of settings.ini to setuptools; everything else stands in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
config = config["DEFAULT"]


def lines(key: str) -> list[str]: return [line.strip() for line in config[key].splitlines() if line.strip()]


demo = lines("demo_requirements")
docs = lines("docs_requirements")
transformers, diffusers, experiments = (lines(f"{name}_requirements") for name in ("transformers", "diffusers", "experiments"))
dev = demo + transformers + diffusers + experiments + lines("dev_requirements")
setup(
    version=config["version"],
    description=config["description"],
    keywords=config["keywords"].split(),
    install_requires=lines("requirements"),
    extras_require={"demo": demo, "transformers": transformers, "diffusers": diffusers, "experiments": demo + experiments, "docs": docs, "dev": dev, "all": dev + docs},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["hilbert_attn = hilbert_attn._modidx:d"]},
)
