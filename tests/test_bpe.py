"""Byte-pair encoding: the heap that joins fast against the loop that joins as defined."""

from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.bpe import learn_merges, merge, merge_plain


@settings(max_examples=100, deadline=None)
@given(
    word=st.text("ab", max_size=14),
    pairs=st.permutations(["a a", "a b", "b a", "aa b", "ab a"]),
)
def test_the_heap_joins_what_the_plain_loop_joins(word, pairs):
    rank = {tuple(pair.split()): i for i, pair in enumerate(pairs)}
    assert merge(list(word), rank) == merge_plain(list(word), rank)


def test_what_is_learned_is_joined_in_the_order_in_which_it_was_learned():
    learned = learn_merges(["low low low lower newest newest"], merges=30)
    rank = {pair: i for i, pair in enumerate(learned)}
    assert learned[:2] == [(b"l", b"o"), (b"lo", b"w")]  # four times each; ties by what sorts first
    assert merge([bytes([b]) for b in b"low"], rank) == [b"low"]  # three times: one token
