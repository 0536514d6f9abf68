"""The Triton kernels and their launchers: few engines, each serving several mechanisms through compile-time options.

runtime                     device or interpreter
softmax_tiles               device functions that all softmax kernels share
softmax_forward             O and LSE; softmax_decode merges split keys
softmax_backward            row term and dQ; softmax_backward_keys dK and dV; softmax_backward_bias the bias
softmax_segments            positions of packed sequences
softmax_configs             tile configurations
softmax_launch              from a checked problem to launches
"""
