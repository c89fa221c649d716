"""The diffusion core that pipelines and training share.

Each module owns one idea: `parts` (finding and loading models), `latents` (pictures and latents),
`text` (prompts and captions), `conditions` (picture sizes), `settings` (steps and guidance that
suit a model), `samplers` (schedulers by name), `diffusion` (noise, objectives and schedulers).
"""
