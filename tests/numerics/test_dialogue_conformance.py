"""What stands between two turns, over the stock chat templates that trl ships: as transformers renders the whole."""

from __future__ import annotations

import re

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from burnish.data.rendering.ask import ask, between, probe_turns, stops
from burnish.data.rendering.marker import Anchors, Refused, as_parts
from burnish.data.rendering.probe import learn
from burnish.data.rendering.template import ChatTemplate
from tests.chat_helpers import assistant, user
from tests.numerics.test_mask_conformance import SOURCES, SPECIAL, STOCK

NO_DIALOGUE = {
    "deepseek_r1_distill": "drops the thoughts of every turn but the one it opens",
    "deepseekv3": "the same",
    "gptoss": "puts a channel before the content that the model has written itself",
    "muse_glimmer": "the same",
    "qwen3_8": "the thoughts of a message are in a field of their own",
}
"""Templates that cannot lead a dialogue whose turns are contents as they were sampled."""
USERS_ALONE = {"cohere", "cohere2", "gemma", "gemma3", "llava_next", "phi3", "phi3_5"} | {
    name for name in STOCK if "gemma" in name and name not in ("gemma4_v2",)
}
"""Templates that refuse or leave out what a tool says without a call in its own form."""
TOOLS_ALONE = re.compile(r"glm4moe|lfm2_2_5.*|nemotron.*|qwen3|qwen3_5.*|qwen3_6")
"""Templates that drop thoughts once the user speaks again."""


def opened(name: str) -> tuple[ChatTemplate, Anchors]:
    template = ChatTemplate(SOURCES[name], {"bos_token": "<s>", "eos_token": "</s>"}, "2025-01-01")
    return template, learn(template, list(dict.fromkeys(["<s>", "</s>", *SPECIAL.findall(SOURCES[name])])), {})


def rendered(name: str, anchors: Anchors, messages: list[dict]) -> str:
    """By transformers itself."""
    if anchors.parts:
        messages = [as_parts(message) for message in messages]
    (text,), _ = render_jinja_template(
        [messages], chat_template=SOURCES[name], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return text


@pytest.mark.parametrize("name", [name for name in STOCK if "strftime_now" not in SOURCES[name]])  # ours is fixed
def test_a_prompt_is_as_transformers_renders_it(name):
    template, anchors = opened(name)
    assert ask(template, anchors, [user("apricot")], None, {}) == rendered(name, anchors, [user("apricot")])


@pytest.mark.parametrize("role", ["tool", "user"])
@pytest.mark.parametrize("name", STOCK)
def test_what_follows_a_turn_is_as_transformers_renders_it(name, role):
    template, anchors = opened(name)
    answer = {"role": role, "content": "cardigan"}
    works = name not in NO_DIALOGUE
    works = (
        works and not (role == "tool" and name in USERS_ALONE) and not (role == "user" and TOOLS_ALONE.fullmatch(name))
    )
    assert (probe_turns(template, anchors) == "") == (name not in NO_DIALOGUE)
    if not works:
        with pytest.raises(Refused):
            between(template, anchors, [user("apricot")], [None, [answer]], None, {})
        return
    tail, head = between(template, anchors, [user("apricot")], [None, [answer]], None, {})
    whole = rendered(name, anchors, [user("apricot"), assistant("bonfire"), answer])
    assert whole.endswith("bonfire" + tail)
    assert tail[head:].startswith("cardigan")
    longer, _ = between(template, anchors, [user("apricot")], [None, [answer], None, [answer]], None, {})
    whole = rendered(name, anchors, [user("apricot"), assistant("bonfire"), answer, assistant("dolphin"), answer])
    assert whole.endswith("dolphin" + longer)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", ["<|im_end|>"]),
        ("llama3_1", ["<|eot_id|>"]),
        ("gptoss", ["<|return|>", "<|call|>"]),  # not <|end|>, behind which it goes on to its final channel
        ("glm4moe", ["<|user|>", "<|observation|>"]),  # the next turn's header
        ("gemma", ["<end_of_turn>"]),
    ],
)
def test_what_ends_a_turn(name, ends):
    assert stops(*opened(name)) == ends
