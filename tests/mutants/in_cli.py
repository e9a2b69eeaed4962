"""Faults of the command line: exit codes, what is refused before anything is written, and approval."""

from .mutant import Mutant

FOLDER, OF_FOLDER = "fedtune/cli/working_folder.py", "tests/cli/test_working_folder.py"
APPROVE, LEDGER = "fedtune/cli/site_actions.py", "fedtune/cli/ledger.py"
OF_SITE, OF_LEDGER = "tests/cli/test_site_commands.py", "tests/cli/test_ledger.py"

CLI_FAULTS = (
    Mutant(
        name="every-error-is-exit-code-one",
        fault="A refusal and a mistake in a setting end with the same exit code, so that a script tries a refused run "
        "again.",
        file="fedtune/cli/main.py",
        old="    except FedtuneError as error:\n"
        '        sys.stderr.write(f"fedtune: {error}\\n")\n        return error.exit_code\n',
        new='    except FedtuneError as error:\n        sys.stderr.write(f"fedtune: {error}\\n")\n        return 1\n',
        tests=("tests/cli/test_main.py::test_each_kind_of_error_has_its_exit_code",),
    ),
    Mutant(
        name="approved-unasked",
        fault="`site approve RUN` approves without a person's word.",
        file=APPROVE,
        old="    if not yes and not _agreed():",
        new="    if yes and not _agreed():",
        tests=(f"{OF_SITE}::test_a_person_is_asked",),
    ),
    Mutant(
        name="approved-by-an-empty-line",
        fault="Any answer but no counts as approval, an empty line and a closed input among them.",
        file=APPROVE,
        old='.strip().lower() in ("y", "yes")',
        new='.strip().lower() not in ("n", "no")',
        tests=(f"{OF_SITE}::test_a_person_is_asked",),
    ),
    Mutant(
        name="approved-over-the-budget",
        fault="A run that policy or budget would refuse can be approved.",
        file=APPROVE,
        old="    if not verdict.allowed:",
        new="    if verdict.allowed is None:",
        tests=(f"{OF_SITE}::test_what_the_budget_refuses_cannot_be_approved_and_waits_on",),
    ),
    Mutant(
        name="approved-by-a-shared-name",
        fault="Where two leads propose runs of one name, the first is approved without a word.",
        file=APPROVE,
        old="    if len(found) > 1:",
        new="    if len(found) > 2:",
        tests=(f"{OF_SITE}::test_of_two_runs_with_one_name_one_is_approved_by_its_digest",),
    ),
    Mutant(
        name="left-with-open-runs",
        fault="A site that leaves keeps its open runs: the lead can go on asking for rounds after a restart.",
        file="fedtune/cli/site.py",
        old="        ledger.end(name)\n",
        new="        ledger.history.runs[name]\n",
        tests=(f"{OF_SITE}::test_leaving_ends_open_runs_and_frees_what_they_had_set_aside",),
    ),
    Mutant(
        name="export-overwrites",
        fault="`ledger export --output` writes over any file, the ledger and the site's key among them.",
        file=LEDGER,
        old="if output is not None and output.exists():",
        new="if output is not None and output.is_dir():",
        tests=(f"{OF_LEDGER}::test_export_overwrites_nothing",),
    ),
    Mutant(
        name="anchor-put-back",
        fault="`ledger anchor` replaces an anchor by one of an older copy of the ledger, and hides the rollback.",
        file=LEDGER,
        old="verify(file, anchor=before, site_key=own.public)",
        new="verify(file, anchor=None, site_key=own.public)",
        tests=(f"{OF_LEDGER}::test_an_anchor_is_not_replaced_by_an_older_one",),
    ),
    Mutant(
        name="frozen-without-a-reason",
        fault="A population is frozen for ever without a reason in the ledger.",
        file=LEDGER,
        old="    if not why.strip():",
        new="    if why is None:",
        tests=(f"{OF_LEDGER}::test_freeze_wants_a_reason_and_makes_no_ledger",),
    ),
    Mutant(
        name="restored-beside-the-policy",
        fault="`ledger restore` charges a copy of the ledger, while the site goes on with the one that lacks events.",
        file=LEDGER,
        old="if not files.ledger.is_file() or not given.samefile(files.ledger):",
        new="if not files.ledger.is_file():",
        tests=(f"{OF_LEDGER}::test_restore_works_on_the_policy_s_own_ledger_alone",),
    ),
    Mutant(
        name="a-ledger-of-another-policy",
        fault="`site check-policy` ends with exit code 0 where the ledger was made for another policy.",
        file="fedtune/cli/policy.py",
        old='        raise ConfigError(f"{file}: {key}", asked, bound)\n',
        new='        ConfigError(f"{file}: {key}", asked, bound)\n',
        tests=("tests/cli/test_site.py::test_a_ledger_of_something_else_does_not_fit",),
    ),
    Mutant(
        name="a-lead-steers-the-terminal",
        fault="Names that come from a lead are printed with their escape sequences, which can rewrite what a person "
        "at a site reads.",
        file="fedtune/cli/plain_words.py",
        old='letter if letter.isprintable() else "?"',
        new="letter",
        tests=(f"{OF_LEDGER}::test_a_run_s_name_cannot_steer_the_terminal",),
    ),
    Mutant(
        name="best-by-test-score",
        fault="A sweep marks the run with the best test score as the best, and that score is then too good.",
        file="fedtune/cli/sweep.py",
        old="    return row.validation.get(row.judged_by)",
        new="    return row.test.get(row.judged_by)",
        tests=("tests/cli/test_sweep.py::test_the_best_run_is_told_by_validation_alone",),
    ),
    Mutant(
        name="somebody-elses-folder-removed",
        fault="A run that ends before it began clears the folder away, also one that was there before.",
        file=FOLDER,
        old="        if made and not begun:\n            _remove(made)",
        new="        if not begun:\n            _remove(made or [folder])",
        tests=(f"{OF_FOLDER}::test_a_resumed_folder_is_never_cleared_away",),
    ),
    Mutant(
        name="sigterm-not-taken",
        fault="A run that is ended by SIGTERM says nothing, and leaves a folder in which nothing began.",
        file=FOLDER,
        old="interrupt) for each in (signal.SIGINT, signal.SIGTERM)}",
        new="interrupt) for each in (signal.SIGINT,)}",
        tests=(f"{OF_FOLDER}::test_a_run_that_is_stopped_while_it_loads_leaves_nothing",),
    ),
    Mutant(
        name="empty-runs-folder-left",
        fault="A run that never began leaves the empty folders around its own.",
        file=FOLDER,
        old="            parent.rmdir()\n",
        new="            break\n",
        tests=(f"{OF_FOLDER}::test_what_never_began_leaves_nothing_behind",),
    ),
    Mutant(
        name="second-experiment-wins",
        fault="Of two experiments on the command line the last one is run, and nothing is said.",
        file="fedtune/cli/compose.py",
        old="    _require_one_experiment(overrides)\n    resumed",
        new="    resumed",
        tests=("tests/cli/test_experiment_file.py",),
    ),
    Mutant(
        name="a-failed-tracker-goes-on",
        fault="A tracker that failed is told of each round again, and each time says that it ends.",
        file="fedtune/tracking.py",
        old="            self._tracker = None\n            self._note(",
        new="            self._note(",
        tests=("tests/test_tracking.py::test_a_tracker_that_fails_ends_no_run",),
    ),
)
