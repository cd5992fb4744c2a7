"""`python scripts/movielens.py`: MovieLens-100k into `data/movielens/`, for the recipes that recommend.

The data lie in the Python package `recbole`, which is downloaded without its dependencies and never installed. They are
for research, and may not be passed on: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quickstart_model import expect

FOLDER = Path("data/movielens")
PACKAGE = "recbole==1.2.1"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
HISTORY = 10
"""Films named in a conversation."""


def prepare(folder: Path) -> None:
    """Makes `folder` hold the ratings, the films, and conversations about them."""
    if not all((folder / name).exists() for name in SHA256):
        fetch(folder)
    for name, digest in SHA256.items():
        expect(folder / name, digest)
    titles = {row["item_id"]: title(row) for row in table(folder / "ml-100k.item")}
    (folder / "items.json").write_text(json.dumps({token(item): said for item, said in titles.items()}, indent=0))
    conversations(folder)


def fetch(folder: Path) -> None:
    """Takes the two files out of the package."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory() as downloads:
        subprocess.run([*pip, "--dest", downloads, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(downloads).glob("recbole-*.whl"))) as wheel:
            for name in SHA256:
                (folder / name).write_bytes(wheel.read(f"recbole/dataset_example/ml-100k/{name}"))


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file whose header says `name:type`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [name.partition(":")[0] for name in next(rows)]
        return [dict(zip(names, row, strict=True)) for row in rows]


def title(film: dict[str, str]) -> str:
    """`Toy Story, 1995, Animation Children's Comedy`: what a language model may know a film by."""
    return ", ".join(filter(None, (film["movie_title"], film["release_year"], film["class"])))


def token(item: str) -> str:
    """A film as a word of its own."""
    return f"<film_{item}>"


def conversations(folder: Path) -> None:
    """`train.jsonl` and `test.jsonl`: what somebody saw, and the film seen next; the very last one is for the test."""
    users: dict[str, list[tuple[float, str]]] = {}
    for row in table(folder / "ml-100k.inter"):
        users.setdefault(row["user_id"], []).append((float(row["timestamp"]), row["item_id"]))
    with (folder / "train.jsonl").open("w") as train, (folder / "test.jsonl").open("w") as test:
        for seen in users.values():
            films = [token(item) for _, item in sorted(seen, key=lambda pair: pair[0])]
            for end in range(HISTORY, len(films) - 2, HISTORY):
                train.write(conversation(films[end - HISTORY : end + 1]))
            test.write(conversation(films[-HISTORY - 1 :]))


def conversation(films: list[str]) -> str:
    """A line of JSON: the last film is the answer."""
    asked = f"I saw {' '.join(films[:-1])}. What should I see next?"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": films[-1]}]
    return json.dumps({"messages": messages}) + "\n"


if __name__ == "__main__":
    prepare(FOLDER)
    print(f"{FOLDER}: 100,000 ratings of {len(table(FOLDER / 'ml-100k.item')):,} films, by 943 people")
