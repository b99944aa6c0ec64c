"""Packaging. `pip install -e '.[demo]'` runs the demonstration, `'.[test]'` the tests."""

from setuptools import find_packages, setup

core = [
    "absl-py>=2.1,<3",
    "array_record>=0.8.1,<0.9",
    "flax>=0.12,<0.13",
    "grain>=0.2.12,<0.3",
    "jax>=0.10,<0.11",
    "jinja2>=3.1,<4",
    "jiwer>=4,<5",
    "ml-collections>=1.0,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11",
    "sacrebleu>=2.5,<3",
    "safetensors>=0.6,<1",
    "scipy>=1.14,<2",
    "soundfile>=0.13,<1",
    "tensorboardX>=2.6.2,<3",
    # Writes and reads ArrayRecord without TensorFlow, which must never become a dependency.
    "tensorflow-datasets>=4.9.9,<5",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
    "transformers>=5,<6",
]
# The speech of Spoken Scenes: the espeak-ng library and its voices in a wheel.
demo = ["espeakng-loader>=0.2.4,<0.3"]
# The upper end lets pip take a CPU build where one lies; a plain `torch` fetches gigabytes of CUDA.
torch = ["torch>=2.10,<=2.13.0", "safetensors>=0.6,<1"]
# References that the metrics are compared with.
references = ["scikit-learn>=1.6,<2"]

setup(
    name="opt_jax",
    version="0.1.0",
    description="OPT (arXiv 2107.00249): joint pre-training of text, image and speech, in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["opt_jax", "opt_jax.*"]),
    package_data={"opt_jax.evaluation": ["*.jinja", "*.css"], "opt_jax.data": ["*.jinja"]},
    python_requires=">=3.11",
    install_requires=core,
    extras_require={
        "demo": demo,
        "cuda12": ["jax[cuda12]>=0.10,<0.11"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "beam": ["apache-beam>=2.70,<3"],
        "torch": torch,
        "test": ["pytest>=8.3", "pytest-xdist>=3.6,<4", "ruff>=0.9", *torch, *demo, *references],
    },
)
