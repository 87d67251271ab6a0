"""Packaging of igva-kernels: ranges here, the exact versions of development in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

TRITON = ["triton>=3.6; sys_platform == 'linux'"]
TRAIN = ["accelerate>=1.10", "peft>=0.18", "tensorboard>=2.15", "sentence-transformers>=5.2"]
# Keeps buffers, such as the frequencies of rotary positions, in fp32 while it converts the weights to bf16.
DEEPSPEED = ["deepspeed>=0.19.8"]
# Serves its fonts from the package since 6.17, and can be told to keep no history of runs since 6.27.
WEB = ["gradio>=6.30,<7", "matplotlib>=3.9"]
QUICKSTART = ["gguf>=0.19", "onnx>=1.18", "scikit-learn>=1.5", "matplotlib>=3.9"]

setup(
    name="igva-kernels",
    version="0.1.0",
    description="Fused kernels for mixing the layers of a vision transformer, and a LLaVA-style model that trains on them",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["igva_kernels", "igva_kernels.*", "model", "model.*"]),
    package_data={
        "igva_kernels": ["impl/native/*.[ch]"],
        "model": [
            "published_results.json",
            "recipes/*.yaml",
            "recipes/*.json",
            "quickstart/requirements.txt",
            "quickstart/sprites/*",
        ],
    },
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        # CUDA builds of torch bring their own triton; a CPU user needs none.
        "triton": TRITON,
        "model": ["transformers>=5.10,<6", "pillow", "safetensors", "jsonargparse[signatures]>=4.49", "rich>=13", "pyyaml"],
        "train": ["igva-kernels[model]", *TRAIN],
        "quickstart": ["igva-kernels[train]", *QUICKSTART],
        "web": ["igva-kernels[train]", *WEB],
        "deepspeed": DEEPSPEED,
        "flash": ["flash-attn>=2.8"],
        "liger": ["liger-kernel>=0.5"],
        "gguf": ["gguf>=0.19", "accelerate>=1.10"],
        "torchao": ["torchao>=0.18", "accelerate>=1.10"],
        "bitsandbytes": ["bitsandbytes>=0.49", "accelerate>=1.10"],
        "lmms-eval": ["igva-kernels[train]", "lmms-eval>=0.7"],
        "dev": [
            "igva-kernels[quickstart]",
            *TRITON,
            *DEEPSPEED,
            "numpy<2.4",  # Triton 3.6's interpreter breaks on newer ones (triton#9171)
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "build",
        ],
    },
    entry_points={
        "console_scripts": ["igva = model.cli.main:main"],
        "lmms_eval.models": ["igva = model.lmms_eval_plugin:manifest"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
