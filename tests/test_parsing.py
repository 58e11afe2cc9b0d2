import time
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_clf.decisions.parsing import AnswerParser
from llm_clf.prompting.tasks import Task, load_task


def a_task(*labels: Any) -> Task:
    tree = {"instruction": "Answer:", "input": "{text}", "label_column": "label", "labels": list(labels)}
    return Task.model_validate(tree)


MEDICAL = load_task("medical_paper")
NEWS = load_task("news_topic_zh")
REVIEW = a_task(
    {"label": "positive", "words": ["positive", "good"], "meaning": "the customer is happy"},
    {"label": "negative", "words": ["negative", "not good", "bad"], "meaning": "the customer is not happy"},
    {"label": "neutral", "words": ["neutral", "so-so", "中性"]},
)
LEVEL = a_task("1", "10")
SIGN = a_task("-1", "0", "1")
YES_NO = a_task("yes", "no")
SHI_FOU = a_task("是", "否")
LETTERS = a_task("A", "B", "C")
LANGUAGES = a_task("C", "C++", "C#")
FIELD = a_task("medical", "not medical", "sports")
INDUSTRY = a_task("体育", "体育产业", "非体育")
HINDI = a_task("खेल", "राजनीति")
CASED = a_task("Yes", "yes", "no")
SYMBOLS = a_task("+", "-")

# fmt: off
TABLE: list[tuple[Task, str | None, list[str]]] = [
    # A bare answer, in any dress.
    (MEDICAL, "1", ["1", " 1\n", "１", "①", "1️⃣", "1.", "1。", "1．", "1,", "1!", "(1)", "（1）", "[1]", "【1】", "「1」"]),
    (MEDICAL, "1", ['"1"', "'1'", "“1”", "‘1’", "《1》", "**1**", "`1`", "<1>", "__1__", "_1_", "# 1", "- 1", "> 1"]),
    (MEDICAL, "1", ["1.0", "1 1", "1\n1", "1\n1\n1\n", "| 1 |", "```\n1\n```", "1</s>", "1<|im_end|>", "\u200b1"]),
    (MEDICAL, "0", ["0", "０", "0.", "(0)", "**0**", "0.0", "⓪"]),
    # After what leads to an answer.
    (MEDICAL, "1", ["Label: 1", "label 1", "LABEL：１", "Answer: 1", "Answer:1", "Answer:\n1", "**Answer:** 1", "Class: 1"]),
    (MEDICAL, "1", ["Output = 1", "output=1", "Output -> 1", "Final answer: 1", "The answer is 1.", "The answer is **1**"]),
    (MEDICAL, "1", ["The correct label is 1", "Based on the abstract, the answer is 1.", "The answer is: `1`", "It is 1."]),
    (MEDICAL, "1", ["The label for this paper is 1", "The predicted class is label 1", "<answer>1</answer>", "[label] 1"]),
    (MEDICAL, "1", ["答：1", "答案是1", "答案是：1", "答案应该是 1。", "标签：1", "标签1", "输出：1", "分类结果为 1", "结果：「1」"]),
    (MEDICAL, "1", ["这篇论文的标签是1", "我认为答案是1。", "预测为1", "应为1", "Question: is it?\nAnswer: 1"]),
    # With an explanation that names no other label.
    (MEDICAL, "1", ["1\nThe study covers 10 patients.", "1. The study covers patients.", "1。这不是一篇综述。", "1, as it is"]),
    (MEDICAL, "1", ["1 (medical)", "1 because it is about a drug", "1，因为研究的是病人", "判断结果：1（医学）"]),
    (MEDICAL, "1", ["**Answer: 1**\n\n**Why:** published in 2023, n = 20, p < 0.05", "Label: 1\nConfidence: 0.95"]),
    # A meaning; one holds the other.
    (MEDICAL, "1", ["a paper of the medical field", "A paper of the\nmedical field.", "This is a paper of the medical field"]),
    (MEDICAL, "1", ["1: a paper of the medical field", "1 - A paper of the medical field", "1 (a paper of the medical field)"]),
    (MEDICAL, "0", ["not a paper of the medical field", "It is NOT a paper of the medical field.", "0 = not a paper of the medical field"]),
    (MEDICAL, None, ["1: not a paper of the medical field", "It isn't a paper of the medical field", "a paper of the field"]),
    # JSON.
    (MEDICAL, "1", ['{"label": 1}', '{"label": "1"}', '{"Label": 1.0}', '{"label":"１"}', '{"label": [1]}', '[{"label": 1}]']),
    (MEDICAL, "1", ['```json\n{"label": 1}\n```', 'Here it is:\n```json\n{"answer": 1}\n```\nDone.', "{'label': 1}"]),
    (MEDICAL, "1", ['{"label": 1, "reason": "not 0"}', '{"label": 1, "probability": 0}', '{"0": 0.1, "1": 0.9, "class": "1"}']),
    (MEDICAL, "1", ['{"result": {"label": 1}}', '{"答案": 1}', '{"label": 1, "category": null}', '{"label": 1, "reason": "cut o']),
    (MEDICAL, "1", ['{"label": 1}\n{"label": 1}', '{"label": 1, "answer": "1"}', '{"output": "The answer is 1."}']),
    (MEDICAL, None, ['{"label": 1, "label": 0}', '{"label": 1, "answer": 0}', '{"label": 1} or {"label": 0}', '{"label": 1}\n0']),
    (MEDICAL, None, ['{"label": [0, 1]}', '{"label": null}', '{"label": 0.1}', '{"label": 10}', '{"label": true}', "{}", "{1: 0}"]),
    (MEDICAL, None, ['{"score": 1}', '{"1": 0.9}', '{"0": 0.1, "1": 0.9}', '{"label": ""}', '{"label": "not 1"}', '{"label":']),
    # Thinking aloud is no answer.
    (MEDICAL, "1", ["<think>0 or 1? Not 0.</think>\n\n1"]),
    (MEDICAL, None, ["<think>The answer is 1", "<think>1</think>", "1</think>"]),
    # Nothing, or two labels.
    (MEDICAL, None, ["", " ", "\n\t\u3000", "...", "**", "\ue000", "\ue001.", "�", "\ud800"]),
    (MEDICAL, None, ["0 or 1", "1 0", "0, 1", "0/1", "0\n1", "1. Not 0.", "1 (not 0)", "output 1 or 0", "Label: 1\nScore: 0", "1或0"]),
    # Other numbers, and a digit in passing.
    (MEDICAL, None, ["2023", "10", "01", "11", "0.1", ".1", "1.5", "1,5", "-1", "−1", "+1", "1/2", "½", "1%", "1 %", "1²", "1-2", "1:2"]),
    (MEDICAL, None, ["1st", "x1", "1x", "label1", "class_1", "$1", "#1", "<1", "p < 1", "x=1", "1e5", "~1", "1+", "v1.0.1", "No. 1"]),
    (MEDICAL, None, ["1 patient", "There is 1 patient.", "The number of groups is 1.", "第1", "1个", "1, 2, 3", "1、2", "1. First\n2. Second"]),
    # Denied, doubted, refused, something else.
    (MEDICAL, None, ["not 1", "The answer is not 1", "答案不是1", "neither 0 nor 1", "1. The answer is not 1", "I cannot say 1"]),
    (MEDICAL, None, ["1?", "maybe 1", "1 or 2", "Answer: 1 or something", "可能是1", "答案是1吗？", "Is the answer 1? Who knows."]),
    (MEDICAL, None, ["medical", "yes", "一", "I", "Sorry, I cannot classify this paper.", "作为一个人工智能，我无法回答。", "A: 1"]),
    # Chinese words stand inside running text.
    (NEWS, "体育", ["体育", "体育。", "「体育」", "《体育》", "**体育**", "答：体育", "答案是体育", "标签：体育", "属于体育", "这条新闻属于体育栏目。"]),
    (NEWS, "体育", ["体育新闻", "这是一篇体育类的新闻，内容是足球。", "体育\n文章报道了一场球赛。", "体育。主角是运动员。", "非常体育", "Answer: 体育"]),
    (NEWS, "体育", ["比赛、运动员与运动项目", "体育：比赛、运动员与运动项目", '{"类别": "体育", "原因": "不是财经"}', '{"topic": 0, "分类结果": "体育"}']),
    (NEWS, "财经", ["经济", "财经", "财经（经济）", "经济、财经", "以下新闻属于：财经"]),
    (NEWS, "健康", ["医疗", "健康、医疗", "疾病、医疗与养生", "分类：健康。疾病、医疗与养生", "ｌａｂｅｌ：健康"]),
    (NEWS, None, ["不是体育", "非体育", "并非体育", "不属于体育", "这不是体育新闻", "既不是体育也不是政治", "没有体育", "与体育无关", "体育，不是政治"]),
    (NEWS, None, ["体育 财经", "体育或财经", "体育、财经、科技、娱乐、健康", "体育，不是财经", "比赛、运动员与运动项目\n财经", '{"标签":"体育","答案":"财经"}']),
    (NEWS, None, ["可能是体育", "是体育吗？", "体育还是政治", "体育：0.9", "体育: 否", "政治", "sports", "我不知道", "无法判断是否属于体育"]),
    # Words: whole, in any case, the longest first.
    (REVIEW, "positive", ["positive", "Positive", "POSITIVE", "ｐｏｓｉｔｉｖｅ", "good", "Good!", "Sentiment: positive", "This review is positive."]),
    (REVIEW, "positive", ["The customer is happy", "positive (good)", "It is good. Good value.", "Positive: the reviewer liked it", "它是positive的"]),
    (REVIEW, "negative", ["not good", "Not good.", "“not good”", "The review is not\ngood", "the customer is not happy", "BAD", "negative, not good"]),
    (REVIEW, "neutral", ["so-so", "Neutral.", "这是中性的", "中性", "So-so, I would say", '{"answer": "SO-SO"}']),
    (REVIEW, None, ["so", "goods", "positively", "seropositive", "non-positive", "positive-ish", "positive's", "happy", "customer is happy"]),
    (REVIEW, None, ["not positive", "not bad", "isn't good", "is not very positive", "no good", "I don't think it is positive", "It isn't a good one"]),
    (REVIEW, None, ["positive negative", "good and bad", "positive and not negative", "good or not good", "positive?", "probably positive", "positive: 0.9"]),
    (REVIEW, None, ["the customer is happy, the customer is not happy", "rather than positive", "Positive. It is not good.", "I cannot tell if it is positive"]),
    # Labels inside one another.
    (LEVEL, "1", ["1", "1.", "(1)", "1.0", "Level: the answer is 1"]),
    (LEVEL, "10", ["10", "10.", "１０", "10.0", "Label: 10", "答案是10", '{"label": 10}']),
    (LEVEL, None, ["1 10", "10 1", "1/10", "1 of 10", "100", "110", "010", "10%", "10.1", "1.10"]),
    (SIGN, "-1", ["-1", "－1", "(-1)", "Answer: -1", "答案是-1", '{"label": -1}']),
    (SIGN, "1", ["1", "- 1", "Answer: 1"]),
    (SIGN, None, ["1-1", "--1", "-1 1", "-10", "-1.5", "+1"]),
    (FIELD, "not medical", ["not medical", "Not medical.", "It is not medical", "**not** medical"]),
    (FIELD, "medical", ["medical", "Medical", "This is a medical paper"]),
    (FIELD, None, ["not sports", "isn't sports", "isn't medical", "non-medical", "biomedical", "not a medical paper", "medical/sports"]),
    (INDUSTRY, "体育产业", ["体育产业", "答案是体育产业", "体育产业新闻"]),
    (INDUSTRY, "体育", ["体育", "体育新闻"]),
    (INDUSTRY, "非体育", ["非体育", "这是非体育新闻"]),
    (INDUSTRY, None, ["体育产业，体育", "不是体育产业", "不是体育", "体育和非体育"]),
    # Names that occur in any text decide only as an answer.
    (YES_NO, "no", ["No", "no.", "NO!", "No, it is not.", "Answer: no", "No\nIt is not a paper on medicine."]),
    (YES_NO, "yes", ["Yes", "yes, it is", "The answer is yes.", "'yes'"]),
    (YES_NO, None, ["No idea", "I have no idea", "yes or no", "There is no way to say yes", "Yes? No.", "nope", "yesterday"]),
    (SHI_FOU, "是", ["是", "“是”", "答案：是", "是。"]),
    (SHI_FOU, "否", ["否", "答：否", "否。这不是一篇医学论文。"]),
    (SHI_FOU, None, ["是否", "不是", "是的", "是 否", "否定", "这是一篇论文"]),
    (LETTERS, "B", ["B", "b", "(B)", "B.", "B)", "Answer: B", "The answer is B.", "Ｂ"]),
    (LETTERS, None, ["A paper", "a b", "A/B", "vitamin C", "AB", "B+", "D"]),
    (LANGUAGES, "C++", ["C++", "c++", "The answer is C++.", "`C++`"]),
    (LANGUAGES, "C", ["C", "c.", "The answer is C"]),
    (LANGUAGES, None, ["C and C++", "C+", "C+++", "Objective-C", "C C#"]),
    (HINDI, "खेल", ["खेल", "खेल।", "यह खेल है"]),
    (HINDI, None, ["खेला", "खेल राजनीति"]),
    # Names that the normal form cannot tell apart are read as written or not at all.
    (CASED, "Yes", ["Yes", '"Yes"']),
    (CASED, "yes", ["yes"]),
    (CASED, None, ["YES", "Answer: Yes"]),
    (SYMBOLS, "+", ["+", "Answer: +", "(+)", "答案是+"]),
    (SYMBOLS, None, ["+ -", "+-", "+1", "a+b"]),
]
# fmt: on
CASES = [(task, text, label) for task, label, texts in TABLE for text in texts]
TASKS = (MEDICAL, NEWS, REVIEW, LEVEL)
PARSERS = {id(task): AnswerParser(task) for task, _, _ in TABLE}

WRAPPINGS = [
    *(
        "{}",
        " {}\n",
        "{}.",
        "{}。",
        "{}!",
        "({})",
        "（{}）",
        "[{}]",
        "【{}】",
        '"{}"',
        "'{}'",
        "“{}”",
        "「{}」",
        "《{}》",
    ),
    *("**{}**", "*{}*", "__{}__", "`{}`", "```\n{}\n```", "<{}>", "# {}", "- {}", "<answer>{}</answer>"),
    *("Label: {}", "Answer: {}", "Output = {}", "The answer is {}.", "**Label:** {}", "Final answer: **{}**"),
    *("答：{}", "答案是{}", "标签：{}", "输出：{}", "分类结果为 {}", "答案是「{}」。"),
    *('{{"label": "{}"}}', '{{"reason": "?", "answer": "{}"}}', '```json\n{{"类别": "{}"}}\n```', "{{'label': '{}'}}"),
    *("{}\nThat is all.", "{}. That is all.", "{}。以上。", "{} {0}", "{}\n{0}"),
]
DRESSES = [
    str,
    str.upper,
    str.title,
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
]
# Pieces of answers, so that random texts meet the rules and not only the alphabet.
PIECES = st.sampled_from(
    [
        *(word for task in TASKS for label in task.labels for word in (label.label, *label.words, label.meaning)),
        *(
            "label",
            "Answer:",
            "is",
            "not ",
            "不是",
            "答案",
            "{",
            "}",
            '"label": ',
            '"',
            ",",
            ".",
            "。",
            "\n",
            " ",
            "1.0",
        ),
        *("**", "`", "_", "<", ">", "(", ")", "[", "]", "'", "’", "?", "-", "=", "\\", "<think>", "</think>"),
        *("\ue000", "\ue001", "\ud800", "\u200b", "\u0301", "\x00"),
    ]
)
# fmt: off
LONG = [
    "1 ", "label: 1 ", "label ", "label is ", "not ", "a ", "不是体育，", "no 1, ", "1. ", "体育", "sports\n", "1(", "1",
    "{", '{"a":', '{"label":1}', "[", "_", "_a", "<", "</", "<|", "<think>", "'", '"', " ", "\n", "\n ", "1.0", "0.", "\\",
    "~", "}", "(", ")", ",", "=", "是", "答案", "答案 ", "#", "- ", "|",
]
# fmt: on


def words_of(task: Task) -> Iterator[tuple[str, str]]:
    """Yield each label with each text that stands for it."""
    for label in task.labels:
        for word in dict.fromkeys((label.label, *label.words)):
            yield label.label, word


def parse(task: Task, text: str) -> str | None:
    return PARSERS[id(task)].parse(text)


@pytest.mark.parametrize(("task", "text", "label"), CASES, ids=[f"{text!a}"[:60] for _, text, _ in CASES])
def test_table(task: Task, text: str, label: str | None) -> None:
    assert parse(task, text) == label


@pytest.mark.parametrize("task", TASKS, ids=["medical", "news", "review", "level"])
@settings(deadline=None, database=None, max_examples=150)
@given(text=st.one_of(st.text(st.characters(exclude_categories=())), st.lists(PIECES, max_size=12).map("".join)))
def test_any_text_gives_a_label_or_nothing(task: Task, text: str) -> None:
    assert parse(task, text) in (*task.names, None)


@pytest.mark.parametrize("task", TASKS, ids=["medical", "news", "review", "level"])
@settings(deadline=None, database=None, max_examples=150)
@given(data=st.data())
def test_every_word_is_read_in_every_wrapping(task: Task, data: st.DataObject) -> None:
    label, word = data.draw(st.sampled_from(list(words_of(task))))
    wrapping, dress = data.draw(st.sampled_from(WRAPPINGS)), data.draw(st.sampled_from(DRESSES))
    assert parse(task, wrapping.replace("{0}", "{}").format(*[dress(word)] * 2)) == label


@pytest.mark.parametrize("task", TASKS, ids=["medical", "news", "review", "level"])
def test_meanings_are_read(task: Task) -> None:
    for label in task.labels:
        if label.meaning:
            assert {parse(task, wrapping.format(label.meaning)) for wrapping in ("{}", "{}.", "Label: {}")} == {
                label.label
            }


@pytest.mark.parametrize("task", [task for task, _, _ in TABLE], ids=lambda task: task.names[0])
def test_two_labels_are_none(task: Task) -> None:
    for (one, first), (other, second) in permutations(words_of(task), 2):
        if one != other and f"{first} {second}" not in dict(words_of(task)).values():
            assert parse(task, f"{first} {second}") is None


@settings(deadline=None, database=None, max_examples=150)
@given(before=st.text(max_size=20), between=st.text(max_size=20), after=st.text(max_size=20))
def test_two_labels_are_none_in_any_surroundings(before: str, between: str, after: str) -> None:
    assert parse(NEWS, f"{before}\n科技\n{between}\n娱乐\n{after}".replace("think", "")) is None


@settings(deadline=None, database=None, max_examples=150)
@given(names=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=4), text=st.text(max_size=20))
def test_any_task_has_a_parser(names: list[str], text: str) -> None:
    try:
        task = a_task(*names)
    except ValidationError:
        assume(False)
    parser = AnswerParser(task)
    assert [parser.parse(name) for name in names] == names
    assert parser.parse(text) in (*names, None)


def test_a_word_goes_before_a_meaning() -> None:
    parser = AnswerParser(a_task({"label": "a1", "meaning": "ham"}, {"label": "spam", "words": ["spam", "ham"]}))
    assert parser.parse("The answer is ham.") == "spam"


def test_a_meaning_of_two_labels_decides_nothing() -> None:
    parser = AnswerParser(a_task({"label": "x1", "meaning": "a thing"}, {"label": "x2", "meaning": "A thing"}))
    assert parser.parse("a thing") is None
    assert parser.parse("x1") == "x1"


def test_names_that_overlap_in_part_both_count() -> None:
    parser = AnswerParser(a_task("中国体育", "体育经济"))
    assert parser.parse("中国体育经济") is None
    assert parser.parse("中国体育 中国体育") == "中国体育"


def seconds(task: Task, text: str) -> float:
    start = time.process_time()
    parse(task, text)
    return time.process_time() - start


@pytest.mark.parametrize("piece", LONG)
def test_no_repetition_takes_quadratic_time(piece: str) -> None:
    # A quadratic step over 40,000 characters takes half a minute.
    frames = ("{}", "1{}1", "体育{}体育2", "{}is是1", "1,{}2")
    texts = [frame.replace("{}", piece * (40_000 // len(piece))) for frame in frames]
    assert max(seconds(task, text) for task in (MEDICAL, NEWS) for text in texts) < 1


@pytest.mark.parametrize("piece", ["1 ", "label: 1 ", "体育，", "This paper is about a new drug. "])
def test_a_megabyte_takes_less_than_a_second(piece: str) -> None:
    # Three, because a shared machine may be slow.
    assert max(seconds(task, piece * (1_000_000 // len(piece))) for task in (MEDICAL, NEWS)) < 3
