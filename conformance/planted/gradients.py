"""Planted kernels whose outputs are right and whose gradients are not."""

from __future__ import annotations

from attnspec.conformance.planted.registry import Witness, plant

GQA = {"H": 4, "Hk": 2}

plant(
    "backward_always_causal",
    "the backward is causal whatever the forward was",
    evidence=("triton-lang/triton#4541", "meta-recsys/generative-recommenders#173"),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "dq_lacks_scale",
    "dQ lacks the scale",
    evidence=("fla-org/flash-linear-attention@85992884",),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "dk_lacks_scale",
    "dK lacks the scale",
    evidence=("fla-org/flash-linear-attention@3a904f02",),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "dq_scaled_twice",
    "dQ is scaled twice",
    evidence=("fla-org/flash-linear-attention@85992884",),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "dk_keeps_last_of_group",
    "dK of a key head is overwritten by the last query head of its group",
    evidence=("SHI-Labs/NATTEN@a407b19", "facebookresearch/xformers@b73c0f2d"),
    region="gradient",
    witness=Witness(GQA, backward=True),
)
plant(
    "dv_averaged_over_group",
    "dV is averaged over the query heads of a group instead of summed",
    evidence=("SHI-Labs/NATTEN@a407b19", "stanford-crfm/levanter#449"),
    region="gradient",
    witness=Witness(GQA, backward=True),
)
plant(
    "bias_gradient_of_first_batch",
    "the gradient of a bias shared by the batch is that of batch entry 0",
    evidence=("jax-ml/jax#30593", "jax-ml/jax#27184"),
    region="gradient",
    witness=Witness({"B": 2}, inputs={"bias": "shared"}, backward=True),
)
plant(
    "bias_gradient_detached",
    "no gradient reaches the bias",
    evidence=("ml-explore/mlx@e5d35aa18", "pytorch/pytorch#188302"),
    region="gradient",
    witness=Witness({}, inputs={"bias": "normal"}, backward=True),
)
plant(
    "softcap_derivative_missing",
    "the derivative of the cap is left out",
    evidence=("Dao-AILab/flash-attention@5f1ae4a3",),
    region="gradient",
    witness=Witness({}, {"softcap": 1.0}, backward=True),
)
plant(
    "softcap_derivative_not_squared",
    "1 - tanh where 1 - tanh^2 is right",
    evidence=("Dao-AILab/flash-attention@14f3627d",),
    region="gradient",
    witness=Witness({}, {"softcap": 1.0}, backward=True),
)
plant(
    "upstream_gradient_ignored",
    "the cotangent of O is taken for ones",
    evidence=("fla-org/flash-linear-attention@b9bdbcf2", "linkedin/Liger-Kernel@9ac26bb8"),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "lse_gradient_ignored",
    "the cotangent of LSE is dropped",
    evidence=("ml-explore/mlx@1b591ec73",),
    region="gradient",
    witness=Witness({}, backward=True),
)
plant(
    "backward_ignores_mask",
    "the backward recomputes the weights without the boolean mask",
    evidence=("Dao-AILab/flash-attention@a4f148b6",),
    region="gradient",
    witness=Witness({"M": 5}, inputs={"mask": "random"}, backward=True),
)
plant(
    "backward_ignores_window",
    "the backward recomputes the weights without the window",
    evidence=("fla-org/flash-linear-attention@7362d874",),
    region="gradient",
    witness=Witness({"M": 5}, {"window_left": 0}, backward=True),
)
plant(
    "backward_ignores_tail",
    "the backward does not mask the last tile",
    evidence=("SHI-Labs/NATTEN@e417723",),
    region="gradient",
    witness=Witness({}, {"causal": True}, backward=True),
)
plant(
    "backward_ignores_dropout",
    "the backward recomputes the weights without dropout",
    evidence=("facebookresearch/xformers@70161e55",),
    region="gradient",
    witness=Witness({"M": 4}, {"dropout_p": 0.5}, inputs={"dropout_mask": "random"}, backward=True),
)
plant(
    "delta_without_dropout",
    "delta = sum(dO * O) uses the output without dropout",
    evidence=("facebookresearch/xformers@70161e55",),
    region="gradient",
    witness=Witness({"M": 4}, {"dropout_p": 0.5}, inputs={"dropout_mask": "random"}, backward=True),
)
plant(
    "delta_per_value_tile",
    "each tile of value columns subtracts delta again",
    evidence=("fla-org/flash-linear-attention@2cec2a33", "fla-org/flash-linear-attention@e4c7f880"),
    region="gradient",
    witness=Witness({"E": 8}, backward=True),
)
plant(
    "lse_of_the_key_block",
    "the backward loads LSE at the key block's index",
    evidence=("Dao-AILab/flash-attention@b3f1b6a5",),
    region="gradient",
    witness=Witness({"N": 20, "M": 20}, backward=True),
)
plant(
    "gradients_not_zeroed",
    "gradients of keys that no query sees are never written",
    evidence=("facebookresearch/xformers@0c7697c9", "Dao-AILab/flash-attention@6998e0ec"),
    region="gradient",
    witness=Witness({"N": 2, "M": 5}, {"causal": True, "causal_alignment": "top_left"}, backward=True),
)
plant(
    "sink_gradient_of_first_batch",
    "the gradient of the sink is that of batch entry 0",
    evidence=("fla-org/flash-linear-attention@31290d15", "fla-org/flash-linear-attention@a0c938eb"),
    region="gradient",
    witness=Witness({"B": 2}, inputs={"sink": [0.5]}, backward=True),
)
plant(
    "sink_gradient_without_normalizer",
    "the gradient of the sink uses weights that leave the sink out of the sum",
    evidence=("Dao-AILab/flash-attention@5579b121", "ml-explore/mlx@1b591ec73"),
    region="gradient",
    witness=Witness({}, inputs={"sink": [0.5]}, backward=True),
)
