"""Triton kernels, a folder an operation: `__init__` (public function, checks), `reference` (plain torch), `kernel`.

Kept empty on purpose: other libraries probe the module name `kernels` for a package of that name.
"""
