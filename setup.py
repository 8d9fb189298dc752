"""Build `cft` from settings.ini, the one place where names, versions and requirements stand."""
import configparser
import shlex
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

kinds = ("grounding", "llm", "lab", "batch", "slurm", "track", "export", "site")
extras = {name: shlex.split(cfg[f"{name}_requirements"]) for name in (*kinds, "cut")}
extras["dev"] = sum((extras[name] for name in kinds), shlex.split(cfg["dev_requirements"]))
extras["all"] = sorted({need for needs in extras.values() for need in needs})

pages = {"cft.notebooks": "nbs", "cft.notebooks.paper": "nbs/paper", "cft.notebooks.related": "nbs/related"}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Natural Language :: English", "Programming Language :: Python :: 3"],
    packages=[*find_packages(include=["cft", "cft.*"]), *pages],
    package_dir=pages,  # the pages that `cft reproduce` executes travel with the package
    package_data={"cft": ["assets/**", "py.typed"], **dict.fromkeys(pages, ["*.ipynb"]),
                  "cft.notebooks": ["24_demo.ipynb"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"])},
)
