"""Faults of what came with several tasks: records of several texts, targets that are no label, and comparisons."""

from .mutant import Mutant

PAIRS, MULTI_LABEL = "fedtune/tasks/embedding.py", "fedtune/tasks/multi_label.py"
BATCHING, TOKENISE, SPEC = (f"fedtune/data/{name}.py" for name in ("batching", "tokenise", "spec"))
OF_BATCHING = "tests/data/test_batching.py"
OF_PAIRS, OF_TARGETS = "tests/tasks/test_embedding.py", "tests/tasks/test_targets.py"
OF_LAYOUTS, OF_EXAMPLES = "tests/training/test_layouts.py", "tests/training/test_examples.py"
COMPARE, GROUPS = "fedtune/cli/compare.py", "fedtune/evaluation/groups.py"
PREFERENCE, OF_PREFERENCE = "fedtune/tasks/preference.py", "tests/tasks/test_preference.py"
OF_COMPARE, OF_GROUPS, OF_COST = (
    "tests/cli/test_compare.py",
    "tests/evaluation/test_groups.py",
    "tests/federation/test_cost.py",
)
_SUMMED = "gradients[name] = reduce(torch.add, (of_rows[text :: batch.texts] for text in range(batch.texts)))"

_SEVERAL_TEXTS = (
    Mutant(
        name="texts-clipped-one-by-one",
        fault="Each text of a record is clipped by itself: a record of three adds up to three clip norms.",
        file="fedtune/training/per_example.py",
        old=_SUMMED,
        new="gradients[name] = of_rows",
        tests=(f"{OF_LAYOUTS}::test_the_clipped_sum_equals_a_loop[scored-whole]",),
    ),
    Mutant(
        name="one-known-text-is-enough",
        fault="A record of which one text cannot be computed is learnt by its others, where frozen states are kept, "
        "and counts as zero where they are not.",
        file="fedtune/training/per_example.py",
        old="view(-1, batch.texts).all(dim=1)",
        new="view(-1, batch.texts).any(dim=1)",
        tests=(f"{OF_EXAMPLES}::test_a_record_without_states_adds_nothing_and_moves_no_other[pairs-not finite-40]",),
    ),
    Mutant(
        name="length-of-the-first-text",
        fault="A record of several texts counts as long as its first one: a longer one does not fit its micro-batch.",
        file=TOKENISE,
        old='object.__setattr__(self, "lengths", lengths.max(axis=1))',
        new='object.__setattr__(self, "lengths", lengths[:, 0])',
        tests=(f"{OF_BATCHING}::test_a_data_set_of_several_texts_has_the_length_of_each_record_s_longest",),
    ),
    Mutant(
        name="alone-takes-one-row",
        fault="A record that is computed by itself, after its micro-batch failed, keeps the first of its texts alone.",
        file=BATCHING,
        old="        kept[:taken] = of_each[place or 0]\n",
        new="        kept[:taken, :1] = of_each[place or 0][:1]\n",
        tests=(f"{OF_BATCHING}::test_an_example_of_several_texts_is_alone_with_all_of_them",),
    ),
    Mutant(
        name="negative-by-place",
        fault="Which public text is a record's negative goes by its place in the file: one record more changes those "
        "of all that follow it.",
        file=PAIRS,
        old="""
    def chosen(record: Record) -> Record:
        number = int.from_bytes(hashlib.sha256(record_key(record)).digest()[:8])
""",
        new="""
    places = iter(range(10**9))

    def chosen(record: Record) -> Record:
        number = next(places)
""",
        tests=(f"{OF_PAIRS}::test_the_negative_from_the_list_follows_from_the_record_alone",),
    ),
    Mutant(
        name="in-batch-allowed",
        fault="Negatives from the batch are accepted: a record's gradient depends on those drawn with it, and clipping "
        "each does not bound what one record does.",
        file=SPEC,
        old='        if self.negatives == "batch":\n',
        new='        if self.negatives == "in-batch":\n',
        tests=(f"{OF_PAIRS}::test_settings_that_cannot_be",),
    ),
    Mutant(
        name="ties-are-first",
        fault="Of equally near texts an anchor's own counts as the nearest: who embeds all texts alike finds "
        "everything.",
        file=PAIRS,
        old="((np.abs(above) <= _TIE).sum(axis=1) + 1) / 2",
        new="1",
        tests=(f"{OF_PAIRS}::test_who_embeds_all_texts_alike_finds_nothing",),
    ),
    Mutant(
        name="room-for-one-text",
        fault="A micro-batch has as many records whether they have one text or three, and takes three times the "
        "memory.",
        file="fedtune/training/machine.py",
        old="micro_batch_tokens(runtime, model.device) // model.spec.texts",
        new="micro_batch_tokens(runtime, model.device)",
        tests=("tests/training/test_machine.py::test_a_record_of_several_texts_takes_their_part_of_a_micro_batch",),
    ),
)

_TARGETS = (
    Mutant(
        name="range-without-width",
        fault="The range of a number may be a point, or narrower than float32 can tell: a division by nothing.",
        file=SPEC,
        old="high - low >= _LEAST_WIDTH * max(1.0, largest)",
        new="high >= low",
        tests=(f"{OF_TARGETS}::test_a_range_that_is_none",),
    ),
    Mutant(
        name="undeclared-labels-dropped",
        fault="Of a record's several labels those that nobody declared are dropped, and it learns to have no more.",
        file=MULTI_LABEL,
        old='                    raise undeclared(record, "labels", data.labels)\n',
        new="                    continue\n",
        tests=(f"{OF_TARGETS}::test_a_record_that_nobody_declared_is_left_out_as_a_whole_and_not_quoted",),
    ),
    Mutant(
        name="target-clamped",
        fault="A number outside the declared range is moved to its edge: a truth that is none is learnt and scored.",
        file="fedtune/tasks/base.py",
        old='        raise DataError(record.at("target"), "outside the range", bound)\n',
        new="        return low if number < low else high\n",
        tests=(f"{OF_TARGETS}::test_a_record_that_nobody_declared_is_left_out_as_a_whole_and_not_quoted",),
    ),
    Mutant(
        name="order-not-sorted",
        fault="The probabilities of an order are differences of answers that need not fall: some are below zero.",
        file="fedtune/tasks/ordinal.py",
        old="logits.sigmoid().sort(dim=1, descending=True).values",
        new="logits.sigmoid()",
        tests=(f"{OF_TARGETS}::test_the_probabilities_of_an_order_are_some_and_their_median_is_the_answer",),
    ),
    Mutant(
        name="ece-equal-width",
        fault="Calibration is measured in bins of equal width: those of an unsure model are all but empty.",
        file="fedtune/tasks/measures.py",
        old="np.array_split(order, BINS)",
        new="np.split(order, np.searchsorted(confidence[order], np.arange(1, BINS) / BINS))",
        tests=("tests/tasks/test_measures.py::test_bins_hold_equally_many_answers_and_none_is_empty",),
    ),
    Mutant(
        name="guess-direction",
        fault="A model of several labels is held against who says the rarest ones, and is never found to be no better.",
        file=MULTI_LABEL,
        old="np.sort(truth.sum(axis=0))[::-1]",
        new="np.sort(truth.sum(axis=0))",
        tests=(f"{OF_TARGETS}::test_a_guess_is_the_best_single_answer",),
    ),
    Mutant(
        name="unit-score-not-clamped",
        fault="One record's score of a number may be far below zero, and moves the sum that is noised for at most one.",
        file="fedtune/tasks/regression.py",
        old="model.logits(batch)[0, 0].clamp(-1, 1) - batch",
        new="model.logits(batch)[0, 0] - batch",
        tests=(f"{OF_TARGETS}::test_one_unit_scores_between_0_and_1",),
    ),
)

_COMPARISONS = (
    Mutant(
        name="draws-not-shared",
        fault="Each model is scored on other draws of the records: what all of them find hard widens every difference.",
        file="fedtune/evaluation/bootstrap.py",
        old="model: scores({name: values[places] for name, values in figures.items()})",
        new="model: scores({name: values[(places + len(model)) % num_records] for name, values in figures.items()})",
        tests=(f"{OF_GROUPS}::test_models_share_the_draws_and_a_mean_is_one_more",),
    ),
    Mutant(
        name="merge-stops-early",
        fault="Small groups are merged, and the next smallest does not join them where they are too few even so.",
        file=GROUPS,
        old="    while small and left and _units_in(",
        new="    while small and not left and _units_in(",
        tests=(f"{OF_GROUPS}::test_small_groups_are_merged_and_the_next_smallest_joins_until_they_are_enough",),
    ),
    Mutant(
        name="units-without-end",
        fault="A site claims a billion times the units that it declares, and its score by group is the federation's.",
        file=GROUPS,
        old="    if units.sum() > most + ",
        new="    if 0 > most + ",
        tests=(OF_GROUPS,),
    ),
    Mutant(
        name="units-below-none",
        fault="A site takes others' units out of a group, as long as its sum of scores is as far below 0.",
        file=GROUPS,
        old="np.minimum(scores, units) < ",
        new="scores < ",
        tests=(OF_GROUPS,),
    ),
    Mutant(
        name="few-of-a-group-prove",
        fault="A group of a few records is called better or worse, because there are enough records in all.",
        file=GROUPS,
        old="num_units=size)",
        new="num_units=max(size, found.num_units))",
        tests=(f"{OF_GROUPS}::test_a_group_of_few_proves_nothing",),
    ),
    Mutant(
        name="plain-keeps-noise",
        fault="The run without privacy, beside which privacy's price is told, has it.",
        file=COMPARE,
        old='"privacy.mechanism": "none", ',
        new="",
        tests=(f"{OF_COMPARE}::test_who_takes_part_is_all_that_differs",),
    ),
    Mutant(
        name="pooled-declares-one-site",
        fault="All records in one place declare the size of one site: their sum is divided by too little.",
        file=COMPARE,
        old="sum(asked.data.sizes(asked.federation.num_sites))",
        new="max(asked.data.sizes(asked.federation.num_sites))",
        tests=(f"{OF_COMPARE}::test_who_takes_part_is_all_that_differs",),
    ),
    Mutant(
        name="site-score-on-training",
        fault="A site scores a final adapter on the records that it trained on.",
        file="fedtune/cli/site_actions.py",
        old="site_records(config, files).heldout",
        new="site_records(config, files).training",
        tests=("tests/cli/test_site_score.py::test_the_records_are_those_held_out_by_the_sites_own_key",),
    ),
    Mutant(
        name="energy-is-told",
        fault="What measures energy goes by its own settings, and sends or writes what it finds.",
        file="fedtune/federation/cost.py",
        old="        output_methods=[],\n        emissions_endpoint=None,\n",
        new="",
        tests=(f"{OF_COST}::test_energy_and_carbon_are_measured_and_nobody_is_told",),
    ),
    Mutant(
        name="cost-goes-to-sites",
        fault="Whether energy is measured goes to the sites: without it, it is another run to them.",
        file="fedtune/sites/shared_settings.py",
        old="        cost=CostSpec(),\n",
        new="",
        tests=(f"{OF_COST}::test_cost_changes_no_run_and_goes_to_no_site",),
    ),
    Mutant(
        name="cost-in-digest",
        fault="Whether a run's cost is told makes it another run, so that it cannot be resumed without its energy.",
        file="fedtune/config.py",
        old='("name", "resume", "tracking", "report", "cost")',
        new='("name", "resume", "tracking", "report")',
        tests=(f"{OF_COST}::test_cost_changes_no_run_and_goes_to_no_site",),
    ),
)

_READING = (
    Mutant(
        name="a-mistake-ends-the-answer",
        fault="What a task's reading of a record raises, besides what it says of records, ends the site's answer.",
        file="fedtune/tasks/base.py",
        old="        except Exception as error:\n",
        new="        except UnicodeError as error:\n",
        tests=(f"{OF_TARGETS}::test_a_mistake_of_ours_in_reading_a_record_leaves_it_out",),
    ),
    Mutant(
        name="labels-by-depth",
        fault="A list of labels that is too deep to be read is a text, which a reader higher in the stack finds a "
        "list.",
        file="fedtune/data/values.py",
        old="    except RecursionError:\n        listed = [None]\n",
        new="    except RecursionError:\n        listed = None\n",
        tests=("tests/data/test_records.py::test_labels_are_the_same_from_every_depth",),
    ),
    Mutant(
        name="four-bytes-a-label",
        fault="A record of a thousand labels takes four kilobytes, and a lead chooses how many a site has memory for.",
        file=MULTI_LABEL,
        old="    target_type = np.int8\n",
        new="    target_type = np.float32\n",
        tests=(f"{OF_TARGETS}::test_many_labels_take_a_byte_of_a_record_each_and_no_more_than_a_thousand",),
    ),
)

_PREFERENCES = (
    Mutant(
        name="reference-with-adapters",
        fault="What a preference is compared with is the adapted model itself, so that nothing is learnt, or only what "
        "an earlier run began with.",
        file="fedtune/model/layers.py",
        old="            layer._disable_adapters = True\n",
        new="            layer._disable_adapters = False\n",
        tests=(f"{OF_PREFERENCE}::test_the_reference_is_the_base_whatever_the_adapter",),
    ),
    Mutant(
        name="adapters-stay-off",
        fault="After the base was asked, the adapters stay off: the model is its base for the rest of the run.",
        file="fedtune/model/layers.py",
        old="            layer._disable_adapters = False\n",
        new="            layer._disable_adapters = True\n",
        tests=(f"{OF_PREFERENCE}::test_what_trains_stays_as_it_was",),
    ),
    Mutant(
        name="anothers-reference",
        fault="Kept references are laid beside the rows in the file's order, so that a record's loss follows another "
        "record.",
        file="fedtune/training/examples.py",
        old="self._reference[part.places]",
        new="self._reference[: len(part.places)]",
        tests=("tests/training/test_examples.py::test_a_kept_reference_gives_the_same_clipped_sum_at_every_adapter",),
    ),
    Mutant(
        name="reference-zero-for-what-fails",
        fault="A record that the base cannot compute has a reference of zero, and adds a gradient that means nothing.",
        file="fedtune/training/examples.py",
        old="missing=torch.nan)",
        new="missing=0.0)",
        tests=(
            "tests/training/test_examples.py::test_a_record_that_the_base_cannot_compute_adds_nothing_and_moves_no_other",
        ),
    ),
    Mutant(
        name="reference-untried",
        fault="The trial before a run asks the base about its examples in one company only, so that a base that mixes "
        "records passes.",
        file="fedtune/training/preflight.py",
        old="        examples.keep_reference(self._model, parts=parts, lenient=False)\n",
        new="        examples.keep_reference(self._model, lenient=False)\n",
        tests=("tests/training/test_preflight.py::test_what_the_base_says_of_a_record_is_tried_in_other_company_too",),
    ),
    Mutant(
        name="prompts-cut-apart",
        fault="The prompt before the longer answer is cut further than before the shorter one, and tells them apart.",
        file=PREFERENCE,
        old=", room_for=longer)",
        new=")",
        tests=(f"{OF_PREFERENCE}::test_a_prompt_is_cut_as_the_longer_answer_needs",),
    ),
    Mutant(
        name="ties-count-as-right",
        fault="A pair whose rewards are the same counts as found: the untrained model looks good.",
        file=PREFERENCE,
        old="<= _TIE * spec.beta, 0.5, margins > 0)",
        new="<= _TIE * spec.beta, 1.0, margins > 0)",
        tests=(f"{OF_PREFERENCE}::test_a_model_that_is_its_base_prefers_nothing",),
    ),
    Mutant(
        name="length-is-rewarded",
        fault="The score controlled for length is the plain mean, which a model that prefers long answers wins.",
        file=PREFERENCE,
        old="(above.mean() + below.mean()) / 2 if len(above) and len(below) else neutral",
        new="np.concatenate([above, below]).mean() if len(above) and len(below) else neutral",
        tests=(f"{OF_PREFERENCE}::test_who_goes_by_length_alone_gains_nothing",),
    ),
    Mutant(
        name="answers-by-depth",
        fault="An answer in brackets that is too deep to be read is a text, which is found to be turns later.",
        file="fedtune/data/values.py",
        old='        raise DataError(at, "brackets in brackets", "must be text, or a list of turns") from None\n',
        new="        turns = None\n",
        tests=("tests/data/test_records.py::test_an_answer_stays_what_it_was_read_as_at_every_depth",),
    ),
)

TASK_FAULTS = (*_SEVERAL_TEXTS, *_TARGETS, *_COMPARISONS, *_READING, *_PREFERENCES)
