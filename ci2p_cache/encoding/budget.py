"""What ends a run early: too many images that cannot be decoded, too many symbols out of range."""

from __future__ import annotations

from ci2p_cache.cache.index import ChannelSums, IndexRow
from ci2p_cache.errors import SaturationError, TooManyBadImagesError, UsageError
from ci2p_cache.specs import LatentSpec

__all__ = ["ErrorBudget", "SaturationProbe", "parse_max_errors", "refuse_more_bad"]

_ALL_BAD = 64
"""When that many images, the first ones, all fail, the source or the settings are wrong."""

_MAX_CLIPPED_SHARE = 1e-4
"""Share of saturated int8 symbols above which int16 is asked for; the official q5 is far below."""

_PROBE_IMAGES = 512
"""Images over which that share is judged."""


def parse_max_errors(text: str, total: int) -> int:
    """Reads `--max-errors`: a share such as "0.1%", or a number of images.

    Returns:
        The number of bad images allowed among `total`. A share above 0 allows at least one, but
        never all: 0.1% of 60 images would be none.

    Raises:
        UsageError: the text is neither.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                least = min(1, total - 1) if share else 0
                return max(int(share * total + 1e-9), least)
        elif int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise UsageError(f"`max_errors` is {text!r}; wanted a share such as 0.1% or a count such as 5")


class ErrorBudget:
    """Counts images that cannot be decoded.

    Args:
        allowed: Bad images that the whole cache may hold.
        already_bad: Those in shards committed earlier.
    """

    def __init__(self, allowed: int, *, already_bad: int = 0) -> None:
        self.allowed = allowed
        self.bad = already_bad
        self._seen = 0
        self._bad_now = 0

    def count(self, row: IndexRow) -> None:
        """Counts one image.

        Raises:
            TooManyBadImagesError: the budget is used up, or none of the first images was good.
        """
        self._seen += 1
        if row.status == "ok":
            return
        self.bad += 1
        self._bad_now += 1
        reason = f"the last one is {row.path}: {row.error}"
        if self._bad_now == self._seen == _ALL_BAD:
            raise TooManyBadImagesError(
                f"the first {_ALL_BAD} images could all not be decoded; {reason}",
                hint="is this the right folder? Look at that file first",
            )
        refuse_more_bad(self.bad, self.allowed, reason)


def refuse_more_bad(bad: int, allowed: int, reason: str) -> None:
    """Holds a number of bad images against the budget.

    Args:
        bad: Images that could not be decoded.
        allowed: How many may be.
        reason: What is known of the last one.

    Raises:
        TooManyBadImagesError: there are more.
    """
    if bad > allowed:
        raise TooManyBadImagesError(
            f"{bad} images could not be decoded, {allowed} are allowed; {reason}. "
            "Shards committed so far are safe",
            hint="mend or remove such files, or run the same command with --max-errors 1% "
            "(or a count): bad images then become rows without a latent, listed in "
            "errors.parquet",
        )


class SaturationProbe:
    """Refuses a dtype that too many symbols do not fit, judged over the first 512 images.

    Args:
        latent: The dtype and its limit.
    """

    def __init__(self, latent: LatentSpec) -> None:
        self._latent = latent
        self._sums = ChannelSums.empty(latent.channels)
        self._images = 0

    def check(self, sums: ChannelSums) -> None:
        """Judges one shard before it is committed.

        Raises:
            SaturationError: more than 1e-4 of the int8 symbols, or any int16 symbol, is too large.
        """
        clipped = sums.clipped.sum()
        if self._latent.dtype == "int16" and clipped:
            raise SaturationError(
                f"{int(clipped)} symbols exceed int16 at step {self._latent.step}",
                hint="repeat with a larger --step, or with --dtype float32 into a new folder",
            )
        if self._images >= _PROBE_IMAGES:
            return
        self._sums = self._sums + sums
        self._images += sums.count // (self._latent.height * self._latent.width)
        share = self._sums.clipped.sum() / max(self._sums.count * self._latent.channels, 1)
        if share > _MAX_CLIPPED_SHARE:
            raise SaturationError(
                f"{share:.2%} of the symbols exceed {self._latent.symbol_limit} in absolute value "
                f"at step {self._latent.step}; {_MAX_CLIPPED_SHARE:.2%} are accepted for int8. "
                "Nothing of this shard was committed",
                hint="repeat the command with --dtype int16 into a new --out folder",
            )
