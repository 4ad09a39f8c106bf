"""Error messages that several modules have."""


def check_positive(**numbers: int) -> None:
    """Raise ValueError if one of the numbers, named as the caller's user knows them, is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is a number of at least 1, got {number}.")


def in_one_line(error: BaseException) -> str:
    """Return what an error says without the line breaks that libraries put in: recipes print one line."""
    return " ".join(str(error).split())
