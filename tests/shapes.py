"""A pytest plugin: the shapes and types in the signatures of nsa_lite are checked at every call.

    python -m pytest -p tests.shapes tests/test_operations.py

A signature such as q: Float[Tensor, "B H T D"] is then held to what is passed and what is returned.
The kernels' front doors are checked so in all of tests/kernels/test_kernels.py.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float

install_import_hook("nsa_lite", "tests.shapes.check")  # before anything imports it
