"""Configs on disk and on the Hub: ``optimizer_config.json``.

``huggingface_hub.ModelHubMixin`` is made for models: it writes ``config.json``
and ``README.md`` into the folder and deletes a ``config.json`` that is there,
which beside a checkpoint is the model's. The methods here have its names and
arguments, and use the public functions of ``huggingface_hub``.
"""

from __future__ import annotations

import json
import os
import uuid
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

CONFIG_FILE = "optimizer_config.json"

ConfigT = TypeVar("ConfigT", bound="HubMixin")


class HubMixin(ABC):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a config."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> str:
        """Write ``optimizer_config.json`` into a folder, as a whole or not at all.

        Args:
            save_directory: the folder; created if it does not exist.

        Returns:
            The file's path.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / CONFIG_FILE
        write_whole(target, self.to_json())
        return str(target)

    @classmethod
    def from_pretrained(
        cls: type[ConfigT],
        pretrained_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **fields: Any,
    ) -> ConfigT:
        """Read a config from a folder or from a repository on the Hub.

        The file is data: nothing in it is executed. Called on
        ``OptimizerConfig`` itself, it returns the config class of the optimizer
        that the file names.

        Args:
            pretrained_name_or_path: a folder that holds
                ``optimizer_config.json``, that file itself, or a repository's
                id on the Hub.
            revision: branch, tag or commit on the Hub.
            token: access token; ``None`` uses the one of ``hf auth login``.
            cache_dir: the Hub's cache folder.
            force_download: download even when cached.
            local_files_only: never ask the Hub.
            **fields: fields that replace the saved ones.

        Returns:
            The config.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            ValueError: the file is no config, is of another optimizer, or has
                a field or value that is not legal.
        """
        path = _locate(
            pretrained_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        values = read_config(path)
        chosen: Any = cls
        if not getattr(cls, "name", ""):
            chosen = _class_for(values.get("optimizer"), path)
        try:
            config = chosen.from_dict(values)
            return config.replace(**fields) if fields else config
        except ValueError as error:
            raise ValueError(f"{path}: {error}{_newer(values)}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload optimizer config",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload ``optimizer_config.json`` to a repository on the Hub.

        Args:
            repo_id: ``user/name`` or ``name``; created if it does not exist.
            commit_message: message of the commit.
            private: make a new repository private.
            token: access token; ``None`` uses the one of ``hf auth login``.
            branch: branch to commit to, ``main`` by default.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's URL.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        commit = api.upload_file(
            path_or_fileobj=self.to_json().encode(),
            path_in_repo=CONFIG_FILE,
            repo_id=repo_id,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
        return str(commit.commit_url)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""

    def to_json(self) -> str:
        """The output of :meth:`to_dict` with the package's version, as JSON."""
        return json.dumps(self.to_dict() | {"hf_precond_version": version()}, indent=2) + "\n"


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


def _locate(source: str | os.PathLike[str], **download: Any) -> Path:
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
