"""Member histories from a table to an exported recommender, as a person sees it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_run
from tests.e2e_helpers import column, ledger
from tests.events_helpers import chains, write
from tests.zygote import Zygote

ITEMS, USERS, LENGTH = 30, 80, 12


class Shop:
    """A folder with a table of interactions, and a zygote that runs commands on recipes over it."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self.table = write(folder / "t.csv", chains(USERS, LENGTH, ITEMS))

    def recipe(self, name: str, **changes: Any) -> Path:
        """`<name>.yaml`; `data` and `model` are changed key by key."""
        blocks: dict[str, Any] = {
            "workflow": {"type": "sft", "evaluate": {"type": "ranking", "k": [1, 10]}},
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "tie_word_embeddings": True,
                }
            },
            "data": {
                "train": [{"type": "events", "path": self.table, "part": "train", "window": 8}],
                "eval": [{"type": "events", "path": self.table, "part": "test"}],
                "tokenizer": {"type": "vocabulary", "learn_from": [self.table]},
                "renderer": {"type": "events", "max_events": 8},
                "max_length": 16,
                "packing": {"type": "best_fit", "row_length": 64, "lanes": 4},
            },
            "optimizer": {"type": "adamw", "learning_rate": 2e-2},
            "global_batch_size": 4,
            "num_steps": 24,
            "run_dir": str(self.folder / name),
        }
        for key in ("data", "model"):
            blocks[key] |= changes.pop(key, {})
        return tiny_run.write_recipe(self.folder / f"{name}.yaml", blocks | changes)

    def burnish(self, *argv: str | Path) -> tuple[int, str]:
        return self.zygote.run([str(word) for word in argv], self.folder / "output.log")

    def train(self, name: str, *overrides: str, expect: int = 0, **changes: Any) -> Path:
        code, output = self.burnish("train", self.recipe(name, **changes), *overrides)
        assert code == expect, output
        return self.folder / name

    def histories(self) -> list[list[str]]:
        """Items of each user, in order."""
        users: dict[str, list[str]] = {}
        for line in Path(self.table).read_text().splitlines()[1:]:
            user, item, _ = line.split(",")
            users.setdefault(user, []).append(item)
        return list(users.values())


@pytest.fixture(scope="module")
def shop(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(zygote, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def full(shop: Shop) -> Path:
    return shop.train("full")


def popularity_ndcg(histories: list[list[str]], k: int = 10) -> float:
    """Of ranking all items by how often they occur in the training part, for everybody the same."""
    counts = Counter(item for history in histories for item in history[:-2])
    place = {item: rank for rank, (item, _) in enumerate(counts.most_common())}
    ranks = [place.get(history[-1], ITEMS) for history in histories]
    return sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) / len(ranks)


def test_the_order_of_events_is_learned(shop, full):
    ndcg, popular = column(full, "eval_ndcg@10"), popularity_ndcg(shop.histories())
    assert ndcg[-1] > 0.7 > 1.5 * popular > ndcg[0]
    # 9 of 10 go on to item + 7, which the model is then sure of
    assert column(full, "eval_recall@1")[-1] > 0.6


def test_every_token_is_accounted_for(full):
    # A training history of 10 events is two windows: 8 events, of which 7 are predicted, and 2 after 4 others.
    totals = ledger(full)
    windows, tokens = totals["samples"], totals["tokens"]
    second = (7 * windows - tokens["trained"]) / 5
    assert tokens == {"trained": 7 * (windows - second) + 2 * second, "masked": (windows - second) + 4 * second}
    assert sum(tokens.values()) == totals["slots"] - totals["padding"]
    assert second == pytest.approx(windows / 2, rel=0.05)


def test_transformers_reads_the_export_and_says_the_same(shop, full):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(full / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(full / "model")
    total = 0.0
    for history in shop.histories():
        ids = tokenizer(" ".join(history[-8:]), return_tensors="pt").input_ids
        with torch.no_grad():
            total -= model(ids[:, :-1]).logits[0, -1].log_softmax(0)[ids[0, -1]].item()
    assert total / USERS == pytest.approx(column(full, "eval_loss")[-1], rel=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(shop, full):
    shop.train("stopped", "stop_after=9", expect=75)
    code, output = shop.burnish("train", shop.folder / "stopped.yaml")
    assert code == 0, output
    assert tiny_run.losses(shop.folder / "stopped") == tiny_run.losses(full)


def test_the_export_of_a_checkpoint_is_that_of_the_run(shop, full):
    from safetensors.torch import load_file

    code, output = shop.burnish("export", full, "--to", shop.folder / "again")
    assert code == 0, output
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (full / "model", shop.folder / "again"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_sample_of_the_catalogue_teaches_too(shop):
    loss = {"type": "sampled_softmax", "num_negatives": 12, "negatives": "log_uniform"}
    workflow = {"type": "sft", "loss": loss, "evaluate": {"type": "ranking", "k": [10]}}
    run = shop.train("sampled", workflow=workflow)
    assert column(run, "eval_ndcg@10")[-1] > 0.6


def test_check_names_what_cannot_be_used(shop):
    rows = [
        {"user": "1", "items": ["i1", "i2", "i3", "i4"]},
        {"user": "2", "items": []},
        {"user": "3", "items": ["i1", "i2", "i3", "i9"]},
        {"user": "4", "items": ["i1", "i2", "i3", "i4"], "timestamps": [4, 3, 2, 1]},
        {"user": "5", "items": ["i1"]},
    ]
    path = write(shop.folder / "h.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    items = write(shop.folder / "items.txt", "i1\ni2\ni3\ni4\n")
    data = {
        "train": [{"type": "events", "path": path}],
        "eval": [],
        "tokenizer": {"type": "vocabulary", "items": items},
        "renderer": {"type": "events"},
    }
    code, output = shop.burnish("check", shop.recipe("bad", data=data))
    assert code == 2
    for line in (
        f"{path}:2: the history is empty",
        f"{path}:3, event 3: item 'i9' is not in the vocabulary",
        f"{path}:4: event 1 is from before event 0",
        f"{path}:5: the history has nothing to predict",
    ):
        assert line in output, output
    data["train"][0]["unordered"] = "sort"
    data["renderer"] |= {"short": "drop", "unknown": "drop"}
    code, output = shop.burnish("check", shop.recipe("good", data=data))
    assert code == 0, output
    # i9, and the one event of user 5
    assert "% dropped: unknown item" in output and "% dropped: nothing to predict" in output


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "lama"}, "did you mean `llama`?"),
        ({"model_type": "llama", "num_hiden_layers": 2}, "did you mean `num_hidden_layers`?"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"model_type": "gpt2"}, "attention weights cannot be dropped"),
        ({"hidden_size": 32}, "`model_type: llama`"),
    ],
)
def test_check_refuses_a_model_that_cannot_be_made(shop, config, reason):
    code, output = shop.burnish("check", shop.recipe("wrong", model={"config": config}))
    assert code == 2
    assert reason in output and "model" in output, output


def test_the_shipped_recipe_runs_on_a_table_like_its_own(shop):
    table = write(shop.folder / "small.inter", chains(12, 60, ITEMS).replace(",", "\t"))
    code, output = shop.burnish(
        "train",
        Path(__file__).parents[2] / "recipes" / "movielens.yaml",
        f"data.train=[{{type: events, path: {table}, part: train, window: 50}}]",
        f"data.eval=[{{type: events, path: {table}, part: test}}]",
        f"data.tokenizer={{type: vocabulary, learn_from: [{table}]}}",
        "num_epochs=1",
        f"run_dir={shop.folder / 'shipped'}",
    )
    assert code == 0, output
    assert len(column(shop.folder / "shipped", "eval_ndcg@10")) == 2
