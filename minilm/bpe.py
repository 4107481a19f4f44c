"""Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909): learn which pairs to join, and join them.

Training: cut the text into words, words into single bytes; join the most frequent adjacent pair everywhere; repeat. Encoding: join, in a
new text, always the pair that was learned first. tokenizer.py puts files, special tokens and tiktoken around this."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

# Ours: marks belong to their letters (else Thai and Indic words break at every vowel sign), at most three digits, line ends apart.
PATTERN = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# tokenizer.json spells bytes as printable characters: those that are printable in Latin-1 as themselves, the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def spell(token: bytes) -> str:
    r"""How tokenizer.json writes a token: b" caf\xc3\xa9" -> "ĠcafÃ©"."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def merge(symbols: list, rank: dict[tuple, int]) -> list:
    """Joins adjacent symbols, always the pair of lowest rank (ties: the leftmost), until no pair has a rank. O(n log n): a heap of
    candidate pairs over a doubly linked list, in which overtaken candidates are recognised and dropped."""
    symbols, n = [*symbols, None], len(symbols)  # None, also found at place -1, joins with nothing
    left, right = list(range(-1, n)), list(range(1, n + 2))
    heap = [(rank[pair], i, *pair) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in rank]
    heapq.heapify(heap)
    while heap:
        _, i, a, b = heapq.heappop(heap)
        j = right[i]
        if symbols[i] != a or symbols[j] != b:
            continue
        symbols[i], symbols[j], right[i], left[right[j]] = a + b, None, right[j], i
        for p, q in ((left[i], i), (i, right[i])):
            if (symbols[p], symbols[q]) in rank:
                heapq.heappush(heap, (rank[symbols[p], symbols[q]], p, symbols[p], symbols[q]))
    return [s for s in symbols if s is not None]


def learn_merges(texts: Iterable[str], merges: int, pattern: str = PATTERN) -> list[tuple[bytes, bytes]]:
    """The first `merges` pairs in the order in which they are joined (fewer, when no pair is left that occurs twice)."""
    cut, counted = regex.compile(pattern), Counter()
    for text in texts:
        counted.update(cut.findall(text))
    return continue_merges([[bytes([b]) for b in word.encode()] for word in counted], list(counted.values()), merges)


def continue_merges(words: list[list], counts: list[int], merges: int, taken: Iterable = ()) -> list[tuple]:
    """Learns from words joined so far (lists of bytes or str), each with its number of occurrences; no pair spells a token of `taken`.
    Words are counted once, and a merge only touches the words that hold its pair: the counts of all other pairs stay as they are."""
    count, where = Counter(), defaultdict(set)
    for w, (word, times) in enumerate(zip(words, counts)):
        for pair in zip(word, word[1:]):
            count[pair] += times
            where[pair].add(w)
    heap = [(-times, pair) for pair, times in count.items()]  # most frequent first; ties: the pair that sorts first
    heapq.heapify(heap)
    learned, known = [], set(taken)  # two pairs can spell one token ("a" "bc", "ab" "c"): the second would give it a second id
    while heap and len(learned) < merges:
        times, pair = heapq.heappop(heap)
        if count[pair] != -times:  # overtaken: its true count is in the heap as well, or comes with this push
            if count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if -times < 2 or pair[0] + pair[1] in known:
            continue
        learned.append(pair)
        known.add(pair[0] + pair[1])
        changed = set()  # pairs whose count changes: the neighbours of the joined ones
        for w in where.pop(pair):
            word, times, joined = words[w], counts[w], []
            for symbol in word:
                if joined and (joined[-1], symbol) == pair:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            for old in zip(word, word[1:]):
                count[old] -= times
            for new in zip(joined, joined[1:]):
                count[new] += times
                where[new].add(w)
            changed.update(zip(word, word[1:]), zip(joined, joined[1:]))
            words[w] = joined
        for other in changed:
            if count[other] > 1:
                heapq.heappush(heap, (-count[other], other))
    return learned
