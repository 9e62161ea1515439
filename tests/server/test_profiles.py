import json

import pytest

from calibrators.profiles import ProfileError, save
from server.profiles import read


def test_every_json_file_of_the_folder_is_a_profile(make_profile, tmp_path):
    for name in ("mild", "calm"):
        save(make_profile(name=name), tmp_path / f"{name}.json")
    (tmp_path / "README.md").write_text("no profile")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "x.json").write_text("no profile")
    profiles = read(tmp_path)
    assert list(profiles) == ["calm", "mild"]
    assert profiles["mild"] == make_profile(name="mild")


def test_one_bad_file_stops_it(make_profile, profile_content, tmp_path):
    save(make_profile(), tmp_path / "calm.json")
    (tmp_path / "other.json").write_text(json.dumps(profile_content(name="other", method=1)))
    with pytest.raises(ProfileError, match=r"^other\.json: method: "):
        read(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"^none: there is no such folder"):
        read(tmp_path / "none")


def test_an_empty_folder(tmp_path):
    assert read(tmp_path) == {}
