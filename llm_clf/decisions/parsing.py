"""Generated text to the label that it means, or to none: an answer is never guessed.

Three steps: the text takes one normal form, each name of a label in it becomes a single mark, and the marked text is
judged by sentences. All of them are linear in the length of the text.
"""

import json
import re
import unicodedata
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from llm_clf.prompting.tasks import Task, canonical

# A name in the text becomes one of these two, which no sentence rule can take for a letter. A word such as `sports`
# may decide inside a sentence; a code such as `1`, `A` or `no` occurs in any text and decides only where it answers.
_WORD, _CODE = "\ue000", "\ue001"
_NAME = f"[{_WORD}{_CODE}]"

# Scripts written without spaces (Thai to Khmer, Chinese, Japanese), and Korean, which attaches particles to a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
# `\w` leaves out the vowel signs of Indic scripts; a name that one follows is part of another word.
_SIGNS = "".join(chr(code) for code in range(0x300, 0xE00) if unicodedata.category(chr(code)).startswith("M"))
_SPACED = rf"[^\W{_UNSPACED}]"

_BEFORE = {
    "digit": rf"(?<!{_SPACED})(?<![-+−–./⁄~^<>$€£¥#@&\\])(?<!\d[,:])(?<!\bno\. )",
    "letter": rf"(?<!{_SPACED})(?<![{_SIGNS}])(?<!{_SPACED}[-'])",
    "sign": rf"(?<!{_SPACED})(?<![-+])",
    "unspaced": "",
}
_AFTER = {
    "digit": rf"(?!{_SPACED}|[.,:]\d|[+^°‰$€£¥/⁄~\\]|-\w|'{_SPACED}|\s*%)",
    "letter": rf"(?!{_SPACED}|[{_SIGNS}+#]|[-']{_SPACED})",
    "sign": rf"(?!{_SPACED}|[-+])",
    "unspaced": "",
}
# Words that a text holds for other reasons: "no idea", "on the other hand".
_COMMON = re.compile(
    "against|all|any|both|else|false|for|neither|none|not|others?|out|some|the|true|yes|其[他它]|不是|没有|是的"
)

_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufe0e\ufe0f\ufeff\u20e3]")
_CLOSING_TAG = re.compile(r"</[^<>]*>|<\|[^<>]*>")
_TAG = re.compile(r"<([^<>]*)>")
_MARKUP = re.compile(rf"[*`{_WORD}{_CODE}]|~~|(?<!\w)_+|(?<!_)_++(?!\w)")
_LINE_START = re.compile(r"^(?:#{1,6}|[-+•>]) (?![-+•>])", re.MULTILINE)
_WHOLE_NUMBER = re.compile(r"(?<![\d.,])(\d+)\.0+(?!\.?\d)")

_WRAP = r"""[\s"'“”‘’«»„()\[\]{}「」『』《》〈〉【】〔〕|]"""
_KEY = (
    r"(?:(?:(?:final|predicted)[ _-]?)?\b(?:labels?|answer|output|class|category|result|prediction|classification)\b"
    "|标签|答案|回答|答(?!案)|类别|分类|结果|输出|预测|判断)"
)
_IS = r"(?:[:=→⇒—是为]|属于|[-=]>|\b(?:is|be|as|equals)\b)"
_NOT = (
    r"(?:\b(?:not?|non|never|neither|nor|cannot|without|hardly|nothing|unable|refuse|decline|except|unlike|unlikely|"
    r"(?:is|do|does|did|ca|was)nt)\b|n't\b|不(?![仅但过断])|非(?!常)|没|无(?!疑)|未(?!来)|难以)"
)
_IS_KEY = re.compile(rf"(?:{_KEY} ?)+")
_DENIAL = re.compile(_NOT)
_DOUBT = re.compile(
    r"[?؟]|\b(?:or|either|maybe|perhaps|may|might|could|possibly|probably|likely|whether|if|unless|unsure|uncertain|"
    r"unclear|between|than|instead|versus|vs)\b|或|可能|也许|大概|是否|还是|吗|似乎|如果|要么|之外|以外"
)
# Runs are possessive (`*+`) wherever one may follow another, else a long run would take quadratic time.
#
# Where a name is the whole answer: at the start of a sentence, bare or after `Label:`, or after `... answer is`;
# then the sentence ends, or an explanation begins; after a comma or bracket, one that is no number and no denial.
_ANSWER = re.compile(
    rf"(?:^{_WRAP}*+(?:(?:(?:the|my|final|correct|predicted) )*{_KEY}{_WRAP}*+{_IS}?"
    r"|(?:it|this|that)(?: is|'s)|这是|应?为)?"
    rf"|{_KEY}(?:{_WRAP}|\w){{0,24}}?{_IS})"
    rf"{_WRAP}*+(?:{_KEY}{_WRAP}*+)?{_NAME}(?:(?:{_WRAP}|[:=,、—-])*+{_NAME})*"
    rf"{_WRAP}*+(?:$|because\b|since\b|因为|由于|(?:[,、—]{_WRAP}*+|(?<=[(\[]))(?!\d|{_NOT}))"
)
# `sports: 0.2`, `sports = false`: a table of all labels, cut short, rather than an answer.
_ENTRY = re.compile(rf"{_WORD}{_WRAP}*+[:=]?{_WRAP}*+(?:\d|true|false|yes|是|否|[√×✓✗✔✘])")
_SENTENCE = re.compile(r"[^\n.!;。।?؟]+[?؟]?")
_CLAUSE = re.compile(r"[^,、:]+")
_OTHER_ITEM = re.compile(r"(?:^|\n|[!;。]|\. )[(\[]?\d{1,2}[.)\]、]")
_NUMBERED = re.compile(rf"^[(\[ ]*+{_CODE}[.)\]、]+ ?(?=\S)", re.MULTILINE)


class AnswerParser:
    """Reads generated answers of one task.

    A name is a label, one of its words or its meaning. The longest name wins where one contains another; an answer
    that names two labels, denies one, or names one only in passing is unparsed.

    Args:
        task: Gives the labels with their words and meanings.
    """

    def __init__(self, task: Task) -> None:
        self._exact = {canonical(name): label.label for label in task.labels for name in (label.label, *label.words)}
        owners = _owners(task)
        self._names = {name: (_kind(name), labels) for name, labels in owners.items()}
        self._pattern = _any_of(owners)

    def parse(self, text: str) -> str | None:
        """Return the label that an answer means, None where it is unparsed.

        Args:
            text: What was generated; any text is allowed.
        """
        answer = text.rpartition("</think>")[2]
        exact = self._exact.get(canonical(text)) or self._exact.get(canonical(answer))
        if exact is not None:
            return exact
        if "<think>" in answer:
            return None
        prose, values = _split_objects(answer)
        if values is None:
            return self._read(answer)
        found = {self._read(value) for value in set(values)}
        # What stands around an object may repeat its label, but not name another.
        agreed = len(found) == 1 and self._mark(_normalised(prose))[1] <= found
        return found.pop() if agreed else None

    def _read(self, text: str) -> str | None:
        """Return the label that plain text means."""
        marked, labels = self._mark(_normalised(text))
        return labels.pop() if len(labels) == 1 and _is_answer(marked) else None

    def _mark(self, text: str) -> tuple[str, set[str]]:
        """Return the text with each name as one mark, and the labels that are named."""
        pieces: list[str] = []
        labels: set[str] = set()
        reach = 0
        for match in self._pattern.finditer(text):
            start, end = match.span(1)
            if end <= reach:
                continue  # Part of a longer name. Where two names overlap only in part, both count.
            mark, owners = self._names[match[1].replace("\n", " ")]
            if not owners <= labels:
                labels |= owners
                if len(labels) > 1:
                    break  # Nothing that follows can change that.
            between, reach = text[reach:start], end
            if between != " " or pieces[-1:] != [mark]:  # Of "1 1 1", one mark says as much.
                pieces += between, mark
        return "".join(pieces) + text[reach:], labels


def _owners(task: Task) -> dict[str, set[str]]:
    """Return each name in its normal form with the labels that it stands for.

    Two labels may differ in case only, or have the same meaning; such a name decides nothing. A meaning gives way
    to a word, because words are what the model was told to say.
    """
    words: dict[str, set[str]] = {}
    meanings: dict[str, set[str]] = {}
    for label in task.labels:
        for name in (label.label, *label.words):
            words.setdefault(_name(name), set()).add(label.label)
        meanings.setdefault(_name(label.meaning), set()).add(label.label)
    return {name: labels for name, labels in (meanings | words).items() if name}


def _name(text: str) -> str:
    """Return a name as it looks in a normalised text."""
    name = _normalised(canonical(text)).replace("\n", " ").strip()
    return name.rstrip(".。") or name


def _kind(name: str) -> str:
    """Return the mark for a name: a word, or a code if it is too short or too common to decide in passing."""
    letters = [char for char in name if unicodedata.category(char)[0] in "LM"]
    size = sum(2 if re.match(f"[{_UNSPACED}]", char) else 1 for char in letters)
    return _CODE if size < 3 or _COMMON.fullmatch(name) else _WORD


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds, at each place of a text where a name begins, the longest one as group 1."""
    longest_first = sorted(names, key=len, reverse=True)
    firsts = "".join({re.escape(name[0]) for name in names})
    bounded = "|".join(map(_bounded, longest_first))
    # The match itself is one letter, so that names may overlap and `re` can leap to the next letter in question;
    # the look-behind steps back to it.
    return re.compile(f"[{firsts}](?<=(?=({bounded})).)", re.DOTALL) if firsts else re.compile("(?!)")


def _bounded(name: str) -> str:
    """Return the pattern of a name that stands as a whole."""
    # Normalised text has one blank or one line break between words.
    escaped = r"\s".join(map(re.escape, name.split(" ")))
    # One Chinese character begins too many words (是, 是否, 是的) to be read where another follows.
    alone = r"(?!\w)" if len(name) == 1 and _edge(name) == "unspaced" else ""
    return _BEFORE[_edge(name[0])] + escaped + _AFTER[_edge(name[-1])] + alone


def _edge(char: str) -> str:
    """Return what kind of neighbour would make a name that begins or ends so part of something else."""
    if re.match(f"[{_UNSPACED}]", char):
        return "unspaced"
    if char.isdigit():
        return "digit"
    return "letter" if re.match(f"[\\w{_SIGNS}]", char) else "sign"


def _normalised(text: str) -> str:
    """Return the text in NFKC and one case, without markup, with single blanks and line breaks."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("’", "'")
    text = _CLOSING_TAG.sub(" ", _INVISIBLE.sub("", text))
    text = _MARKUP.sub(" ", _TAG.sub(r"(\1)", text))
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
    return _WHOLE_NUMBER.sub(r"\1", _LINE_START.sub("", text))


def _split_objects(text: str) -> tuple[str, list[str] | None]:
    """Return the text outside of its JSON objects, and the values of the keys that hold an answer.

    None stands for the values where there is no object, or where one is broken: that text is read as it is.
    """
    values: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        # Pairs, not a dict: of a repeated key, a dict would keep the last value and hide that they disagree.
        for key, value in pairs:
            if value is not None and _is_key(key):
                values.append(str(value))

    # Numbers stay as written: `1` and `1.0` are read by the same rules as in text, and none is too long.
    decoder = json.JSONDecoder(
        object_pairs_hook=collect, parse_int=str, parse_float=str, parse_constant=str, strict=False
    )
    prose, place = [], 0
    while (start := text.find("{", place)) >= 0:
        prose.append(text[place:start])
        try:
            _, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return text, None
    prose.append(text[place:])
    return "\n".join(prose), values if place else None


@lru_cache
def _is_key(key: str) -> bool:
    """Return whether a key of an object holds an answer."""
    return _IS_KEY.fullmatch(_normalised(key).replace("_", " ").strip()) is not None


def _is_answer(marked: str) -> bool:
    """Return whether a text that names one label gives it as the answer."""
    if _OTHER_ITEM.search(marked):
        marked = _NUMBERED.sub("", marked)
    # A set, because a model that repeats itself says one sentence thousands of times.
    sentences = {sentence for sentence in _SENTENCE.findall(marked) if _WORD in sentence or _CODE in sentence}
    return any(map(_affirms, sentences)) and not any(map(_denies, sentences))


def _affirms(sentence: str) -> bool:
    """Return whether a sentence says, without doubt, that the name in it is the answer."""
    before = re.split(_NAME, sentence, maxsplit=1)[0]
    if _DOUBT.search(sentence) or _DENIAL.search(before):
        return False
    if _ANSWER.search(sentence):
        return True
    return _WORD in sentence and not _DENIAL.search(sentence) and not _ENTRY.search(sentence)


def _denies(sentence: str) -> bool:
    """Return whether a name in a sentence stands after a denial in the same clause."""
    clauses = (clause[: max(clause.rfind(_WORD), clause.rfind(_CODE)) + 1] for clause in _CLAUSE.findall(sentence))
    return any(_DENIAL.search(clause) for clause in clauses)
