"""Package metadata, all of it read from settings.ini (the one place where it is written)."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("reproduce", "dev")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["mice", "mice.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": sorted({r for group in extras.values() for r in group})},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
