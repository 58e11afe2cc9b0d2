"""Papers to documents: plain ones, and ones that ask what the paper itself answers.

A base that has read instruction, text and answer in this order learns a task of that shape from few rows. What is asked
is known without any labelling: which field a paper is from, which topics its words speak of, whether a title belongs to
it, what the title is, and whether words that were taken out belong to it. No real task's instruction is among them.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pretraining.corpus import Paper
from pretraining.wordings import (
    ANSWERS,
    CLAIMS,
    EXACT,
    INPUTS,
    LIFE,
    MATCHES,
    PATTERNS,
    REVIEWS,
    TITLES,
    TOPICS_BELOW,
    WITHOUT_TITLE,
    WORDS,
)

# Characters of a text in a question: with instruction and answers it then fits into the context.
LONGEST = 3000
WORD = re.compile(r"[A-Za-z][a-z]+(?:-[a-z]+)*")
# Papers that are kept to mix up with, and papers whose words are counted.
APART = 50
COUNTED = 5000


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document that is tokenised by itself."""

    text: str
    answer: bool = False
    """Whether it is an answer of a question, which weighs more."""


Document = list[Piece]


def make_documents(papers: Iterable[Paper], questions: float, seed: int) -> Iterator[Document]:
    """Yield one document for each paper; for one of biology or health under a question its plain text too.

    Args:
        papers: In an order that does not tell their sources apart.
        questions: Share of papers that something is asked about.
        seed: Of all choices.
    """
    rng = random.Random(seed)
    asker = Asker(rng)
    for paper in papers:
        asked = asker.ask(paper) if rng.random() < questions else []
        asker.remember(paper)
        if asked:
            yield asked
        if not asked or is_life(paper):
            yield [Piece(_plain(paper, rng))]


def _plain(paper: Paper, rng: random.Random) -> str:
    if paper.title and rng.random() < 0.5:
        return f"title:{paper.title},abstract:{paper.text}"
    return f"{paper.title}\n{paper.text}".strip()


class Asker:
    """Makes questions about papers, with those that came before as the wrong answers."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.others: list[Paper] = []
        self.seen = 0
        self.common: Counter[str] = Counter()

    def remember(self, paper: Paper) -> None:
        """Keep a paper to mix up with later ones, and count its words."""
        if self.seen < COUNTED:
            self.seen += 1
            self.common.update(set(WORD.findall(paper.text[:LONGEST].lower())))
        self.others = [*self.others[-APART:], paper]

    def ask(self, paper: Paper) -> Document:
        """Return a document of instruction, text and answers; an empty one where nothing can be asked."""
        if len(self.others) < APART:
            return []
        kinds = [(self._topic, 25), (self._topics, 15), (self._words, 10)]
        if paper.title:
            kinds += [(self._match, 10), (self._title, 8)]
        if paper.source == "arxiv" or is_life(paper):
            kinds += [(self._field, 30)]
        if paper.source.startswith("asreview:"):
            kinds += [(self._review, 15)]
        asks, weights = zip(*kinds, strict=True)
        document: Document = self.rng.choices(asks, weights)[0](paper)
        return document

    def _field(self, paper: Paper) -> Document:
        life = is_life(paper)
        about_life = self.rng.random() < 0.85
        claim = self.rng.choice(LIFE if about_life else EXACT)
        # Biomedical passages have no titles: without one for others too, that alone would tell.
        title = paper.title if self.rng.random() < 0.6 else ""
        return self._claim(claim, self._input(title, paper.text), life == about_life)

    def _topic(self, paper: Paper) -> Document:
        has, lacks = self._about(paper)
        true = self.rng.random() < 0.5
        if not (has if true else lacks):
            return []
        title = paper.title if self.rng.random() < 0.8 else ""
        claim = f"the topic is {self.rng.choice(has if true else lacks)}"
        return self._claim(claim, self._input(title, paper.text), true)

    def _topics(self, paper: Paper) -> Document:
        has, lacks = self._about(paper)
        some = self.rng.sample(has, min(4, len(has)))
        yes, no = self.rng.choice(ANSWERS)
        asked = [(topic, yes) for topic in some]
        asked += [(topic, no) for topic in self.rng.sample(lacks, min(max(1, len(some)), len(lacks)))]
        self.rng.shuffle(asked)
        text = self._input(paper.title, paper.text)
        document = [Piece(f"{self.rng.choice(TOPICS_BELOW).format(yes=yes, no=no)}\n{text}")]
        for topic, answer in asked:
            document += [Piece(f"\n{topic}\n"), Piece(answer, answer=True)]
        return document

    def _about(self, paper: Paper) -> tuple[list[str], list[str]]:
        """Return topics that a paper has, and topics that it has not."""
        text = f"{paper.title} {paper.text[:LONGEST]}"
        found = {topic: len({word.lower() for word in pattern.findall(text)}) for topic, pattern in PATTERNS.items()}
        return [topic for topic in found if found[topic] >= 2], [topic for topic in found if not found[topic]]

    def _review(self, paper: Paper) -> Document:
        right = REVIEWS.get(paper.source.removeprefix("asreview:"))
        if right is None:
            return []
        true = self.rng.random() < 0.5
        topic = right if true else self.rng.choice([topic for topic in REVIEWS.values() if topic != right])
        return self._claim(f"the topic is {topic}", self._input(paper.title, paper.text), true)

    def _match(self, paper: Paper) -> Document:
        true = self.rng.random() < 0.5
        title = paper.title if true else self._other_title(paper)
        return self._claim(self.rng.choice(MATCHES), self._input(title, paper.text), true)

    def _title(self, paper: Paper) -> Document:
        return [Piece(f"{self.rng.choice(TITLES)}\n{self._input('', paper.text)}\n"), Piece(paper.title)]

    def _words(self, paper: Paper) -> Document:
        """Take rare words out of the text and ask for them among others."""
        text = paper.text[:LONGEST]
        other = self.rng.choice(self.others)
        mine, foreign = self._rare(text, other.text), self._rare(other.text[:LONGEST], paper.text)
        if not mine or not foreign:
            return []
        for word in mine:
            text = re.sub(rf"\b{word}\b ?", "", text, flags=re.IGNORECASE)
        yes, no = self.rng.choice(ANSWERS)
        asked = [(word, yes) for word in mine] + [(word, no) for word in foreign]
        self.rng.shuffle(asked)
        document = [Piece(f"{self.rng.choice(WORDS).format(yes=yes, no=no)}\n{self._input('', text)}")]
        for word, answer in asked:
            document += [Piece(f"\n{word}\n"), Piece(answer, answer=True)]
        return document

    def _rare(self, text: str, without: str) -> list[str]:
        """Return up to four words of a text that few papers have, and the other text has not."""
        words = sorted(set(WORD.findall(text.lower())) - set(WORD.findall(without.lower())))
        rare = [word for word in words if len(word) > 3 and 3 <= self.common[word] <= max(4, self.seen // 50)]
        return self.rng.sample(rare, min(4, len(rare)))

    def _other_title(self, paper: Paper) -> str:
        titles = [other.title for other in self.others if other.title and other.title != paper.title]
        return self.rng.choice(titles) if titles else ""

    def _input(self, title: str, text: str) -> str:
        form = self.rng.choice(INPUTS if title else WITHOUT_TITLE)
        return form.format(title=title, text=text[:LONGEST])

    def _claim(self, claim: str, text: str, true: bool) -> Document:
        yes, no = self.rng.choice(ANSWERS)
        asked = self.rng.choice(CLAIMS).format(claim=claim, yes=yes, no=no)
        return [Piece(f"{asked}\n{text}\n"), Piece(yes if true else no, answer=True)]


def is_life(paper: Paper) -> bool:
    """Whether a paper's source is one of biology or health."""
    return paper.source == "bio_ner" or (
        paper.source.startswith("asreview:") and paper.source != "asreview:Kitchenham_2010"
    )
