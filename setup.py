"""Packaging. Beam also builds this, given --setup_file=./setup.py, for its remote workers."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="tracin-beam",
    version=runpy.run_path(str(ROOT / "tracin_beam" / "_version.py"))["__version__"],
    description="TracIn training data influence for Keras models, as an Apache Beam pipeline",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tracin_beam", "tracin_beam.*"]),
    package_data={"tracin_beam.report": ["templates/*"]},
    entry_points={"console_scripts": ["tracin-beam = tracin_beam.__main__:main"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "apache-beam>=2.70,<3",  # tested with 2.77.0
        "scann[tf]~=1.4.2",  # fixes the TensorFlow version: its library is built for 2.20
        "keras>=3.10",
        "google-crc32c",  # without it Beam cannot read or write TFRecords
        "Jinja2>=3.1",
        # These come with Beam or Keras, whose limits on their versions apply.
        "h5py",
        "numpy",
        "Pillow",
        "pyarrow",
        "PyYAML",
        "tqdm",
    ],
    extras_require={
        "gcp": ["apache-beam[gcp]"],
        "aws": ["apache-beam[aws]"],
        "dataframe": ["pandas"],
        "benchmarks": ["cleanlab", "pandas", "scikit-learn"],
        "examples": ["scikit-learn"],
        "zoo": ["keras-hub", "tensorflow-text~=2.20.1"],  # of the TensorFlow that ScaNN wants
        "test": [
            "apache-beam[gcp]",
            "dockerfile-parse",
            "gcp-storage-emulator",
            "ipython",
            "kubernetes-validate~=1.33.1",  # with the schemas of Kubernetes 1.33
            "mypy",
            "openlineage-python",  # whose classes check facets
            "pandas",
            "prometheus-client",  # whose parser reads metrics
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "selenium",  # drives Chromium, which apt-get installs: chromium and chromium-driver
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
