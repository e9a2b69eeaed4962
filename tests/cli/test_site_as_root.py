"""File ownership after commands by root at a site whose process runs as another account."""

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedtune.cli.ledger
import fedtune.cli.site

# A process that gave up root may no longer be able to read modules.
import fedtune.cli.site_actions
import fedtune.ops.doctor.examination
import fedtune.ops.kits.models  # noqa: F401
from fedtune.cli.main import main
from fedtune.ops import files
from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal

from ..conftest import name_run, run_proposal
from .conftest import Here

SERVICE = 54321
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that all accounts can access, in contrast to pytest's folder."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def served_site(join_site: Any, monkeypatch: pytest.MonkeyPatch) -> Here:
    """A site whose files are owned by the account of its process."""
    # This Python may be in root's own folder; the modules that are needed are imported already.
    monkeypatch.setattr(files, "_is_python_readable", lambda: True)
    here = join_site("north")
    here.edit(anchor="anchor.json")
    here.open()
    for path in (here.folder, *here.folder.rglob("*")):
        os.chown(path, SERVICE, SERVICE)
    return here


def run_in_child(work: Callable[[], object], *, account: int = 0) -> int:
    """Run a function in a forked process, which may switch accounts, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if account:
                os.setgroups([])
                os.setresgid(account, account, account)
                os.setresuid(account, account, account)
            result = work()
            code = result if isinstance(result, int) else 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def call_command(*words: str) -> int:
    return run_in_child(lambda: main(words))


def list_owners(folder: Path) -> set[int]:
    return {path.lstat().st_uid for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def waiting_proposal(served_site: Here) -> Proposal:
    proposal = run_proposal(run=name_run("r", "{}"))
    assert run_in_child(lambda: served_site.state.queue_for_approval(proposal, "{}") and None, account=SERVICE) == 0
    return proposal


@pytest.mark.parametrize("command", ["approve", "pause", "resume", "leave", "doctor", "init"])
def test_site_commands_as_root_keep_file_ownership(served_site: Here, waiting_proposal: Proposal, command: str) -> None:
    kit_options = (
        served_site.kit
        if command in ("pause", "resume")
        else served_site.words[2:]
        if command == "init"
        else served_site.words
    )
    options = {"approve": (waiting_proposal.run, "--yes"), "init": ("--out", str(served_site.folder / "new-kit"))}.get(
        command, ()
    )
    code = call_command("site", command, *options, *kit_options)
    if command == "approve":
        assert (code, served_site.state.list_pending_runs()) == (0, [])
    if command == "init":
        assert (code, (served_site.folder / "new-kit/join_request.json").is_file()) == (0, True)
    # The account owns all files, and its process can continue the ledger.
    assert list_owners(served_site.folder) == {SERVICE}
    assert run_in_child(lambda: served_site.start_run(waiting_proposal, 1), account=SERVICE) == 0


@pytest.mark.parametrize("command", ["restore", "freeze", "anchor"])
def test_ledger_commands_as_root_keep_file_ownership(
    served_site: Here, waiting_proposal: Proposal, command: str
) -> None:
    ledger, policy = str(served_site.folder / "ledger.db"), ("--policy", str(served_site.site_toml))
    key = ("--key", str(served_site.folder / "site_key.pem"), "--output", str(served_site.folder / "anchor.json"))
    words = {"restore": policy, "freeze": (*policy, "--why", "withdrawn"), "anchor": (ledger, *key)}
    assert call_command("ledger", command, *words[command]) == 0
    assert list_owners(served_site.folder) == {SERVICE}
    verify(served_site.folder / "ledger.db")


def test_root_commands_do_not_follow_symbolic_links(
    served_site: Here, waiting_proposal: Proposal, tmp_path: Path
) -> None:
    target = tmp_path / "root's own"
    target.write_text("secret")
    target.chmod(0o600)
    (served_site.folder / "anchor.json").unlink()
    os.symlink(target, served_site.folder / "anchor.json")
    assert call_command("site", "approve", "r", "--yes", *served_site.words) != 0
    assert target.read_text() == "secret"


def test_root_writes_no_anchor_or_report_through_a_link(served_site: Here, tmp_path: Path) -> None:
    folder = served_site.folder
    os.symlink(tmp_path / "anchor", folder / "new.json")
    os.symlink(tmp_path, folder / "report")
    key = ("--key", str(folder / "site_key.pem"), "--output", str(folder / "new.json"))
    assert call_command("ledger", "anchor", str(folder / "ledger.db"), *key) != 0
    assert call_command("report", str(served_site.site_toml), "--output", str(folder / "report")) != 0
    assert not {"anchor", "report.json"} & {path.name for path in tmp_path.iterdir()}


def test_unreadable_python_is_reported_before_dropping_privileges(
    served_site: Here, waiting_proposal: Proposal, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(files, "_is_python_readable", lambda: False)
    assert call_command("site", "approve", "r", "--yes", *served_site.words) == 2
    assert "cannot be read by account 54321" in capfd.readouterr().err


def test_replaced_file_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    file, new = tmp_path / "file", tmp_path / "folder/new"
    file.write_bytes(b"old")
    file.chmod(0o640)
    os.chown(file, SERVICE, SERVICE + 1)
    new.parent.mkdir()
    os.chown(new.parent, SERVICE, SERVICE)
    for path in (file, new):
        write_durably(path, b"new")
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (SERVICE, SERVICE + 1, 0o640)
    assert new.stat().st_uid == SERVICE
