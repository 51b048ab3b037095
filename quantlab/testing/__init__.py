"""A conformance kit: whether a plugin keeps the contract of its hook.

Two lines of a plugin's tests run all of it, one test for each part of the contract::

    from quantlab.testing import conformance
    test_contract = conformance(MyPolicy)

Classes of every kind and methods are accepted. A failure says what the contract is and what came. The checks draw their
cases with hypothesis, which ``pip install 'quantlab[test]'`` brings.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as _missing:
    raise ImportError("quantlab.testing needs hypothesis: pip install 'quantlab[test]'") from _missing

from quantlab.testing.contract import ContractError, Subject, subject_of
from quantlab.testing.suite import check, checks_of, conformance

__all__ = ["ContractError", "Subject", "check", "checks_of", "conformance", "subject_of"]
