"""Stop strings that span tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import RuntimeProblem
from edgetune.runtime.generation_request import TokenEvent
from edgetune.runtime.stop_strings import StopStrings


def run(stops: list[str], pieces: list[bytes]) -> tuple[list[bytes], str | None, list[int]]:
    """The bytes that are shown, the stop string, and how many bytes had been shown after each token."""
    finder, shown, progress = StopStrings(stops), [], []
    for token, piece in enumerate(pieces):
        events, stop = finder.feed(TokenEvent(token, piece))
        shown += [event.bytes_ for event in events]
        progress.append(len(b"".join(shown)))
        if stop is not None:
            return shown, stop, progress
    return shown + [event.bytes_ for event in finder.finish()], None, progress


def test_a_stop_string_ends_the_answer_though_it_spans_three_tokens() -> None:
    shown, stop, progress = run(["</tool>"], [b"a", b"b<", b"/to", b"ol>c"])
    assert (shown, stop) == ([b"a", b"b"], "</tool>")
    assert progress == [1, 1, 1, 2], "nothing of the stop string is shown before it is complete"


def test_text_that_did_not_become_a_stop_string_is_shown_after_all() -> None:
    assert run(["###"], [b"#", b"#", b"x", b"#"]) == ([b"#", b"#", b"x", b"#"], None, [0, 0, 3, 3])


def test_the_earliest_stop_string_counts_and_of_those_the_longest() -> None:
    assert run(["cd", "b", "bc"], [b"abcd"])[:2] == ([b"a"], "bc")


def test_control_tokens_without_bytes_keep_their_place() -> None:
    assert run(["yz"], [b"x", b"", b"y", b"", b"z"])[:2] == ([b"x", b""], "yz")


def test_characters_of_several_bytes_may_be_cut_by_tokens() -> None:
    lamp = "灯".encode()
    assert run(["灯"], [b"a" + lamp[:1], lamp[1:]])[:2] == ([b"a"], "灯")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RuntimeProblem, match="empty"):
        StopStrings(["a", ""])


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.binary(max_size=0) | st.text("abc", max_size=3).map(str.encode), max_size=12),
)
def test_what_is_shown_is_the_text_before_the_first_stop_string(stops: list[str], pieces: list[bytes]) -> None:
    shown, stop, progress = run(stops, pieces)
    text, finder = b"".join(pieces), 0
    # the first token after which the text has a stop string
    for end in range(len(pieces) + 1):
        sofar = b"".join(pieces[:end])
        places = [(sofar.find(each.encode()), -len(each), each) for each in stops if each.encode() in sofar]
        if places:
            place, _, expected = min(places)
            assert (b"".join(shown), stop) == (text[:place], expected)
            assert max(progress) <= place
            return
        finder = end
    assert finder == len(pieces)
    assert (b"".join(shown), stop) == (text, None)
