"""What LocalDiT costs beside diffusers' PixArt (`benchmarks.denoiser`), and where the time of its
blocks goes (`benchmarks.breakdown`).
"""
