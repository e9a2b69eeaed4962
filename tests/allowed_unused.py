"""Names in fedtune/ that no code of fedtune uses, and who uses them instead."""

ALLOWED_UNUSED: dict[str, set[str]] = {
    "Click calls the functions of commands by their decorators, or by a module's name": {
        *(
            "add_site",
            "copies",
            "doctor",
            "format_help_text",
            "get_command",
            "leave",
            "list_commands",
            "list_sites",
            "pause",
        ),
        *("flower_app", "model_hash", "renew_lead", "renew_server", "show_events", "write_anchor"),
    },
    "cards and pages show them": {
        "classified",
        "posterior",
        "chosen_by",
        "codes_file",
        "codes_sha256",
        "distinct_pairs",
    },
    "people call them from Python": {"to_frame", "plot", "predict_proba"},
    "notebooks call them to show an object": {"_repr_html_", "_repr_svg_"},
    "Prometheus's client calls it": {"collect"},
    "Flower calls them": {"current_arrays", "intercept"},
    "Python itself: a module's names, and one of another class": {"__class__", "__dir__"},
    "logging and Python call them in the place of their own": {"handleError", "showwarning"},
    "settings of objects that belong to a library": {
        *("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32"),
        *("compress_type", "create_system", "decoder", "_disable_adapters", "disabled"),
        "intra_op_num_threads",
        *(
            "fill_uninitialized_memory",
            "follow_redirects",
            "id2label",
            "intercepted_binops",
            "label2id",
            "model_input_names",
            "num_tickets",
        ),
        *("post_processor", "pre_tokenizer", "prec", "_ssl_context", "use_cache", "writeable"),
    },
    "Python and pydantic read them; torch calls with it": {"__getattr__", "__pydantic_config__", "persistent"},
    "Hydra calls them": {"is_config", "load_config", "manipulate_search_path", "scheme", "version_base"},
    "importlib.resources calls it": {"get_resource_reader"},
    "Opacus calls it": {"_scales_grad_sampler"},
    "names.toml and the layouts of files name them, of a column": {
        *("is_asked", "is_completion", "is_context", "is_nested", "is_of_persons", "is_rank", "is_score"),
        *("are_words", "is_spans", "is_whole_chat", "other_numbers", "with_keys"),
    },
    "templates call them": {
        *("about_ceiling", "band_range", "epsilon_spent", "of_whom", "says_nothing", "without_base"),
        *("right_of_100_for_2", "right_of_100_for_5", "right_of_100_with_all_others", "held_out_epsilon"),
        *("fixed_part", "reference_filter", "reference_pld"),
    },
    "settings of libraries": {"LOAD_TRUNCATED_IMAGES"},
    "fields of what is written as JSON or taken from arguments": {
        *("carbon_kg", "first_seconds", "frozen_states_kept", "lead_days", "server_days", "site_days"),
    },
}
