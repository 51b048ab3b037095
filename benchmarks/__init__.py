"""What quantlab's arithmetic costs beside a plain loop and beside other packages: ``python -m benchmarks``.

A section is a module with a function ``cases(quick)``; ``SECTIONS`` in ``benchmarks/__main__.py`` lists them.
"""
