import hashlib
from pathlib import Path

from server import profiles

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_example_profiles_load_and_are_of_the_example_data():
    found = profiles.read(EXAMPLES / "profiles")

    assert found
    for profile in found.values():
        data = profile.provenance.data
        content = (EXAMPLES / "data" / data.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == data.sha256
