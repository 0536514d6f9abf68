"""The names under which the field's functions take a mechanism's inputs and options.

Read by `binding`. An alias counts only where the mechanism has the name that it stands for; names that mean
different things in different libraries (`k_cache`, `alibi_slopes`, `lengths`) are left out on purpose: a
wrong guess would judge a kernel by something that it does not compute.
"""

from __future__ import annotations

MASK_OR_BIAS = "mask_or_bias"
WINDOW = "window"
ENABLE_GQA = "enable_gqa"
SPECIAL = (MASK_OR_BIAS, WINDOW, ENABLE_GQA)

ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "Q": ("query", "queries"),
        "K": ("key", "keys"),
        "V": ("value", "values"),
        "bias": ("attn_bias", "attention_bias", "score_bias", "logit_bias"),
        "mask": ("bool_mask", "keep"),
        "sink": ("sinks", "sink_logits", "attention_sinks", "s_aux"),
        "dropout_mask": ("dropout_keep", "keep_mask"),
        "q_segment": ("q_segments", "q_segment_ids", "query_segment_ids"),
        "kv_segment": ("kv_segments", "kv_segment_ids", "key_segment_ids"),
        "q_length": ("q_lengths", "q_lens", "q_seqlen", "q_seqlens", "query_seq_lengths"),
        "kv_length": (
            "kv_lengths",
            "kv_lens",
            "kv_seqlen",
            "kv_seqlens",
            "key_value_seq_lengths",
            "context_lens",
        ),
        "left_pad": ("leftpad", "left_padding", "leftpad_k"),
        "k_pages": ("key_pages",),
        "v_pages": ("value_pages",),
        "block_table": ("block_tables", "page_table"),
        "causal": ("is_causal",),
        "scale": ("sm_scale", "softmax_scale", "scaling", "scale_factor"),
        "softcap": ("soft_cap", "logit_softcap", "logits_soft_cap", "attn_logits_soft_cap"),
        "window_left": ("window_size_left", "left_window"),
        "window_right": ("window_size_right", "right_window"),
        "causal_alignment": ("alignment",),
        "chunk": ("chunk_size", "attention_chunk"),
        "sink_tokens": ("num_sink_tokens",),
        MASK_OR_BIAS: ("attn_mask", "attention_mask"),
        WINDOW: ("window_size", "sliding_window_size", "local_window_size"),
    }.items()
    for alias in aliases
}

# An output may come back under these names in a dict.
OUTPUT_ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "O": ("out", "output", "attn_output"),
        "LSE": ("logsumexp", "softmax_lse", "log_sum_exp"),
    }.items()
    for alias in aliases
}
