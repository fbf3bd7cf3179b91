"""A text for long runs: the Python sources of this environment, as tokens of two bytes.

The standard library, and installed packages whose metadata names a permissive
licence. Nothing is downloaded; nothing leaves the cache folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sysconfig
from array import array
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 8192
HELD_OUT = 50
"""One file in so many is held out."""

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|Zlib|HPND|0BSD)\b", re.I
)
OTHER = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|CDDL|SSPL|Proprietary|NVIDIA)", re.I)
TRAINED_ON = 8 * 2**20
"""Characters that the vocabulary is learned from."""


def is_permissive(package: metadata.Distribution) -> bool:
    """Whether a package's metadata names a permissive licence, and no other beside it.

    Args:
        package: an installed distribution.
    """
    found: Any = package.metadata  # an email.message.Message, whose type says less
    words = [found.get("License-Expression") or (found.get("License") or "")[:200]]
    words += [c for c in found.get_all("Classifier") or () if c.startswith("License")]
    text = " ".join(words)
    return bool(PERMISSIVE.search(text)) and not OTHER.search(text)


def files() -> Iterator[Path]:
    """The files: the standard library's, then those of permissive packages, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "lib2to3"} & set(path.parts):
            yield path
    packages = {str(p.metadata["Name"]).lower(): p for p in metadata.distributions()}
    for name in sorted(packages):
        if is_permissive(packages[name]):
            for file in sorted(packages[name].files or (), key=str):
                if file.suffix == ".py":
                    yield Path(str(file.locate()))


def tokens(cache: Path, megabytes: float = 40.0) -> tuple[Tensor, Tensor]:
    """The tokens of training and held-out files, made where the cache has none.

    Args:
        cache: the folder.
        megabytes: at most so many, two bytes a token.

    Returns:
        Two one-dimensional tensors of uint16, the training tokens first.
    """
    from filelock import FileLock

    folder = cache / f"{VOCABULARY}-{megabytes:g}"
    done = folder / "train.bin"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / "lock")):
        if not done.exists():
            _make(folder, int(megabytes * 1e6) // 2)
    return _read(done), _read(folder / "held.bin")


def _read(path: Path) -> Tensor:
    size = path.stat().st_size // 2
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint16)


def _texts() -> Iterator[tuple[int, str]]:
    """A number and the text of different files, in an order that the files' names decide."""

    def place(path: Path) -> str:
        return hashlib.sha256("/".join(path.parts[-4:]).encode()).hexdigest()

    seen: set[bytes] = set()
    for path in sorted(files(), key=place):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if 200 < len(text) < 1_000_000 and digest not in seen:
            seen.add(digest)
            yield int.from_bytes(digest), text


def _make(folder: Path, count: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|file|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(TRAINED_ON), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    streams = {"held": array("H"), "train": array("H")}
    texts, used = _texts(), 0
    while sum(map(len, streams.values())) < count:
        part = list(itertools.islice(texts, 64))
        if not part:
            break
        used += len(part)
        for (number, _), encoded in zip(
            part, tokenizer.encode_batch_fast([text for _, text in part]), strict=True
        ):
            streams["train" if number % HELD_OUT else "held"].extend([0, *encoded.ids])
    about = {"files": used, "vocabulary": VOCABULARY}
    (folder / "about.json").write_text(json.dumps(about))
    for name in ("held", "train"):  # the training tokens, last, are what is looked for
        kept = streams[name][:count]
        count -= len(kept)
        draft = folder / f"{name}.draft"
        draft.write_bytes(kept.tobytes())
        os.replace(draft, folder / f"{name}.bin")


def _first(characters: int) -> Iterator[str]:
    for _, text in _texts():
        yield text
        characters -= len(text)
        if characters <= 0:
            return
