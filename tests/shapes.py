"""A pytest plugin: the shapes and types in the signatures of nsa_lite and of kernels are checked.

    python -m pytest -p tests.shapes tests/test_operations.py

A signature such as q: Float[Tensor, "B H T D"] is then held to what is passed and what is returned:
in every function of nsa_lite, and at the front doors of kernels (what triton compiles stays alone).
"""

from importlib.util import find_spec

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook, jaxtyped

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float

install_import_hook("nsa_lite", "tests.shapes.check")  # before anything imports it

if find_spec("triton"):
    import kernels

    for name in kernels.__all__:
        setattr(kernels, name, jaxtyped(typechecker=check)(getattr(kernels, name)))
