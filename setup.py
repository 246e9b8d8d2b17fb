"""A wheel carries configs/ and starter/ inside agentrl; a checkout, and an editable install of it, has them at its top."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPackagedFolders(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "starter"):
                shutil.copytree(folder, Path(self.build_lib, "agentrl", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithPackagedFolders})
