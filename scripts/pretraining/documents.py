"""Papers to documents: plain ones, and ones that ask what the paper itself answers.

A base that has read instruction, text and answer in this order learns a task of that shape from few rows. What is asked
is known without any labelling: whether a title belongs to a text, which of two does, what the title is, whether
words that were taken out belong to it, and which field it is from. No real task's instruction is among the wordings.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pretraining.corpus import Paper

# Characters of a text in a question: with instruction and answers it then fits into the context.
LONGEST = 3000
WORD = re.compile(r"[A-Za-z][a-z]+(?:-[a-z]+)*")
# Papers that are kept to mix up with, and papers whose words are counted.
APART = 50
COUNTED = 5000

INPUTS = 6 * ("title:{title},abstract:{text}",) + (
    "title: {title}\nabstract: {text}",
    "Title: {title}. Abstract: {text}",
    "{title}\n{text}",
)
WITHOUT_TITLE = 3 * ("abstract:{text}",) + ("title:,abstract:{text}", "text: {text}", "{text}")
ANSWERS = 6 * (("1", "0"),) + (
    ("yes", "no"),
    ("yes", "no"),
    ("Yes", "No"),
    ("true", "false"),
    ("right", "wrong"),
    ("A", "B"),
    ("0", "1"),
    ("no", "yes"),
)
CLAIMS = (
    "Decide whether {claim}. Answer {yes} or {no}.",
    "Does it hold that {claim}? Write {yes} if so, {no} if not.",
    "Say if {claim}; {yes} means that it is so, {no} that it is not:",
    "Is it true that {claim}? {yes} or {no}",
    "Read the paper below and output {yes} if {claim}, else {no}.",
    "Here are title and abstract of a paper. Output {yes} where {claim} and {no} otherwise -->",
    "Please tell from the text whether {claim}, output {yes} or {no}, the text follows:",
    "{yes}: {claim}. {no}: it is not so. Which of the two?",
)
LIFE = (
    "this is from the life sciences",
    "the paper is about biology or health",
    "the authors work on medicine or biology",
    "the topic is living beings, their diseases or their treatment",
    "it was published in a biomedical journal",
)
EXACT = (
    "this is from computing, astronomy or engineering",
    "the paper is about machines, mathematics, physics or the sky",
    "the authors work on computers, algorithms or physics",
    "the topic is outside of biology and health",
)
MATCHES = (
    "the title belongs to the abstract",
    "title and abstract are of the same paper",
    "this abstract was written under this title",
)
TITLES = ("Give the paper a title.", "Which title has this paper?", "Write the title of the text:", "What is it about?")
CHOICES = (
    "Which title fits the text, {a} or {b}? {a}: {first} {b}: {second}",
    "Two titles: {a} {first} / {b} {second}. Answer with the one that the text has.",
)
WORDS = (
    "Some words were taken out of the text. For each word below it answer {yes} if it is one of them, else {no}.",
    "Say of every word behind the text whether it is likely in it, {yes} or {no}:",
)
REVIEWS = {
    "ACEInhibitors": "ACE inhibitors",
    "ADHD": "attention deficit disorder",
    "Antihistamines": "antihistamines",
    "AtypicalAntipsychotics": "antipsychotics",
    "BetaBlockers": "beta blockers",
    "CalciumChannelBlockers": "calcium channel blockers",
    "Estrogens": "estrogens and hormones",
    "Kitchenham_2010": "software and computing",
    "NSAIDS": "drugs against inflammation",
    "Nagtegaal_2019": "changes of health behaviour",
    "Opiods": "opioids and pain",
    "OralHypoglycemics": "drugs against diabetes",
    "ProtonPumpInhibitors": "stomach acid and ulcers",
    "SkeletalMuscleRelaxants": "relaxing muscles",
    "Triptans": "migraine",
    "UrinaryIncontinence": "incontinence",
    "Bannach-Brown_2019": "depression in animals",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document that is tokenised by itself."""

    text: str
    answer: bool = False
    """Whether it is an answer of a question, which weighs more."""


Document = list[Piece]


def make_documents(papers: Iterable[Paper], questions: float, seed: int) -> Iterator[Document]:
    """Yield one document for each paper.

    Args:
        papers: In an order that does not tell their sources apart.
        questions: Share of documents that ask something.
        seed: Of all choices.
    """
    rng = random.Random(seed)
    asker = Asker(rng)
    for paper in papers:
        asked = asker.ask(paper) if rng.random() < questions else []
        asker.remember(paper)
        yield asked or [Piece(_plain(paper, rng))]


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
        kinds = [(self._words, 30)]
        if paper.title:
            kinds += [(self._match, 20), (self._title, 15), (self._choice, 10)]
        if paper.source == "arxiv" or is_life(paper):
            kinds += [(self._field, 25)]
        if paper.source.startswith("asreview:"):
            kinds += [(self._review, 20)]
        asks, weights = zip(*kinds, strict=True)
        document: Document = self.rng.choices(asks, weights)[0](paper)
        return document

    def _field(self, paper: Paper) -> Document:
        life = is_life(paper)
        about_life = self.rng.random() < 0.7
        claim = self.rng.choice(LIFE if about_life else EXACT)
        # Biomedical passages have no titles: without one for others too, that alone would tell.
        title = paper.title if self.rng.random() < 0.6 else ""
        return self._claim(claim, self._input(title, paper.text), life == about_life)

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

    def _choice(self, paper: Paper) -> Document:
        titles = [paper.title, self._other_title(paper)]
        names = self.rng.choice((("A", "B"), ("1", "2"), ("1", "0"), ("a", "b")))
        right = self.rng.randrange(2)
        first, second = titles if right == 0 else titles[::-1]
        asked = self.rng.choice(CHOICES).format(a=names[0], b=names[1], first=first, second=second)
        return [Piece(f"{asked}\n{self._input('', paper.text)}\n"), Piece(names[right], answer=True)]

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
