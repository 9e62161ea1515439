import pytest

from server.refusals import listed


@pytest.mark.parametrize(
    ("names", "text"), [([], "none"), (["b"], "b"), (["b", "a", "c"], "a, b, c")]
)
def test_names_are_listed_in_order(names, text):
    assert listed(names) == text


def test_many_names_are_counted():
    names = [f"profile-{number:04}" for number in range(2000)]
    text = listed(names)
    assert text.startswith("profile-0000, profile-0001, ")
    assert len(text) < 350
    shown = text.count(",") + 1
    assert text.endswith(f"profile-{shown - 1:04} and {2000 - shown} more")


def test_a_name_as_long_as_the_list():
    assert listed(["x" * 290, "y" * 290]) == "x" * 290 + " and 1 more"
