"""What the pages tell of the recorded runs at 65,536 tokens is what the record holds."""

from pathlib import Path

import pytest

from nsa_lite.lab.runs import recorded

ROOT = Path(__file__).parents[2]
LONG = recorded("haystack_64k")["runs"]
SHORT = recorded("haystack_64k_short")["runs"]


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text("utf-8").split())


def found(attention: str, length: int, runs: dict = LONG, key: str = "accuracy") -> list[float]:
    """The share of the answers that each seed finds at a length, the lowest first."""
    results = [result for name, result in runs.items() if name.startswith(f"{attention}-seed")]
    return sorted(depth[key] for r in results for depth in r["depths"] if depth["length"] == length)


def between(scores: list[float]) -> str:
    return f"{scores[0]:.2f} to {scores[-1]:.2f}"


@pytest.mark.parametrize(("attention", "seeds"), [("nsa", 3), ("dense", 3), ("window", 3)])
def test_every_run_was_asked_at_five_lengths(attention, seeds):
    for length in (4096, 16_384, 65_536, 131_072, 262_144):
        assert len(found(attention, length)) == seeds


def test_the_readme_gives_what_was_found_with_and_without_selection():
    readme = text_of("README.md")
    ours, dense = found("nsa", 65_536), found("dense", 65_536)
    assert f"NSA finds {between(ours)} of the facts with its own choice" in readme
    assert f"dense attention {between(dense)} (three seeds)" in readme
    ours, dense = found("nsa", 262_144), found("dense", 262_144)
    assert f"NSA still finds {between(ours)}, dense attention {between(dense)}" in readme
    here, far = found("nsa-no-selection", 65_536), found("nsa-no-selection", 262_144)
    assert f"without any selection it is {between(here)}, and {between(far)} at 262,144" in readme
    steps = [LONG[f"{name}-cost"]["milliseconds"] for name in ("nsa", "dense")]
    assert f"a step takes {steps[0]:.0f} ms and {steps[1]:.0f}" in readme


def test_the_readme_gives_what_was_found_of_short_needles():
    readme = text_of("README.md")
    at = {kind: found(kind, 65_536, SHORT) for kind in ("nsa", "dense", "nsa-own-kl-first")}
    assert all(len(scores) == 3 for scores in at.values())
    told = f"NSA answers {between(at['nsa'])} at 65,536 tokens, dense attention"
    assert f"{told} {between(at['dense'])}" in readme
    taught = ("nsa-kl", "nsa-own-kl")
    right, hits = (
        sorted(x for kind in taught for x in found(kind, 65_536, SHORT, key))
        for key in ("accuracy", "hit_rate")
    )
    assert f"NSA answers {between(right)} of the questions" in readme
    assert max(abs(a - b) for a, b in zip(right, hits, strict=True)) < 0.02
    assert f"taught for 300 steps only, {between(at['nsa-own-kl-first'])}" in readme
    nothing, *some = found("nsa-no-selection", 65_536, SHORT)
    assert nothing < 0.1
    assert f"two seeds answer {some[0]:.2f} and {some[1]:.2f} from summaries alone" in readme


def test_the_readme_gives_the_minutes_of_the_laptops_runs():
    results = recorded("haystack")["runs"]
    seconds = [
        sum(results[f"{kind}-seed{seed}"]["seconds"] for kind in ("dense", "nsa-kl", "window"))
        for seed in range(3)
    ]
    readme = text_of("README.md")
    assert f"took {min(seconds) / 60:.0f} to {max(seconds) / 60:.0f} minutes" in readme
    record = recorded("train_long")
    assert {
        under["machine"]["cores"] for made in record["made"].values() for under in made["under"]
    } == {2}
    whole = sum(run["seconds"] for run in record["runs"].values())
    assert whole < 300  # the five minutes that a laptop's reader is promised
    assert f"On 2 cores it takes {whole / 60:.1f} minutes" in readme
    last = {name: run["evaluations"][-1] for name, run in record["runs"].items()}
    assert last["nsa-kl-seed0"]["hit_rate"] > 0.9 > 0.1 > last["window-seed0"]["test_accuracy"]


def test_the_readme_gives_the_laptops_controls():
    controls = recorded("haystack_controls")["runs"]
    at = {
        kind: found(kind, 16_384, controls)
        for kind in ("nsa-no-selection", "nsa-random", "nsa-oracle")
    }
    assert {len(scores) for scores in at.values()} == {3}
    nothing, random, best = map(between, at.values())
    told = f"NSA without selection ({nothing}) and with random blocks ({random}) stays at chance"
    readme = text_of("README.md")
    assert told in readme
    assert best == "1.00 to 1.00"
    assert "with the blocks of most true mass it finds 1.00 (three seeds each)" in readme


def test_the_notes_give_the_coherence_of_every_choice_that_was_trained():
    kept = [
        LONG[f"{attention}-seed{seed}"]["kept"]
        for attention in ("nsa", "nsa-kl", "nsa-own-kl-first")
        for seed in range(3)
    ]
    first, second = zip(*kept, strict=True)
    told = " and ".join(
        f"{min(layer):.2f} to {max(layer):.2f} in the {place}"
        for place, layer in (("first layer", first), ("second", second))
    )
    notes = text_of("benchmarks/NOTES.md")
    assert told in notes
    assert max(first + second) < 0.75
    taught = [r["kept"] for name, r in SHORT.items() if name.startswith(("nsa-kl", "nsa-own-kl-s"))]
    short_first, short_second = map(sorted, zip(*taught, strict=True))
    assert len(taught) == 6
    told = f"keep {between(short_first)} in the first and {between(short_second)} in the second"
    assert told in notes
    named = ("nsa-seed", "nsa-kl", "nsa-own-kl")
    everything = sorted(
        x
        for runs in (LONG, SHORT)
        for name, result in runs.items()
        if name.startswith(named)
        for x in result.get("kept", [])
    )
    assert between(everything).replace("0.", ".") in text_of("README.md")
    assert everything[len(everything) * 3 // 4] < 0.5


def test_blocks_at_random_are_as_coherent_as_chance():
    assert all(abs(share) < 0.01 for share in LONG["nsa-random-seed0"]["kept"])
    assert LONG["nsa-no-selection-seed0"]["kept"] == [None, None]
