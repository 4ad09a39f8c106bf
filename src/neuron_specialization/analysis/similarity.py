"""Linear centered kernel alignment (CKA) between representations of the same inputs, all at once or streamed.

CKA compares the similarity structure of n inputs in two spaces: 1 where one is a rotation and scaling of the other,
near 0 where they are unrelated (Kornblith et al., 2019). The usual estimate is biased upwards where there are few
inputs for the number of dimensions; the debiased one (the default) takes HSIC₁ of Song et al. (2012).

Everything needed is a sum over inputs, so that a corpus of any size streams through in memory of d² numbers per
representation, in float64, and gives the number that all inputs at once give.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

_FEWEST = 4  # HSIC₁ divides by n - 3


def linear_cka(x: torch.Tensor, y: torch.Tensor, debiased: bool = True) -> float:
    """Return the linear CKA of two representations of the same n inputs.

    Args:
        x: [n, d], any floating dtype.
        y: [n, e], row i for the same input as row i of x.
        debiased: estimate HSIC by HSIC₁ (unbiased, may be slightly below 0) instead of the biased HSIC₀.

    Raises:
        ValueError: if the shapes do not fit, there are fewer than 4 inputs, or a representation is constant.
    """
    streamed = StreamingCKA([("x", "y")], debiased)
    streamed.update({"x": x, "y": y})
    return streamed.similarity()["x", "y"]


class StreamingCKA:
    """Linear CKA of named representations, from batches of inputs.

    Args:
        pairs: names of the representations to compare.
        debiased: see `linear_cka`.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], debiased: bool = True) -> None:
        self.pairs = list(dict.fromkeys(pairs))
        self.debiased = debiased
        self.names = list(dict.fromkeys(name for pair in self.pairs for name in pair))
        self._shift: dict[str, torch.Tensor] = {}
        self._sums: dict[tuple[str, str], _Sums] = {}

    def update(self, representations: Mapping[str, torch.Tensor]) -> None:
        """Add a batch: name → [n, d], row i of each for the same input.

        Raises:
            ValueError: if a representation is missing, is not [n, d], or has another n or d than the others.
        """
        missing = [name for name in self.names if name not in representations]
        if missing:
            raise ValueError(f"Expected representations {', '.join(self.names)}; missing: {', '.join(missing)}.")
        rows = {name: self._shifted(name, representations[name]) for name in self.names}
        if len({len(row) for row in rows.values()}) != 1:
            lengths = ", ".join(f"{name} {len(row)}" for name, row in rows.items())
            raise ValueError(f"Expected one row per input in every representation, got {lengths}.")
        for a, b in dict.fromkeys([*((name, name) for name in self.names), *self.pairs]):
            batch = _Sums.of(rows[a], rows[b])
            self._sums[a, b] = self._sums[a, b] + batch if (a, b) in self._sums else batch

    def similarity(self) -> dict[tuple[str, str], float]:
        """Return pair → CKA over everything added so far.

        Raises:
            ValueError: if there are fewer than 4 inputs, or a representation does not vary.
        """
        hsic = {names: sums.hsic(self.debiased) for names, sums in self._sums.items()}
        constant = [name for name in self.names if hsic[name, name] <= 0]
        if constant:
            raise ValueError(f"CKA is not defined where a representation does not vary: {', '.join(constant)}.")
        return {(a, b): hsic[a, b] / (hsic[a, a] * hsic[b, b]) ** 0.5 for a, b in self.pairs}

    def _shifted(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"{name}: expected floating [inputs, width], got {values.dtype} {list(values.shape)}.")
        values = values.detach().to(torch.float64)
        # CKA does not depend on an offset, and sums of values near zero round less than sums of large ones
        shift = self._shift.setdefault(name, values.mean(0))
        if values.shape[1] != len(shift):
            raise ValueError(f"{name}: expected width {len(shift)} as in the batches before, got {values.shape[1]}.")
        return values - shift


@dataclass
class _Sums:
    """Sums over inputs that HSIC of x [n, d] and y [n, e] is computed from; a_i = ‖x_i‖², b_i = ‖y_i‖².

    With K = x xᵀ, L = y yᵀ and ~ for "diagonal set to zero":
    tr(K~ L~) = ‖xᵀy‖² - Σ a_i b_i;  1ᵀ K~ 1 = ‖Σ x‖² - Σ a;
    1ᵀ K~ L~ 1 = (Σx)ᵀ xᵀy (Σy) - (Σx)·(Σ b_i x_i) - (Σy)·(Σ a_i y_i) + Σ a_i b_i.
    """

    n: int
    xy: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bx: torch.Tensor
    ay: torch.Tensor
    ab: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> "_Sums":
        a, b = x.square().sum(1), y.square().sum(1)
        return cls(len(x), x.T @ y, x.sum(0), y.sum(0), a.sum(), b.sum(), b @ x, a @ y, a @ b)

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def hsic(self, debiased: bool) -> float:
        if self.n < _FEWEST:
            raise ValueError(f"CKA needs at least {_FEWEST} inputs, got {self.n}.")
        if not debiased:
            return float((self.xy - torch.outer(self.x, self.y) / self.n).square().sum()) / (self.n - 1) ** 2
        trace = self.xy.square().sum() - self.ab
        totals = (self.x @ self.x - self.a) * (self.y @ self.y - self.b)
        rows = self.x @ self.xy @ self.y - self.x @ self.bx - self.y @ self.ay + self.ab
        n = self.n
        return float(trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))
