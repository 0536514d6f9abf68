"""Planted kernels: causal masks, windows, boolean masks and tails of the key loop."""

from __future__ import annotations

from attnspec.conformance.planted.registry import Witness, plant

CAUSAL = {"causal": True}
RISING = {"N": 20, "M": 23}

plant(
    "causal_top_left",
    "causal mask aligned at the start where the contract says at the end",
    evidence=("Dao-AILab/flash-attention#1778", "NVIDIA/cutlass#2336", "onnx/onnx#8068", "ml-explore/mlx#2836"),
    region="diagonal",
    witness=Witness({"N": 2, "M": 5}, CAUSAL),
)
plant(
    "causal_bottom_right_always",
    "causal mask aligned at the end although top_left is asked for",
    evidence=("ml-explore/mlx#2967", "pytorch/pytorch#103082"),
    region="diagonal",
    witness=Witness({"N": 2, "M": 5}, {"causal": True, "causal_alignment": "top_left"}),
)
plant(
    "causal_strict",
    "j < i where j <= i is right: the diagonal is dropped",
    evidence=("PaddlePaddle/flash-attention#48", "lucidrains/x-transformers@4465de5"),
    region="diagonal",
    witness=Witness({}, CAUSAL),
)
plant(
    "causal_one_future_key",
    "j <= i + 1: one future key is visible",
    evidence=("InfiniTensor/InfiniCore#279",),
    region="diagonal",
    witness=Witness({}, CAUSAL),
)
plant(
    "causal_per_four_rows",
    "one causal limit for each group of four rows, that of the group's last row",
    evidence=("pytorch/pytorch#195910",),
    region="diagonal",
    witness=Witness({"N": 6, "M": 6}, CAUSAL),
)
plant(
    "causal_loop_ends_at_first_row",
    "the key loop ends at what the tile's first query row sees",
    evidence=("ml-explore/mlx@6a40e1c17", "flashinfer-ai/flashinfer@9b861cdbb"),
    region="block",
    witness=Witness(RISING, CAUSAL),
)
plant(
    "causal_loop_end_floored",
    "the end of the key loop is rounded down to a whole tile",
    evidence=("flashinfer-ai/flashinfer@ff6808cc1", "flashinfer-ai/flashinfer@480d1ae00"),
    region="block",
    witness=Witness(RISING, CAUSAL),
)
plant(
    "causal_loop_end_lacks_offset",
    "the end of the key loop lacks the offset M - N",
    evidence=("flashinfer-ai/flashinfer@480d1ae00",),
    region="block",
    witness=Witness({"N": 20, "M": 23}, CAUSAL),
)
plant(
    "straddling_tile_unmasked",
    "only tiles that start behind the diagonal are masked, not those that cross it",
    evidence=("fla-org/flash-linear-attention@51a8c0a8", "SHI-Labs/NATTEN@e417723"),
    region="block",
    witness=Witness(RISING, CAUSAL),
)
plant(
    "decode_sees_first_key",
    "a single causal query is aligned at the start: it sees key 0 only",
    evidence=("lucidrains/x-transformers@4465de5", "pytorch/pytorch#103082"),
    region="everything",
    witness=Witness({"N": 1, "M": 4}, CAUSAL),
)
plant(
    "causal_flag_ignored",
    "the kernel is always causal",
    evidence=("triton-lang/triton#4541",),
    region="diagonal",
    witness=Witness({}),
)
plant(
    "causal_needs_a_mask",
    "the causal rule is merged only where the caller also passes a mask",
    evidence=("facebookresearch/xformers#103", "pytorch/pytorch#99282"),
    region="diagonal",
    witness=Witness({}, CAUSAL),
)
plant(
    "cross_attention_is_causal",
    "cross attention (N != M) inherits the causal default of self-attention",
    evidence=("huggingface/transformers#48172", "NVIDIA/TransformerEngine#629"),
    region="diagonal",
    witness=Witness({"N": 3, "M": 4}),
)
plant(
    "window_counts_itself_twice",
    "the left window misses its last key: W keys where W + 1 are right",
    evidence=("huggingface/transformers#39408", "NVIDIA/TransformerEngine@c3b3cd21a", "microsoft/onnxruntime#25927"),
    region="diagonal",
    witness=Witness({"N": 5, "M": 5}, {"window_left": 2, "causal": True}),
)
plant(
    "window_one_key_more",
    "the left window shows one key too many",
    evidence=("huggingface/transformers#40163", "vllm-project/vllm#3385"),
    region="diagonal",
    witness=Witness({"N": 5, "M": 5}, {"window_left": 2, "causal": True}),
)
plant(
    "window_right_exclusive",
    "the right window bound is exclusive",
    evidence=("ModelTC/LightLLM#1312", "sgl-project/sglang#34273"),
    region="diagonal",
    witness=Witness({"N": 5, "M": 5}, {"window_right": 1}),
)
plant(
    "window_two_sided",
    "a left window also bounds the right side",
    evidence=("huggingface/transformers#40700",),
    region="diagonal",
    witness=Witness({"N": 5, "M": 5}, {"window_left": 1}),
)
plant(
    "window_dropped_at_decode",
    "the single-query path never gets the window",
    evidence=("unslothai/unsloth#8253", "huggingface/transformers#29777"),
    region="everything",
    witness=Witness({"N": 1, "M": 5}, {"window_left": 1}),
)
plant(
    "window_zero_is_off",
    "a left window of 0 is taken for no window",
    evidence=("Dao-AILab/flash-attention@5678dd90", "unslothai/unsloth#8253"),
    region="diagonal",
    witness=Witness({"N": 4, "M": 4}, {"window_left": 0, "causal": True}),
)
plant(
    "window_loop_starts_late",
    "the window's key loop starts one tile too late",
    evidence=("sgl-project/sglang#39769", "flashinfer-ai/flashinfer@48003688d"),
    region="block",
    witness=Witness({"N": 4, "M": 40}, {"window_left": 20}),
)
plant(
    "finite_mask_in_tiles",
    "the mask value and the initial maximum are -1e6, so live logits below it drown",
    evidence=("tile-ai/TileOPs#295", "tile-ai/TileOPs#296"),
    region="row",
    witness=Witness({"N": 2, "M": 3}, inputs={"mask": "first_row_empty"}),
)
plant(
    "mask_polarity_flipped",
    "True drops a key where True keeps it",
    evidence=("lucidrains/x-transformers@186335a", "HKUSTDial/flash-sparse-attention#146", "pytorch/pytorch#21518"),
    region="everything",
    witness=Witness({"N": 4, "M": 5}, inputs={"mask": "random"}),
    kind="plain",
)
plant(
    "mask_added_as_number",
    "the boolean mask is added to the logits as 0 and 1",
    evidence=("pytorch/pytorch#117939", "tinygrad/tinygrad@5326bbc9a6"),
    region="everything",
    witness=Witness({"N": 4, "M": 5}, inputs={"mask": "random"}),
    kind="plain",
)
plant(
    "padding_mask_on_queries",
    "the validity of keys is applied to the query axis",
    evidence=("hyunwoongko/transformer#40",),
    region="row",
    witness=Witness({"N": 4, "M": 4}, inputs={"kv_length": [2]}),
    kind="plain",
)
plant(
    "kv_length_ignored",
    "keys behind kv_length are attended to",
    evidence=("huggingface/transformers#22161", "fla-org/flash-linear-attention@7eff5519"),
    region="batch",
    witness=Witness({"N": 2, "M": 4}, inputs={"kv_length": [2]}),
)
plant(
    "left_padding_as_right",
    "a left-padded batch is read as a right-padded one",
    evidence=("lucidrains/x-transformers@5a7b03f", "huggingface/transformers#22161"),
    region="batch",
    witness=Witness({"B": 2, "N": 2, "M": 4}, CAUSAL, inputs={"left_pad": [0, 2]}),
)
plant(
    "mask_of_first_batch_entry",
    "the mask of batch entry 0 serves all",
    evidence=("pytorch/pytorch#163314", "meta-pytorch/attention-gym#98"),
    region="batch",
    witness=Witness({"B": 2, "N": 3, "M": 5}, inputs={"mask": "random"}),
)
plant(
    "mask_of_first_head",
    "the mask of head 0 serves all",
    evidence=("pytorch/pytorch#163314",),
    region="head",
    witness=Witness({"H": 2, "Hk": 2, "N": 3, "M": 5}, inputs={"mask": "random"}),
)
plant(
    "tail_index_clamped",
    "the last tile's index is clamped, so the last key counts several times",
    evidence=("no public report known; the sibling of the dropped tail",),
    region="block",
    witness=Witness({"N": 2, "M": 20}),
)
plant(
    "tail_tile_dropped",
    "M // tile tiles where the ceiling is right",
    evidence=("fla-org/flash-linear-attention@01f02517", "facebookresearch/xformers@3e4a1b4b"),
    region="block",
    witness=Witness({"N": 2, "M": 20}),
)
plant(
    "tile_base_missing",
    "mask positions of every tile count from 0",
    evidence=("XunhaoLai/native-sparse-attention-triton@c3afd54", "state-spaces/mamba@442fab4"),
    region="block",
    witness=Witness({"N": 20, "M": 20}, CAUSAL),
)
plant(
    "segments_leak",
    "packed sequences attend across their boundaries",
    evidence=("huggingface/transformers#46634", "fla-org/flash-linear-attention@9b3c930c"),
    region="everything",
    witness=Witness({"N": 5, "M": 5}, inputs={"q_segment": [[0, 0, 1, 1, 1]], "kv_segment": [[0, 0, 1, 1, 1]]}),
)
plant(
    "chunk_counts_left_padding",
    "chunks are counted from the first slot instead of the first real key",
    evidence=("huggingface/transformers#40214", "huggingface/transformers#40324"),
    region="batch",
    witness=Witness({"B": 2, "N": 4, "M": 6}, {"causal": True, "chunk": 2}, inputs={"left_pad": [0, 1]}),
)
