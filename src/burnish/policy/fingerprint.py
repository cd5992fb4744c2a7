"""Which weights a model folder holds, without reading all of them: a model laid under the path of another says other
things. Training changes neither names nor sizes nor headers of files, so bytes of the weights are looked at.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PLACES, SAMPLE_BYTES = 1024, 64
"""A file is looked at in so many places, evenly spread; one of up to 64 KB, such as `config.json`, is read whole."""
PATTERNS = ("config.json", "*.safetensors", "pytorch_model*.bin")


def weights_fingerprint(path: str) -> str | None:
    """Of the weight files and the configuration of a local folder, or of a `.gguf` file: names, sizes, and bytes at
    `PLACES`. None where nothing is there, as for a hub id.

    A change of every weight of a layer is noticed, one of a few single weights may not be.
    """
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(file for pattern in PATTERNS for file in place.glob(pattern))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            for at in range(0, size, max(SAMPLE_BYTES, size // PLACES)):
                opened.seek(at)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
