from collections import Counter
from itertools import combinations

import pytest

from utils.data.quiz import CATEGORIES, OOD_CATEGORIES, OPTIONS, quiz_questions
from utils.data.quiz_facts import CAPITALS, NOUNS, OPPOSITES, VERBS


@pytest.fixture(scope="module")
def quiz():
    return quiz_questions()


def category(question):
    return question.id.partition("-")[0]


def test_sizes_and_categories(quiz):
    assert len(quiz["train"]) >= 800
    assert len(quiz["validation"]) >= 200
    assert len(quiz["test"]) >= 400
    assert len(quiz["ood"]) >= 100
    for split in ("train", "validation", "test"):
        counts = Counter(category(q) for q in quiz[split])
        assert set(counts) == set(CATEGORIES)
        assert max(counts.values()) < 2 * min(counts.values())
    assert {category(q) for q in quiz["ood"]} == set(OOD_CATEGORIES)


def test_the_same_every_time(quiz):
    assert quiz_questions() == quiz


def test_no_question_occurs_twice(quiz):
    prompts = {split: [q.fields["question"] for q in questions] for split, questions in quiz.items()}
    for questions in prompts.values():
        assert len(set(questions)) == len(questions)
    for one, other in combinations(prompts.values(), 2):
        assert not set(one) & set(other)


def test_both_directions_of_an_opposite_are_in_one_split(quiz):
    for split in ("train", "validation", "test"):
        asked = {q.fields["question"]: q for q in quiz[split] if category(q) == "opposite"}
        assert all(f"Reverse of {q.options[q.answer]}:" in asked for q in asked.values())


def test_four_different_options_and_balanced_answers(quiz):
    for questions in quiz.values():
        assert all(len(q.options) == len(set(q.options)) == OPTIONS for q in questions)
        places = Counter(q.answer for q in questions)
        assert max(places.values()) - min(places.values()) <= len(CATEGORIES)


def test_answers_follow_the_rules(quiz):
    for q in (q for questions in quiz.values() for q in questions):
        prompt, right = q.fields["question"], q.options[q.answer]
        wrong = [option for option in q.options if option != right]
        subject = prompt.rstrip(":").split()[-1]
        if category(q) == "first_letter":
            assert subject[0] == right
        elif category(q) == "alphabet":
            assert right < subject < min(wrong)
        elif category(q) == "larger":
            sign = 1 if prompt.startswith("Larger") else -1
            assert sign * int(right) > sign * int(subject)
            assert all(sign * int(option) < sign * int(subject) for option in wrong)
        elif category(q) == "sequence":
            a, b, c = (int(number) for number in prompt.strip(",").split(","))
            assert int(right) - c == c - b == b - a


@pytest.mark.parametrize("facts", [VERBS, NOUNS, CAPITALS])
def test_no_subject_has_two_facts(facts):
    assert len({subject for subject, _ in facts}) == len(facts)


def test_no_word_has_two_opposites():
    words = [word for pair in OPPOSITES for word in pair]
    assert [word for word, count in Counter(words).items() if count > 1] == []
