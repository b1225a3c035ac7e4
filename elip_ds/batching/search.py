"""The largest micro-batch that fits, from few tries, each in processes of its own.

Small sizes are measured, a line for each phase says where the limit lies, and the size that will be
used is run itself before it is given. Whatever the curve is really like, that run decides: a wrong
line costs tries, never an answer that does not fit.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elip_ds.batching.fit import MIN_POINTS, Fit, Shape, fit_peaks
from elip_ds.batching.memory import Outcome
from elip_ds.batching.sizes import show_bytes
from elip_ds.errors import UserError

Measure = Callable[[Sequence[int]], list[Outcome]]
"Tries ascending sizes in one group of processes; the last outcome may be the first that failed."
Verify = Callable[[int], Outcome]
"Tries one size for more steps, in a fresh group of processes."

MAX_TRIES = 6
LADDER = 5
"Sizes in the first group when nothing is known: 1, 2, 4, 8, 16."
REACH = 16
"How far beyond the largest measured size a line is used; farther, and it is measured again."
SURE = 1.1
"Of the largest size wanted: where a plan allows that much, nothing is measured before trying it."
WORTHWHILE = 0.01
"Gain in size, as a share, for which one more group of processes is started."


@dataclass(frozen=True)
class Answer:
    """micro_batch_size: the largest size that ran within the budget, one of those asked for.

    points: every outcome, in the order tried.  verified: the outcome of the verification that
    passed; None where only a short measurement did.  tries: verifications run, passed or not.
    warnings: what was not as the fit assumes, one line each.
    """

    micro_batch_size: int
    points: tuple[Outcome, ...]
    fit: Fit
    verified: Outcome | None
    tries: int
    warnings: tuple[str, ...]


class NothingFits(UserError):
    """Not even the smallest size.  needed_bytes: what that takes at least; None: nobody knows."""

    def __init__(self, micro_batch_size: int, budget_bytes: int, needed: int | None, reason: str):
        self.micro_batch_size = micro_batch_size
        self.needed_bytes = needed
        self.reason = reason
        takes = "takes more than there is" if needed is None else f"takes {show_bytes(needed)}"
        told = f" ({reason})" if reason else ""
        super().__init__(
            f"micro-batch {micro_batch_size} {takes}; the budget is {show_bytes(budget_bytes)} "
            f"per rank{told}"
        )


def find_micro_batch(
    measure: Measure,
    verify: Verify,
    budget_bytes: int,
    sizes: Sequence[int],
    *,
    guess: int | None = None,
    shape: Shape | None = None,
    max_tries: int = MAX_TRIES,
    worthwhile: float = WORTHWHILE,
) -> Answer:
    """sizes: those that may be answered, ascending, such as micro_batches gives.  Others are
    measured on the way, none below the first or above the last.

    budget_bytes: of a rank; a size whose peak is above it failed, whether or not memory ran out.
    guess, shape: what a plan says fits, and its curve.  max_tries: verifications, 1 or more; all
    are only used where the curve is not what the fit assumes.

    Raises NothingFits when the smallest size fails.
    """
    tries = _Tries(budget_bytes, sizes, shape, worthwhile)
    if guess is not None and guess >= SURE * sizes[-1]:
        tries.verify(verify, sizes[-1])
    if tries.verified is None:
        tries.measure(measure, guess)
    while tries.count < max_tries and (size := tries.next_size()) is not None:
        tries.verify(verify, size)
    return tries.answer()


class _Tries:
    """What is known so far: passed < the answer's limit < failed."""

    def __init__(
        self, budget_bytes: int, sizes: Sequence[int], shape: Shape | None, worthwhile: float
    ):
        self.budget_bytes = budget_bytes
        self.sizes = sizes
        self.shape = shape
        self.worthwhile = worthwhile
        self.points: list[Outcome] = []
        self.passed = 0  # largest size that fit, verified or only measured
        self.failed = sizes[-1] + 1  # smallest that did not, or is not wanted
        self.verified: Outcome | None = None
        self.count = 0  # verifications
        self.refuted = 0  # of these, failed against the fit's word
        self.warnings: list[str] = []

    def fit(self) -> Fit:
        return fit_peaks(self.points, self.shape)

    def take(self, outcome: Outcome, verification: bool) -> bool:
        """Note it; whether it fit.

        A measured peak above the budget decides nothing by itself: it may be far off, and the line
        through all of them knows better.
        """
        self.points.append(outcome)
        size, peaks = outcome.micro_batch_size, outcome.peaks
        if peaks is not None and peaks.highest <= self.budget_bytes:
            self.passed = max(self.passed, size)
            return True
        if verification or peaks is None:
            self.failed = min(self.failed, size)
        return False

    def measure(self, measure: Measure, guess: int | None) -> None:
        """A few small sizes, enough to check a line by, up to where it has not far to go."""
        if guess is not None:
            self._run(measure, self._quarters(min(guess, self.failed - 1)))
        if not self.passed:
            self._run(measure, [self.sizes[0] << i for i in range(LADDER)])
        if not self.passed:
            raise self._nothing_fits()
        while (limit := self.limit()) > REACH * self.passed:
            if not self._run(measure, self._quarters(min(limit, 4 * REACH * self.passed))):
                break
        if self.fit().num_sizes < MIN_POINTS:
            self._run(measure, [self.passed // 4, self.passed // 2])
        fit = self.fit()
        if fit.num_sizes >= MIN_POINTS and fit.doubt:
            self.warnings.append(f"{fit.doubt}: the limit is found by trying")

    def _quarters(self, size: int) -> list[int]:
        first = max(self.sizes[0], size // 16)
        return [first, 2 * first, 4 * first]

    def _run(self, measure: Measure, sizes: Sequence[int]) -> bool:
        """Those of sizes that are wanted, untried and not known to fail; whether there were any."""
        tried = {point.micro_batch_size for point in self.points}
        new = [s for s in sizes if self.sizes[0] <= s < self.failed and s not in tried]
        for outcome in measure(new) if new else ():
            self.take(outcome, verification=False)
        return bool(new)

    def limit(self) -> int:
        """The largest size not known to fail that is predicted to fit; 0: none."""
        return self.fit().largest(self.budget_bytes, self.failed - 1)

    def verify(self, verify: Verify, size: int) -> None:
        expected = self.fit() if self.points else None
        self.count += 1
        outcome = verify(size)
        if self.take(outcome, verification=True):
            self.verified = outcome
            return
        if expected and expected.predict(size).highest <= self.budget_bytes:
            self.refuted += 1
            self.warnings.append(f"micro-batch {size} was predicted to fit and did not")

    def next_size(self) -> int | None:
        """What to verify next; None when nothing more is to be gained."""
        done = self.verified.micro_batch_size if self.verified else 0
        least = done + max(1, round(self.worthwhile * done))
        wanted = self.sizes[bisect_left(self.sizes, least) : bisect_left(self.sizes, self.failed)]
        if not wanted:
            return None
        target = self._target(self.fit(), verified=done > 0)
        if done and target < wanted[0]:
            return None
        return wanted[max(0, bisect_right(wanted, target) - 1)]

    def _target(self, fit: Fit, verified: bool) -> int:
        """The fit's limit while nothing speaks against it, else between what passed and failed."""
        limit = fit.largest(self.budget_bytes, min(self.failed, REACH * self.passed))
        if not self.refuted:
            return limit
        middle = (self.passed + self.failed) // 2
        if limit < self.failed:
            return limit if fit.trusted else min(limit, middle)
        if fit.trusted and self.refuted == 1 and not verified:  # perhaps wrong by a little only
            return self.failed - max(1, self.failed // 8)
        return middle

    def answer(self) -> Answer:
        if self.verified is not None:
            best = self.verified.micro_batch_size
        else:
            count = bisect_right(self.sizes, min(self.passed, self.failed - 1))
            if not count:
                raise self._nothing_fits()
            best = self.sizes[count - 1]
            self.warnings.append(f"micro-batch {best} ran, but no verification passed")
        return Answer(
            best, tuple(self.points), self.fit(), self.verified, self.count, tuple(self.warnings)
        )

    def _nothing_fits(self) -> NothingFits:
        smallest = self.sizes[0]
        tried = [point for point in self.points if point.micro_batch_size == smallest]
        needed = [point.peaks.highest for point in tried if point.peaks]
        needed += [point.reached_bytes for point in tried if point.reached_bytes]
        if not needed and self.shape is not None:
            needed = [self.shape(smallest).highest]
        told = max(needed, default=0)
        return NothingFits(
            smallest,
            self.budget_bytes,
            told if told > self.budget_bytes else None,  # else the plan is wrong here
            tried[-1].reason if tried else "",
        )
