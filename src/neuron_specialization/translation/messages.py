"""What error messages are made of."""


def in_one_line(error: BaseException) -> str:
    """Return what an error says without the line breaks that libraries put in: recipes print one line."""
    return " ".join(str(error).split())
