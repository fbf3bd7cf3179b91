"""A text for long runs: the Python sources of this environment, as tokens of two bytes.

The standard library, and installed packages whose metadata names a permissive
licence. Nothing is downloaded; nothing leaves the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
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


def _texts(limit: int) -> list[tuple[str, str]]:
    """Digest and text of different files, in the order of their digests, up to some characters."""
    found: dict[str, str] = {}
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 200 < len(text) < 1_000_000:
            found[hashlib.sha256(text.encode()).hexdigest()] = text
    chosen, size = [], 0
    for digest in sorted(found):
        chosen.append((digest, found[digest]))
        size += len(found[digest])
        if size > limit:
            break
    return chosen


def _make(folder: Path, count: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = _texts(8 * count)  # a token is 3 to 4 characters of source
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|file|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned, size = [], 0
    for _, text in texts:
        learned.append(text)
        size += len(text)
        if size > TRAINED_ON:
            break
    tokenizer.train_from_iterator(learned, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    streams: dict[str, list[int]] = {"held": [], "train": []}
    used = 0
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        for (digest, _), encoded in zip(
            part, tokenizer.encode_batch([t for _, t in part]), strict=True
        ):
            name = "held" if int(digest, 16) % HELD_OUT == 0 else "train"
            streams[name] += [0, *encoded.ids]
            used += 1
        if sum(map(len, streams.values())) >= count:
            break
    room = count
    for name in ("held", "train"):  # the training tokens, last, are what is looked for
        kept = streams[name][:room]
        room -= len(kept)
        draft = folder / f"{name}.draft"
        draft.write_bytes(torch.tensor(kept, dtype=torch.int32).to(torch.uint16).numpy().tobytes())
        about = {"files": used, "tokens": {k: len(v) for k, v in streams.items()}}
        (folder / "about.json").write_text(json.dumps(about))
        os.replace(draft, folder / f"{name}.bin")
