"""The diffusion core that pipelines and training share.

Each module owns one idea: `parts` (finding and loading models), `latents` (pictures and latents),
`text` (prompts and captions), `conditions` (picture sizes), `samplers` (steps, guidance and
schedulers by name), `diffusion` (noise and objectives), `schedulers` (what Diffusers' lack).
"""
