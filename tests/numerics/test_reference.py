"""References and teachers beside a policy: they say what plain transformers says, however they are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.data.packing.layout import empty_block
from burnish.losses.base import Loss
from burnish.losses.dpo import DPO
from burnish.losses.hidden_kd import HiddenKD
from burnish.losses.kd import KD
from burnish.losses.kto import KTO
from burnish.losses.nll import NLL
from burnish.losses.topk_kd import TopKKD
from burnish.mesh import Mesh, open_mesh
from burnish.policy.mismatch import mismatched
from burnish.policy.policy import Policy
from burnish.policy.second import Reference, Teacher
from burnish.policy.throughput import Throughput
from burnish.types import Block
from tests import tiny_run
from tests.preference_helpers import token_block
from tests.second_helpers import LORA, PAIRS, move, open_policy, pair_rows, reference_logprobs, student, surroundings
from tests.tiny_models import tiny_model

MODES: dict[str, tuple[dict[str, Any], Reference]] = {
    "adapter-off": ({"adapter": LORA}, Reference()),
    "frozen-copy": ({}, Reference()),
    "adapter-off-precomputed": ({"adapter": LORA}, Reference(precompute=True)),
    "frozen-copy-precomputed": ({}, Reference(precompute=True)),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are far apart, and a tokenizer of as many ids."""
    path = tmp_path_factory.mktemp("second") / "model"
    tiny_model("llama", vocab_size=320).save_pretrained(path)
    tiny_run.write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the student, and with 32 rows of padding behind the same 320 ids."""
    path = tmp_path_factory.mktemp("teacher") / "model"
    tiny_model("llama", seed=5, vocab_size=352, hidden_size=48).save_pretrained(path)
    tiny_run.write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with three times as large logits: tokens drawn at random are far less likely under it."""
    path = tmp_path_factory.mktemp("sharp") / "model"
    model = tiny_model("llama", seed=5, vocab_size=320)
    model.lm_head.weight.data *= 3
    model.save_pretrained(path)
    tiny_run.write_tokenizer(path)
    return path


def plain(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()


def opened(mode: str, folder: Path, mesh: Mesh, tmp_path: Path, **more: Any) -> Policy:
    model, reference = MODES[mode]
    return open_policy(reference, surroundings(student(folder, **model), mesh, tmp_path, **more))


def answers() -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of the ten answers, in the order in which `pair_rows` lays them."""
    return [(pair.prompt, answer) for pair in PAIRS for answer in (pair.chosen, pair.rejected)]


@torch.no_grad()
def plain_states(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """float64 [n, H]: what each token of the answer is drawn from."""
    ids = torch.tensor([prompt + answer])
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]


@torch.no_grad()
def plain_logprobs(model: Any, prompt: list[int], answer: list[int], vocab_size: int = 320) -> Tensor:
    """float64 [n, V], of one answer alone."""
    return model.lm_head(plain_states(model, prompt, answer))[:, :vocab_size].log_softmax(-1)


def trained(columns: list[Tensor], blocks: list[Block]) -> Tensor:
    return torch.cat([column[block.loss_mask] for column, block in zip(columns, blocks, strict=True)])


@pytest.mark.parametrize("shared", [False, True], ids=["own-prompts", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_a_reference_is_the_untouched_model_however_far_the_policy_moved(
    mode: str, shared: bool, folder: Path, mesh: Mesh, tmp_path: Path
) -> None:
    blocks = pair_rows(shared=shared)
    policy = opened(mode, folder, mesh, tmp_path, blocks=lambda: blocks)
    base = plain(folder)
    expected = torch.cat([plain_logprobs(base, p, a).gather(1, torch.tensor(a)[:, None])[:, 0] for p, a in answers()])
    torch.testing.assert_close(trained(policy.logprobs(blocks), blocks).double(), expected, rtol=1e-5, atol=2e-5)
    before = reference_logprobs(policy, blocks)
    torch.testing.assert_close(trained(before, blocks).double(), expected, rtol=1e-5, atol=2e-5)
    move(policy)
    for column, again in zip(before, reference_logprobs(policy, blocks), strict=True):
        assert torch.equal(column, again)
    for column, block in zip(before, blocks, strict=True):
        assert not column[~block.loss_mask].any()
    moved = trained(policy.logprobs(blocks), blocks)
    assert (moved - trained(before, blocks)).abs().max() > 0.1


@pytest.mark.parametrize("shared", [False, True], ids=["own-prompts", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_the_initial_dpo_loss_is_ln_2(mode: str, shared: bool, folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Packed, or laid for the policy otherwise than for the reference's pass."""
    asked = pair_rows(shared=shared)
    policy = opened(mode, folder, mesh, tmp_path, blocks=lambda: asked)
    one_by_one = [token_block([pair], 64, shared=shared) for pair in PAIRS]
    for blocks in (asked, one_by_one):
        summed, count = policy.evaluate(blocks, DPO(beta=0.1))["loss"]
        assert (summed / count, count) == (pytest.approx(math.log(2), abs=1e-6), 5)


def test_precomputed_is_online_bit_for_bit(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    online = reference_logprobs(opened("frozen-copy", folder, mesh, tmp_path), pair_rows())
    kept = reference_logprobs(opened("frozen-copy-precomputed", folder, mesh, tmp_path), pair_rows())
    for one, other in zip(online, kept, strict=True):
        assert torch.equal(one, other)


def test_micro_batches_and_empty_rows_change_no_column(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    blocks = pair_rows()
    policy = opened("frozen-copy", folder, mesh, tmp_path, micro_batch_size=2)
    empty = [empty_block(64, 12, blocks[0].columns)] * 2
    annotated = policy.annotated([*empty, *blocks, *empty[:1]], DPO())
    assert len({tuple(sorted(block.columns)) for block in annotated}) == 1  # or rows could not be laid together
    columns = [block.columns["ref_logprobs"] for block in annotated[2:]]
    assert not columns[2].any()
    alone = reference_logprobs(opened("frozen-copy", folder, mesh, tmp_path), blocks)
    torch.testing.assert_close(columns[:2], alone, rtol=0, atol=1e-5)


def test_asking_the_policy_with_its_adapter_off_leaves_it_as_it_was(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Dropout of one half in the adapter: what is drawn from the generator, and by which modules, must not change."""
    policy = opened("adapter-off", folder, mesh, tmp_path)
    move(policy)
    policy.model.train()
    policy.model.layers[0].eval()
    modes = [module.training for module in policy.model.modules()]
    trains = [parameter.requires_grad for parameter in policy.model.parameters()]
    random = torch.get_rng_state()
    reference_logprobs(policy, pair_rows())
    assert [module.training for module in policy.model.modules()] == modes
    assert [parameter.requires_grad for parameter in policy.model.parameters()] == trains
    assert torch.equal(torch.get_rng_state(), random)
    policy.forward_backward(pair_rows(), DPO())
    gradients = {name: p.grad for name, p in policy.model.trainable_parameters()}
    assert gradients and all(gradient is not None for gradient in gradients.values())


def test_no_second_model_trains_or_is_saved(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    policy = opened("frozen-copy", folder, mesh, tmp_path)
    alone = open_policy(None, surroundings(student(folder), mesh, tmp_path))
    tensors, _ = policy.state()
    expected, _ = alone.state()
    assert tensors["model"].keys() == expected["model"].keys()
    policy.forward_backward(pair_rows(), DPO())
    frozen: Any = policy.second
    assert not any(p.requires_grad or p.grad is not None for p in frozen.inner.model.parameters())


def test_a_frozen_copy_in_bfloat16_is_the_policy(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    around = surroundings(student(folder, dtype="bfloat16"), mesh, tmp_path)
    policy = open_policy(Reference(), around)
    summed, count = policy.evaluate(pair_rows(), DPO(beta=0.1))["loss"]
    assert summed / count == pytest.approx(math.log(2), abs=1e-6)


# Teachers


def test_a_teachers_likeliest_tokens_are_those_of_its_distribution_over_the_students_ids(
    folder: Path, teacher: Path, mesh: Mesh, tmp_path: Path
) -> None:
    policy = open_policy(Teacher(path=str(teacher), top_k=7), surroundings(student(folder), mesh, tmp_path))
    blocks = policy.annotated(pair_rows(), TopKKD())
    of_teacher = plain(teacher)
    logprobs_nV = torch.cat([plain_logprobs(of_teacher, prompt, answer) for prompt, answer in answers()])
    expected = logprobs_nV.topk(7)
    ids = trained([block.columns["teacher_topk_ids"] for block in blocks], blocks)
    assert torch.equal(ids, expected.indices)
    found = trained([block.columns["teacher_topk_logprobs"] for block in blocks], blocks)
    torch.testing.assert_close(found.double(), expected.values, rtol=1e-5, atol=2e-5)


def test_a_teachers_hidden_states_are_those_its_tokens_are_drawn_from(
    folder: Path, teacher: Path, mesh: Mesh, tmp_path: Path
) -> None:
    policy = open_policy(Teacher(path=str(teacher)), surroundings(student(folder), mesh, tmp_path))
    blocks = policy.annotated(pair_rows(shared=True), HiddenKD())
    of_teacher = plain(teacher)
    expected = torch.cat([plain_states(of_teacher, prompt, answer) for prompt, answer in answers()])
    found = trained([block.columns["teacher_hidden"] for block in blocks], blocks)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["own-prompts", "shared"])
def test_the_divergence_from_a_teacher_is_that_of_the_plain_distributions(
    shared: bool, folder: Path, teacher: Path, mesh: Mesh, tmp_path: Path
) -> None:
    policy = open_policy(Teacher(path=str(teacher)), surroundings(student(folder), mesh, tmp_path))
    summed, count = policy.evaluate(pair_rows(shared=shared), KD())["loss"]
    of_teacher, of_student = plain(teacher), plain(folder)
    expected = sum(
        float((q.exp() * (q - p)).sum())
        for q, p in ((plain_logprobs(of_teacher, *answer), plain_logprobs(of_student, *answer)) for answer in answers())
    )
    assert summed / count == pytest.approx(expected / sum(len(answer) for _, answer in answers()), rel=1e-5)


# KTO's reference point


def test_mismatched_pairs_are_the_prompts_with_the_answers_before_them() -> None:
    """Two pairs of one row: answers (p, c), (p, r), (q, c'), (q, r'); each prompt is met by the answer before."""
    block = token_block(PAIRS[:2], 64, shared=True)
    (row,) = mismatched([block])
    (p, c, r), (q, c2, r2) = ((pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS[:2])
    documents = [row.token_ids[start:end].tolist() for start, end, _, _ in row.documents[:4].tolist()]
    assert documents == [p + r2, p + c, q + r, q + c2]
    masks = [int(row.loss_mask[start:end].sum()) for start, end, _, _ in row.documents[:4].tolist()]
    assert masks == [12, 5, 3, 9]
    assert row.position_ids[: len(p + r2) + 1].tolist() == [*range(18), 0]


def test_a_mismatched_pair_is_cut_to_the_row_and_rows_hold_what_they_held() -> None:
    blocks = [token_block([pair], 20, shared=False, num_documents=4) for pair in (PAIRS[0], PAIRS[2])]
    rows = mismatched(blocks)
    assert [row.num_documents for row in rows] == [1, 2, 1]  # 13 and 11 tokens; 9 + 11; 5 of 20
    long = token_block([PAIRS[1]], 32, shared=False, num_documents=4)
    assert mismatched([long])[0].num_tokens == 32
    one = token_block([PAIRS[1]], 32, shared=False, num_documents=4)
    one.loss_mask[:11] = False
    assert mismatched([one]) == []


def test_a_mismatched_pair_is_cut_to_the_models_positions() -> None:
    """Prompts of 2 tokens, answers of 9 and 12: a model of 12 positions, enough for neither answer's own document, is
    never asked about a thirteenth, however long the row is."""
    (row,) = mismatched([token_block([PAIRS[1]], 64, shared=False)], 12)
    assert [end - start for start, end, _, _ in row.documents[:2].tolist()] == [12, 11]
    assert int(row.position_ids.max()) == 11 and int(row.loss_mask.sum()) == 10 + 9


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own-prompts", "shared"])
def test_the_kto_kl_is_the_mean_log_ratio_of_mismatched_pairs(
    shared: bool, micro_batch_size: int, folder: Path, sharp: Path, mesh: Mesh, tmp_path: Path
) -> None:
    """Against a loop over single documents of plain transformers in float64."""
    around = surroundings(student(folder), mesh, tmp_path, micro_batch_size=micro_batch_size)
    policy = open_policy(Reference(path=str(sharp)), around)
    blocks = policy.annotated(pair_rows(shared=shared), KTO())
    of_policy, of_reference = plain(folder), plain(sharp)
    ratios = []
    for (prompt, _), (_, answer) in zip(answers(), [answers()[-1], *answers()[:-1]], strict=True):
        at = torch.tensor(answer)[:, None]
        p, q = (plain_logprobs(m, prompt, answer).gather(1, at).sum() for m in (of_policy, of_reference))
        ratios.append(float(p - q))
    expected = sum(ratios) / len(ratios)
    assert expected > 1.0
    for block in blocks:
        used = block.documents[:, 1] > 0
        assert block.columns["kto_kl"][used].tolist() == pytest.approx([expected] * int(used.sum()), rel=1e-5)
        assert not block.columns["kto_kl"][~used].any()


def test_the_kto_kl_is_never_below_0(folder: Path, sharp: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Under the sharper policy the answers are less likely than under the reference: the mean log-ratio is negative."""
    policy = open_policy(Reference(path=str(folder)), surroundings(student(sharp), mesh, tmp_path))
    for block in policy.annotated(pair_rows(), KTO()):
        assert block.columns["kto_kl"].tolist() == [0.0] * 12


def test_an_evaluation_of_kto_does_not_depend_on_micro_batches(
    folder: Path, sharp: Path, mesh: Mesh, tmp_path: Path
) -> None:
    """Its reference point is that of as many rows as a step has, not of a micro-batch: a row of one answer has none."""

    def evaluated(micro_batch_size: int, at_once: int) -> tuple[float, float]:
        around = surroundings(student(folder), mesh, tmp_path, micro_batch_size=micro_batch_size)
        metrics = open_policy(Reference(path=str(sharp)), around).evaluate(pair_rows(), KTO(), at_once=at_once)
        return metrics["loss"][0], metrics["kl"][0]

    assert evaluated(1, 2) == pytest.approx(evaluated(2, 2), rel=1e-6)
    assert evaluated(1, 1)[1] != pytest.approx(evaluated(1, 2)[1], rel=1e-3)


# What it costs


@pytest.mark.parametrize("loss", [DPO(), KD(), TopKKD()], ids=lambda loss: loss.type)
def test_the_second_models_operations_are_executed_and_not_useful(
    loss: Loss, folder: Path, mesh: Mesh, tmp_path: Path
) -> None:
    """The same model twice: a forward pass beside one of three passes; the head once more a trained token, and twice
    for a divergence."""
    second = Reference() if isinstance(loss, DPO) else Teacher(path=str(folder), top_k=4)
    around = surroundings(student(folder, pad_vocab_to=1), mesh, tmp_path)
    policy, alone = open_policy(second, around), open_policy(None, around)
    blocks = pair_rows()
    with_second = Throughput(policy.model, policy.second).flops(blocks, loss)
    without = Throughput(alone.model).flops(blocks, loss)
    assert with_second is not None and without is not None
    assert with_second[0] == without[0]

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        annotated = policy.annotated(blocks, loss)
        if loss.divergence is not None:
            assert policy.second is not None
            for block in annotated:
                policy.second.reference(block, loss)
    head = 2 * 320 * 32 * sum(len(answer) for _, answer in answers())
    expected = counter.get_total_flops() + (2 * head if loss.divergence is not None else 0)
    assert with_second[1] - without[1] == pytest.approx(expected, rel=1e-9)


def test_a_loss_that_asks_nothing_is_not_answered(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    policy = opened("frozen-copy", folder, mesh, tmp_path)
    blocks = pair_rows()
    assert policy.annotated(blocks, NLL()) is blocks
