"""Whether the tests notice: twenty behaviours and more are broken on purpose, one at a time.

::

    tree --copy--> clean copy --> the expected tests pass there
                        |
                        +--copy, one text replaced--> expected tests -> whole default tier
                                                            -> the same of the slow tier

A mutation is caught by the first tier in which a test fails. A test that fails in the clean copy
too does not count, nor does a run that breaks down for another reason, such as a failing import.

The bar: the default tier may miss two mutations, both tiers together may miss none. For twenty
mutations that is 18 and 20; each spare one raises both numbers.

python tests/long/mutations.py [--only NAME[,NAME]] [--list] [--jobs N] [--no-baseline]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]

MAX_MISSED_BY_DEFAULT = 2
"""Mutations that may be left to the slow tier."""

DEFAULT, SLOW = "not slow", "slow"
"""Marker expressions of the two tiers."""

_ACCIDENTS = (
    *("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError"),
    # pytest's word for a test file that cannot be imported.
    "collection failure",
)
"""Errors that say the mutation itself is broken, not that a test has noticed it."""

_MEANINGFUL = (0, 1, 5)
"""Exit codes of pytest: all passed, some failed, none was selected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """One behaviour that is broken by replacing one text."""

    name: str
    """For `--only` and the output."""
    says: str
    """What no longer works, in one sentence."""
    file: str
    """The file, relative to the repository."""
    old: str
    """The text that is replaced; it occurs once."""
    new: str
    """What is put there."""
    where: tuple[str, ...]
    """Tests that are expected to notice, files or node ids, relative to tests/."""

    @property
    def tests(self) -> tuple[str, ...]:
        """The same, relative to the repository."""
        return tuple(f"tests/{node}" for node in self.where)


_EPOCH = (
    "loader/test_loader.py::test_an_epoch_holds_every_good_sample_once_as_the_split_gives_it[int8]"
)
_FOLDS = "training/test_folds.py::test_five_folds_validate_each_row_once_and_train_on_the_others"

MUTATIONS = (
    Mutation(
        name="checksum-ignored",
        says="The checksum of an uncompressed chunk is computed and not held against the stored.",
        file="ci2p_cache/cache/codecs.py",
        old='raise ValueError("crc32c is wrong")',
        new="pass",
        where=(
            "cache/test_corners.py::TestShard"
            "::test_a_wrong_checksum_or_size_of_an_uncompressed_chunk_is_refused",
        ),
    ),
    Mutation(
        name="resume-forgets-a-shard",
        says="A command that continues leaves out the first of the missing shards.",
        file="ci2p_cache/encoding/intent.py",
        old="return commits, missing",
        new="return commits, missing[1:] if commits else missing",
        where=("encoding/test_encode.py::TestDamage::test_encoding_again_mends_what_is_missing",),
    ),
    Mutation(
        name="rows-swapped-between-shards",
        says="A batch takes the last row of the first shard for the first row of the second.",
        file="ci2p_cache/cache/split.py",
        old="np.divmod(rows, self.record.shard_rows)",
        new="(lambda n: np.divmod(np.where(np.isin(rows, [n - 1, n]) & (self.num_rows > n),"
        " 2 * n - 1 - rows, rows), n))(self.record.shard_rows)",
        where=(_EPOCH,),
    ),
    Mutation(
        name="label-off-by-one",
        says="A batch gives each image the label of the row before it.",
        file="ci2p_cache/loader/batches.py",
        old="self.split.labels[rows]",
        new="self.split.labels[rows - 1]",
        where=(_EPOCH,),
    ),
    Mutation(
        name="views-of-another-seed",
        says="Random crops are drawn from the seed that follows the one asked for.",
        file="ci2p_cache/images/views.py",
        old="_draws(view_spec.seed,",
        new="_draws(view_spec.seed + 1,",
        where=("images/test_views.py::test_crops_of_seed_42_stay_where_they_are",),
    ),
    Mutation(
        name="validation-rows-in-training",
        says="With folds, the rows that validate are trained from as well.",
        file="ci2p_cache/training/loaders.py",
        old="rows[~validates]",
        new="rows",
        where=(_FOLDS,),
    ),
    Mutation(
        name="saturation-not-counted",
        says="Symbols that do not fit the dtype are clamped and counted as none.",
        file="ci2p_cache/encoder/frozen.py",
        old="clipped.sum(dim=(-2, -1))",
        new="0 * clipped.sum(dim=(-2, -1))",
        where=("encoder/test_encoder.py::test_saturation_clamps_and_counts_per_channel",),
    ),
    Mutation(
        name="exif-applied-twice",
        says="An image is turned by its EXIF orientation and then once more.",
        file="ci2p_cache/images/decode.py",
        old="pixels = _turned(pixels, orientation)",
        new="pixels = _turned(_turned(pixels, orientation), orientation)",
        where=("images/test_decode.py::test_orientation_turns_pixels_only_where_it_is_applied",),
    ),
    Mutation(
        name="lock-not-taken",
        says="The lock file is written, and no one holds its lock.",
        file="ci2p_cache/cache/lock.py",
        old="fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        new="pass",
        where=("cache/test_corners.py::TestLock::test_it_names_its_holder_and_waits_for_nobody",),
    ),
    Mutation(
        name="checkpoint-without-optimizer",
        says="A checkpoint holds none of the optimiser's moments: they start at zero again.",
        file="ci2p_cache/training/checkpoint.py",
        old="OPTIMIZER: _tensor_bytes(checkpoint.optimizer)",
        new="OPTIMIZER: _tensor_bytes({})",
        where=(
            "training/test_checkpoint.py"
            "::test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_naming_both"
            "[flipped weights]",
        ),
    ),
    Mutation(
        name="exit-code-3-turned-1",
        says="Data that cannot be used ends a command with 1, the code of a mistake of ours.",
        file="ci2p_cache/errors.py",
        old="exit_code = 3",
        new="exit_code = 1",
        where=("cli/test_cli.py::TestBadInput::test_an_empty_folder",),
    ),
    Mutation(
        name="tar-end-ignored",
        says="A tar that is cut between two members counts as whole.",
        file="ci2p_cache/images/tar_bytes.py",
        old='self._refuse("ends without an end marker; it was cut short")',
        new="return None",
        where=("hostile/test_tars.py::test_a_tar_cut_anywhere_is_refused[.tar]",),
    ),
    Mutation(
        name="html-not-escaped",
        says="Names from a stranger's cache are markup in the report.",
        file="ci2p_cache/report/elements.py",
        old="return html.escape(visible(text, longest=longest), quote=True)",
        new="return visible(text, longest=longest)",
        where=("report/test_report.py::test_hostile_names_are_shown_and_never_obeyed",),
    ),
    Mutation(
        name="rank-slices-overlap",
        says="The first sample of a rank's slice is the last one of the rank before, too.",
        file="ci2p_cache/loader/order.py",
        old="min((rank + 1) * share, num_samples)",
        new="min((rank + 1) * share + 1, num_samples)",
        where=("training/test_distributed.py::test_slices_are_those_of_torch_chunk",),
    ),
    Mutation(
        name="evaluation-counts-a-padded-row",
        says="Loss and hits of the last image of each batch count twice, as if padded with it.",
        file="ci2p_cache/training/metrics.py",
        old="_scores(logits_BK.float(), batch.labels)",
        new="_scores(logits_BK.float(), batch.labels) "
        "+ _scores(logits_BK[-1:].float(), batch.labels[-1:])",
        where=("inference/test_evaluate.py::test_both_files_say_the_same",),
    ),
    Mutation(
        name="dequantize-without-offset",
        says="Dequantising leaves out the medians.",
        file="ci2p_cache/encoder/frozen.py",
        old=".add_(medians_M[:, None, None])",
        new="",
        where=("encoder/test_encoder.py::test_symbols_survive_dequantising_and_quantising_again",),
    ),
    Mutation(
        name="decoder-crash-ends-the-run",
        says="A decoder that crashes is an error of the machine instead of its image.",
        file="ci2p_cache/images/decoders.py",
        old='ImageDecodeError(f"the decoder crashed',
        new='ResourceError(f"the decoder crashed',
        where=(
            "images/test_decoder_crash.py"
            "::test_a_decoder_that_crashes_makes_its_image_bad_and_the_next_one_is_decoded",
        ),
    ),
    Mutation(
        name="stale-mirror-accepted",
        says="What was fetched of an earlier cache at the same URL is taken for this one's.",
        file="ci2p_cache/cache/folder.py",
        old="not mine.is_file() or mine.read_bytes() != manifest",
        new="not mine.is_file()",
        where=(
            "cache/test_remote_cache.py"
            "::test_another_cache_at_the_same_url_is_not_mixed_with_the_old_one",
        ),
    ),
    Mutation(
        name="folds-overlap",
        says="A fold validates its own part and those of all folds before it.",
        file="ci2p_cache/training/loaders.py",
        old="% spec.folds == spec.fold",
        new="% spec.folds <= spec.fold",
        where=(_FOLDS,),
    ),
    Mutation(
        name="onnx-rounds-half-away-from-zero",
        says="An exported model rounds y halfway between two symbols away from zero, not to even.",
        file="ci2p_cache/inference/export.py",
        old="torch.round((y_BMhw - self.offset) / self._step)",
        new="(lambda x: x.sign() * (x.abs() + 0.5).floor())((y_BMhw - self.offset) / self._step)",
        where=(
            "inference/test_graph.py"
            "::test_a_value_at_a_tie_falls_to_the_even_symbol_as_in_the_cache",
        ),
    ),
    # Spare ones.
    Mutation(
        name="swapped-shards-accepted",
        says="An intact shard that is in the place of another is read as that one.",
        file="ci2p_cache/cache/containers.py",
        old="if stored_crc != index_crc:",
        new="if False:",
        where=("cache/test_zarr_shards.py::test_an_intact_but_foreign_shard_is_refused",),
    ),
    Mutation(
        name="loader-without-offset",
        says="Batches are dequantised without the medians.",
        file="ci2p_cache/loader/batches.py",
        old="latents.add_(self._offset)",
        new="pass",
        where=(_EPOCH,),
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutation."""

    mutation: Mutation
    tier: str | None
    """The marker expression of the tier that caught it; None where neither did."""
    told: str
    """The test that failed first, or why the mutation does not count."""
    seconds: float
    """Of all its runs."""

    def __str__(self) -> str:
        caught = {DEFAULT: "caught by default tier", SLOW: "caught only by slow tier"}
        tier = caught.get(self.tier or "", "caught by nothing")
        return f"{self.mutation.name:32} {tier:24} {self.seconds:6.1f} s  {self.told}"


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of pytest has told."""

    passed: frozenset[str]
    """Node ids of the tests that ran and passed."""
    failed: tuple[str, ...]
    """Node ids of those that noticed something, in their order."""
    accident: str
    """Why the run does not count; empty where it does."""


class Tree:
    """A copy of the repository, with what its tests expect beside it.

    Args:
        folder: Where it is made; what pytest writes goes there too.
        source: What is copied: the repository, or another copy.
        files: The files to copy, relative to it.
    """

    def __init__(self, folder: Path, source: Path, files: Sequence[str]) -> None:
        self.folder, self.root = folder, folder / "tree"
        for name in files:
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target, follow_symlinks=False)
        if (ROOT.parent / "shared").is_dir():
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        # Some tests ask git which files there are.
        for command in (["init"], ["add", "--all"]):
            subprocess.run(["git", *command], cwd=self.root, check=True, capture_output=True)
        # An editable install of the repository would be tested instead, and notice nothing.
        found = self._python("-c", "import ci2p_cache; print(ci2p_cache.__file__)").stdout.strip()
        if Path(found) != self.root / "ci2p_cache" / "__init__.py":
            raise SystemExit(f"the tests in {self.root} would not test it: {found}")

    def test(self, tests: Iterable[str], tier: str, *, without: Iterable[str] = ()) -> Report:
        """Runs tests in one process, up to the first that fails.

        Args:
            tests: Files or node ids, relative to the copy.
            tier: A marker expression; other tests among them are left out.
            without: Node ids to leave out.
        """
        results = self.folder / "results.xml"
        results.unlink(missing_ok=True)
        done = self._python(
            *("-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", tier),
            *("-o", "junit_family=xunit1", f"--junitxml={results}"),
            f"--basetemp={self.folder / 'tmp'}",
            *(f"--deselect={node}" for node in without),
            *tests,
        )
        accident = ""
        if done.returncode not in _MEANINGFUL or not results.exists():
            accident = f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"
        passed, failed = set(), []
        for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
            problem = case.find("failure")
            problem = case.find("error") if problem is None else problem
            if problem is not None:
                failed.append(_node_id(case))
                reason = problem.get("message", "").removeprefix('failed on setup with "')
                if reason.startswith(_ACCIDENTS):
                    accident = f"{failed[-1]}: {reason}"
            elif case.find("skipped") is None:
                passed.add(_node_id(case))
        return Report(frozenset(passed), tuple(failed), accident)

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


class Check:
    """Tries mutations; safe to use from many threads.

    Args:
        folder: Where copies are made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        # One that was deleted and not committed yet is still listed.
        self._files = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
        self.clean = Tree(folder / "clean", ROOT, self._files)
        self._clean_lock = threading.Lock()
        self._sound: dict[str, bool] = {}

    def baseline(self, mutations: Iterable[Mutation]) -> None:
        """Runs all expected tests in the clean copy.

        Raises:
            SystemExit: one of them fails, is not there, or is none of the default tier.
        """
        wanted = sorted({test for mutation in mutations for test in mutation.tests})
        report = self.clean.test(wanted, DEFAULT)
        if report.accident or report.failed:
            raise SystemExit(f"expected tests fail unmutated: {report.accident or report.failed}")
        idle = [test for test in wanted if not any(_is_of(node, test) for node in report.passed)]
        if idle:
            raise SystemExit(f"expected tests that the default tier does not run: {idle}")
        self._sound = dict.fromkeys(report.passed, True)

    def verdict(self, mutation: Mutation) -> Verdict:
        """Applies a mutation to a copy of its own, and runs tests there until one fails."""
        started = time.monotonic()
        folder = self._folder / mutation.name
        try:
            tree = Tree(folder, self.clean.root, self._files)
            (tree.root / mutation.file).write_text(broken_text(tree.root, mutation), "utf-8")
            tier, told = self._caught(tree, mutation)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Verdict(mutation, tier, told, time.monotonic() - started)

    def _caught(self, tree: Tree, mutation: Mutation) -> tuple[str | None, str]:
        """Returns the tier that caught a mutation and the test; or None and the reason."""
        unsound: list[str] = []
        for tier in (DEFAULT, SLOW):
            for tests in (mutation.tests, ["tests"]):
                while True:
                    report = tree.test(tests, tier, without=unsound)
                    if report.accident:
                        return None, report.accident
                    if not report.failed:
                        break
                    if self._is_sound(report.failed[0], tier):
                        return tier, report.failed[0]
                    unsound.append(report.failed[0])
        return None, "no test failed"

    def _is_sound(self, node: str, tier: str) -> bool:
        """Whether a test passes in the clean copy."""
        with self._clean_lock:
            if node not in self._sound:
                self._sound[node] = node in self.clean.test([node], tier).passed
            return self._sound[node]


def broken_text(root: Path, mutation: Mutation) -> str:
    """Returns the content of a file of a copy with the mutation in it.

    Raises:
        SystemExit: its text does not occur once, or what it leaves is no Python.
    """
    path = root / mutation.file
    text = path.read_text("utf-8") if path.is_file() else ""
    if (count := text.count(mutation.old)) != 1:
        raise SystemExit(
            f"mutation {mutation.name} no longer applies: {mutation.file} has its text {count} "
            f"times, wanted once: {mutation.old}"
        )
    broken = text.replace(mutation.old, mutation.new)
    try:
        compile(broken, mutation.file, "exec")
    except SyntaxError as error:
        raise SystemExit(f"mutation {mutation.name} no longer applies: {error}") from error
    return broken


def _node_id(case: ElementTree.Element) -> str:
    """Returns what names a test of a junit report on pytest's command line."""
    file, name = case.get("file", ""), case.get("name", "")
    inner = case.get("classname", "").removeprefix(file.removesuffix(".py").replace("/", "."))
    return "::".join([file, *inner.strip(".").split("."), name] if inner else [file, name])


def _is_of(node: str, test: str) -> bool:
    """Whether a test is the one named, one of its parameters, or is in what is named."""
    return node == test or node.startswith((f"{test}[", f"{test}::"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names of mutations, with commas between them")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    parser.add_argument("--jobs", type=int, default=2, help="mutations tried at a time")
    parser.add_argument("--no-baseline", action="store_true", help="try no test unmutated first")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [each.name for each in MUTATIONS]
    if unknown := sorted(set(names) - {each.name for each in MUTATIONS}):
        parser.error(f"there is no mutation {', '.join(unknown)}; --list names them")
    chosen = [each for each in MUTATIONS if each.name in names]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:32} {mutation.says}")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        check = Check(Path(folder))
        for mutation in chosen:
            broken_text(check.clean.root, mutation)
        if not arguments.no_baseline:
            check.baseline(chosen)
            print(f"unmutated all pass, {time.monotonic() - started:.0f} s", flush=True)
        verdicts = []
        pool = ThreadPoolExecutor(arguments.jobs)
        try:
            for done in as_completed([pool.submit(check.verdict, each) for each in chosen]):
                verdicts.append(done.result())
                print(verdicts[-1], flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    by_default = sum(verdict.tier == DEFAULT for verdict in verdicts)
    by_either = sum(verdict.tier is not None for verdict in verdicts)
    bar = max(len(chosen) - MAX_MISSED_BY_DEFAULT, 0)
    print(
        f"default tier {by_default}/{len(chosen)} (bar {bar}), both tiers {by_either}/{len(chosen)}"
        f" (bar {len(chosen)}); {time.monotonic() - started:.0f} s"
    )
    return int(by_default < bar or by_either < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
