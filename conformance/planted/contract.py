"""Planted kernels: options accepted and ignored, memory, repetition."""

from __future__ import annotations

from attnspec.conformance.planted.registry import Witness, plant

plant(
    "window_ignored",
    "the window is accepted and ignored",
    evidence=("pytorch/pytorch#178588", "unslothai/unsloth#8253"),
    region="diagonal",
    witness=Witness({"N": 4, "M": 4}, {"window_left": 1}),
)
plant(
    "window_arguments_swapped",
    "left and right bounds are passed in the wrong order",
    evidence=("flashinfer-ai/flashinfer@f15336938", "flashinfer-ai/flashinfer#1023"),
    region="diagonal",
    witness=Witness({"N": 4, "M": 4}, {"window_left": 2, "window_right": 0}),
)
plant(
    "softcap_ignored",
    "the softcap is accepted and ignored",
    evidence=("vllm-project/vllm-metal#665",),
    region="everything",
    witness=Witness({}, {"softcap": 1.0}),
)
plant(
    "chunk_ignored",
    "the chunk length is accepted and ignored",
    evidence=("lucidrains/x-transformers#352", "huggingface/transformers#37351"),
    region="block",
    witness=Witness({"N": 4, "M": 4}, {"chunk": 2}),
)
plant(
    "sink_tokens_ignored",
    "the first keys are not exempt from the window",
    evidence=("thu-ml/SpargeAttn#121",),
    region="block",
    witness=Witness({"N": 6, "M": 6}, {"window_left": 1, "sink_tokens": 2, "causal": True}),
)
plant(
    "sink_ignored",
    "the sink is accepted and ignored on the unsplit path",
    evidence=("kekzl/imp#1303", "pytorch/pytorch#178588"),
    region="everything",
    witness=Witness({}, inputs={"sink": [1.0]}),
)
plant(
    "dropout_ignored",
    "dropout stays off",
    evidence=("huggingface/pytorch-image-models#1978",),
    region="everything",
    witness=Witness({"M": 4}, {"dropout_p": 0.5}, inputs={"dropout_mask": "random"}),
)
plant(
    "query_scaled_in_place",
    "the query is scaled in the caller's memory",
    evidence=("unslothai/unsloth#5001", "fla-org/flash-linear-attention@670f5706"),
    region="memory",
    witness=Witness({}),
)
plant(
    "output_overwrites_query",
    "the output is also written over the query",
    evidence=("Dao-AILab/flash-attention@bc0e4ac0", "sgl-project/sglang#19928"),
    region="memory",
    witness=Witness({}),
)
plant(
    "reads_behind_the_keys",
    "an element behind the keys is read and multiplied by 0",
    evidence=("facebookresearch/xformers@3e4a1b4b", "fla-org/flash-linear-attention#1142"),
    region="everything",
    witness=Witness({}, guarded=True),
)
plant(
    "writes_behind_the_keys",
    "a tile that starts at the end is still written",
    evidence=("fla-org/flash-linear-attention@be882f3b",),
    region="memory",
    witness=Witness({}, guarded=True),
)
plant(
    "padded_rows_not_written",
    "output rows behind q_length are left as the allocator gave them",
    evidence=("Dao-AILab/flash-attention@6998e0ec", "Dao-AILab/flash-attention@ea8f7350"),
    region="row",
    witness=Witness({"N": 4}, inputs={"q_length": [2]}),
)
plant(
    "heads_beyond_the_grid_not_written",
    "batch entries and heads beyond the launch grid's bound are skipped in silence (a bound of 4 for 65535)",
    evidence=("Dao-AILab/flash-attention#172", "flashinfer-ai/flashinfer#3125"),
    region="batch",
    witness=Witness({"B": 2, "H": 4, "Hk": 4}),
)
plant(
    "one_head_size_corrupt",
    "one configuration of the kernel (head size 64, 64 keys and more) mixes rows",
    evidence=("state-spaces/mamba@e9594ce", "Dao-AILab/flash-attention@7962e24e"),
    region="column",
    witness=Witness({"N": 2, "M": 64, "D": 64}),
)
plant(
    "stale_tile",
    "from the third tile on, the second half of the keys is the previous tile's",
    evidence=("Dao-AILab/flash-attention@1c41d2b0", "Dao-AILab/flash-attention@188643b8"),
    region="block",
    witness=Witness({"N": 2, "M": 48}),
)
plant(
    "compiled_for_the_first_options",
    "the cache of compiled kernels is keyed by shape only: the first call's options serve all",
    evidence=("ml-explore/mlx@00794c42b", "flashinfer-ai/flashinfer@82784bb11", "pytorch/pytorch#184122"),
    region="everything",
    witness=Witness({}, {"causal": True}, before={"causal": False}),
)
plant(
    "order_of_sums_varies",
    "the same call gives other last bits",
    evidence=("Dao-AILab/flash-attention@ab66326a", "Dao-AILab/flash-attention#2244"),
    region="repeat",
    witness=Witness({}, repeats=8),
)
