"""Faults of what a site answers: to whom, and what leaves with it."""

from .mutant import Mutant

MECHANISM, SITE, PROTOCOL = (
    "fedtune/privacy/mechanism.py", "fedtune/federation/site_round.py", "fedtune/federation/protocol.py"
)  # fmt: skip
OF_MECHANISM = ("tests/privacy/test_mechanism.py",)
OF_SITE = ("tests/federation/test_site_round.py",)
HOSTILE = ("tests/federation/test_hostile_lead.py",)
REAL_SITE, SHARED = "fedtune/sites/real_site.py", "fedtune/sites/shared_model.py"
OF_SHARED = ("tests/sites/test_shared_model.py",)
NAN = (f"{HOSTILE[0]}::test_an_adapter_that_is_not_the_runs_is_refused[nan]",)
OF_EXAMPLES = ("tests/training/test_examples.py",)
NO_ORACLE = ("tests/sites/test_no_oracle.py",)

AT_SITE = (
    Mutant(
        name="a-group-decides-the-split",
        fault="The column by which scores are told apart is part of the bytes by which records are held out: a run "
        "with groups is tested on records that the run before trained on.",
        file="fedtune/data/records.py",
        old="    fields = {role: value for role, value in record.fields.items() if role != GROUP}\n",
        new="    fields = dict(record.fields)\n",
        tests=("tests/data/test_records.py",),
    ),
    Mutant(
        name="groups-without-leave",
        fault="A site that allows scores of all its records gives one for each group that a lead names.",
        file="fedtune/privacy/site_policy.py",
        old="list(METRICS).index(metrics) <= list(METRICS).index(self.metrics)",
        new='self.metrics != "none"',
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="exact-scores",
        fault="Score and count of held-out records leave exactly, and are charged as if they were noised.",
        file=MECHANISM,
        old='tuple(map(float, noisy["sums"]',
        new='tuple(map(float, sums["sums"]',
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="scores-of-sensitivity-one",
        fault="A unit's score and its count are two numbers of up to 1, and the noise is made for one of them.",
        file=MECHANISM,
        old="sensitivity=root)",
        new="sensitivity=1.0)",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="root-rounded-down",
        fault="The root of two is rounded down, and the noise of scores is smaller than stated.",
        file=MECHANISM,
        old="root = float(np.nextafter(np.sqrt(2.0), 2.0))",
        new="root = float(np.nextafter(np.sqrt(2.0), 1.0))",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="scores-not-clamped",
        fault="A unit's score is taken as it comes, so that one unit moves the sum by any amount.",
        file=MECHANISM,
        old="usable = np.clip(np.where(np.isfinite(scores), scores, 0.0), 0.0, 1.0)",
        new="usable = np.where(np.isfinite(scores), scores, 0.0)",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="exact-count-as-weight",
        fault="The true number of training records travels with the update, as Flower's `num-examples` does.",
        file="fedtune/sites/work.py",
        old="Trained(adapter=trained, scores=scores,",
        new="Trained(adapter=trained, scores=scores or (0.0, float(len(self.records.training))),",
        tests=("tests/end_to_end/test_noised_metrics.py::test_by_default_no_score_leaves_a_site",),
    ),
    Mutant(
        name="exception-text-in-a-reply",
        fault="A failure's own words leave with the refusal, as Flower sends an exception's type and text.",
        file=SITE,
        old="""    except Exception:
        log.exception("%s failed in %s", site.name, _about(request))
        body = _refusal(site, request, Refused(Reason.SITE_ERROR))""",
        new="""    except Exception as error:
        log.exception("%s failed in %s", site.name, _about(request))
        body = _refusal(site, request, Refused(Reason.SITE_ERROR, asked=error))""",
        tests=OF_SITE,
    ),
    Mutant(
        name="exceptions-left-to-flower",
        fault="What fails before the site is opened is raised into Flower, which sends its text to the server.",
        file="fedtune/flower/client.py",
        old="""        except Exception:
            log.exception("%s could not answer", name_of(context))
""",
        new="""        except RuntimeError:
            log.exception("%s could not answer", name_of(context))
""",
        tests=("tests/flower/test_client.py",),
    ),
    Mutant(
        name="lead-not-checked",
        fault="Whoever signs is answered before it is asked whether the site allows this lead.",
        file=SITE,
        old="    if request.proposal.lead not in site.ledger.policy.allow.leads:\n"
        "        raise Refused(Reason.LEADS, asked=request.proposal.lead)\n    if request.site",
        new="    if request.site",
        tests=HOSTILE,
    ),
    Mutant(
        name="signature-not-checked",
        fault="A request counts as that of the lead whom it names, whoever sent it.",
        file=PROTOCOL,
        old="if not is_signed(lead(asked), purpose, text, signed.signature):",
        new="if not signed.signature:",
        tests=HOSTILE,
    ),
    Mutant(
        name="expiry-ignored",
        fault="A request that ran out is trained for, whenever somebody plays it again.",
        file=SITE,
        old="    if time.time() > request.expires:\n        raise Refused(Reason.REQUEST_EXPIRED)\n",
        new="",
        tests=HOSTILE,
    ),
    Mutant(
        name="declared-size-not-checked",
        fault="A run may take the site for larger or smaller than it says it is: rate, denominator and delta are off.",
        file=SITE,
        old="    if run.declared_size != declared:",
        new="    if run.declared_size < 1:",
        tests=HOSTILE,
    ),
    Mutant(
        name="nan-in-the-adapter",
        fault="An adapter's values are compared so that NaN passes for a finite value.",
        file=SITE,
        old="    if not all(bool(np.isfinite(value).all()) for value in adapter.tensors.values()):",
        new="    if any(bool((np.abs(value) == np.inf).any()) for value in adapter.tensors.values()):",
        tests=NAN,
    ),
    Mutant(
        name="another-plan-than-the-first",
        fault="A lead may change a run's plan after its first round, and the site trains by what it is sent.",
        file="fedtune/privacy/ledger/site_ledger.py",
        old="    if known.proposal != proposal:",
        new="    if known.proposal.lead != proposal.lead:",
        tests=("tests/privacy/test_ledger.py::test_a_changed_proposal_is_refused",),
    ),
    Mutant(
        name="a-second-adapter-for-a-round",
        fault="A round that was trained can be asked for again with another adapter, within the plan.",
        file="fedtune/privacy/ledger/site_ledger.py",
        old="        if run.reserved.get(round, request) != request:",
        new='        if run.reserved.get(round, request) == "":',
        tests=HOSTILE,
    ),
    Mutant(
        name="receipt-unsigned",
        fault="A receipt passes with any signature, so a server can tell the lead what it likes of a site.",
        file="fedtune/privacy/release.py",
        old="return is_signed(self.site_key, RECEIPT, self.message(), self.signature)",
        new="return bool(self.site_key and self.signature)",
        tests=("tests/privacy/test_release.py",),
    ),
    Mutant(
        name="receipt-shows-the-head",
        fault="A receipt carries the ledger's plain hash, on which a guess of what the ledger holds can be tested.",
        file="fedtune/privacy/ledger/site_ledger.py",
        old='"head": self._store.salted_head(),',
        new='"head": self.history.hash,',
        tests=("tests/privacy/test_ledger.py::test_a_receipt_does_not_show_the_head_that_it_proves",),
    ),
    Mutant(
        name="fingerprint-without-a-key",
        fault="The records' fingerprint is a plain hash: whoever reads the ledger can test a candidate data set.",
        file="fedtune/sites/work.py",
        old='digest = hmac.new(key, digestmod="sha256")',
        new="digest = hashlib.sha256()",
        tests=("tests/sites/test_work.py::test_a_fingerprint_is_of_the_training_records_under_the_given_key",),
    ),
    Mutant(
        name="settings-kept-after-the-charge",
        fault="What the site keeps of a run is written when the round is charged: where it cannot be, each repetition "
        "charges another round and trains none.",
        file="fedtune/federation/site_round.py",
        old="""        run.store()
        # A round whose reply could not be kept would be charged for nothing.
        require_room(site.ledger.folder, 16 * run.template.num_values)

    granted = site.ledger.reserve(request.proposal, round=request.round, request=request.digest(), unless=make_ready)
""",
        new="""\
        # A round whose reply could not be kept would be charged for nothing.
        require_room(site.ledger.folder, 16 * run.template.num_values)

    granted = site.ledger.reserve(request.proposal, round=request.round, request=request.digest(), unless=make_ready)
    run.store()
""",
        tests=("tests/sites/test_real_site.py::test_a_site_that_cannot_keep_the_settings_charges_nothing",),
    ),
    Mutant(
        name="records-read-before-the-charge",
        fault="Records are opened when a request is checked: a refused one tells of them, by its time or its failure.",
        file="fedtune/sites/real_site.py",
        old="        Path(config.data.train_file).stat()  # a file",
        new="        self._work(request.run, self._shared_model(config), files)  # a file",
        tests=NO_ORACLE,
    ),
    Mutant(
        name="a-record-that-fails",
        fault="A setting that a lead chose makes a site fail for certain records, and the failure tells of them.",
        file="fedtune/sites/real_site.py",
        old="            lenient=True,",
        new="            lenient=False,",
        tests=("tests/sites/test_no_oracle.py::test_a_record_without_a_token_stops_no_round",),
    ),
    Mutant(
        name="states-of-a-record-that-fails",
        fault="A record that the frozen layers cannot compute ends the round where their states are kept, and the "
        "answer tells that there is one.",
        file="fedtune/training/examples.py",
        old="_states(model, batch) if lenient else model.frozen_states(batch)",
        new="model.frozen_states(batch)",
        tests=OF_EXAMPLES,
    ),
    Mutant(
        name="a-record-without-states-counts",
        fault="A record that the frozen layers cannot compute adds the gradient of made-up states, and counts as zero "
        "only where no states are kept.",
        file="fedtune/training/per_example.py",
        old="    if known[: len(batch)].all():\n",
        new="    if known.any():\n",
        tests=OF_EXAMPLES,
    ),
    Mutant(
        name="a-broken-line-ends-the-file",
        fault="A site's lenient reading ends at a record that cannot be parsed, so that one record ends every answer.",
        file="fedtune/data/records.py",
        old="        if isinstance(row, DataError):\n            yield line, row\n            continue\n",
        new="        if isinstance(row, DataError):\n            raise row\n",
        tests=("tests/data/test_records.py",),
    ),
    Mutant(
        name="an-old-policy-goes-on",
        fault="A policy that was changed during a run has no effect on the figures that the site's process holds.",
        file=REAL_SITE,
        old="shared.config.to_json(), files.policy.digest()]",
        new="shared.config.to_json()]",
        tests=("tests/sites/test_real_site.py::test_a_tighter_bound_on_the_adapter_holds_with_the_next_request",),
    ),
    Mutant(
        name="a-model-that-was-never-tried",
        fault="A site trains a model without having tried whether an example's gradient is the same alone and beside "
        "another.",
        file=SHARED,
        old="        tried = config.privacy.private and trains\n",
        new="        tried = config.privacy.private and declared_size is None\n",
        tests=OF_SHARED,
    ),
    Mutant(
        name="passed-before-it-was-tried",
        fault="That a model passed its try is noted before it did: whoever asks a second time gets past.",
        file=SHARED,
        old="        if self._facts not in _measured:\n",
        new="        if self._facts not in _measured:\n            _measured[self._facts] = self.shapes, 0.0\n",
        tests=OF_SHARED,
    ),
    Mutant(
        name="inexact-without-consent",
        fault="A machine that lets an example's company change how it is rounded is taken, whatever the policy says.",
        file=SHARED,
        old="path=config.model.path, inexact_allowed=inexact_allowed)",
        new="path=config.model.path, inexact_allowed=True)",
        tests=OF_SHARED,
    ),
    Mutant(
        name="tried-for-a-run-without-privacy",
        fault="A model that was loaded for a run without privacy, for which nothing is tried, serves a private one.",
        file=SHARED,
        old="            config.privacy.private,\n",
        new="",
        tests=OF_SHARED,
    ),
    Mutant(
        name="replies-at-once",
        fault="Replies leave as soon as they are made although the policy holds them to a schedule; their time grows "
        "with the true count.",
        file=SITE,
        old="        time.sleep(max(0.0, math.ceil(passed / every_s) * every_s - passed))",
        new="        time.sleep(0.0)",
        tests=OF_SITE,
    ),
)
