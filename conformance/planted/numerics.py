"""Planted kernels: softmax numerics, order of scale, softcap and bias, sinks, split merges, LSE."""

from __future__ import annotations

from attnspec.conformance.planted.registry import Witness, plant

TWO_TILES = {"N": 2, "M": 20}

plant(
    "no_max_subtraction",
    "exponentials without subtracting the maximum: overflow",
    evidence=("EleutherAI/gpt-neo#192", "zhuzilin/ring-flash-attention@9b84a6a"),
    region="row",
    witness=Witness({"N": 2, "M": 3}, values="large_logits"),
    kind="plain",
)
plant(
    "softmax_over_queries",
    "the softmax runs over the queries",
    evidence=("labmlai/annotated_deep_learning_paper_implementations#146", "PetrochukM/PyTorch-NLP#2"),
    region="everything",
    witness=Witness({"N": 2, "M": 3}),
    kind="plain",
)
plant(
    "accumulator_not_rescaled",
    "the accumulator keeps its scale when the running maximum grows",
    evidence=("flashinfer-ai/flashinfer@91a64ede6", "flashinfer-ai/flashinfer@338b2f5b9"),
    region="everything",
    witness=Witness(TWO_TILES, values="rising_keys"),
)
plant(
    "sum_not_rescaled",
    "the running sum keeps its scale when the running maximum grows",
    evidence=("flashinfer-ai/flashinfer@6cbaf6e26",),
    region="everything",
    witness=Witness(TWO_TILES, values="rising_keys"),
)
plant(
    "sum_reset_each_tile",
    "only the last tile's sum is kept",
    evidence=("flashinfer-ai/flashinfer@5dadb243c",),
    region="everything",
    witness=Witness(TWO_TILES),
)
plant(
    "scale_compounds_over_tiles",
    "the scale is multiplied by log2(e) again in every step of the loop",
    evidence=("flagos-ai/FlagGems#424",),
    region="block",
    witness=Witness(TWO_TILES),
)
plant(
    "neighbour_row_in_sum",
    "a row's sum folds in its neighbour's",
    evidence=("flashinfer-ai/flashinfer@6e3ea8fcc",),
    region="everything",
    witness=Witness({"N": 2, "M": 3}),
)
plant(
    "accumulates_in_half",
    "accumulator and sum are kept in the input's half precision",
    evidence=("linkedin/Liger-Kernel@7d54ff88", "SHI-Labs/NATTEN@a84dd09"),
    region="everything",
    witness=Witness({"N": 2, "M": 500}, dtype="bf16"),
)
plant(
    "logits_overflow_in_fp16",
    "dot products are kept in fp16 and overflow",
    evidence=("ggml-org/llama.cpp#7805", "flashinfer-ai/flashinfer@6e3ea8fcc"),
    region="everything",
    witness=Witness({"N": 1, "M": 2, "D": 64}, inputs={"mask": "random"}, values="forties", dtype="fp16"),
    level="exhaustive",  # kernels that declare logits in fp16 overflow there honestly
)
plant(
    "lse_is_base_2",
    "LSE comes back in base 2",
    evidence=("pytorch/pytorch#181645", "flashinfer-ai/flashinfer#2113", "vllm-project/vllm#43919"),
    region="lse",
    witness=Witness({"N": 2, "M": 3}),
)
plant(
    "lse_not_stored_when_split",
    "LSE is not stored when the keys are split",
    evidence=("flashinfer-ai/flashinfer@0cdd32902", "facebookresearch/xformers@41646dbb"),
    region="lse",
    witness=Witness({"N": 2, "M": 3}),
    splits=2,
)
plant(
    "scale_ignored",
    "the default scale is used whatever is passed",
    evidence=("flashinfer-ai/flashinfer@82784bb11", "pytorch/pytorch#184122"),
    region="everything",
    witness=Witness({}, {"scale": 1.0}),
)
plant(
    "scale_zero_is_default",
    "a scale of 0 is taken for none",
    evidence=("fla-org/flash-linear-attention@3422c449",),
    region="everything",
    witness=Witness({}, {"scale": 0.0}),
)
plant(
    "scale_from_value_size",
    "the default scale comes from the value size",
    evidence=("ollama/ollama#13893", "NVIDIA/Megatron-LM#1501"),
    region="everything",
    witness=Witness({"D": 4, "E": 8}),
)
plant(
    "bias_scaled",
    "the bias is scaled with the logits",
    evidence=("NVIDIA/TransformerEngine#236",),
    region="everything",
    witness=Witness({"M": 4}, inputs={"bias": "normal"}),
)
plant(
    "bias_lacks_log2e",
    "an exp2 kernel converts the logits to base 2 but not the bias",
    evidence=("pytorch-labs/segment-anything-fast#71",),
    region="everything",
    witness=Witness({"M": 4}, inputs={"bias": "normal"}),
)
plant(
    "bias_of_first_head",
    "the bias of head 0 serves all",
    evidence=("pytorch/pytorch#163314", "meta-pytorch/attention-gym#98"),
    region="head",
    witness=Witness({"H": 2, "Hk": 2}, inputs={"bias": "normal"}),
)
plant(
    "softcap_multiplies_score",
    "s * tanh(s / c) where c * tanh(s / c) is right",
    evidence=("Dao-AILab/flash-attention@14f3627d",),
    region="everything",
    witness=Witness({}, {"softcap": 2.0}),
)
plant(
    "softcap_before_scale",
    "the cap is applied before the scale",
    evidence=("Dao-AILab/flash-attention@14f3627d",),
    region="everything",
    witness=Witness({}, {"softcap": 0.5}),
)
plant(
    "softcap_after_bias",
    "the cap is applied after the bias",
    evidence=("onnx/onnx#7865",),
    region="everything",
    witness=Witness({}, {"softcap": 0.5}, inputs={"bias": "normal"}),
)
plant(
    "softcap_after_mask",
    "the cap is applied after the mask, so masked keys keep the logit -c",
    evidence=("onnx/onnx#7865", "lucidrains/x-transformers@9078611", "ggml-org/llama.cpp#29034"),
    region="everything",
    witness=Witness({"M": 5}, {"softcap": 2.0}, inputs={"mask": "random"}),
)
plant(
    "mask_is_minus_1e4",
    "masked logits are -1e4 instead of -inf",
    evidence=("huggingface/transformers#3181", "flashinfer-ai/flashinfer#4267"),
    region="row",
    witness=Witness({"N": 2, "M": 3}, inputs={"mask": "first_row_empty"}),
)
plant(
    "masks_add_up_to_minus_infinity",
    "two planes of finfo.min are summed and overflow to -inf where both mask; else an empty row is a mean",
    evidence=("NVIDIA-NeMo/Automodel#2658", "huggingface/transformers#31303"),
    region="row",
    witness=Witness({"N": 2, "M": 3}, inputs={"mask": "first_row_empty"}),
)
plant(
    "empty_row_is_nan",
    "a row that sees nothing is 0 / 0",
    evidence=("pytorch/pytorch#103963", "facebookresearch/xformers@540fcbfd", "ml-explore/mlx@711a64580"),
    region="row",
    witness=Witness({"N": 2, "M": 3}, inputs={"mask": "first_row_empty"}),
    kind="plain",
)
plant(
    "empty_tile_is_nan",
    "a wholly masked tile before the first live one makes exp(-inf + inf)",
    evidence=("pytorch/pytorch#109517", "flashinfer-ai/flashinfer@d7f2c6464", "facebookresearch/xformers@63d7f30b"),
    region="row",
    witness=Witness({"N": 2, "M": 40}, inputs={"mask": "first_tile_hidden"}),
)
plant(
    "dropout_before_normalizer",
    "weights are dropped before the sum, which renormalises the row",
    evidence=("aws-neuron/nki-samples#80",),
    region="everything",
    witness=Witness({"M": 4}, {"dropout_p": 0.5}, inputs={"dropout_mask": "random"}),
    kind="plain",
)
plant(
    "sink_not_exponentiated",
    "the sink's logit is added to the sum as it is",
    evidence=("Dao-AILab/flash-attention@e81c237e",),
    region="everything",
    witness=Witness({}, inputs={"sink": [-1.0]}),
)
plant(
    "sink_in_every_split",
    "each part of the split keys counts the sink",
    evidence=("ROCm/rocm-libraries#12227", "ROCm/rocm-libraries#12229"),
    region="everything",
    witness=Witness({"M": 40}, inputs={"sink": [1.0]}),
    splits=2,
)
plant(
    "sink_outside_max",
    "a large sink overflows because it is not part of the maximum",
    evidence=("NVIDIA/TensorRT-LLM#19220", "Dao-AILab/flash-attention#2752"),
    region="lse",
    witness=Witness({}, inputs={"sink": [120.0]}),
)
plant(
    "split_outputs_averaged",
    "the parts of the split keys are averaged",
    evidence=("zhuzilin/ring-flash-attention#20", "flashinfer-ai/flashinfer@6cbaf6e26"),
    region="everything",
    witness=Witness({"M": 40}, values="rising_keys"),
    splits=2,
)
plant(
    "split_keeps_the_last",
    "only the last part of the split keys is kept",
    evidence=("flashinfer-ai/flashinfer@5dadb243c",),
    region="everything",
    witness=Witness({"M": 40}),
    splits=2,
)
plant(
    "merge_lacks_max",
    "the merge takes exp(LSE) without subtracting the maximum",
    evidence=("zhuzilin/ring-flash-attention@9b84a6a",),
    region="row",
    witness=Witness({"M": 40}, values="large_logits"),
    splits=2,
)
plant(
    "empty_split_counts",
    "a part without keys joins the merge with LSE 0",
    evidence=("flashinfer-ai/flashinfer@6ec3baed4", "vllm-project/vllm#49294"),
    region="everything",
    witness=Witness({"N": 1, "M": 1}),
    splits=2,
)
