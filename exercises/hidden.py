"""The hidden tests' check, by a name that no notebook has had the chance to take."""

from exercises import checking, outside


def hidden_check(number: str, answer: object) -> None:
    """check with other numbers, strict, after what the notebook has replaced is put back.

    Errors: AssertionError with check's line, if the answer is not right.
    """
    for said in outside.put_back_names():
        print(f"put back: {said}")
    checking.check(number, answer, seed=1, strict=True)
