"""Optimized implementations in Triton: thin mechanisms here, the kernels they launch in `impls.engines`.

    attnspec.impls.softmax      softmax attention with every option, forward and backward, and split-KV decode
    attnspec.impls.aot          compiles every kernel variant ahead of time, without a GPU

Importing this package imports nothing; the modules need PyTorch and Triton.
"""
