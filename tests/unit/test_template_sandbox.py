"""Chat templates are programs: hostile ones are refused by name, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import time

import pytest

from burnish.data.renderers.chat import Chat
from burnish.data.rendering.template import TAG_CLOSE, TAG_OPEN, ChatTemplate, mark, take_marks
from burnish.errors import DataError
from tests.chat_helpers import CHATML, assistant, byte_level, mask_of, refusal_of, row, user

SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "loops without end": (SPIN, "of processor time"),
    "allocates at once": ("{% set x = 'a' * 2147483647 %}", "too much memory"),
    "doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "memory|processor time",
    ),
    "pads": ("{{ '%2000000000d' % 1 }}", "too much memory"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "writes without end": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "characters|memory"),
    "reaches for python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "is not jinja": ("{% for %}", "TemplateSyntaxError"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_template_is_refused_at_open(attack: str) -> None:
    template, reason = ATTACKS[attack]
    tokenizer = byte_level(template + CHATML)
    tokenizer.name_or_path = "evil/model"
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match=reason) as caught:
        Chat().open(tokenizer)
    assert "evil/model" in str(caught.value)
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_template_that_attacks_on_some_row_is_stopped_at_that_row() -> None:
    tokenizer = byte_level("{% if messages[0].content == 'now' %}" + SPIN + "{% endif %}" + CHATML)
    live = Chat().open(tokenizer)
    rows = [row(user(text), assistant("b")) for text in ("a", "now", "c")]
    good, bad, after = live.render(rows)
    assert good.group is not None
    assert bad.refusal is not None and "more than 2 s of processor time" in str(bad.refusal)
    assert bad.refusal.where == "data/train.jsonl:7"
    assert after.refusal is not None
    assert mask_of(live, tokenizer, rows[2]).endswith("[[b<|im_end|>]]\n")  # the next call starts a new process


def test_a_template_that_needs_too_much_on_some_row_is_refused_there_alone() -> None:
    tokenizer = byte_level("{% if messages[0].content == 'now' %}{{ 'a' * 2147483647 }}{% endif %}" + CHATML)
    live = Chat().open(tokenizer)
    bad, good = live.render([row(user("now"), assistant("b")), row(user("a"), assistant("b"))])
    assert bad.refusal is not None and "too much memory" in str(bad.refusal)
    assert good.group is not None


def test_the_template_process_ends_with_its_renderer() -> None:
    live = Chat().open(byte_level())
    process = live._process._process
    assert process.poll() is None
    del live
    assert process.returncode is not None


def test_a_killed_template_process_is_named_and_replaced() -> None:
    tokenizer = byte_level()
    live = Chat().open(tokenizer)
    os.kill(live._process._process.pid, 9)
    assert "its process ended with code -9" in refusal_of(live, row(user("a"), assistant("b")))
    assert mask_of(live, tokenizer, row(user("a"), assistant("b"))).endswith("[[b<|im_end|>]]\n")


def test_values_that_are_not_json_are_refused() -> None:
    import datetime

    live = Chat().open(byte_level())
    assert "a value that is not JSON" in refusal_of(live, row(user("a"), {**assistant("b"), "at": datetime.date.min}))


def test_marks_survive_and_give_their_places() -> None:
    text = "ab" + mark(7) + "cd" + mark(70_000 - 60_000) + mark(6_399)
    assert take_marks(text) == ("abcd", [(7, 2), (10_000, 4), (6_399, 4)])


def test_generation_tags_are_marked_only_when_asked_for() -> None:
    template = ChatTemplate("x{% generation %}{{ messages[0].content }}{% endgeneration %}y", {}, "2025-01-01")
    assert template.has_tags
    assert template.render([user("abc")], None, {}) == "xabcy"
    marked = template.render([user("abc")], None, {}, marking=True)
    assert take_marks(marked) == ("xabcy", [(TAG_OPEN, 1), (TAG_CLOSE, 4)])
