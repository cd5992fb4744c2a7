"""Masks over the stock chat templates that trl ships, held against its hand-tagged training twins.

A twin is a stock template with `{% generation %}` tags put in by hand. Wherever both render the same text, the tokens
that the tags hold and those that we locate in the *stock* template, without any tag, must be the same, but for the
template text at the edges listed in `EDGES` with its reason.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from burnish.data.rendering.locate import Turn, locate
from burnish.data.rendering.marker import Anchors, Refused, as_parts
from burnish.data.rendering.probe import learn, report
from burnish.data.rendering.template import TAG_CLOSE, TAG_OPEN, ChatTemplate, take_marks
from burnish.data.rendering.tokens import SpanTokenizer
from tests.chat_helpers import assistant, byte_level, user

SOURCES = {
    path.stem: path.read_text("utf-8") for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
}
STOCK = sorted(name for name in SOURCES if not name.endswith("_training"))
TWINS = sorted(name for name in STOCK if f"{name}_training" in SOURCES)
SPECIAL = re.compile(
    r"""<\|[\w"]+\|?>|<\w+\|>|<\uff5c[^<>{}'"]{1,40}\uff5c>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]|\[gMASK\]"""
)

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": "the map", "n": 2}}}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where."}}},
    },
}
FOUND = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "xylophone"}
THOUGHT = {"reasoning_content": "hmm mirror", "thinking": "hmm mirror"}
CHATS = {
    "plain": ([user("apricot"), assistant("bonfire"), user("cardigan"), assistant("dolphin")], None),
    "system": ([{"role": "system", "content": "zeppelin"}, user("apricot"), assistant("bonfire")], None),
    "spaces": ([user(" apricot\n"), assistant("\n bonfire \n"), user("cardigan"), assistant("dolphin\n")], None),
    "reasoning": ([user("apricot"), assistant("bonfire"), user("cardigan"), assistant("dolphin", **THOUGHT)], None),
    "call": ([user("apricot"), assistant(tool_calls=[CALL]), FOUND, assistant("dolphin")], [LOOK]),
    "said and called": (
        [user("apricot"), assistant("bonfire", tool_calls=[CALL]), FOUND, assistant("dolphin")],
        [LOOK],
    ),
}

HEADER = "the twin trains the header, which the generation prompt already holds"
THINK = "the twin trains the `<think>` that the generation prompt already holds"
EDGES: dict[str, tuple[str, set[tuple[str, str]]]] = {
    "deepseek_r1_distill": (HEADER, {("twin", "<\uff5cAssistant\uff5c>")}),
    "deepseekv3": (HEADER, {("twin", "<\uff5cAssistant\uff5c>")}),
    "gptoss": (HEADER, {("twin", "<|start|>assistant")}),
    "muse_glimmer": (HEADER, {("twin", "<|start|>assistant")}),
    "nemotron_3_5_lightning": (THINK, {("twin", "<think>"), ("twin", "<think>\n")}),
    "nemotron_3_nano": (THINK, {("twin", "<think>"), ("twin", "<think>\n")}),
    "nemotron_3_super": (THINK, {("twin", "<think>"), ("twin", "<think>\n")}),
    "nemotron_3_ultra": (THINK, {("twin", "<think>"), ("twin", "<think>\n")}),
    "qwen3_5_nothink": (THINK, {("twin", "<think>\n\n</think>\n\n"), ("twin", "<think>\n")}),
    "qwen3_5_think": (THINK, {("twin", "<think>\n")}),
    "qwen3_6": (THINK, {("twin", "<think>\n")}),
    "qwen3_8": (THINK, {("twin", "<think>\n")}),
    "qwen2_5": ("the twin trains the header's line end, which a line end of content shares", {("twin", "\n\n")}),
    "phi3": ("the end of the text comes after the end of the turn, which stops a server", {("twin", "\n<eos>")}),
    "phi3_5": ("the end of the text comes after the end of the turn, which stops a server", {("twin", "\n<eos>")}),
    "diffusion_gemma": ("a turn of calls ends with the token that stops a server", {("ours", "<|tool_response>")}),
}
LINE_END = ("twin", "\n")
"""Twins may hold the line end after the end-of-turn token, which a server never generates."""

OTHER_TEXT = {"glm4moe", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
"""Twins that render some chat differently from their stock template."""
UNENDED = {("diffusion_gemma", "said and called"), ("gemma4_v5", "said and called")}
"""Content beside a call comes after the call's result, and the next turn follows with nothing between."""
DROP_CALLS = {"deepseek_r1_distill", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl"}
"""Templates that silently leave out `tool_calls`."""


@cache
def specials() -> list[str]:
    return ["<eos>", "<bos>", *sorted({special for source in SOURCES.values() for special in SPECIAL.findall(source)})]


@cache
def tokenizer():
    made = byte_level(None, specials(), merges=60)
    made.bos_token = "<bos>"
    return made


@cache
def opened(name: str) -> tuple[ChatTemplate, Anchors]:
    template = ChatTemplate(SOURCES[name], dict(tokenizer().special_tokens_map), "2025-01-01")
    return template, learn(template, specials(), {})


def located(name: str, chat: str) -> tuple[str, list[Turn]]:
    template, anchors = opened(name)
    messages, tools = CHATS[chat]
    return locate(template, anchors, messages, tools, {})


def as_taken(name: str, chat: str) -> list[dict]:
    messages = CHATS[chat][0]
    return [as_parts(message) for message in messages] if opened(name)[1].parts else messages


@pytest.mark.parametrize("name", TWINS)
def test_located_tokens_are_the_hand_tagged_ones(name: str) -> None:
    twin, _ = opened(f"{name}_training")
    compared = 0
    for chat, (_, tools) in CHATS.items():
        try:
            text, turns = located(name, chat)
            tagged = twin.render(as_taken(name, chat), tools, {}, marking=True)
        except Exception:  # the template refuses the chat, or drops part of it: `test_every_stock_template` has those
            continue
        plain, marks = take_marks(tagged)
        if plain != text:
            assert name in OTHER_TEXT
            continue
        opens, closes = ([at for mark_id, at in marks if mark_id == tag] for tag in (TAG_OPEN, TAG_CLOSE))
        spans = SpanTokenizer(tokenizer())
        (ours,) = spans.encode([text], [[span for turn in turns for span in turn.spans]])
        (theirs,) = spans.encode([text], [list(zip(opens, closes, strict=True))])
        allowed = EDGES.get(name, ("", set()))[1] | {LINE_END}
        assert _differences(ours, theirs) <= allowed, chat
        compared += 1
    assert compared >= (0 if name == "glm4moe" else 1)


def _differences(ours, theirs) -> set[tuple[str, str]]:
    """(who trains it, text) of each run of tokens that only one of the two trains."""
    runs: list[tuple[str, list[int]]] = []
    before = ""
    for token_id, own, other in zip(ours.ids.tolist(), ours.trained.tolist(), theirs.trained.tolist(), strict=True):
        who = "" if own == other else "ours" if own else "twin"
        if who and who != before:
            runs.append((who, []))
        if who:
            runs[-1][1].append(token_id)
        before = who
    return {(who, tokenizer().decode(ids)) for who, ids in runs}


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_template(name: str) -> None:
    """Every word of the assistant is trained, no other word is, and each turn ends with its end-of-turn token; or the
    chat is refused with a reason that the template gives, or that names what it leaves out."""
    template, anchors = opened(name)
    rendered = 0
    for chat in CHATS:
        try:
            text, turns = located(name, chat)
        except Refused as refused:
            assert re.match("the chat template (refuses this conversation|does not render the)", refused.reason), chat
            continue
        rendered += 1
        trained = "".join(text[start:end] for turn in turns for start, end in turn.spans)
        for message in CHATS[chat][0]:
            for words in (message["content"].split(), message.get("reasoning_content", "").split()):
                for word in words:
                    is_there = word in text
                    assert (word in trained) == (is_there and message["role"] == "assistant"), (chat, word)
            assert not message.get("tool_calls") or ("look" in trained and "the map" in trained), chat
        for turn in turns[:-1]:
            ended = turn.ended and text[: turn.spans[-1][1]].endswith(anchors.ends)
            assert ended or (name, chat) in UNENDED, chat
    assert rendered >= 2
    told = report(template, anchors, {})
    assert ("does not render the tool_calls" in told.tool_calls) == (name in DROP_CALLS)


@pytest.mark.parametrize("name", [*STOCK, *(f"{name}_training" for name in TWINS)])
def test_text_is_that_of_apply_chat_template(name: str) -> None:
    template, _ = opened(name)
    variables = tokenizer().special_tokens_map
    source = SOURCES[name].replace("strftime_now(", "fixed_now(")
    same = 0
    for chat, (_, tools) in CHATS.items():
        for prompt in (False, True):
            messages = as_taken(name, chat)
            try:
                expected, _ = render_jinja_template(
                    [messages], tools, None, source, add_generation_prompt=prompt, fixed_now=_new_year, **variables
                )
            except Exception as error:  # then ours must refuse it too, with the same words
                with pytest.raises(type(error), match=re.escape(str(error))):
                    template.render(messages, tools, {}, prompt=prompt)
                continue
            assert template.render(messages, tools, {}, prompt=prompt) == expected[0]
            same += 1
    assert same >= 4


def _new_year(pattern: str) -> str:
    from datetime import datetime

    return datetime(2025, 1, 1).strftime(pattern)
