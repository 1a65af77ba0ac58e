import pytest

from experiments.errors import UserError
from experiments.tasks.questions import parse_question, read_questions
from experiments.tasks.rows import Place, Rows, read_rows

CHOOSE = "Please choose the correct answer to the question: "


def test_choices_follow_the_question():
    question = parse_question(
        f"{CHOOSE}Which gas: this one?\n\nAnswer1: oxygen. Answer2: carbon dioxide"
        " Answer3: Answer: none\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    )

    assert question.prompts == ("Question: Which gas: this one?\nAnswer:",) * 3
    assert question.continuations == (" oxygen.", " carbon dioxide", " Answer: none")
    assert question.outputs == ("answer1", "answer2", "answer3")
    assert question.right == 1


def test_solutions_stand_in_paragraphs():
    question = parse_question(
        "Please choose the correct solution to the question: dresser\n\n"
        "Solution1: replace drawer \n\nSolution2: finish it \n\n"
        "Answer format: solution1/solution2",
        "solution1",
    )

    assert question.prompts[0] == "Question: dresser\nAnswer:"
    assert question.continuations == (" replace drawer", " finish it")


def test_a_blank_is_filled_and_what_follows_it_is_scored():
    question = parse_question(
        "Please choose the correct answer to fill in the blank to complete the "
        "given sentence: Sarah was better than Maria so _ got the easy cases.\n\n"
        "Option1: Sarah Option2: Maria Answer format: option1/option2",
        "option2",
    )

    assert question.prompts == (
        "Sarah was better than Maria so Sarah",
        "Sarah was better than Maria so Maria",
    )
    assert question.continuations == (" got the easy cases.",) * 2
    assert question.right == 1


def test_an_ending_continues_its_sentence():
    question = parse_question(
        "Please choose the correct ending to complete the given sentence: Roof: A "
        "man sits. he\n\nEnding1: sleeps. Ending2: is there.\n\n"
        "Answer format: ending1/ending2",
        "ending1",
    )

    assert question.prompts == ("Roof: A man sits. he",) * 2
    assert question.continuations == (" sleeps.", " is there.")


def test_true_and_false_are_yes_and_no():
    question = parse_question(
        "Please answer the following question with true or false, question: is ice "
        "cold?\n\nAnswer format: true/false",
        "the correct answer is false",
    )

    assert question.prompts == ("Question: is ice cold?\nAnswer:",) * 2
    assert question.continuations == (" yes", " no")
    assert question.outputs == ("the correct answer is true", question.outputs[1])
    assert question.outputs[question.right] == "the correct answer is false"


def test_a_question_may_spell_the_name_of_a_choice():
    question = parse_question(
        f"{CHOOSE}What is Answer1: for?\n\nAnswer1: x Answer2: y\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    )

    assert question.prompts[0] == "Question: What is Answer1: for?\nAnswer:"


@pytest.mark.parametrize(
    ("instruction", "answer", "message"),
    [
        ("Is ice cold?", "true", "does not end in 'Answer format: name/name'"),
        ("Is it? Answer format: true", "true", "does not end in"),
        (
            "Is it? Answer format: true/false",
            "yes",
            "'yes' ends with none of true/false",
        ),
        (
            f"{CHOOSE}Q? Answer1: x Answer format: answer1/answer2",
            "answer1",
            "names answer2, but has no text behind 'Answer2:'",
        ),
        (
            f"{CHOOSE}Q? Answer1: Answer2: y Answer format: answer1/answer2",
            "answer1",
            "names answer1, but has no text behind 'Answer1:'",
        ),
    ],
)
def test_an_instruction_in_another_format_is_an_error(instruction, answer, message):
    with pytest.raises(UserError, match=message):
        parse_question(instruction, answer)


def test_a_row_in_another_format_is_named():
    values = [{"instruction": "Is it? Answer format: true/false", "output": "maybe"}]
    rows = Rows("x.csv", values, [Place("x.csv", "line", 2)], ())

    with pytest.raises(UserError, match=r"^x.csv, line 2: the answer 'maybe' ends"):
        read_questions(rows, "instruction", "output")


def test_every_row_of_the_real_files_is_a_question(shared_data):
    rows = read_rows(str(shared_data / "commonsense"))
    questions = read_questions(rows, "instruction", "output")

    assert len(rows) == 18750
    for question, row in zip(questions, rows.values, strict=True):
        assert question.outputs[question.right] == row["output"]
        assert len(question.continuations) == len(question.outputs) >= 2
        assert all(len(text) > 1 for text in question.continuations)
        assert all(question.prompts)
