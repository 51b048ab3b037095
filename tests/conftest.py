"""What holds for the whole of the tests."""

import setuptools  # noqa: F401  torch's compiler imports it, and it fails once the standard library's distutils is loaded
