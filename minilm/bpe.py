r"""Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909): learn which pairs
to join, and join them.

Training: cut the text into words, words into single bytes; join the most frequent adjacent pair
everywhere; repeat. Encoding: join, in a new text, always the pair that was learned first.
tokenizer.py puts files, special tokens and tiktoken around this."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

# How a text is cut into words, no pair reaches across two of them. First alternative that fits:
PATTERN = "|".join((
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # letters with their marks (Thai has vowels)
    r"\p{N}{1,3}",  # at most three digits
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation
    r"\s*[\r\n]+",  # line ends apart
    r"\s+(?!\S)",  # blanks, but the last one belongs to the word after them
    r"\s+",
))

# tokenizer.json spells bytes as printable characters: those that are printable in Latin-1 as
# themselves, the others from U+0100 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in sorted(_PRINTABLE)}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def spell(token: bytes) -> str:
    r"""How tokenizer.json writes a token: b" caf\xc3\xa9" -> "ĠcafÃ©"."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def merge_plain(symbols: list, rank: dict[tuple, int]) -> list:
    """The definition of `merge`: look at every pair, join the leftmost one of lowest rank, start
    again."""
    symbols = list(symbols)
    while True:
        pairs = list(zip(symbols, symbols[1:]))
        places = [i for i, pair in enumerate(pairs) if pair in rank]
        if not places:
            return symbols
        i = min(places, key=lambda i: rank[pairs[i]])  # the first of equals
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def merge(symbols: list, rank: dict[tuple, int]) -> list:
    """Joins adjacent symbols, always the pair of lowest rank (ties: the leftmost), until no pair
    has a rank.

    O(n log n): a heap of candidate pairs over a doubly linked list. A join overtakes the candidates
    beside it: they stay in the heap, and are recognised and dropped when they come up."""
    n = len(symbols)
    symbols = [*symbols, None]  # None, also found at place -1, joins with nothing
    left = list(range(-1, n))
    right = list(range(1, n + 2))
    pairs = enumerate(zip(symbols, symbols[1:]))
    heap = [(rank[pair], i, *pair) for i, pair in pairs if pair in rank]
    heapq.heapify(heap)
    while heap:
        _, i, a, b = heapq.heappop(heap)
        j = right[i]
        if symbols[i] != a or symbols[j] != b:  # overtaken
            continue
        symbols[i] = a + b
        symbols[j] = None
        right[i] = right[j]
        left[right[j]] = i
        for p, q in ((left[i], i), (i, right[i])):  # the two new neighbourhoods
            pair = symbols[p], symbols[q]
            if pair in rank:
                heapq.heappush(heap, (rank[pair], p, *pair))
    return [s for s in symbols if s is not None]


def learn_merges(
    texts: Iterable[str], merges: int, pattern: str = PATTERN
) -> list[tuple[bytes, bytes]]:
    """The first `merges` pairs in the order in which they are joined (fewer, when no pair is left
    that occurs twice)."""
    cut = regex.compile(pattern)
    counted = Counter()
    for text in texts:
        counted.update(match[0] for match in cut.finditer(text))
    words = [[bytes([b]) for b in word.encode()] for word in counted]
    return continue_merges(words, list(counted.values()), merges)


def continue_merges(
    words: list[list], counts: list[int], merges: int, taken: Iterable = ()
) -> list[tuple]:
    """Learns from words joined so far (lists of bytes or str), each with its number of occurrences;
    no pair spells a token of `taken`. Changes `words`.

    Words are counted once, and a merge only touches the words that hold its pair: the counts of all
    other pairs stay as they are."""
    count = Counter()
    where = defaultdict(set)  # pair -> the words that hold it
    for w, (word, times) in enumerate(zip(words, counts)):
        for pair in zip(word, word[1:]):
            count[pair] += times
            where[pair].add(w)
    # most frequent first; ties: the pair that sorts first
    heap = [(-times, pair) for pair, times in count.items()]
    heapq.heapify(heap)
    learned = []
    known = set(taken)  # two pairs can spell one token ("a" "bc", "ab" "c"): it would get two ids
    while heap and len(learned) < merges:
        times, pair = heapq.heappop(heap)
        if count[pair] != -times:  # overtaken: its true count is in the heap or comes now
            if count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if -times < 2 or pair[0] + pair[1] in known:
            continue
        learned.append(pair)
        known.add(pair[0] + pair[1])
        changed = set()  # pairs whose count changes: the neighbours of the joined ones
        for w in where.pop(pair):
            word = words[w]
            joined = _join(word, pair)
            for old in zip(word, word[1:]):
                count[old] -= counts[w]
            for new in zip(joined, joined[1:]):
                count[new] += counts[w]
                where[new].add(w)
            changed.update(zip(word, word[1:]), zip(joined, joined[1:]))
            words[w] = joined
        for other in changed:
            if count[other] > 1:
                heapq.heappush(heap, (-count[other], other))
    return learned


def _join(word: list, pair: tuple) -> list:
    """The word with every occurrence of the pair joined, from the left: a a a with (a, a) is aa
    a."""
    joined = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
