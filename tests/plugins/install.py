"""Installs the packages in this folder where a test can import them, without network or pip."""

import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def install(name, folder):
    """Puts a package's modules and metadata into ``folder``, as ``pip install --target`` does.

    Returns:
        ``folder``, for ``PYTHONPATH``.
    """
    with open(HERE / name / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    for module in (HERE / name).glob("*.py"):
        shutil.copy(module, folder)
    metadata = Path(folder) / f"{name}-{project['version']}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    (metadata / "METADATA").write_text("\n".join([*lines, ""]))
    sections = [
        "\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join([*sections, ""]))
    return folder
