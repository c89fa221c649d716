"""Packaging of LocalDiT. The settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TRAIN = [
    line.split("#")[0].strip()
    for line in (ROOT / "requirements-train.txt").read_text().splitlines()
    if not line.startswith("#")
]
LORA = ["peft>=0.17"]
TRITON = ['triton>=3.2; platform_system == "Linux"']  # comes with PyTorch's builds for CUDA
DEMO = ["gradio>=6.20"]
EVALUATE = ["torchmetrics>=1.8"]
DOCS = [  # builds the site and runs the notebooks in tests
    "ipykernel>=6.20",
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=0.26",
    "nbclient>=0.8",
]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "localdit/version.py").read_text())[1]

setup(
    name="localdit",
    version=VERSION,
    description="Text-to-image and image-to-image diffusion with shifted window attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The LocalDiT authors",
    keywords="diffusion transformer text-to-image diffusers window-attention",
    python_requires=">=3.10",
    # Only the package: `config.py` and the scripts beside it are not installed.
    packages=find_packages(include=["localdit", "localdit.*"]),
    package_data={"localdit": ["py.typed", "checkpoint/*.pyi", "box/**/*", "demo/*.css"]},
    entry_points={"console_scripts": ["localdit=localdit.cli:main"]},
    install_requires=[
        "torch>=2.6",  # before, `weights_only=True` could be bypassed
        "diffusers>=0.38",
        "transformers>=4.51",
        "accelerate>=1.0",
        "einops>=0.6",
        "safetensors>=0.8",
        "pillow>=11",
        "numpy>=1.24",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "lora": LORA,
        "evaluate": EVALUATE,
        "quantization": ["bitsandbytes>=0.43"],
        "triton": TRITON,
        "docs": DOCS,
        "dev": [
            *LORA,
            *TRAIN,
            *DEMO,
            *EVALUATE,
            *DOCS,
            *TRITON,  # tests run its kernels in interpreter mode
            "build>=1.0",
            "hypothesis>=6.100",
            "import-linter>=2.17",
            "mypy>=1.10",
            "playwright>=1.40",  # drives Chromium in the tests of the page
            "pytest>=8.0",
            "ruff>=0.6",
            "scipy>=1.10",  # LMSDiscreteScheduler, which tests cover, needs it
            "setuptools>=68",
            "twine>=5.0",
            "webdataset>=0.2",  # a test reads an encoded set with it
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
