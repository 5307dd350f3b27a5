"""Package metadata, all of it read from settings.ini (the one place where it is written)."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("photos", "reproduce", "tensorboard", "dev")}


class WithReproduction(build_py):
    "A wheel also carries the reproduction notebook and its experiments, for use without a checkout."

    def run(self):
        super().run()
        if not self.editable_mode:
            source = here / "nbs" / "reproduction"
            target = Path(self.build_lib) / cfg["lib_path"] / "reproduction"
            for path in (source / "reproduce.ipynb", *source.glob("experiments/*.yaml")):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


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
    classifiers=["Typing :: Typed"],
    url=cfg["git_url"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["mice", "mice.*"]),
    package_data={"": ["py.typed", "page/*", "*.csv"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": sorted({r for group in extras.values() for r in group})},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],  # nbdev looks for the name of the import
    },
    cmdclass={"build_py": WithReproduction},
    zip_safe=False,
)
