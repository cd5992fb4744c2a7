"""The embedded engine says of its tokens what the policy says of them, whatever else is in flight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.errors import ModelError, RunFailed, SyncFailed
from burnish.mesh import open_mesh
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from burnish.rollout.engines.embedded import Embedded
from burnish.rollout.weights import outgoing
from tests.engine_helpers import HandWeights, asked, finish, largest_error, policy_logprobs, prompts, setup
from tests.tiny_models import tiny_model

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "gpt2")


def policy(family: str = "llama", **overrides: object) -> PolicyModel:
    return PolicyModel.from_hf(tiny_model(family, **overrides), pad_vocab_to=64)


@pytest.fixture(scope="module")
def llama() -> PolicyModel:
    return policy()


def engine(model: PolicyModel, *, max_length: int = 64, max_concurrent: int = 8, max_batch_tokens: int = 64):
    live = Embedded(max_concurrent=max_concurrent, max_batch_tokens=max_batch_tokens).open(setup(max_length), model)
    live.update_weights(HandWeights(0))
    return live


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_policys(family: str) -> None:
    """Windows of 4 tokens, soft caps and sinks where the family has them; prompts are read in stretches of 6 tokens
    beside what is sampled, and ten requests share four slots."""
    model = policy(family)
    short, long = prompts(3, 17)
    requests = [asked(prompt, seed, 5 + 3 * seed) for prompt, n in ((short, 4), (long, 6)) for seed in range(n)]
    live = engine(model, max_concurrent=4, max_batch_tokens=6)
    found = finish(live, requests)
    assert largest_error(model, requests, found) <= 1e-5
    # The first of a group reads its prompt; the others but its last token. Two tokens are too few to be copied late.
    assert live.facts()["prompt_tokens"] == 4 * 3 + 6 * 17
    assert live.facts()["prompt_tokens_shared"] == 3 * 2 + 5 * 16


def test_lengths_far_apart_are_exact() -> None:
    """Slots that attend alone because padding them would cost more, beside ones that attend together."""
    model = policy(max_position_embeddings=1024)
    requests = [asked(prompt, 1, 4) for prompt in prompts(700, 5, 6, 650, 7, 1)]
    live = engine(model, max_length=720, max_batch_tokens=256)
    assert largest_error(model, requests, finish(live, requests)) <= 1e-5


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="cannot be sampled token by token"):
        engine(policy(family))


def test_frequencies_that_depend_on_the_company_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert engine(policy(rope_parameters=rope), max_length=256)
    with pytest.raises(ModelError, match="cannot be sampled token by token"):
        engine(policy(rope_parameters=rope), max_length=4096)


def test_company_changes_no_token(llama: PolicyModel) -> None:
    requests = [asked(prompt, seed) for prompt in prompts(4, 9, 14) for seed in range(3)]
    together = finish(engine(llama), requests)
    alone = engine(llama, max_concurrent=1)
    for request in reversed(requests):
        found = finish(alone, [request])[request.request_id]
        assert found.token_ids == together[request.request_id].token_ids
        assert found.logprobs == pytest.approx(together[request.request_id].logprobs, abs=1e-5)


def test_sampling_parameters_reach_each_request_alone(llama: PolicyModel) -> None:
    (prompt,) = prompts(6)
    greedy, cold, one = (
        asked(prompt, 1, 6, temperature=0.0),
        asked(prompt, 1, 5, temperature=0.5),
        asked(prompt, 1, 4, top_k=1),
    )
    found = finish(engine(llama), [greedy, cold, one])
    likeliest = found[greedy.request_id]
    assert likeliest.logprobs == pytest.approx(policy_logprobs(llama, prompt, likeliest.token_ids), abs=1e-5)
    assert found[one.request_id].token_ids == likeliest.token_ids[:4]
    assert found[one.request_id].logprobs == [0.0] * 4
    llama.temperature = 0.5
    expected = policy_logprobs(llama, prompt, found[cold.request_id].token_ids)
    llama.temperature = 1.0
    assert found[cold.request_id].logprobs == pytest.approx(expected, abs=1e-5)


def test_weights_change_under_a_request_and_old_prefixes_are_forgotten() -> None:
    model, (prompt,) = policy(), prompts(40)
    live, under = engine(model), asked(prompt, 1, 12)
    live.submit([under])
    for _ in range(5):
        live.step()
    before = policy_logprobs(model, prompt, [5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert policy_logprobs(model, prompt, [5]) != pytest.approx(before, abs=1e-3)
    live.update_weights(HandWeights(1))
    after = asked(prompt, 2, 6)
    found = finish(live, [after])
    assert found[under.request_id].versions == [0] * 5 + [1] * 7
    assert found[after.request_id].versions == [1] * 6
    assert largest_error(model, [after], found) <= 1e-5
    assert live.facts()["prompt_tokens_shared"] == 0


def test_the_next_turn_goes_on_from_the_last(llama: PolicyModel) -> None:
    """Prompt of 30 and 10 sampled: 39 of them have keys and values. Of an unlike prompt nothing is taken."""
    live, (prompt, other) = engine(llama), prompts(30, 36)
    first = asked(prompt, 1, 10)
    turn = finish(live, [first])[first.request_id]
    further = [asked([*prompt, *turn.token_ids, 7, 8], 1, 4), asked(other, 1, 4)]
    assert largest_error(llama, further, finish(live, further)) <= 1e-5
    assert live.facts()["prompt_tokens_shared"] == 39


def test_training_mode_is_as_it_was_and_does_not_reach_the_engine() -> None:
    """With dropout on, the attention would refuse and the tokens would differ."""
    model, request = policy(attention_dropout=0.5), asked(prompts(5)[0], 3)
    expected = finish(engine(model), [request])
    model.train()
    model.head.eval()
    assert finish(engine(model), [request]) == expected
    assert model.backbone.training and model.layers[0].training and not model.head.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_memory_that_runs_out_leaves_fewer_slots(llama: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    requests = [asked(prompt, seed, 6) for prompt in prompts(4, 9) for seed in range(4)]
    expected, live = finish(engine(llama), requests), engine(llama)

    def full(_module: object, _inputs: object, arguments: dict[str, torch.Tensor]) -> None:
        if arguments["input_ids"].numel() >= limit[0]:
            raise torch.OutOfMemoryError("no room for it")

    limit = [13]
    hook = llama.backbone.register_forward_pre_hook(full, with_kwargs=True)
    try:
        found = finish(live, requests)
        assert {key: each.token_ids for key, each in found.items()} == {k: e.token_ids for k, e in expected.items()}
        assert [r.message for r in caplog.records] == ["out of memory: from now on 4 requests at once (no room for it)"]
        limit[0] = 1
        with pytest.raises(RunFailed, match=r"with one request in flight \(no room for it\)\n  cure: lower"):
            finish(live, requests)
    finally:
        hook.remove()


def test_nothing_is_sampled_without_a_version(llama: PolicyModel) -> None:
    live = Embedded().open(setup(), llama)
    assert live.step() == []
    live.submit([asked([5, 6], 0)])
    with pytest.raises(SyncFailed, match="no version of the policy"):
        live.step()


def test_a_full_prompt_gets_an_empty_completion(llama: PolicyModel) -> None:
    live, (full, nearly) = engine(llama, max_length=20), prompts(20, 18)
    requests = [asked(full, 0), asked(nearly, 0)]
    found = finish(live, requests)
    assert (found[requests[0].request_id].token_ids, found[requests[0].request_id].finish_reason) == ([], "length")
    assert (len(found[requests[1].request_id].token_ids), found[requests[1].request_id].finish_reason) == (2, "length")


def test_a_turn_ends_at_a_token_or_a_text_and_keeps_it(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from tests.tiny_run import WORDS

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with open_mesh() as mesh:
        config = setup(path=str(tiny_model)).model
        model = load_model(config, mesh, seed=0)
        live = Embedded().open(setup(tokenizer=str(tiny_model), stop_token_ids=(2,)), model)
        live.update_weights(HandWeights(0))
        prompt = tokenizer("turn around: " + WORDS[0])["input_ids"]
        whole = asked(prompt, 5, 24)
        drawn = finish(live, [whole])[whole.request_id].token_ids
        assert len(drawn) == 24
        text = tokenizer.decode(drawn[9:11])[-3:]
        ends = next(n for n in range(1, 25) if text in tokenizer.decode(drawn[:n]))
        by_text = asked(prompt, 5, 23, stop=["never said", text])
        by_token = asked(prompt, 5, 22, stop_token_ids=[drawn[4]])
        found = finish(live, [by_text, by_token])
        for request, expected in ((by_text, drawn[:ends]), (by_token, drawn[: drawn.index(drawn[4]) + 1])):
            assert found[request.request_id].token_ids == expected
            assert found[request.request_id].finish_reason == "stop"
        with pytest.raises(ModelError, match="no tokenizer to find texts with"):
            engine(model).submit([asked(prompt, 5, stop=["."])])


LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_both_homes_say_what_the_policy_says(tiny_model: Path, adapter: dict[str, object] | None) -> None:
    """In the training process, and in one of its own that loads the files and takes the trained weights."""
    settings, requests = setup(path=str(tiny_model), adapter=adapter), [asked([5, 9, 200, 31], seed) for seed in (1, 2)]
    with open_mesh() as mesh:
        trained = load_model(settings.model, mesh, seed=0)
        with torch.no_grad():
            for number, (_, parameter) in enumerate(trained.trainable_parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        sent = [(name, tensor.clone()) for name, tensor in outgoing(trained, adapter_only=adapter is not None)]
        found = finish(engine(trained), requests)
        assert largest_error(trained, requests, found) <= 1e-5
    live, weights = Embedded().open(settings), HandWeights(4, sent)
    weights.adapter_only = adapter is not None
    receipt = live.update_weights(weights)
    assert (receipt.version, receipt.digest, receipt.num_bytes) == (4, weights.digest, sum(t.nbytes for _, t in sent))
    again = finish(live, requests)
    assert largest_error(trained, requests, again) <= 1e-5
    assert {key: each.token_ids for key, each in again.items()} == {key: each.token_ids for key, each in found.items()}
    live.sleep()
    live.wake()
    assert finish(live, requests) == again
    with pytest.raises(SyncFailed):
        live.update_weights(HandWeights(5, sent[:-1]))
    live.submit(requests)
    with pytest.raises(SyncFailed, match="no version"):
        live.step()
    live.close()
    with open_mesh():
        pass  # the engine has left its process group


@pytest.mark.filterwarnings("ignore")
def test_a_policy_in_bfloat16_is_cast_as_it_is_in_training(tiny_model: Path) -> None:
    """On one rank its masters are float32, and FSDP casts them for a pass; a bfloat16 near 8 is 0.03 from the next."""
    settings, request = setup(path=str(tiny_model), dtype="bfloat16"), asked([5, 9, 200, 31], 1, 20)
    with open_mesh("cpu") as mesh:
        model = load_model(settings.model, mesh, seed=0)
        found = finish(engine(model), [request])
        assert largest_error(model, [request], found) <= 0.05
        assert next(model.parameters()).dtype == torch.float32
