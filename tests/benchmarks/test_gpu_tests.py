"""make test-gpu's parts: counts are added, a crash fails, and a record says which parts ran."""

import pytest

from benchmarks import gpu_tests, records


def test_every_part_passed_in_the_record():
    """The first record has one count for two parts."""
    parts = records.load("tests")["parts"]
    assert {name for key in parts for name in key.split(", ")} == set(gpu_tests.PARTS)
    counts = [part["pytest"] for part in parts.values() if "pytest" in part]
    assert all(set(count) <= {"passed", "skipped"} for count in counts)
    assert sum(count["passed"] for count in counts) > 80
    assert all(part["passed"] for part in parts.values())
    verdicts = [parts["sanitizer"][tool] for tool in gpu_tests.TOOLS]
    assert all(" 0 errors" in line or " 0 hazards" in line for line in verdicts)


def test_counts_of_several_pytest_processes_are_added():
    lines = [
        "..s  [100%]",
        "1 failed, 12 passed, 2 skipped in 33.10s",
        "FAILED tests/kernels/test_gpu.py::test_x - 3 passed",
        "13 passed, 1 error in 61.02s (0:01:01)",
    ]
    assert gpu_tests.counted(lines) == {"failed": 1, "passed": 25, "skipped": 2, "error": 1}


@pytest.fixture
def asked(monkeypatch):
    """Which tests each pytest process was asked for; one that gets "crash" has no last line."""
    calls = []

    def run_some(names):
        calls.append(names)
        return (-11, ["..."]) if "crash" in names else (0, ["1 passed in 0.10s"])

    monkeypatch.setattr(gpu_tests, "run_some", run_some)
    monkeypatch.setattr(gpu_tests, "sanitize", lambda tool: f"{tool}: 0 errors")
    return calls


def test_a_pytest_process_that_crashes_fails_its_part(asked):
    done = gpu_tests.run_tests(["crash", "b"], 2)
    assert done == {"pytest": {"passed": 1}, "failed": [], "passed": False}
    assert gpu_tests.run_tests(["a", "b"], 2)["passed"] is True


def test_no_pytest_process_starts_without_names(asked):
    gpu_tests.run_tests(["a", "b"], 12)
    assert sorted(asked) == [["a"], ["b"]]


def test_each_part_runs_its_own_tests(asked, monkeypatch):
    names = ["tests/kernels/test_gpu.py::a", "tests/kernels/test_kernels.py::b"]
    monkeypatch.setattr(gpu_tests, "kernel_tests", lambda: names)
    assert set(gpu_tests.run_parts(["real"])) == {"real"} and asked == [names[:1]]
    assert set(gpu_tests.run_parts(["small"])) == {"small"} and asked[1:] == [names[1:]]
    verdicts = {"memcheck": "memcheck: 0 errors", "racecheck": "racecheck: 0 errors"}
    assert gpu_tests.run_parts(["sanitizer"]) == {"sanitizer": verdicts | {"passed": True}}
    assert len(asked) == 2
    monkeypatch.setattr(gpu_tests, "sanitize", lambda tool: "ERROR SUMMARY: 10 errors")
    assert gpu_tests.run_parts(["sanitizer"])["sanitizer"]["passed"] is False


def test_a_part_stays_in_the_record_while_the_code_is_the_same(tmp_path):
    now = {"device": "d", "versions": {"torch": "1"}, "code": "abc", "command": "second"}
    old = now | {"command": "first", "parts": {"real": {"passed": True}}}
    same = ("device", "versions", "code")
    out = tmp_path / "tests.json"
    records.save(old, out)
    small = {"small": {"passed": False}}
    assert gpu_tests.record_of(now, records.earlier(out, now, same), small) == now | {
        "command": "first; second",
        "parts": {"real": {"passed": True}} | small,
    }
    again = {"real": {"passed": False}}
    assert gpu_tests.record_of(now, old, again) == now | {"parts": again}
    for key in same:
        assert records.earlier(out, now | {key: "other"}, same) is None
    assert gpu_tests.record_of(now, None, small) == now | {"parts": small}


def test_the_code_is_told_apart_by_any_file_that_is_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "TESTED", ("kernels", "cases.py"))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "cases.py").write_text("a = 1")
    seen = [gpu_tests.code_tested()]
    (tmp_path / "kernels/new.py").write_text("")
    seen.append(gpu_tests.code_tested())
    (tmp_path / "cases.py").write_text("a = 2")
    seen.append(gpu_tests.code_tested())
    (tmp_path / "README.md").write_text("not tested")
    assert len(set(seen)) == 3 and gpu_tests.code_tested() == seen[-1]
