"""How to install what only some parts of this package need."""

REPOSITORY = "https://github.com/neuron-specialization/neuron-specialization"


def install(extra: str) -> str:
    """Return the command that installs this package with one of its extras: it is on no package index."""
    return f"pip install 'neuron-specialization[{extra}] @ git+{REPOSITORY}'"
