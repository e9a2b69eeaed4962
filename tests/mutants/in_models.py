"""Faults of the model: what is loaded, what its hash covers, what one record can do to another, where it begins."""

from .mutant import Mutant

MANIFEST, REFUSALS, FITS = ("fedtune/model/manifest.py", "fedtune/model/refusals.py", "fedtune/model/fits.py")
OF_MANIFEST = ("tests/model/test_manifest.py",)
HOSTILE_FOLDERS = ("tests/model/test_hostile_folders.py",)
SAVED, OF_START = "fedtune/tasks/saved.py", "tests/tasks/test_start_adapter.py"
SCALES, OF_SCALES = "fedtune/model/scales.py", "tests/model/test_scales.py"
OF_KINDS = "tests/training/test_adapter_kinds.py"
SETTINGS, OF_SETTINGS = "fedtune/sites/shared_settings.py", "tests/sites/test_shared_settings.py"

_BASE = (
    Mutant(
        name="loaded-from-the-original-folder",
        fault="A model's files are hashed in a folder of their own, and loaded from where they lay, beside others.",
        file=MANIFEST,
        old="yield Staged(folder=place,",
        new="yield Staged(folder=folder,",
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="config-not-pinned",
        fault="The model's hash leaves config.json out: the same weights with another activation pass for it.",
        file=MANIFEST,
        old="            hashes[name] = hashlib.sha256(content).hexdigest()",
        new='            hashes |= {} if name == "config.json" else {name: hashlib.sha256(content).hexdigest()}',
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="weights-alone-are-a-model",
        fault="A hash of the weights is taken for the model's: tokenizer and config may be anybody's.",
        file=MANIFEST,
        old="        if sha256 == self.sha256:",
        new="        if sha256 in (self.sha256, *(digest for _, digest in self.files)):",
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="redirecting-keys-followed",
        fault="config.json may name other weights, code or another config, which transformers then loads.",
        file=REFUSALS,
        old="        if key in _REDIRECTING and value is not None:",
        new="        if key in _REDIRECTING and value is None:",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="rope-by-the-batch",
        fault="Rope types that follow a batch's longest example are loaded: one record changes the others.",
        file=REFUSALS,
        old="_rope_refusal(fields) or _architecture_refusal(fields)",
        new="_architecture_refusal(fields)",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-architecture",
        fault="Every model that the library can build is taken, also those that size something by a batch's richest "
        "example: weights can hide from the try before a run that one record then turns all others.",
        file=REFUSALS,
        old="_rope_refusal(fields) or _architecture_refusal(fields) or _unknown_key_refusal(fields)",
        new="_rope_refusal(fields)",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-key-of-a-config",
        fault="config.json may have any key, and one of them makes transformers read an innocent other one as the name "
        "of the file with the weights.",
        file=REFUSALS,
        old=" or _unknown_key_refusal(fields)",
        new="",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-key-of-a-tokenizers-config",
        fault="tokenizer_config.json may have any key, and each is an argument of the library's tokenizer.",
        file=REFUSALS,
        old="        if may_name_own and key not in OF_TOKENIZER_CONFIG and not (",
        new="        if may_name_own and key in ('slow_tokenizer_file',) and not (",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="activations-of-a-whole-batch",
        fault="An activation works on a batch at once: the last elements of its tensor are rounded otherwise, so that "
        "a record's place decides its bits, which a model's weights can enlarge.",
        file="fedtune/model/base_model.py",
        old="    compute_by_row(model)\n",
        new="",
        tests=("tests/model/test_activations.py",),
    ),
    Mutant(
        name="tried-with-its-own-weights-alone",
        fault="Weights that show nothing on made-up examples pass the try before a run.",
        file="fedtune/training/preflight.py",
        old="with _random_weights(model, draws) if weights_chosen else nullcontext():",
        new="with nullcontext():",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="no-example-in-every-place",
        fault="The try leaves out the one that puts a whole example into every row, so that a kernel that rounds some "
        "places otherwise passes where made-up examples have padding.",
        file="fedtune/training/preflight.py",
        old="_rows(found, torch.zeros_like(rows))",
        new="_rows(found, rows)",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="made-up-from-a-fixed-seed",
        fault="What a model is tried with is the same each time, and a lead can look for a model that passes.",
        file="fedtune/training/preflight.py",
        old="np.random.default_rng(seed), count(1)",
        new="np.random.default_rng(seed or 20241), count(1)",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="map-names-a-repository",
        fault="special_tokens_map.json may tell the tokenizer's library which repository or folder to look into.",
        file="fedtune/model/refusals.py",
        old="        if key not in OF_SPECIAL_TOKENS_MAP:\n",
        new="        if key in ('vocab_file',):\n",
        tests=("tests/model/test_hostile_folders.py",),
    ),
    Mutant(
        name="text-grows-without-bound",
        fault="A tokenizer's normaliser may make gigabytes of one record's letters, and the site's process ends.",
        file="fedtune/data/tokenise.py",
        old="<= _MOST_LONGER * len(text) + _ROOM",
        new=">= 0",
        tests=("tests/tasks/test_tokenise.py",),
    ),
    Mutant(
        name="encoder-as-a-decoder",
        fault="An encoder trains as a language model, with a head whose GELU rounds by its place in the batch.",
        file="fedtune/model/fits.py",
        old="    if kind in ENCODERS:\n",
        new="    if kind in ():\n",
        tests=("tests/tasks/test_task_model.py",),
    ),
    Mutant(
        name="built-rope-not-looked-at",
        fault="Only the config's word for a rope type counts, and not what the library makes of it.",
        file=FITS,
        old="            reason = rotary_refusal(kind)",
        new="            reason = None",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="tokens-beyond-the-embedding",
        fault="A tokenizer may give ids without a row in the embedding: a site fails where a record has one.",
        file=FITS,
        old="    if largest >= rows:",
        new="    if largest >= 1 << 40:",
        tests=("tests/sites/test_pinned_model.py", *HOSTILE_FOLDERS),
    ),
    Mutant(
        name="positions-with-the-padding-row",
        fault="All 514 rows of a RoBERTa's table count as positions: an example of 513 tokens makes a site fail.",
        file=FITS,
        old="bounds.append(len(weight) - (padding + 1 if padding is not None else offset))",
        new="bounds.append(len(weight) - (0 if padding is not None else offset))",
        tests=HOSTILE_FOLDERS,
    ),
)

_START = (
    Mutant(
        name="start-path-travels",
        fault="The folder of the adapter that a run begins in is sent to the sites, with the lead's names of folders.",
        file=SETTINGS,
        old="public_id=None, adapter=None)",
        new="public_id=None)",
        tests=(f"{OF_SETTINGS}::test_places_and_speeds_of_the_lead_make_no_difference_and_do_not_travel",),
    ),
    Mutant(
        name="start-path-opened-at-a-site",
        fault="A site keeps the folder of a start adapter that a lead sent, and opens what it names.",
        file=SETTINGS,
        old="    model = replace(model, adapter=None)",
        new="    model = replace(model)",
        tests=("tests/sites/test_at_site.py::test_the_folder_of_a_start_adapter_is_not_opened_whatever_a_lead_sends",),
    ),
    Mutant(
        name="start-outside-the-digest",
        fault="A run that begins in another adapter has the same id, and goes on under the charge of the first.",
        file="fedtune/config.py",
        old='("cache_dir", "public_id", "adapter")]',
        new='("cache_dir", "public_id", "adapter", "adapter_sha256")]',
        tests=(f"{OF_SETTINGS}::test_whatever_decides_a_result_makes_another_run",),
    ),
    Mutant(
        name="start-outside-the-proposal",
        fault="A proposal does not name the adapter that the run begins in: no site's ledger says it.",
        file="fedtune/config.py",
        old='            start_adapter=self.model.adapter_sha256 or "",',
        new='            start_adapter="",',
        tests=(
            "tests/sites/test_real_site.py::test_an_adapter_that_a_run_begins_in_is_brought_into_the_bound_of_the_site",
        ),
    ),
    Mutant(
        name="approved-for-any-start",
        fault="A proposal's digest leaves the start adapter out: an approval of one is one of all.",
        file="fedtune/privacy/proposal.py",
        old="            if fields[key] == before:",
        new='            if key == "start_adapter" or fields[key] == before:',
        tests=("tests/privacy/test_proposal.py",),
    ),
    Mutant(
        name="start-exchanged-after-the-proposal",
        fault="The lead begins in whatever lies in the folder by then, and not in the adapter that was proposed.",
        file="fedtune/sites/shared_model.py",
        old="        if start.digest != named.adapter_sha256:",
        new="        if named.adapter_sha256 is None:",
        tests=(
            "tests/sites/test_shared_model.py::test_a_run_begins_in_the_adapter_that_it_was_proposed_with_and_no_other",
        ),
    ),
    Mutant(
        name="start-tensors-unchecked",
        fault="A start adapter's tensors are not compared with the digest that is proposed.",
        file=SAVED,
        old="            if Adapter(self._trained(saved)).digest() != self.digest:",
        new="            if not self._trained(saved):",
        tests=(f"{OF_START}::test_values_that_are_damaged_or_not_finite_are_refused",),
    ),
    Mutant(
        name="start-not-finite",
        fault="A run begins in an adapter with values that are not finite, and charges its sites for nothing.",
        file=SAVED,
        old="            if not all(bool(np.isfinite(one).all()) for one in taken.values()):",
        new="            if not taken:",
        tests=(f"{OF_START}::test_values_that_are_damaged_or_not_finite_are_refused",),
    ),
    Mutant(
        name="start-beside-another-frozen-a",
        fault="With a frozen A, a run begins in a B that was trained beside another A than the sites make.",
        file=SAVED,
        old="if not parameters[name].requires_grad and not np",
        new="if name not in parameters and not np",
        tests=(f"{OF_START}::test_an_a_that_is_not_sent_must_be_the_one_that_the_sites_make",),
    ),
    Mutant(
        name="start-of-another-base",
        fault="A run begins in an adapter that was tuned on another base model.",
        file=SAVED,
        old="        if was != now:",
        new="        if was is None:",
        tests=(f"{OF_START}::test_another_base_is_refused_by_its_hash",),
    ),
    Mutant(
        name="head-of-other-labels",
        fault="The head of a start adapter is taken wherever there are as many labels: its rows stand for others.",
        file=SAVED,
        old="same = self.spec.labels == spec.labels and",
        new="same = len(self.spec.labels) == len(spec.labels) and",
        tests=(f"{OF_START}::test_under_other_labels_the_head_starts_as_it_would_without",),
    ),
    Mutant(
        name="scores-without-their-scale",
        fault="A base that scales its scores after its output layer is trained as one that does not.",
        file="fedtune/model/layers.py",
        old="        return [(id(scores), version) for scores, version in seen] == [(id(output), output._version)]",
        new="        return len(seen) == 1",
        tests=("tests/model/test_output_layer.py::test_scores_of_chosen_places_are_the_models_own",),
    ),
    Mutant(
        name="export-not-compared",
        fault="An export is not compared with the run's model: a base without the adapter merged goes out as merged.",
        file="fedtune/export/for_others.py",
        old="        if not apart <= _MOST_APART * max(1.0, float(ours.abs().max())):",
        new='        if apart == float("inf"):',
        tests=("tests/export/test_for_others.py::test_an_export_that_computes_something_else_leaves_nothing",),
    ),
)

_KINDS = (
    Mutant(
        name="scales-gradient-over-batch",
        fault="The gradient of a factor adds the tokens of all records of a micro-batch.",
        file="fedtune/training/per_example.py",
        old="    return {layer.offset: _added_tokens(backprops * activations[0])}",
        new="    total = _added_tokens(backprops * activations[0])\n"
        "    return {layer.offset: total.sum(dim=0, keepdim=True).expand_as(total)}",
        tests=(OF_KINDS,),
    ),
    Mutant(
        name="scales-start-at-one",
        fault="A factor is its offset, so that an adapter of zeros silences what it scales.",
        file=SCALES,
        old="        return values * (1 + self.offset)",
        new="        return values * self.offset",
        tests=(f"{OF_SCALES}::test_zeros_change_nothing_bit_for_bit",),
    ),
    Mutant(
        name="dora-length-of-the-base",
        fault="DoRA divides by the length of the base's row, not by that of the sum: its direction changes its length.",
        file=SCALES,
        old="(start / _row_lengths(module))",
        new="(start / start)",
        tests=(f"{OF_KINDS}::test_the_gradients_of_dora_are_those_of_pefts_own",),
    ),
    Mutant(
        name="dora-takes-a-row-of-zeros",
        fault="DoRA divides by the length of a row of zeros: every loss is no number.",
        file=SCALES,
        old="            if not lengths.all():",
        new="            if not lengths.any():",
        tests=(f"{OF_SCALES}::test_a_row_of_zeros_is_refused_by_dora",),
    ),
    Mutant(
        name="ia3-has-the-scale-of-lora",
        fault="A site is told that an IA3 adapter is multiplied by LoRA's alpha / rank.",
        file="fedtune/model/spec.py",
        old='        return 1.0 if self.kind == "ia3" else self.alpha',
        new="        return self.alpha",
        tests=("tests/model/test_spec.py", "tests/test_config.py"),
    ),
    Mutant(
        name="adapter-kind-not-checked",
        fault="A run with a kind of adapter that the policy does not list is allowed.",
        file="fedtune/privacy/site_policy.py",
        old="        (Reason.ADAPTERS, proposal.adapter, allow.adapters),\n",
        new="",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="another-kind-begins-a-run",
        fault="A run of one kind of adapter begins in a start adapter of another.",
        file=SAVED,
        old='        for key in ("kind", "rank",',
        new='        for key in ("rank",',
        tests=(f"{OF_START}::test_what_differs_is_named_all_at_once",),
    ),
    Mutant(
        name="scales-saved-as-they-started",
        fault="PEFT reads an adapter whose factors are those of the untrained one.",
        file=SCALES,
        old="start.detach() * scale.view_as(start)",
        new="start.detach().clone()",
        tests=("tests/tasks/test_saved.py",),
    ),
)

MODEL_FAULTS = (*_BASE, *_START, *_KINDS)
