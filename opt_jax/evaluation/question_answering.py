"""Visual question answering: VQA accuracy and soft targets (Goyal et al. 2017, arXiv 1612.00837).

The metric is that of Antol et al. 2015 (arXiv 1505.00468): an answer that three of the people gave
is right. Answers are made alike first, by the rules of visualqa.org/evaluation.html as the official code
(github.com/GT-Vision-Lab/VQA, commit a013f00, vqaEval.py) carries them out, with what it does beside them: if
all people gave the same answer, nothing is changed on either side (issue 14 there: such answers are often
read off the picture). Only here, a blank prediction is always wrong.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

MATCHES_FOR_FULL_SCORE = 3

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
# A word that lacks one of its apostrophes -> the word. Not "im" or "ive": the official code looks for them
# with a capital in what is lower case by then.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHES
    for i, letter in enumerate(word)
    if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, as in the official code


def normalise_answer(answer: str) -> str:
    """The answer in lower case, without articles and most punctuation, numbers to ten in digits.

    A mark goes where it has a space beside it somewhere in the answer, or where the answer has a comma
    between digits; else it becomes a space ("black/white" is two words, "1,000" one). Apostrophes and colons
    stay, and points before a digit.
    """
    text = _one_line(answer)
    thousands = re.search(r"\d,\d", text) is not None
    without = {
        mark: "" if thousands or f"{mark} " in text or f" {mark}" in text else " " for mark in _PUNCTUATION
    }
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(without)))
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """VQA accuracy in percent: 100 times the mean of `answer_accuracies`."""
    return 100.0 * float(answer_accuracies(predictions, answers).mean())


def answer_accuracies(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Accuracy float64 [n] in [0, 1] of each prediction: the mean of min(1, matches / 3) over the subsets of
    people's answers that leave one out.

    predictions: n texts, a blank one scores 0; answers: for each question what people said, ten answers in
    VQA v2 (with fewer than four nothing reaches 1).
    Raises:
      ValueError: no question, differing numbers, one text where a list of answers should be, fewer than two
        answers, or a blank one.
    """
    if len(predictions) == 0:
        raise ValueError("no answers to score")
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predicted answers, but people's to {len(answers)} questions")
    scores = np.zeros(len(predictions))
    for i, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        change, alike = _made_alike(given, f"question {i}")
        if prediction.strip():
            scores[i] = _accuracy(change(prediction), alike)
    return scores


def soft_scores(alike: Sequence[str]) -> dict[str, float]:
    """Targets in (0, 1] for training on one question: each answer's accuracy, were it the prediction.

    alike: what people said, each as `normalise_answer` makes it; one of which nothing is left is no target,
    but counts among the people. Of ten, one, two, three and more that agree make 0.3, 0.6, 0.9 and 1, the
    soft scores of Teney et al. 2018 (arXiv 1708.02711).
    """
    alike = list(alike)
    return {answer: _accuracy(answer, alike) for answer in dict.fromkeys(alike) if answer}


def _made_alike(answers: Sequence[str], question: str) -> tuple[Callable[[str], str], list[str]]:
    """What is done to a prediction, and the answers after that."""
    if isinstance(answers, str):
        raise ValueError(f"answers to {question} must be a list of texts, found one text {answers!r}")
    if len(answers) < 2 or not all(answer.strip() for answer in answers):
        raise ValueError(f"{question} needs two or more answers, none of them empty, found {list(answers)!r}")
    change = normalise_answer if len(set(map(_one_line, answers))) > 1 else _one_line
    return change, [change(answer) for answer in answers]


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(answer: str, answers: Sequence[str]) -> float:
    matches = [other == answer for other in answers]
    left_out = [min(1.0, (sum(matches) - match) / MATCHES_FOR_FULL_SCORE) for match in matches]
    return sum(left_out) / len(left_out)
