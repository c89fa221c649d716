"""What LocalDiT costs beside diffusers' PixArt (`benchmarks.denoiser`), where the time goes of its
blocks (`benchmarks.breakdown`), and the window kernel by itself (`benchmarks.window_kernel`).
"""
