"""Faults between a file and its examples: who gets a record, how it is read and laid out, and how data are prepared."""

from .mutant import Mutant

LOAD, VALUES, FORMATS = (f"fedtune/data/{name}.py" for name in ("load", "values", "formats"))
TEXT_ROWS = "fedtune/data/text_rows.py"
CAUSAL, CHAT = "fedtune/tasks/causal_lm.py", "fedtune/tasks/chat_format.py"
CHECK, CLEAN = "fedtune/preparation/check_data.py", "fedtune/preparation/clean.py"
OF_LOAD, OF_FORMATS, MALFORMED = (f"tests/data/test_{name}.py" for name in ("load", "formats", "malformed"))
OF_CAUSAL, OF_CHAT = "tests/tasks/test_causal_lm.py", "tests/tasks/test_chat_format.py"
OF_CHECK, OF_CLEAN = "tests/preparation/test_check_data.py", "tests/preparation/test_clean.py"

_READING = (
    Mutant(
        name="lead-share-also-trains",
        fault="A record of the lead's share of a training file also goes to a site, which is scored on what it learnt.",
        file=LOAD,
        old="                elif is_selected(",
        new="                if is_selected(",
        tests=(f"{OF_LOAD}::test_the_leads_share_is_no_sites",),
    ),
    Mutant(
        name="lead-share-parts-a-user",
        fault="With unit user, the lead's share is chosen by record: a person's texts train and test the same model.",
        file=LOAD,
        old='unit_hash(record, purpose="test", key=key, unit=unit)',
        new='unit_hash(record, purpose="test", key=key)',
        tests=(f"{OF_LOAD}::test_users_are_the_leads_whole",),
    ),
    Mutant(
        name="first-rows-are-scored",
        fault="`data.test_rows` takes the first rows of a file, which are those of one label where it is sorted.",
        file=LOAD,
        old="    return [records[place] for place in sorted(",
        new="    return list(records[:rows]) or [records[place] for place in sorted(",
        tests=(f"{OF_LOAD}::test_rows_of_the_lead_are_chosen_by_their_hash",),
    ),
    Mutant(
        name="fraction-at-real-sites",
        fault="A run with real sites may take its test records as a share of the sites' file, which the lead has not.",
        file="fedtune/config.py",
        old='            if self.runtime.kind == "deployment":\n                self.data.check_lead_has_files()\n',
        new="",
        tests=("tests/sites/test_data_notes.py::test_real_sites_have_no_file_of_which_the_lead_could_have_a_share",),
    ),
    Mutant(
        name="copy-of-the-training-file",
        fault="Nothing is said where the test file is a copy of the training file under another name.",
        file="fedtune/sites/data_notes.py",
        old="    return one.samefile(other) or (",
        new="    return one.samefile(other) and (",
        tests=("tests/sites/test_data_notes.py",),
    ),
    Mutant(
        name="a-record-chooses-the-comma",
        fault="What separates the cells of a table depends on its records: one of them changes what all others are.",
        file=TEXT_ROWS,
        old='b"", next(lines, None) or b"")\n',
        new='b"", b"".join(raw or b"" for raw in lines))\n',
        tests=(f"{OF_FORMATS}::test_the_header_line_alone_says_whether_cells_end_in_semicolons",),
    ),
    Mutant(
        name="a-site-refuses-an-array-that-breaks-off",
        fault="At a site the last record of a JSON array decides whether the whole file is read.",
        file=TEXT_ROWS,
        old="            if not mark and not lenient:\n",
        new="            if not mark:\n",
        tests=(f"{OF_FORMATS}::test_an_array_that_breaks_off_is_the_fault_of_a_lead_s_file_and_of_a_site_s_row",),
    ),
    Mutant(
        name="a-lead-takes-an-array-that-breaks-off",
        fault="A file of the lead's that breaks off is read as far as it goes: scores are of an unknown part of it.",
        file=TEXT_ROWS,
        old="            if not mark and not lenient:\n",
        new="            if not mark and False:\n",
        tests=(f"{OF_FORMATS}::test_an_array_that_breaks_off_is_the_fault_of_a_lead_s_file_and_of_a_site_s_row",),
    ),
    Mutant(
        name="one-row-ends-the-file",
        fault="A row of Parquet that cannot be read ends the reading of the whole file: at a site one record decides "
        "whether there is an answer.",
        file=FORMATS,
        old="                row = error\n",
        new="                raise error\n",
        tests=(f"{OF_FORMATS}::test_a_row_of_arrow_is_left_out_by_itself",),
    ),
    Mutant(
        name="saved-set-names-any-file",
        fault="The list of files in a saved Hugging Face set may name one outside its folder.",
        file=FORMATS,
        old='            check_name("filename", name)\n',
        new="            str(name)\n",
        tests=(f"{MALFORMED}::test_a_saved_set_whose_list_of_files_is_damaged",),
    ),
    Mutant(
        name="wrong-turns-pass",
        fault="The turns of a conversation may follow one another in any order.",
        file=VALUES,
        old="        if roles[place] != wanted:",
        new='        if roles[place] == "system":',
        tests=(f"{MALFORMED}::test_a_malformed_file_is_named_with_place_and_bound",),
    ),
    Mutant(
        name="unknown-role-ignored",
        fault="A turn of an unknown speaker, such as a tool, is taken for the user's.",
        file=VALUES,
        old="    return _SPEAKERS.get(said, said)\n",
        new='    return _SPEAKERS.get(said, "user")\n',
        tests=(f"{MALFORMED}::test_a_malformed_file_is_named_with_place_and_bound",),
    ),
    Mutant(
        name="marked-answers-are-learnt",
        fault="An answer with weight 0 or train false, which others do not learn, is learnt.",
        file=VALUES,
        old="    return all(value for _, value in given)\n",
        new="    return bool(given) or True\n",
        tests=("tests/data/test_values.py::test_an_answer_that_others_do_not_learn_is_marked",),
    ),
    Mutant(
        name="an-id-in-two-forms",
        fault="An id in two Unicode forms, or with a letter that nobody sees, is two users, each protected by half.",
        file=VALUES,
        old="    found = one_form(text)\n",
        new="    found = text\n",
        tests=("tests/data/test_values.py::test_one_person_has_one_id",),
    ),
    Mutant(
        name="nobody-is-a-person",
        fault="All rows without an id that a table calls NA are one user, and whoever is in them is not protected.",
        file=VALUES,
        old="    if found in NO_NAME:\n",
        new="    if not found:\n",
        tests=("tests/data/test_values.py::test_who_has_no_id_is_no_person",),
    ),
    Mutant(
        name="site-reads-all-its-columns",
        fault="A site reads every column that its policy names: records that lack one that a run has no use for are "
        "left out, and a language model learns from another column than was asked for.",
        file="fedtune/sites/shared_settings.py",
        old="columns = {role: dataset.columns[role] for role in config.data.columns if role in dataset.columns}",
        new="columns = dict(dataset.columns)",
        tests=("tests/sites/test_at_site.py::test_of_the_site_s_columns_the_run_s_layout_is_read",),
    ),
)

_LAYOUT = (
    Mutant(
        name="control-tokens-in-records",
        fault="The name of a special token in a chat's text becomes that token: a record can end its own turn, and "
        "speak as the assistant or the system.",
        file="fedtune/data/tokenise.py",
        old='"".join(secrets.choice(string.ascii_lowercase) for _ in range(24))',
        new="tokenizer.convert_ids_to_tokens(number)",
        tests=(f"{OF_CHAT}::test_a_mark_in_a_record_is_text",),
    ),
    Mutant(
        name="marks-that-a-record-writes",
        fault="A template may mark its turns by what is no special token, so that a record's text can do it, too.",
        file="fedtune/data/tokenise.py",
        old='if token["special"]}.union(marks)',
        new='if token["special"]}',
        tests=(f"{OF_CHAT}::test_a_mark_in_a_record_is_text",),
    ),
    Mutant(
        name="template-not-tried",
        fault="A chat template is taken for a chain without a try: one that treats some contents in a way of their own "
        "trains on other text than the model is asked with.",
        file=CHAT,
        old="if any(text != chain.text(turns) for turns, text in tried.items()):",
        new="if not all(tried.values()):",
        tests=(f"{OF_CHAT}::test_a_template_that_is_no_chain_is_refused",),
    ),
    Mutant(
        name="template-asks-the-clock",
        fault="A chat template may ask for the date: what a record is trained as goes by the day, and differs by site.",
        file=CHAT,
        old="{name: Undefined(name=name) for name in _WITHHELD}",
        new="{}",
        tests=(OF_CHAT,),
    ),
    Mutant(
        name="bad-messages-raise-at-a-site",
        fault="A conversation that cannot be learnt makes a site's round fail: an answer says that nobody has one.",
        file=CAUSAL,
        old="lenient=lenient_within is not None)",
        new="lenient=False)",
        tests=(f"{OF_CAUSAL}::test_messages_that_are_none_add_nothing_and_move_no_other",),
    ),
    Mutant(
        name="half-a-record-is-learnt",
        fault="Of a record with a part that the tokenizer cannot encode the rest is learnt, such as an answer to "
        "another question.",
        file=CAUSAL,
        old="if one and other else _Tokens()",
        new="if one or other else _Tokens()",
        tests=("tests/tasks/test_tokenise.py", OF_CAUSAL),
    ),
    Mutant(
        name="prompt-unbounded-in-characters",
        fault="What stands before an answer is encoded whole: one long record decides how much memory and time a site "
        "needs.",
        file=CAUSAL,
        old="_Example(_last(context, length), answer, reference)",
        new="_Example(context, answer, reference)",
        tests=(f"{OF_CAUSAL}::test_a_record_is_bounded_in_characters_before_it_is_encoded",),
    ),
    Mutant(
        name="prompt-tokens-are-learnt",
        fault="A language model learns to write prompts, too: what users asked comes out of it.",
        file=CAUSAL,
        old="learnt = [False] * len(before) + [True]",
        new="learnt = [True] * len(before) + [True]",
        tests=(OF_CAUSAL,),
    ),
    Mutant(
        name="answer-cut-instead-of-prompt",
        fault="An example that is too long loses its answer, and teaches nothing.",
        file=CAUSAL,
        old="kept = [*range(self.start), *range(self.start + cut, self.context + answer)]",
        new="kept = [*range(min(length, len(self.numbers)))]",
        tests=(f"{OF_CAUSAL}::test_a_prompt_is_cut_from_the_left",),
    ),
)

_PREPARATION = (
    Mutant(
        name="undeclared-label-quoted",
        fault="`data check` quotes a label that is not declared: where columns are mixed up, that is a record's text.",
        file="fedtune/tasks/pooled.py",
        old='return DataError(record.at(role), "not declared",',
        new="return DataError(record.at(role), record.fields[role],",
        tests=(f"{OF_CHECK}::test_no_text_of_a_record_is_in_what_is_found",),
    ),
    Mutant(
        name="user-column-masked",
        fault="`data clean --mask` masks the ids of users, too: all with an e-mail address become one person, and all "
        "but one of them have no protection of their own.",
        file=CLEAN,
        old="column: value if column in names else inner(",
        new="column: inner(",
        tests=(f"{OF_CLEAN}::test_masks_leave_what_tells_records_apart",),
    ),
    Mutant(
        name="clean-writes-over-a-file",
        fault="`data clean` writes over a file that is there, such as the old one.",
        file=CLEAN,
        old="            if out.exists():",
        new="            if out.is_dir():",
        tests=(f"{OF_CLEAN}::test_the_old_file_stays_and_a_new_one_is_never_written_over",),
    ),
    Mutant(
        name="duplicates-ignore-the-label",
        fault="Of two equal texts with different labels the second is dropped as a duplicate.",
        file=CLEAN,
        old="            if any(twin.mark[1] == record.answer for twin in some):",
        new="            if some:",
        tests=(f"{OF_CLEAN}::test_a_rule_drops_its_rows_and_no_others",),
    ),
)

DATA_FAULTS = (*_READING, *_LAYOUT, *_PREPARATION)
