"""LoraDelta: one low-rank update ``scaling * B @ A`` of one weight."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from lorastack.core.dtypes import cast
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, NonFiniteError, ShapeError, UnsupportedError, shown
from lorastack.ways import Way, ways

Kind = Literal["linear", "embedding", "experts", "stored", "conv"]
_NDIM: dict[str, tuple[int, ...]] = {
    "linear": (2,),
    "embedding": (2,),
    "experts": (3,),
    "stored": (2, 3),
    "conv": (3, 4, 5),
}

#: The floats that NumPy has of ``ml_dtypes``: it calls their kind void.
_FURTHER_FLOATS = frozenset("bfloat16 float8_e4m3fn float8_e5m2".split())


def multiplier(scale: float, scaling: float, dtype: np.dtype) -> float:
    """``scale * scaling``, which the type that computes has to hold: in float32 1e39 would be infinite.

    Raises
    ------
    ArgumentError
        When it does not.
    """
    value = scale * scaling
    if not abs(value) <= float(np.finfo(dtype).max):
        raise ArgumentError(f"scale {scale:g} times the scaling {scaling:g} is more than {dtype} holds")
    return value


class LoraDelta:
    """One low-rank update of one weight, frozen: ``scaling * B @ A`` (Hu et al. 2021, arXiv:2106.09685).

    Parameters
    ----------
    a, b
        Arrays of any float dtype, or lazily read `Factor` objects. By ``kind``:

        ============  ======================  =====================
        kind          a                       b
        ============  ======================  =====================
        linear        ``(rank, in)``          ``(out, rank)``
        embedding     ``(rank, vocabulary)``  ``(width, rank)``
        experts       ``(E, rank, in)``       ``(E, out, rank)``
        conv          ``(rank, in, *kernel)`` ``(out, rank, 1, ...)``
        stored        ``(..., rank, cols)``   ``(..., rows, rank)``
        ============  ======================  =====================

        ``stored`` is an update of a parameter as it is kept, ``[rows, cols]`` or ``[E, rows, cols]``, whichever
        of the two a model multiplies with: only the base tells (`lorastack.base.settle`).
    scaling
        The adapter's own multiplier for this weight: alpha/rank, or alpha/√rank under rsLoRA.
    kind
        ``"linear"`` unless given; three-dimensional factors are taken as experts, four- and
        five-dimensional ones as a convolution.

    Raises
    ------
    ShapeError
        When the two factors do not fit each other; the message has both shapes.

    Examples
    --------
    >>> import numpy as np
    >>> delta = LoraDelta(np.ones((1, 3)), np.ones((2, 1)), scaling=0.5)
    >>> delta.rank, delta.in_features, delta.out_features
    (1, 3, 2)
    >>> delta.apply(np.array([1.0, 2.0, 3.0]))
    array([3., 3.])
    """

    __slots__ = ("_a", "_b", "kind", "scaling")

    _a: Factor
    _b: Factor
    scaling: float
    kind: Kind

    def __init__(
        self, a: np.ndarray | Factor, b: np.ndarray | Factor, scaling: float = 1.0, kind: Kind | None = None
    ) -> None:
        fa = a if isinstance(a, Factor) else Factor.of(as_floats(a, "a"), "lora_A")
        fb = b if isinstance(b, Factor) else Factor.of(as_floats(b, "b"), "lora_B")
        if kind is None:
            kind = {3: "experts", 4: "conv", 5: "conv"}.get(len(fa.shape), "linear")  # type: ignore[assignment]
        assert kind is not None
        problem = misfit(fa.shape, fb.shape, kind)
        if problem:
            raise ShapeError(problem)
        put = object.__setattr__
        put(self, "_a", fa)
        put(self, "_b", fb)
        put(self, "scaling", finite(scaling, "a scaling"))
        put(self, "kind", kind)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a LoraDelta is frozen, {name!r} cannot be set; make a new one or use .scaled()")

    def __copy__(self) -> LoraDelta:
        return self

    def __deepcopy__(self, memo: object) -> LoraDelta:
        return self

    def __reduce__(self) -> tuple[type[LoraDelta], tuple[Factor, Factor, float, Kind]]:
        return LoraDelta, (self._a, self._b, self.scaling, self.kind)

    def __repr__(self) -> str:
        return f"LoraDelta(rank={self.rank}, {self.in_features} -> {self.out_features}, scaling={self.scaling:g}" + (
            f", kind={self.kind!r})" if self.kind != "linear" else ")"
        )

    @property
    def a(self) -> np.ndarray:
        """lora_A, read-only, in its stored dtype. Raises NonFiniteError on NaN or Inf."""
        return self._a.array

    @property
    def b(self) -> np.ndarray:
        """lora_B, read-only, in its stored dtype. Raises NonFiniteError on NaN or Inf."""
        return self._b.array

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """A and B as `Factor` objects: shapes, dtypes and origin without reading the numbers."""
        return self._a, self._b

    @property
    def rank(self) -> int:
        """Rank of the update (for experts: of each expert)."""
        return self._a.shape[0 if self.kind == "conv" else -2]

    @property
    def in_features(self) -> int:
        """Length of the input (embedding: the vocabulary; convolution: channels per group)."""
        return self._a.shape[1 if self.kind == "conv" else -1]

    @property
    def out_features(self) -> int:
        """Length of the output."""
        return self._b.shape[0 if self.kind == "conv" else -2]

    @property
    def num_experts(self) -> int | None:
        """Number of experts, or None for everything else."""
        return self._a.shape[0] if self.kind != "conv" and len(self._a.shape) == 3 else None

    def over(self, kind: Kind) -> LoraDelta:
        """The update of the transposed weight, ``A^T B^T``, as one of ``kind``.

        >>> LoraDelta(np.ones((1, 3)), np.ones((2, 1)), kind="stored").over("linear")
        LoraDelta(rank=1, 2 -> 3, scaling=1)
        """
        a, b = (factor.mapped(_turned, (*factor.shape[:-2], *factor.shape[:-3:-1])) for factor in self.factors)
        return LoraDelta(b, a, self.scaling, kind)

    def scaled(self, factor: float) -> LoraDelta:
        """The same factors with ``factor`` times the scaling."""
        return LoraDelta(self._a, self._b, self.scaling * factor, self.kind)

    def apply(self, x: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """``scale * scaling * B @ A @ x``, never forming ``B @ A``.

        Parameters
        ----------
        x
            ``[in]`` or ``[..., in]``, any float dtype; for an embedding integer ids of any shape; for
            experts ``[E, ..., in]``.

        Returns
        -------
        numpy.ndarray
            ``[..., out]`` in float32, or in float64 for float64 input.

        Raises
        ------
        ShapeError
            When x does not fit.
        UnsupportedError
            For a convolution, which needs the model's stride and padding.
        """
        x = np.asarray(x)
        dtype = compute_dtype(x)
        a, b = self._arrays(dtype)
        factor = dtype.type(multiplier(scale, self.scaling, dtype))
        check_input(x, self)
        if self.kind == "embedding":
            return (a[:, x.reshape(-1)].T * factor @ b.T).reshape(*x.shape, self.out_features)
        x = x.astype(dtype, copy=False)
        if self.num_experts:
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            y = (flat @ a.transpose(0, 2, 1) * factor) @ b.transpose(0, 2, 1)
            return y.reshape(*x.shape[:-1], self.out_features)
        return (x @ a.T * factor) @ b.T

    def dense(self) -> np.ndarray:
        """``scaling * B @ A`` as one matrix, in float32: ``[out, in]``, experts ``[E, out, in]``, convolution
        ``[out, in, *kernel]``. For tests and small sizes; nothing else in the package forms it.
        """
        a, b = self._arrays(np.dtype(np.float32))
        times = np.float32(multiplier(1.0, self.scaling, a.dtype))
        if self.kind == "conv":
            flat = b.reshape(b.shape[0], b.shape[1]) @ a.reshape(a.shape[0], -1)
            return (flat * times).reshape(b.shape[0], *a.shape[1:])
        return b @ a * times

    def _arrays(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        read_all([self])
        a, b = (in_type(factor.array, dtype, factor.label) for factor in self.factors)
        return a, b


def _turned(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def misfit(a: tuple[int, ...], b: tuple[int, ...], kind: Kind) -> str | None:
    """Say why factors of these shapes are not an update of this kind; None when they are."""
    if kind not in _NDIM:
        raise ArgumentError(f"kind {kind!r} is not one of {', '.join(_NDIM)}")
    shapes = f"lora_A is {a} and lora_B is {b}"
    if len(a) not in _NDIM[kind] or len(b) != len(a):
        wanted = " or ".join(str(n) for n in _NDIM[kind])
        return f"{shapes}: {kind} factors have {wanted} dimensions each"
    if 0 in a or 0 in b:
        return f"{shapes}: a dimension is 0"
    stacked = kind != "conv" and len(a) == 3
    if stacked and a[0] != b[0]:
        return f"{shapes}: {a[0]} experts against {b[0]}"
    rank_a, rank_b = (a[1], b[2]) if stacked else (a[0], b[1])
    if rank_a != rank_b:
        return f"{shapes}: rank {rank_a} against {rank_b}"
    if kind == "conv" and any(side != 1 for side in b[2:]):
        return f"{shapes}: lora_B of a convolution has a kernel of 1"
    return None


def finite(value: float, what: str) -> float:
    """``value`` as a float; ArgumentError when it is no number, NaN or infinite."""
    try:
        if type(value) not in (int, float) and np.asarray(value).dtype.kind in "cmM":  # NumPy drops what does not fit
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{what} is a number, got {shown(value)}") from error
    if not math.isfinite(number):
        raise ArgumentError(f"{what} is a finite number, got {number}")
    return number


def in_type(array: np.ndarray, dtype: np.dtype, label: str) -> np.ndarray:
    """A factor in the type that computes; float64 may hold more than float32."""
    if array.dtype == np.float64 and dtype == np.float32:
        return cast(array, 1.0, dtype, label, whole=False)
    return array.astype(dtype, copy=False)


def compute_dtype(x: np.ndarray) -> np.dtype:
    """The dtype a sum over ``x`` is taken and returned in: float64 for float64, else float32."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def check_input(x: np.ndarray, delta: LoraDelta) -> None:
    """Raise unless ``delta`` can be applied to ``x``."""
    ids = np.issubdtype(x.dtype, np.integer)
    if delta.kind == "conv":
        raise UnsupportedError(
            "a convolution's update cannot be applied to a bare vector: stride and padding are the model's"
            + ways(
                Way("attach the stack with lorastack.torch", "give prompts to `lorastack run`"),
                Way("use dense()", None),
            )
        )
    if delta.kind == "embedding":
        if not ids:
            raise ShapeError(f"x is {x.dtype}, this is an embedding's update: it takes integer token ids")
        if x.size and not 0 <= int(x.min()) <= int(x.max()) < delta.in_features:
            raise ShapeError(
                f"token ids run from {x.min()} to {x.max()}, this update's vocabulary is {delta.in_features}"
            )
        return
    if ids or x.dtype == bool:
        raise ShapeError(f"x is {x.dtype}, this delta takes floating-point input")
    if x.ndim == 0 or x.shape[-1] != delta.in_features:
        has = x.shape[-1] if x.ndim else "no"
        raise ShapeError(f"x has {has} features, this delta takes {delta.in_features} (x is {x.shape})")
    if delta.num_experts and (x.ndim < 2 or x.shape[0] != delta.num_experts):
        raise ShapeError(f"x is {x.shape}, an experts' update takes [{delta.num_experts}, ..., {delta.in_features}]")


def read_all(deltas: list[LoraDelta]) -> None:
    """Read every factor, and list every one that holds NaN or Inf in one error."""
    found: list[str] = []
    for delta in deltas:
        for factor in delta.factors:
            try:
                _ = factor.array
            except NonFiniteError as error:
                found.append(str(error))
    if found:
        raise NonFiniteError(f"{len(found)} factor{'s' if len(found) > 1 else ''} not finite", found)


def as_floats(array: np.ndarray, name: str) -> np.ndarray:
    """``array`` if it has a float dtype (bfloat16 too), as float32 if it holds integers; else ShapeError."""
    try:
        array = np.asarray(array)
    except (TypeError, ValueError) as error:  # lists of several lengths
        raise ShapeError(f"{name} is {shown(array)}, not a float array") from error
    if array.dtype.kind in "iub":
        return array.astype(np.float32)
    if array.ndim == 0 or not (array.dtype.kind == "f" or array.dtype.name in _FURTHER_FLOATS):
        raise ShapeError(f"{name} is {array.dtype} of shape {array.shape}, not a float array")
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array
