"""The fusion pass: rewrites all_reduce → + residual → RMSNorm in graphs that torch compiles.

The package is called ``graph`` so that ``fusewise.compile`` can be the function.
"""
