"""A new objective is one file: dropped beside the recipe, it trains, is saved with the run and found on resume."""

from __future__ import annotations

from pathlib import Path

from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote

EXPONENTIAL = '''
"""AdaBoost's margin loss on preference pairs."""
from burnish.losses.pairs import PairLoss


class Exponential(PairLoss):
    """exp(-m), with m = beta (log-ratio of the chosen answer - log-ratio of the rejected one); 1 at the start."""

    beta: float = 0.1

    def compare(self, pairs):
        chosen, rejected = pairs.ratios(mean=False)
        return (-self.beta * (chosen - rejected)).exp(), self.beta * chosen, self.beta * rejected
'''


def test_a_file_beside_the_recipe_trains_resumes_and_has_every_metric_of_pairs(
    zygote: Zygote, tmp_path: Path, tiny_model: Path
):
    (tmp_path / "my_loss.py").write_text(EXPONENTIAL)
    pairs = [
        {"prompt": f"say {word}:", "chosen": f" {word}", "rejected": f" {word} {word} stone"}
        for word in tiny_run.WORDS * 4
    ]
    lab = Lab(zygote, tmp_path, tiny_model, tiny_run.write_jsonl(tmp_path / "pairs.jsonl", pairs))
    workflow = {"type": "preference", "loss": {"type": "my_loss:Exponential", "beta": 0.5}}
    run = lab.train("own", workflow=workflow, num_steps=8)
    losses = column(run, "loss")
    assert abs(losses[0] - 1.0) < 1e-6 and losses[-1] < 0.9
    assert column(run, "rewards/accuracies")[-1] > 0.5
    stopped = lab.train("stopped", "stop_after=4", workflow=workflow, num_steps=8, expect=75)
    lab.resume("stopped")
    assert tiny_run.losses(stopped) == tiny_run.losses(run)
    code, output = lab.burnish("check", lab.recipe("typo", workflow=workflow | {"loss": {"type": "my_loss:Exp"}}))
    assert code == 2 and "cannot import 'my_loss:Exp'" in output
