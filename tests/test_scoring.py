"""Label scores against the plainest reference: one row, one answer, no padding, log-softmax over everything."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import Bigrams, tiny_model

from llm_clf.decisions.decide import probabilities
from llm_clf.engine.label_words import AnswerTree, LabelWords
from llm_clf.engine.packing import FAMILIES, enable_packing
from llm_clf.engine.scoring import LabelScorer
from llm_clf.errors import ArtifactError

END = 0
# Labels that begin alike (0 and 1 do in ChatGLM2), one that begins another (1 and 10), and one with two words.
ANSWERS = [[[17, 40, END]], [[17, 41, END]], [[17, 41, 40, END]], [[50, END], [51, 52, END]]]
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(5, 261, (length,), generator=GENERATOR).tolist() for length in (3, 30, 11, 11, 1, 24)]


def reference(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Return label scores by the definition."""
    scores = []
    for words in ANSWERS:
        of_words = []
        for word in words:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *word]])).logits[0].float()
            log_probs = logits.log_softmax(dim=-1)
            of_words.append(sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(word)))
        scores.append(torch.stack(of_words).logsumexp(dim=0))
    return torch.stack(scores)


def packed_scorer(family: str = "glm", shared: Sequence[int] = ()) -> LabelScorer:
    model = tiny_model(family)
    enable_packing(model)
    return LabelScorer(model, LabelWords(ANSWERS), pad_id=3, packed=True, shared=shared)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_equals_one_by_one(family: str) -> None:
    model = tiny_model(family)
    expected = torch.stack([reference(model, prompt) for prompt in PROMPTS])
    scores = packed_scorer(family).score(PROMPTS)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "glm", "gpt2", "mistral-window"])
def test_plain_equals_one_by_one(family: str) -> None:
    model = tiny_model(family)
    expected = torch.stack([reference(model, prompt) for prompt in PROMPTS])
    scores = LabelScorer(model, LabelWords(ANSWERS), pad_id=3, packed=False).score(PROMPTS)
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=2e-5)


def test_prompts_that_begin_alike_equal_one_by_one_and_others_among_them_too() -> None:
    model, shared = tiny_model("glm"), [200, 201, 202]
    prompts = [[*shared, *prompt] for prompt in PROMPTS] + [[200, 201], shared, [5, 6, 7, 8]]
    expected = torch.stack([reference(model, prompt) for prompt in prompts])
    scores = packed_scorer(shared=shared).score(prompts)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_start_forgets_what_a_changed_model_made_of_the_shared_tokens() -> None:
    scorer = packed_scorer(shared=[200, 201])
    prompts = [[200, 201, *prompt] for prompt in PROMPTS]
    before = scorer.score(prompts)
    with torch.no_grad():
        scorer._model.model.embed_tokens.weight[200].neg_()
    scorer.start()
    expected = torch.stack([reference(scorer._model, prompt) for prompt in prompts])
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(scorer.score(prompts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_probabilities_do_not_depend_on_batch_or_order(packed: bool) -> None:
    scorer = packed_scorer() if packed else LabelScorer(tiny_model("glm"), LabelWords(ANSWERS), pad_id=3, packed=False)
    together = probabilities(scorer.score(PROMPTS).numpy())
    alone = np.concatenate([probabilities(scorer.score([prompt]).numpy()) for prompt in PROMPTS])
    backwards = probabilities(scorer.score(PROMPTS[::-1]).numpy())[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_the_pad_token_does_not_matter() -> None:
    model = tiny_model("glm")
    one, other = (LabelScorer(model, LabelWords(ANSWERS), pad_id=pad, packed=False).score(PROMPTS) for pad in (3, 99))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_whole_answer_counts_so_1_does_not_always_beat_10() -> None:
    one, zero, prompt = 41, 40, 9
    model = Bigrams({prompt: {one: 0.9, zero: 0.1}, one: {zero: 0.8, END: 0.2}, zero: {END: 1.0}})
    scores = LabelScorer(
        model, LabelWords([[[one, END]], [[one, zero, END]], [[zero, END]]]), pad_id=3, packed=False
    ).score([[prompt]])
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.18, 0.72, 0.1]]), atol=1e-4, rtol=0)


def test_words_of_a_label_add_up() -> None:
    model = Bigrams({9: {50: 0.3, 51: 0.3, 52: 0.4}, 50: {END: 1.0}, 51: {END: 1.0}, 52: {END: 1.0}})
    scores = LabelScorer(model, LabelWords([[[50, END], [51, END]], [[52, END]]]), pad_id=3, packed=False).score([[9]])
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.6, 0.4]]), atol=1e-3, rtol=0)


def test_answers_share_their_beginnings_and_never_read_their_end() -> None:
    tree = AnswerTree.build(ANSWERS)
    assert tree.tokens == [17, 40, 41, 40, 50, 51, 52]
    assert tree.ancestors == [[0], [0, 1], [0, 2], [0, 2, 3], [4], [5], [5, 6]]
    assert tree.paths[1] == [[(0, 17), (1, 41), (3, END)]]


@pytest.mark.parametrize("packed", [True, False])
def test_bf16_stays_near_fp32(packed: bool) -> None:
    def scores(dtype: torch.dtype) -> np.ndarray:
        model = tiny_model("glm").to(dtype)
        enable_packing(model)
        return probabilities(LabelScorer(model, LabelWords(ANSWERS), pad_id=3, packed=packed).score(PROMPTS).numpy())

    np.testing.assert_allclose(scores(torch.bfloat16), scores(torch.float32), atol=0.15)


def test_scores_that_are_no_numbers_are_refused() -> None:
    scorer = packed_scorer()
    with torch.no_grad():
        scorer._model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="not numbers"):
        scorer.score(PROMPTS)


def test_plan_counts_the_answer_tree_and_leaves_out_what_is_shared() -> None:
    scorer = packed_scorer()
    assert scorer.plan([10, 10], 2 * (10 + 7)) == [[0, 1]]
    assert scorer.plan([10, 10], 2 * (10 + 7) - 1) == [[0], [1]]
    assert packed_scorer(shared=[200, 201]).plan([10, 10], 2 * (8 + 7)) == [[0, 1]]
    assert packed_scorer().plan([10, 2, 2], 10 + 7 + 2 + 7) == [[0, 1], [2]]
