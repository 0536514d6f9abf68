"""Planted kernels: strides, offsets, head maps, head sizes, packed sequences and paged caches."""

from __future__ import annotations

from attnspec.conformance.planted.registry import Witness, plant

PAGED = {"k_pages": "pages", "v_pages": "pages", "block_table": [[5, 1, 3]], "kv_length": [9]}
PAGED_2 = {"k_pages": "pages", "v_pages": "pages", "block_table": [[5, 1, 3], [0, 2, 4]], "kv_length": [9, 6]}
PACKED = {"q_segment": [[0, 1, 1, 2, 2, 2]], "kv_segment": [[0, 1, 1, 2, 2, 2]]}

plant(
    "strides_ignored",
    "tensors are read as if they were contiguous",
    evidence=("pytorch/pytorch#181133", "pytorch/pytorch#112577", "NVIDIA/TransformerEngine#1195"),
    region="everything",
    witness=Witness({"H": 2, "Hk": 2}, strided=("Q",)),
)
plant(
    "value_read_with_key_strides",
    "V is addressed with K's strides",
    evidence=("ml-explore/mlx@62f297b51", "Dao-AILab/flash-attention@9ee0ff1d", "ROCm/pytorch#3230"),
    region="everything",
    witness=Witness({"H": 2, "Hk": 2}, strided=("V",)),
)
plant(
    "batch_stride_assumed",
    "the batch stride of K and V is taken from their shape",
    evidence=("pytorch/pytorch#191937", "pytorch/pytorch#134031", "ml-explore/mlx@af705590a"),
    region="batch",
    witness=Witness({"B": 2}, strided=("expanded",)),
)
plant(
    "query_offset_uses_kv_heads",
    "(b * Hk + h) addresses a query head where (b * H + h) is right",
    evidence=("fla-org/flash-linear-attention@95a89568", "fla-org/flash-linear-attention#384"),
    region="batch",
    witness=Witness({"B": 2, "H": 4, "Hk": 2}),
)
plant(
    "head_offset_missing",
    "all query heads read key/value head 0",
    evidence=("fla-org/flash-linear-attention@d38ed8b5", "ml-explore/mlx@76a977ca4", "PSAL-POSTECH/ONNXim#34"),
    region="head",
    witness=Witness({"H": 2, "Hk": 2}),
)
plant(
    "batch_offset_missing",
    "all batch entries read the keys and values of entry 0",
    evidence=("flashinfer-ai/flashinfer@4fa40aeea",),
    region="batch",
    witness=Witness({"B": 2}),
)
plant(
    "gqa_heads_tiled",
    "query head h reads key/value head h % Hk where h // G is right",
    evidence=("onnx/onnx#7274", "ekzhang/jax-js#180"),
    region="head",
    witness=Witness({"H": 4, "Hk": 2}),
)
plant(
    "heads_merged_without_transpose",
    "the output [b, i, h, e] is relabelled as [b, h, i, e]",
    evidence=("jsbaan/transformer-from-scratch#6", "ajhalthor/Transformer-Neural-Network#4"),
    region="everything",
    witness=Witness({"H": 2, "Hk": 2}),
)
plant(
    "batch_squeezed_away",
    "a batch of one loses its axis",
    evidence=("fla-org/flash-linear-attention@8797deff", "lucidrains/x-transformers@92a9e13"),
    region="everything",
    witness=Witness({}),
)
plant(
    "padded_in_front_trimmed_behind",
    "the length is padded to a multiple of 4 in front and trimmed behind: the rows shift",
    evidence=("lucidrains/nystrom-attention#5",),
    region="row",
    witness=Witness({"N": 5}),
)
plant(
    "value_columns_taken_from_query_size",
    "only D columns of V are computed",
    evidence=("pytorch/pytorch#176767", "Dao-AILab/flash-attention@6d199aa2"),
    region="column",
    witness=Witness({"D": 4, "E": 8}),
)
plant(
    "head_size_64_hard_coded",
    "only 64 columns of Q and K enter the dot product",
    evidence=("ByteDance-Seed/Triton-distributed#200", "sgl-project/sglang#1281"),
    region="everything",
    witness=Witness({"D": 80}),
)
plant(
    "head_size_rounded_up",
    "columns up to the next power of two are read without a bound",
    evidence=("triton-lang/triton#621", "fla-org/flash-linear-attention@b67113b4"),
    region="everything",
    witness=Witness({"D": 5}),
)
plant(
    "value_tiles_stored_at_column_0",
    "every tile of value columns is stored at column 0",
    evidence=("fla-org/flash-linear-attention@ccb0ff94",),
    region="column",
    witness=Witness({"E": 8}),
)
plant(
    "key_passed_as_value",
    "K is passed as V where the sizes allow it",
    evidence=("hpcaitech/ColossalAI#6428", "Dao-AILab/flash-attention@e3b2400a"),
    region="everything",
    witness=Witness({}),
)
plant(
    "offsets_in_16_bits",
    "element offsets wrap at 16 bits (a cheap stand-in for 32)",
    evidence=("Dao-AILab/flash-attention@b62d93f3", "pytorch/pytorch#187225", "ggml-org/llama.cpp#23610"),
    region="block",
    witness=Witness({"H": 4, "Hk": 4, "N": 2, "M": 129, "D": 64}, {"causal": True}),
)
plant(
    "packed_start_missing",
    "key positions of a packed sequence count from the start of the pack",
    evidence=("fla-org/flash-linear-attention@898f2369", "flashinfer-ai/flashinfer@04d1bd29d"),
    region="row",
    witness=Witness({"N": 6, "M": 6}, {"causal": True}, inputs=PACKED),
)
plant(
    "lengths_are_end_offsets",
    "cu[1:] - cu[:1] where cu[1:] - cu[:-1] is right",
    evidence=("zhuzilin/ring-flash-attention@8996282", "fla-org/flash-linear-attention@e2a67879"),
    region="diagonal",
    witness=Witness({"N": 6, "M": 6}, {"causal": True}, inputs=PACKED),
)
plant(
    "pages_consecutive",
    "the pages of a request are taken to follow its first",
    evidence=("hw-native-sys/pypto#470", "flashinfer-ai/flashinfer@103fcf862"),
    region="block",
    witness=Witness({"N": 1, "D": 4}, inputs=PAGED),
)
plant(
    "last_page_not_trimmed",
    "all slots of the last page are attended to",
    evidence=("flashinfer-ai/flashinfer@47fda1bb4", "flashinfer-ai/flashinfer#5090"),
    region="block",
    witness=Witness({"N": 1, "D": 4}, inputs=PAGED),
)
plant(
    "block_table_of_first_request",
    "every request reads the first one's row of the block table",
    evidence=("flashinfer-ai/flashinfer@93b5d4e1b",),
    region="batch",
    witness=Witness({"B": 2, "N": 1, "D": 4}, inputs=PAGED_2),
)
