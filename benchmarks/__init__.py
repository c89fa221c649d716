"""Measure time and memory.

`benchmarks.denoiser` compares LocalDiT with Diffusers' PixArt, `benchmarks.breakdown` times the
parts of a block, `benchmarks.pipeline` the parts of a pipeline and its options, and
`benchmarks.window_kernel` the window attention kernel on a GPU.
"""
