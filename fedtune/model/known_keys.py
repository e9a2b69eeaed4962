"""The keys that a model's files may have: lists, since transformers takes any other as well and acts on some."""

from __future__ import annotations

OF_ANY_CONFIG = frozenset(
    # Of every config, or of every older one.
    {"model_type", "_name_or_path", "_model_name_or_path", "torch_dtype", "num_labels", "output_attentions"}
    | {"attn_implementation", "finetuning_task", "gradient_checkpointing", "position_embedding_type", "prefix"}
    | {"tokenizer_class", "torchscript", "use_bfloat16", "transformers.js_config", "task_specific_params"}
    | {"sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "use_cache"}
    | {"tie_encoder_decoder", "output_past"}
    # How to generate: transformers leaves these out.
    | {"max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"}
    | {"temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"}
    | {"encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"}
    | {"return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
    | {"exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
    # Positions by rotation, which transformers makes `rope_parameters` of, and attention to the nearest tokens.
    | {"rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor", "rotary_pct"}
    | {"rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "head_dim"}
    | {"sliding_window_pattern", "_sliding_window_pattern"}
    # In well-known models, and read by no code.
    | {"directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"}
    | {"pooler_size_per_head", "pooler_type", "n_ctx", "is_llama_config", "use_mrope", "tie_weights_"}
    | {"pretraining_tp", "feed_forward_length"}
)
"""Keys of config.json that are taken beside those that an architecture's own config declares.  A list, since
transformers makes an attribute of any other: with `attribute_map` an innocent key is read as `transformers_weights`,
and `fusion_config` or `distributed_config` bring other code."""

WITHOUT_EFFECT = frozenset({"special_tokens_map_file", "tokenizer_file", "tokenizer_config_file", "added_tokens_file"})
"""Old releases wrote where these lay. transformers puts the folder's own files in their places, always."""

OF_TOKENIZER_CONFIG = WITHOUT_EFFECT | frozenset(
    {"add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens"}
    | {"backend", "chat_template", "clean_text", "clean_up_tokenization_spaces", "do_basic_tokenize", "do_lower_case"}
    | {"errors", "extra_special_tokens", "handle_chinese_chars", "is_local", "keep_accents", "legacy"}
    | {"legacy_behaviour", "local_files_only", "max_length", "model_input_names", "model_max_length"}
    | {"model_specific_special_tokens", "name_or_path", "never_split", "normalization", "pad_to_multiple_of"}
    | {"pad_token_type_id", "padding", "padding_side", "processor_class", "remove_space", "return_token_type_ids"}
    | {"sp_model_kwargs", "spaces_between_special_tokens", "split_special_tokens", "stride", "strip_accents"}
    | {"token_type_ids_pattern", "tokenize_chinese_chars", "tokenizer_class", "transformers_version", "trim_offsets"}
    | {"truncation", "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast", "verbose"}
    | {"vocab_size", "wordpieces_prefix"}
)
"""Keys of tokenizer_config.json, beside tokens such as `eos_token`: each is an argument of the library's tokenizer."""

OF_SPECIAL_TOKENS_MAP = frozenset(
    {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    | {"additional_special_tokens", "extra_special_tokens"}
)
"""Keys of special_tokens_map.json. transformers hands each of its keys to the tokenizer, after it has put the folder's
own name in place: another one would name a folder or a repository to read, and say that a hub may be asked."""
