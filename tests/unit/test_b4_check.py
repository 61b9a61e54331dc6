# SPDX-License-Identifier: MIT
"""What b4 is told of a series: which records are of its kernels, what they say, and what comes of a hostile message."""

from __future__ import annotations

import base64
import io
import json
import os
import quopri
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe import b4_check, kvm_record
from probe import record as rec
from probe.b4_check import File, Message, Series, Shelf, Tracking, bearing, named_by, read_message, read_tracking
from probe.cli import main
from probe.diff.moved import AnyRecord
from probe.errors import ExitCode, RecordError
from probe.kernel_tree import KernelTree, series_of
from probe.masks import hex64
from tests.fakes import FakeRegister
from tests.fakes_machine import facts_of, record_of, threadripper

NESTED = Path("results/debian-kernels-nested/zen2-client")
OLD, NEW = (next(NESTED.glob(f"*-kvm-{release}*.json")).resolve() for release in ("6.1.0", "7.2"))
BASE, ONE, TIP = (f"{word}{'0' * 28}" for word in ("ba5e00000000", "0ae000000000", "71b000000000"))
COVER = b"""\
From: A Developer <developer@example.org>
Subject: [PATCH v2 0/2] KVM: x86: count longer
Message-ID: <cover.1@example.org>

Two patches.

 arch/x86/kvm/x86.c             | 12 +++++-------
 .../selftests/kvm/x86/spec.c   |  3 ++-
 2 files changed, 8 insertions(+), 7 deletions(-)

base-commit: ba5e000000000000000000000000000000000000
--
2.51.0
"""
SERIES = Series(BASE, (ONE, TIP))
Captured = pytest.CaptureFixture[str]


def kvm(commit: str = "", path: Path = OLD, dirty: str = "") -> kvm_record.KvmRecord:
    record = kvm_record.decode(path.read_bytes(), path.name)
    record.kernel.release = f"6.19.0-rc1-00002-g{commit[:12]}{dirty}" if commit else "6.19.0-rc1"
    return record


def shelf(*records: tuple[str, AnyRecord], **more: Any) -> Shelf:
    files = [File(f"{name}.json", record, f"{number:064x}") for number, (name, record) in enumerate(records, 1)]
    return Shelf("/srv/records", tuple(files), **more)


def told(*records: tuple[str, AnyRecord], series: Series = SERIES, mail: bytes = COVER, **more: Any) -> dict[str, str]:
    """Return the one answer; it must be as b4 wants it, whatever it says."""
    found = b4_check.check(read_message(mail), series, shelf(*records), **more)
    assert len(found) == 1
    sound(found[0])
    return dict(found[0])


def sound(answer: dict[str, str]) -> None:
    assert set(answer) == {"tool", "status", "summary", "details"}
    assert answer["status"] in ("pass", "warn", "fail")
    assert answer["summary"].isprintable()
    assert 0 < len(answer["summary"]) <= b4_check.LONGEST_SUMMARY
    assert answer["details"].replace("\n", "").isprintable()
    assert len(answer["details"].encode()) <= b4_check.LARGEST_DETAILS


# --- which kernel a record is of -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("6.19.0-rc1-00012-g0123456789ab", "0123456789ab"),
        ("6.19.0-rc1-virtme-g0123456789ab", "0123456789ab"),
        ("6.19.0-rc1-00012-g0123456789ab-dirty", ""),
        ("6.19.0-rc1", "v6.19-rc1"),
        ("6.19.0", "v6.19"),
        ("6.19.3", "v6.19.3"),
        ("6.19.0-rc1+", ""),
        ("6.19.0-rc1-dirty", ""),
        ("6.1.0-56-amd64", ""),
        ("7.2.13+deb14-amd64", ""),
        ("", ""),
        ("6.19.0-rc1\n", ""),
    ],
)
def test_a_release_names_a_commit_or_a_tag(release: str, name: str) -> None:
    assert named_by(release) == name


def test_records_are_found_by_commit() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP)), ("c", kvm("abcdef012345", NEW)))
    assert (said["tool"], said["status"]) == ("spec-ctrl-probe", "pass")
    assert said["summary"] == "nothing moved: 245 guest CPUIDs x 64 bits, 1 pair of records, 1 machine"
    assert "a.json" in said["details"]
    assert "c.json" not in said["details"]


def test_a_commit_that_begins_alike_is_another() -> None:
    assert told(("a", kvm(BASE)), ("b", kvm(TIP[:11] + "1")))["summary"] == "no record of this series' kernel"


def test_the_same_sources_are_the_same_kernel() -> None:
    trees = {BASE: "t0", TIP: "t2", "abcdef012345": "t2", "v6.19-rc1": "t0"}
    records = (("a", kvm()), ("b", kvm("abcdef012345")))
    assert told(*records)["summary"] == "no record of this series' kernel"
    assert told(*records, series=Series(BASE, (ONE, TIP), trees=trees))["status"] == "pass"


def test_a_base_that_is_the_series_is_no_comparison() -> None:
    said = told(("a", kvm(TIP)), series=Series(TIP, (TIP,)))
    assert (said["status"], said["summary"]) == ("warn", "nothing was compared: base and series are one kernel")


def test_a_kernel_with_changes_of_its_own_is_not_the_series() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP, dirty="-dirty")))
    assert said["summary"] == "no record of this series' kernel"
    assert "b.json: 6.19.0-rc1-00002-g71b000000000-dirty has changes that" in said["details"]


def test_releases_can_be_given() -> None:
    records = [("a", kvm()), ("b", kvm(path=NEW))]
    records[0][1].kernel.release, records[1][1].kernel.release = "6.1.0-56-amd64", "7.2.13+deb14-amd64"
    said = told(*records, series=Series("6.1.0-56-amd64", ("7.2.13+deb14-amd64",)))
    assert said["status"] == "warn"
    assert told(("a", kvm()), ("b", kvm(TIP)), series=Series("v6.19-rc1", (TIP,)))["status"] == "pass"


# --- what the records say --------------------------------------------------------------------------------------------


def test_what_moved_is_a_warning() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP, NEW)))
    assert said["status"] == "warn"
    assert said["summary"] == "moved: explained by: kvm-6.1-svm -> kvm-6.19-svm, and 4 changes more"
    assert "  guest write of IA32_PRED_CMD: bit 0: accepted -> #GP" in said["details"]
    assert f"SHA-256\n           {2:064x}" in said["details"]


def test_a_new_finding_fails_and_an_old_one_does_not() -> None:
    worse = kvm(TIP)
    worse.explained_by, worse.follows = [], ""
    said = told(("a", kvm(BASE)), ("b", worse))
    assert said["status"] == "fail"
    assert said["summary"] == "1 finding that the base does not have: no model explains every case"
    before = kvm(BASE)
    before.explained_by, before.follows = [], ""
    assert told(("a", before), ("b", worse))["status"] == "pass"


def run(commit: str, valid: int = 0x6, **more: Any) -> rec.Record:
    registers = {cpu: FakeRegister(valid=valid) for cpu in (0, 1)}
    record = record_of(registers, threadripper(), facts_of("threadripper-3970x"), **more)
    record.kernel.release = f"6.19.0-rc1-g{commit[:12]}"
    return record


def test_runs_are_compared_too() -> None:
    assert told(("a", run(BASE)), ("b", run(TIP)))["summary"] == "nothing moved: 2 CPUs, 1 pair of records, 1 machine"
    said = told(("a", run(BASE)), ("b", run(TIP, valid=0x4)))
    assert said["status"] == "fail"
    assert "bit01_stibp: predicted to be accepted, the write took #GP" in said["summary"]
    assert told(("a", run(BASE, valid=0x4)), ("b", run(TIP)))["status"] == "warn"


def test_what_one_cpu_did_before_is_new_on_another() -> None:
    def odd(commit: str, cpu: int) -> rec.Record:
        registers = {each: FakeRegister(valid=0x4 if each == cpu else 0x6) for each in (0, 1)}
        record = record_of(registers, threadripper(), facts_of("threadripper-3970x"))
        record.kernel.release = f"6.19.0-rc1-g{commit[:12]}"
        return record

    told_ = told(("a", odd(BASE, 0)), ("b", odd(TIP, 1)))
    assert told_["status"] == "fail"
    assert "bit01_stibp: CPU 1: predicted to be accepted" in told_["summary"]
    assert told(("a", odd(BASE, 1)), ("b", odd(TIP, 1)))["status"] != "fail"


@pytest.mark.parametrize("before", ["verified", "failed"])
def test_a_register_that_was_not_put_back_fails_whatever_the_base_did(before: str) -> None:
    one, other = run(BASE), run(TIP)
    for entry in one.restore:
        entry.state = before  # type: ignore[assignment]
    for entry in other.restore:
        entry.state = "failed"
    said = told(("a", one), ("b", other))
    assert said["status"] == "fail"
    assert "failed: held" in said["summary"]


def test_a_plan_is_no_measurement() -> None:
    plan = run(TIP)
    plan.observations = []
    said = told(("a", run(BASE)), ("b", plan))
    assert said["summary"] == "no record of this series' kernel"
    assert "b.json: a plan, nothing was written" in said["details"]


def test_bits_without_an_answer_are_no_pass() -> None:
    def refused(commit: str) -> rec.Record:
        record = run(commit)
        text = "bits 3 were not measured"
        record.findings.append(rec.FindingEntry(kind="incomplete", cpus="0-1", mask=hex64(1 << 3), text=text))
        return record

    said = told(("a", refused(BASE)), ("b", refused(TIP)))
    assert said["status"] == "warn"
    assert said["summary"].endswith("there are bits without an answer")
    assert "both have  bits 3 were not measured" in said["details"]
    assert told(("a", run(BASE)), ("b", refused(TIP)))["status"] == "fail"
    assert told(("b", refused(TIP)))["status"] == "fail"


def test_without_the_base_a_record_stands_alone() -> None:
    said = told(("b", kvm(TIP)))
    assert said["status"] == "pass"
    assert said["summary"] == "nothing was compared, no record of the base; no findings"
    said = told(("b", run(TIP, valid=0x4)))
    assert said["status"] == "fail"
    assert said["summary"].startswith("nothing was compared, no record of the base; 1 finding: bit01_stibp: ")


def test_different_machines_have_nothing_to_compare() -> None:
    said = told(("a", kvm(BASE)), ("b", run(TIP)))
    assert said["status"] == "warn"
    assert said["summary"].startswith("nothing to compare")


def test_a_record_without_a_counterpart_is_said() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP)), ("c", run(TIP)))
    assert said["status"] == "warn"
    assert said["summary"].endswith("; 1 record without a counterpart")
    assert "c.json" in said["details"]


def test_an_earlier_patch_stands_in_for_the_last_and_is_said() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(ONE)))
    assert said["status"] == "warn"
    assert said["summary"].startswith("nothing moved: ")
    assert "compared is patch 1 of 2: the last has no record" in said["details"]


def test_a_branch_that_took_the_series() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP)), series=Series(BASE, (), tips=(("next", ONE), ("queue", TIP))))
    assert said["status"] == "warn"
    assert "the tip of queue, which took the series" in said["details"]
    both = Series(BASE, (), tips=(("queue", TIP), ("next", ONE)))
    assert "the tip of next" in told(("a", kvm(BASE)), ("b", kvm(TIP)), ("c", kvm(ONE)), series=both)["details"]


# --- patches ---------------------------------------------------------------------------------------------------------


def patch(number: int) -> bytes:
    return COVER.replace(b"0/2", b"%d/2" % number)


def test_a_patch_is_compared_with_the_one_before() -> None:
    records = (("a", kvm(BASE)), ("b", kvm(ONE)), ("c", kvm(TIP, NEW)))
    assert told(*records, mail=patch(1), per_patch=True)["status"] == "pass"
    said = told(*records, mail=patch(2), per_patch=True)
    assert (said["tool"], said["status"]) == ("spec-ctrl-probe patch", "warn")
    assert "b.json" in said["details"]
    said = told(records[0], records[2], mail=patch(2), per_patch=True)
    assert "patches 1 to 2 are compared" in said["details"]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_patch_without_a_kernel_of_its_own_is_nothing_to_report(number: int) -> None:
    records = shelf(("a", kvm(BASE)), ("c", kvm(TIP, NEW)))
    assert b4_check.check(read_message(patch(number)), SERIES, records, per_patch=True) == []


# --- no record -------------------------------------------------------------------------------------------------------


def test_a_series_that_bears_on_the_register_wants_a_record() -> None:
    said = told(("a", kvm(BASE)))
    assert (said["status"], said["summary"]) == ("warn", "no record of this series' kernel")
    assert "arch/x86/kvm/x86.c: KVM on x86" in said["details"]
    assert "--record-dir /srv/records -- kvm\n" in said["details"]
    assert "commit 71b000000000: the last patch" in said["details"]
    assert "the base" not in said["details"]
    assert "commit ba5e00000000: the base" in told()["details"]
    said = told(series=Series(BASE))
    assert said["summary"] == "no record of this series' kernel: its commits are not known"


def test_another_series_is_nothing_to_report() -> None:
    mail = COVER.replace(b"arch/x86/kvm/x86.c", b"drivers/net/dummy.c")
    assert b4_check.check(read_message(mail), SERIES, shelf(("a", kvm(BASE)))) == []
    paths = Series(BASE, (TIP,), paths=("arch/x86/kernel/cpu/bugs.c",))
    assert told(series=paths, mail=mail)["status"] == "warn"


@pytest.mark.parametrize(
    ("path", "bears"),
    [
        ("arch/x86/kvm/svm/svm.c", True),
        (".../x86/kvm/svm/svm.c", True),
        (".../kernel/cpu/bugs.c", True),
        ("arch/x86/kernel/cpu/bugs.c", True),
        ("arch/x86/kernel/cpu/bugs.c.orig", False),
        ("arch/x86/kvm/mmu/mmu.c", False),
        ("arch/arm64/kvm/arm.c", False),
        (".../kvm/arm.c", False),
        (".../bugs.c", False),
        ("tools/testing/selftests/kvm/x86/spec_ctrl.c", False),
        ("tools/arch/x86/include/asm/cpufeatures.h", False),
        ("", False),
    ],
)
def test_what_bears_on_the_register(path: str, bears: bool) -> None:
    assert bool(bearing([path])) == bears


def test_every_row_is_found_by_its_own_path() -> None:
    for row in b4_check.BEARING:
        assert bearing([row.path + ("x.c" if row.path.endswith("/") else "")])
        assert row.why


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_cover_letter() -> None:
    message = read_message(COVER)
    assert message.subject == "[PATCH v2 0/2] KVM: x86: count longer"
    assert (message.number, message.base, message.prerequisites) == (0, BASE, 0)
    assert message.paths == ("arch/x86/kvm/x86.c", ".../selftests/kvm/x86/spec.c")


def test_a_patch() -> None:
    text = b"Subject: =?utf-8?q?=5BPATCH_RFC_03/12=5D?= KVM: 1/2 of it\n\n--- a/a.c\n+++ b/b.c\n {x => y}/c.c | Bin\n"
    message = read_message(text)
    assert message.number == 3
    assert message.paths == ("a.c", "b.c", "x/c.c", "y/c.c")
    assert read_message(b"Subject: [PATCH] KVM: 0/2 of it\n\n").number == 1
    assert read_message(COVER + b"base-commit: " + TIP.encode() + b"\n").base == TIP
    assert read_message(COVER + b"prerequisite-patch-id: 0123\nprerequisite-patch-id: 4567\n").prerequisites == 2


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
def test_an_encoded_body_is_read(encoding: str) -> None:
    head, _, body = COVER.partition(b"\n\n")
    coded = base64.encodebytes(body) if encoding == "base64" else quopri.encodestring(body)
    mail = head + f"\nContent-Transfer-Encoding: {encoding}\n\n".encode() + coded
    assert read_message(mail) == read_message(COVER)
    parts = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n" + mail.partition(b"\n")[2].partition(b"\n")[2]
    assert read_message(head + b"\n" + parts + b"\n--b--\n").base == BASE


def test_prerequisites_are_said() -> None:
    said = told(("a", kvm(BASE)), ("b", kvm(TIP)), mail=COVER + b"prerequisite-patch-id: 0123\n")
    assert "needs 1 more patches on its base" in said["details"]


DEEP = b"Subject: x\n" + b"".join(
    b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (number, number) for number in range(5000)
)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\n", b"no mail", b"\0\1\2\xff" * 1000, b"{}", b"Subject:\n\ntext", b"From x\n\nSubject: body", DEEP],
    ids=["empty", "newline", "text", "binary", "json", "no subject", "in the body", "deep"],
)
def test_what_is_no_mail(raw: bytes) -> None:
    with pytest.raises(RecordError, match="no mail"):
        read_message(raw)


def test_a_message_that_is_too_large() -> None:
    with pytest.raises(RecordError, match="larger than 32 MiB"):
        read_message(COVER + b"x" * b4_check.LARGEST_MESSAGE)


@pytest.mark.parametrize(
    "raw",
    [
        b"Subject: x\n\n " + b" " * (4 << 20) + b"|",
        b"Subject: x\n\n" + b"".join(b" %d | 1\n" % number for number in range(300_000)),
        b"Subject: x\n\n {" + b" => " * 100_000 + b"| 1\n",
        b"Subject: " + b"[" * 100_000 + b"\n\n",
        b"Subject: " + b"[a] " * 100_000 + b"\n\n",
        b"Subject: =?x?q?" + b"=41" * 10_000 + b"?=\n\n",
        b"Subject: x\nContent-Type: text/plain; charset=\xff\nContent-Transfer-Encoding: base64\n\n\xff\xfe",
    ],
    ids=["blanks", "paths", "renames", "brackets", "prefixes", "unknown charset", "unknown everything"],
)
def test_a_large_or_odd_message_is_read_in_time(raw: bytes) -> None:
    start = time.process_time()
    message = read_message(raw)
    assert len(message.paths) <= 10_000
    sound(b4_check.check(message, SERIES, shelf(("a", kvm(TIP))))[0])
    assert time.process_time() - start < 5


@given(st.binary(max_size=400), st.sampled_from([b"Subject", b"Content-Type", b"Content-Transfer-Encoding"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message_or_none(raw: bytes, header: bytes) -> None:
    for mail in (raw, header + b": " + raw, header + b": " + raw + b"\nSubject: [PATCH] x\n\n" + raw):
        try:
            assert read_message(mail).subject
        except RecordError as error:
            assert "no mail" in str(error)


# --- b4's tracking file ----------------------------------------------------------------------------------------------


def tracked(**series: object) -> bytes:
    return json.dumps({"series": series}).encode()


def test_a_tracking_file() -> None:
    raw = tracked(
        **{
            "base-commit": BASE,
            "first-patch-commit": ONE,
            "change-id": "20261120-x-0123",
            "expected": 2,
            "branch-tips": [{"branch": "next", "sha": TIP, "date": "2026-11-20"}],
        }
    )
    assert read_tracking(raw) == Tracking(BASE, ONE, "20261120-x-0123", 2, (("next", TIP),))


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no series"),
        (b"1", "no series"),
        (b'{"series": []}', "no series"),
        (b" " * (b4_check.LARGEST_TRACKING + 1), "larger than"),
    ],
)
def test_a_tracking_file_that_is_none(raw: bytes, word: str) -> None:
    assert word in read_tracking(raw).complaint


@pytest.mark.parametrize("value", [None, 1, [], {}, "", "--upload-pack=x", "HEAD", "..", "a b", "x" * 999, True, -1])
def test_what_is_not_as_it_should_be_in_it_is_not_said(value: object) -> None:
    names = ("base-commit", "first-patch-commit", "branch-tips", "expected")
    found = read_tracking(tracked(known=1, **dict.fromkeys(names, value)))
    assert found in (Tracking(), Tracking(patches=1))
    for tips in ([value], [{"branch": value, "sha": value}]):
        assert read_tracking(tracked(**{"branch-tips": tips})).tips == ()
    change_id = read_tracking(tracked(**{"change-id": value})).change_id
    assert change_id in ("", "HEAD")


# --- details ---------------------------------------------------------------------------------------------------------


def test_nothing_of_a_record_or_message_gets_out_of_its_line() -> None:
    record = kvm(TIP, NEW)
    record.machine.brand = "\x1b[2J\x9b\u202e evil\r\n"
    record.kernel.version = "x" * 100_000
    record.explained_by = ["\x1b[2J\u202e\n" * 50]
    name = "\x1b]0;a\x07\n../b"
    files = (File(name, record, "0" * 64), File("a", kvm(BASE), "1" * 64))
    mail = COVER.replace(b"x86.c", b"\x1b[31m.c")
    left = (("\x1b\n", "\x07"),)
    sound(b4_check.check(read_message(mail), SERIES, Shelf("/\x1b x\n", files, left))[0])
    sound(b4_check.check(read_message(mail), SERIES, Shelf("/\x1b x\n", (), left))[0])


def test_details_are_cut_between_lines() -> None:
    left = tuple((f"{number}.json", "cut " * 50) for number in range(1000))
    short = b4_check.check(read_message(COVER), SERIES, Shelf("/x", (), left))[0]
    assert "and 994 more" in short["details"]
    pairs = []
    for number in range(200):
        one, other = kvm(BASE), kvm(TIP, NEW)
        one.identity = other.identity = f"lab-{number}"
        pairs += [(f"a{number}", one), (f"b{number}", other)]
    said = told(*pairs)
    assert said["details"].endswith("... the rest: spec-ctrl-probe diff")
    assert len(said["details"]) > b4_check.LARGEST_DETAILS - 200


# --- the kernel's repository -----------------------------------------------------------------------------------------


@pytest.fixture
def linux(tmp_path: Path) -> Callable[..., str]:
    """A repository; calls run git in it."""
    if not shutil.which("git"):
        pytest.skip("no git here")
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**own, **names})
        return done.stdout.strip()

    git("init", "-q", "-b", "master")
    for number in range(4):
        (tmp_path / "x.c").write_text(str(min(number, 2)))
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", str(number))
    git("tag", "v6.19-rc1", "HEAD~3")
    git("branch", "b4/review/change")
    return git


def test_the_commits_of_a_branch(linux: Callable[..., str], tmp_path: Path) -> None:
    base, one, two, own = (linux("rev-parse", f"HEAD~{3 - number}") for number in range(4))
    tree = KernelTree(tmp_path)
    assert tree.branch(one, "change") == (base, (one, two))
    assert tree.branch(two, "change") == (one, (two,))
    for first, change in ((one, "other"), ("", "change"), (one, ""), ("0" * 40, "change"), (own, "change")):
        assert tree.branch(first, change) == ("", ())
    trees = tree.trees([base, one[:12], two, own, "v6.19-rc1", "0" * 12, "v9.9", "master"])
    assert set(trees) == {base, one[:12], two, own, "v6.19-rc1"}
    assert trees[base] == trees["v6.19-rc1"] != trees[two] == trees[own]
    assert tree.paths(base, two) == ("x.c",)
    tracking = Tracking(base="f" * 40, first=one, change_id="change", patches=2)
    found = series_of(tree, tracking, Message("x"), ["6.19.0-rc1", f"6.19.0-g{one[:12]}", "6.1.0-56-amd64"])
    assert (found.base, found.commits, found.whole, found.paths) == (base, (one, two), True, ("x.c",))
    assert set(found.trees) == {base, one, two, one[:12], "v6.19-rc1"}
    given = series_of(tree, tracking, Message("x"), [], "v6.19-rc1", own)
    assert (given.base, given.commits) == ("v6.19-rc1", (own,))
    assert given.trees["v6.19-rc1"] == trees[base]


def test_without_a_repository_or_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for path in (os.environ["PATH"], "/nowhere"):
        monkeypatch.setenv("PATH", path)
        tracking = Tracking(BASE, ONE, "change", 2)
        found = series_of(KernelTree(tmp_path), tracking, Message("x"), ["6.19.0-rc1"])
        assert (found.base, found.commits, found.whole, found.trees) == (BASE, (ONE,), False, {})
        assert series_of(KernelTree(tmp_path), Tracking(), Message("x", base=TIP), []).base == TIP


# --- the command -----------------------------------------------------------------------------------------------------


class _Stdin:
    def __init__(self, raw: bytes) -> None:
        self.buffer = io.BytesIO(raw)


@pytest.fixture
def b4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Callable[..., tuple[int, Any, str]]:
    """Run the command on a message, in the folder of the records; return exit code, JSON or "", stderr."""
    monkeypatch.delenv("B4_TRACKING_FILE", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(raw: bytes, *arguments: str) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "stdin", _Stdin(raw))
        code = main(["b4-check", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else "", err

    return call


def test_the_command(b4: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "a.json").write_bytes(kvm_record.encode(kvm(BASE)))
    (tmp_path / "b.json").write_bytes(kvm_record.encode(kvm(TIP, NEW)))
    (tmp_path / "lab" / "cut.json").write_bytes(kvm_record.encode(kvm(TIP))[:5000])
    (tmp_path / "lab" / "new.json").write_bytes(b'{"schema_version": "99.0"}')
    os.mkfifo(tmp_path / "lab" / "fifo.json")
    code, said, err = b4(COVER, "lab", "b.json", "--tip", TIP)
    assert (code, err) == (ExitCode.AS_PREDICTED, "")
    assert said[0]["status"] == "warn"
    for name in ("cut.json: ", "new.json: ", "fifo.json: no ordinary file"):
        assert name in said[0]["details"]
    track = tmp_path / "tracking"
    monkeypatch.setenv("B4_TRACKING_FILE", str(track))
    track.write_bytes(tracked(**{"base-commit": BASE, "first-patch-commit": TIP, "expected": 1}))
    assert b4(COVER.replace(b"base-commit", b"x"), "lab", "b.json")[1][0]["summary"].startswith("moved: ")
    track.write_bytes(b"{")
    assert "b4's tracking file is not JSON" in b4(COVER, "lab")[1][0]["details"]
    track.unlink()
    code, said, err = b4(COVER, "lab")
    assert (code, err) == (ExitCode.AS_PREDICTED, "")
    assert "b4's tracking file cannot be read: No such file" in said[0]["details"]


def test_an_error_is_one_line_and_no_json(b4: Callable[..., Any]) -> None:
    for raw, arguments, word in (
        (b"\0\xff", ["."], "no mail"),
        (COVER + b"x" * (100 << 20), ["."], "larger than 32 MiB"),
        (COVER, ["nowhere"], "no file or folder nowhere"),
    ):
        code, out, err = b4(raw, *arguments)
        assert (code, out) == (ExitCode.FAILED, "")
        assert word in err
        assert err.count("\n") == 1


def test_nothing_to_report_is_an_empty_list(b4: Callable[..., Any]) -> None:
    assert b4(b"Subject: [PATCH] net: dummy\n\n", ".")[:2] == (ExitCode.AS_PREDICTED, [])


@pytest.mark.parametrize("value", ["", "-x", "a b", "$(x)", "x" * 200])
def test_a_kernel_that_is_none(value: str, b4: Callable[..., Any], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as error:
        b4(COVER, ".", f"--tip={value}")
    assert error.value.code == ExitCode.USAGE
    assert "is no commit, tag or kernel release" in capsys.readouterr().err
