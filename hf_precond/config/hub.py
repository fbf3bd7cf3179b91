"""Configs on disk and on the Hub: ``optimizer_config.json``.

``huggingface_hub.ModelHubMixin`` is made for models: it writes ``config.json``
and ``README.md`` into the folder and deletes a ``config.json`` that is there,
which beside a checkpoint is the model's. So configs have methods of the same
names and arguments, on top of the public functions of ``huggingface_hub``.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

CONFIG_FILE = "optimizer_config.json"


def save(config: Any, folder: str | os.PathLike[str]) -> str:
    """Write a config into a folder, which is created if it does not exist.

    Args:
        config: the config.
        folder: the folder.

    Returns:
        The file's path.
    """
    target = Path(folder) / CONFIG_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, config.to_json())
    return str(target)


def load(
    cls: Any, source: str | os.PathLike[str], fields: Mapping[str, Any], **download: Any
) -> Any:
    """Read a config from a folder, a file or a repository on the Hub.

    Args:
        cls: the config class; without a name, the class of the optimizer that
            the file names.
        source: the folder, the file or the repository's id.
        fields: fields that replace the saved ones.
        **download: for ``huggingface_hub.hf_hub_download``.

    Returns:
        The config.

    Raises:
        FileNotFoundError: there is no such folder, repository or file.
        ValueError: the file is no config, is of another optimizer, or has a
            field or value that is not legal.
    """
    path = _locate(source, download)
    values = read_config(path)
    config_cls = cls if cls.name else _class_for(values.get("optimizer"), path)
    try:
        return config_cls.from_dict({**values, **fields})
    except ValueError as error:
        advice = "" if "is the last release" in str(error) else _newer(values)
        raise ValueError(f"{path}: {error}{advice}") from error


def push(
    config: Any, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any
) -> str:
    """Upload a config to a repository on the Hub, which is created if it does not exist.

    Args:
        config: the config.
        repo_id: ``user/name`` or ``name``.
        private: make a new repository private.
        token: access token; ``None`` uses the one of ``hf auth login``.
        **commit: for ``huggingface_hub.HfApi.upload_file``.

    Returns:
        The commit's URL.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    uploaded = api.upload_file(
        path_or_fileobj=config.to_json().encode(),
        path_in_repo=CONFIG_FILE,
        repo_id=repository,
        **commit,
    )
    return str(uploaded.commit_url)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as a whole or not at all; an existing file stays until it is replaced.

    Args:
        path: the file; its folder exists.
        text: written in UTF-8.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # Else the new name may reach the disk before what it names.
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def version() -> str:
    """The version of this package, ``"unknown"`` in a source tree that is not installed."""
    try:
        return metadata.version("hf_precond")
    except metadata.PackageNotFoundError:
        return "unknown"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields in a config file.

    Args:
        path: the file.

    Raises:
        ValueError: the file holds no JSON object.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number that JSON has")

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file of an optimizer config ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: holds a JSON {type(values).__name__}, and a config is an object of fields."
        )
    return values


def _locate(source: str | os.PathLike[str], download: Mapping[str, Any]) -> Path:
    """The config file in a folder, at a path or in a repository on the Hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return path / CONFIG_FILE
        raise FileNotFoundError(
            f"{path}: the folder holds no {CONFIG_FILE}; config.save_pretrained(folder) writes it."
        )
    from huggingface_hub import errors, hf_hub_download

    absent = "there is no such folder, and"
    reasons: dict[type[Exception], str] = {
        errors.HFValidationError: f"{absent} it is no repository id of the Hub (user/name) either.",
        errors.LocalEntryNotFoundError: f"{absent} {CONFIG_FILE} of a Hub repository of that name "
        "is not in the local cache and could not be downloaded (offline?).",
        errors.RepositoryNotFoundError: f"{absent} no such repository on the Hub (a private one "
        "needs a token).",
        errors.EntryNotFoundError: f"this repository holds no {CONFIG_FILE}; "
        "config.push_to_hub(repo_id) uploads one.",
        errors.HfHubHTTPError: f"the Hub refused {CONFIG_FILE}: {{error}}",
    }
    try:
        return Path(hf_hub_download(str(source), CONFIG_FILE, **download))
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise FileNotFoundError(f"{source}: {reason.format(error=error)}") from error


def _newer(values: dict[str, Any]) -> str:
    """Advice for a refused file that another release of this package wrote, else nothing."""
    written = values.get("hf_precond_version", version())
    if written == version():
        return ""
    return (
        f" (The file was written by hf_precond {written}, and this is {version()}: install that "
        "release, or correct the file.)"
    )


def _class_for(name: Any, path: Path) -> Any:
    """The config class of the optimizer that a file names."""
    from hf_precond.registry import get_info, list_optimizers

    if name not in list_optimizers():
        raise ValueError(
            f"{path}: optimizer={name!r}: hf_precond knows {', '.join(list_optimizers())}; a "
            'config file names one of them under "optimizer".'
        )
    return get_info(name).config_cls
