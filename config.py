"""The settings of LocalDiT, for scripts and sessions started in this folder.

Every value has a default, and every value can be changed in the constructor or afterwards:

    from config import Config

    config = Config(height=1024, width=1024, denoising_steps=30)
    config.guidance_scale = 4.5

`localdit/config.py` lists all fields with their defaults. Unknown names and values out of range
raise an error that says what was expected. To keep your own settings, derive a class:

    @dataclass(kw_only=True)
    class Square(Config):
        height: int = 1024
"""

from localdit.config import Config

__all__ = ["Config"]
