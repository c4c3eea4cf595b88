"""The command line of `scripts/mutate`, and the loop over the mutants."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
from pathlib import Path
from typing import Any

from mutation import guards
from mutation.choice import Choice
from mutation.equivalent import EQUIVALENT
from mutation.sites import KINDS, Mutant, mutants_of
from mutation.trial import KILLED, NO_TEST, SURVIVED, Tree, copied

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("linalg", "curvature", "gradients", "run", "watching")


def main(arguments: list[str], text: str) -> int:
    """The exit status: 0, or 1 where a guard is not held."""
    options = _options(arguments, text)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    os.nice(5)
    with copied(ROOT) as tree:
        if options.guards:
            complaints = guards.check(tree)
            print("\n".join(complaints) or f"Each of {len(guards.GUARDS)} guards is held by its test.")
            return 1 if complaints else 0
        Session(tree, options).run()
    return 0


def _options(arguments: list[str], text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guards", action="store_true", help="try the fixed list of guards only")
    parser.add_argument("--sample", type=int, default=40, help="how many mutants (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help=f"folders of diag (default {' '.join(ROOMS)})")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of changes (default all)")
    parser.add_argument(
        "--closest", action="store_true", help="ask a module's own tests only, not all of its room's"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/mutants.json"), help="the record, taken up again"
    )
    parser.add_argument("--again", type=Path, help="a record whose survivors are tried once more")
    parser.add_argument(
        "--longest", type=float, default=90.0, help="test files slower than this many seconds are left out"
    )
    options = parser.parse_args(arguments)
    missing = [room for room in options.rooms if not (ROOT / "diag" / room).exists()]
    if missing:
        parser.error(f"diag has no room {', '.join(missing)}; give folders of diag")
    return options


class Session:
    """A record of mutants on disk, and the trials that fill it."""

    def __init__(self, tree: Tree, options: argparse.Namespace) -> None:
        self.tree, self.options, self.choice = tree, options, Choice(tree.folder)
        self.output = options.again or options.output
        self.record: dict[str, Any] = {"seconds": {}, "mutants": {}}
        if self.output.exists():
            self.record = json.loads(self.output.read_text())

    def run(self) -> None:
        """Tries what has not been tried, and prints the totals."""
        chosen = self._survivors() if self.options.again else self._sample()
        for number, mutant in enumerate(chosen, 1):
            if mutant.key not in self.record["mutants"] or self.options.again:
                entry = self._tried(mutant)
                self.record["mutants"][mutant.key] = entry
                self._save()
                result = f"{number:4}/{len(chosen)} {entry['result']:10}{entry['seconds']:6.1f} s"
                print(f"{result}  {mutant.path}:{mutant.line} {mutant.change}", flush=True)
        self._summary(chosen)

    def _all(self) -> list[Mutant]:
        files = [p for room in self.options.rooms for p in sorted((self.tree.folder / "diag" / room).rglob("*.py"))]
        found = [m for path in files for m in mutants_of(path, self.tree.folder, self.options.seed)]
        return [m for m in found if m.key not in EQUIVALENT and m.kind in self.options.kinds]

    def _sample(self) -> list[Mutant]:
        found = self._all()
        random.Random(self.options.seed).shuffle(found)
        return found[: self.options.sample]

    def _survivors(self) -> list[Mutant]:
        """Those that still exist: of code that has gone since, nothing survives."""
        known = {
            k for k, entry in self.record["mutants"].items() if entry["result"] != KILLED and k not in EQUIVALENT
        }
        rooms = {self.record["mutants"][k]["path"].split("/")[1] for k in known}
        self.options.rooms = sorted(rooms)
        self.options.seed = self.record.get("seed", self.options.seed)
        return [m for m in self._all() if m.key in known]

    def _tried(self, mutant: Mutant) -> dict[str, Any]:
        asked = self.choice.of(mutant.path, self.options.closest)
        tests = [t for t in asked if self._seconds(t) is not None]
        source = (self.tree.folder / mutant.path).read_bytes()
        seconds = [self._seconds(t) or 0 for t in tests]
        limits = 60 + 4 * sum(seconds), 20 + 2 * max(seconds, default=0)
        entry = {"path": mutant.path, "line": mutant.line, "text": mutant.text, "kind": mutant.kind,
                 "old": mutant.old, "new": mutant.new}  # fmt: skip
        if not tests:
            return entry | {"result": NO_TEST, "seconds": 0.0, "test": ""}
        with self.tree.changed(mutant.path, mutant.applied(source)):
            outcome = self.tree.run(tests, *limits)
        return entry | {"result": outcome.result, "seconds": round(outcome.seconds, 1), "test": outcome.test}

    def _seconds(self, test: str) -> float | None:
        """What a test file takes without any change; None where it is too slow, fails by itself or is empty."""
        known = self.record["seconds"]
        if test not in known:
            outcome = self.tree.run([test], self.options.longest)
            known[test] = round(outcome.seconds, 1) if outcome.result == SURVIVED else None
            if outcome.result != SURVIVED:
                print(f"     left out: {test} ({outcome.result} without any change: {outcome.test})", flush=True)
            self._save()
        return known[test]

    def _save(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.record["seed"] = self.options.seed
        part = self.output.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1, ensure_ascii=False))
        part.replace(self.output)

    def _summary(self, chosen: list[Mutant]) -> None:
        entries = [self.record["mutants"][m.key] for m in chosen]
        for room in sorted({e["path"].split("/")[1] for e in entries}):
            count = collections.Counter(e["result"] for e in entries if e["path"].split("/")[1] == room)
            print(f"{room:12} " + ", ".join(f"{n} {name}" for name, n in count.most_common()))
        count = collections.Counter(e["result"] for e in entries)
        print(f"{len(entries)} mutants: " + ", ".join(f"{n} {name}" for name, n in count.most_common()))
