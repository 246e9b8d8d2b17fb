"""A wheel carries configs/, pocket_policy/ and starter/ inside agentrl; a checkout, or an editable install of one, at its top."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPackagedFolders(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "pocket_policy", "starter"):
                shutil.copytree(folder, Path(self.build_lib, "agentrl", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithPackagedFolders})
